"""Tokens on the chunk grid: chunks restart with every document, and padding does not count.

The columns of a row are rearranged as [chunks, slots]. No chunk has tokens of two documents, and none has padding before or
between its tokens. A token's place in its chunk depends on its document alone, so packing, padding and splits change nothing.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..documents import Documents, positions, select_rows, undivided
from ..sizes import Size, as_array, bounded, known, pad_end, pieces


class Layout(NamedTuple):
  """The places of tokens: N chunks of C slots in each row. Empty slots come after those with tokens.

  Attributes:
    is_token: bool [B, N, C].
    position: int32 [B, N, C], of the token in its chunk; for an empty slot, that of the last token before it.
    fresh: bool [B, N], whether the chunk begins a document other than that of the incoming state.
    open: bool [B, N], whether the chunk is not full, so that a later call can continue it.
    continues: bool [B, N], whether the chunk has tokens of an earlier call.
    count: int32 [B], tokens in the chunk that is open at the end.
    overflow: bool [B], rows with too many documents for N chunks, or with `chunk_size` or more in the incoming chunk. `fresh`,
      `open`, `continues` and `overflow` are `None` where they are known to be false everywhere.
    source: int32 [B, N, C], column of the token; `None` if the tokens are already in place.
    slot: int32 [B, T], n * C + c of each column's token, -1 for padding; `None` likewise.
  """

  is_token: jax.Array
  position: jax.Array
  fresh: jax.Array | None
  open: jax.Array | None
  continues: jax.Array | None
  count: jax.Array
  overflow: jax.Array | None
  source: jax.Array | None
  slot: jax.Array | None

  def chunks(self, x: jax.Array) -> jax.Array:
    """x [B, T, ...] to [B, N, C, ...], with zeros in empty slots."""
    batch, chunks, size = self.is_token.shape
    if self.source is None:
      return pad_end(x, chunks * size - x.shape[1]).reshape(batch, chunks, size, *x.shape[2:])
    flat = self.source.reshape(batch, -1, *[1] * (x.ndim - 2))
    x = jnp.take_along_axis(x, jnp.maximum(flat, 0), axis=1)
    return jnp.where(flat >= 0, x, jnp.zeros((), x.dtype)).reshape(batch, chunks, size, *x.shape[2:])

  def tokens(self, x: jax.Array, length: int) -> jax.Array:
    """x [B, N, C, ...] to [B, T, ...], with zeros at padding and NaN in rows that overflow."""
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    if self.slot is None:
      return x[:, :length]
    flat = self.slot.reshape(*self.slot.shape, *[1] * (x.ndim - 2))
    x = jnp.where(flat >= 0, jnp.take_along_axis(x, jnp.maximum(flat, 0), axis=1), jnp.zeros((), x.dtype))
    return self.poison(x)

  def poison(self, tree: Any) -> Any:
    """Sets floats [B, ...] to NaN in rows that overflow, so that the error is visible. Integers stay."""
    floats = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
    return select_rows(self.overflow, floats, tree)


def count_chunks(tokens: Size, chunk_size: int, documents: int) -> Size:
  """The number of chunks that always suffices for `tokens` tokens in `documents` documents; the first may continue a state."""
  waste = (documents + 1) * (chunk_size - 1)
  chunks = (tokens + waste) // chunk_size
  return min(tokens, chunks) if known(tokens) else chunks


def lay_out(
  batch: Size, tokens: Size, chunk_size: int, count: jax.Array | None, docs: Documents | None, max_documents: int
) -> Layout:
  """The layout of [batch, tokens].

  Args:
    batch, tokens: shape of the input.
    chunk_size: tokens in a chunk.
    count: int32 [B], tokens in the open chunk of the incoming state; `None` for a fresh state.
    docs: documents of the rows; `None` for one document per row.
    max_documents: largest number of documents in a row; it determines the number of chunks.
  """
  if count is None and docs is None:
    return _in_place(batch, tokens, chunk_size)
  first_call = count is None
  count = jnp.zeros((batch,), jnp.int32) if count is None else count
  if docs is None:
    docs, max_documents = undivided(batch, tokens), 1
  chunks, size = count_chunks(tokens, chunk_size, max_documents), bounded(tokens, chunk_size)
  place = positions(docs, count) % chunk_size
  begins = docs.is_token & (place == 0)
  chunk = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - jnp.where(count == 0, 1, 0)[:, None]
  slot = chunk * size + place - jnp.where(chunk == 0, count[:, None], 0)
  overflow = jnp.any(docs.is_token & (chunk >= chunks), axis=1) | (count >= chunk_size)
  slot = jnp.where(docs.is_token & (chunk < chunks), slot, -1)

  target = jnp.where(slot < 0, chunks * size, slot)  # one past the end is dropped
  column = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), slot.shape)

  @partial(jax.vmap, in_axes=(0, 0, None))  # row by row: rows that are on other devices are not needed
  def scatter_row(target, value, empty):
    return jnp.full((chunks * size,), empty, value.dtype).at[target].set(value, mode="drop")

  def scatter(value, empty):
    return scatter_row(target, value, empty).reshape(batch, chunks, size)

  source = scatter(column, -1)
  position = jax.lax.cummax(scatter(place, 0), axis=2)
  fresh = jnp.any(scatter(docs.starts, False), axis=2)
  still_open = ~jnp.any(scatter(place == chunk_size - 1, False), axis=2)
  last = jnp.max(jnp.where(docs.is_token, column, -1), axis=1)
  left = (jnp.take_along_axis(place, jnp.maximum(last, 0)[:, None], axis=1)[:, 0] + 1) % chunk_size
  continues = None if first_call else position[..., 0] > 0
  return Layout(source >= 0, position, fresh, still_open, continues, jnp.where(last < 0, count, left), overflow, source, slot)


def one_chunk(is_token: jax.Array, count: jax.Array, chunk_size: int) -> Layout:
  """The layout of tokens that continue one open chunk of `count` [B] tokens, or begin one; `is_token` is bool [B, C]."""
  position = count[:, None] + jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1
  left = count + jnp.sum(is_token, axis=1, dtype=jnp.int32)
  parts = (is_token[:, None], jnp.maximum(position, 0)[:, None], None, (left != chunk_size)[:, None], (count > 0)[:, None])
  return Layout(*parts, jnp.where(left == chunk_size, 0, left), left > chunk_size, None, None)


def _in_place(batch: Size, tokens: Size, chunk_size: int) -> Layout:
  """The layout of one whole document per row, from its first token: nothing moves."""
  size = bounded(tokens, chunk_size)
  chunks = pieces(tokens, size)
  column = jnp.arange(chunks * size, dtype=jnp.int32).reshape(chunks, size)
  place = jnp.minimum(column, as_array(tokens - 1)) % chunk_size

  def rows(x):
    return jnp.broadcast_to(x, (batch, *x.shape))

  left = tokens % chunk_size
  still_open = rows(jnp.arange(chunks, dtype=jnp.int32) == as_array(tokens // chunk_size)) if not known(left) or left else None
  count = jnp.full((batch,), as_array(left), jnp.int32)
  return Layout(rows(column < as_array(tokens)), rows(place), None, still_open, None, count, None, None, None)
