"""The tokens of a call in columns: neighbours in a document are neighbours here, padding comes last, and a cache comes before.

    columns -S .. -1     what a ring of S slots holds, the oldest first: the last tokens of document 0
    columns 0 .. T - 1   the tokens of the call, then its padding

So a token t columns before another is t tokens before it, if both are of one document, and blocks of columns have windows.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..pallas_kernels.documents import Documents
from ..pallas_kernels.sizes import at_most, pad_end, pieces


def padding_last(docs: Documents) -> tuple[jax.Array, jax.Array]:
  """The order [B, T] in which padding comes after all tokens of its row, and the one that undoes it; see `take_tokens`."""
  order = jnp.argsort(~docs.is_token, axis=1, stable=True)
  return order, jnp.argsort(order, axis=1)


def take_tokens(tree: Any, index: jax.Array | None) -> Any:
  """The tokens at `index` [B, S] of arrays [B, T, ...]; all of them for `None`."""
  if index is None:
    return tree
  return jax.tree.map(lambda a: jnp.take_along_axis(a, jnp.expand_dims(index, range(2, a.ndim)), axis=1), tree)


def places_before(slots: int, length: jax.Array) -> jax.Array:
  """Positions of the `slots` columns before a call, int32 [B, slots], for a document of `length` [B]; negative where empty."""
  return length[:, None] + (jnp.arange(slots, dtype=jnp.int32) - slots)[None]


def before(ring: jax.Array, length: jax.Array, first: int, count: Any) -> jax.Array:
  """Of what a ring [B, H, S, d] holds, `count` columns from -`first` on, [B, count, H, d]; `length` as in `places_before`."""
  slots = (length[:, None] + (jnp.arange(count, dtype=jnp.int32) - first)[None]) % ring.shape[2]
  return jnp.take_along_axis(ring, slots[:, None, :, None], axis=2).swapaxes(1, 2)  # only these are moved


def block_size(tokens: Any, window: int) -> Any:
  """The number of columns in a block: all, or `window` where there are more."""
  return tokens if at_most(tokens, window) else window


def missing(tokens: Any, size: Any) -> Any:
  """The number of columns that the last block of `size` lacks."""
  return pieces(tokens, size) * size - tokens


def blocks(a: jax.Array, size: Any, fill: Any = 0) -> jax.Array:
  """a [B, T, ...] in blocks, [B, N, size, ...]; `fill` follows the last column."""
  tokens = a.shape[1]
  return _cut(pad_end(a, missing(tokens, size), fill=fill), pieces(tokens, size), size)


def windows(a: jax.Array, window: int, fill: Any = 0) -> jax.Array:
  """For each block of C of T columns, its own and the `window` before it: a [B, window + T, ...] to [B, N, window + C, ...]."""
  tokens = a.shape[1] - window
  if at_most(tokens, window):
    return a[:, None]
  a = _cut(pad_end(a, missing(tokens, window), fill=fill), pieces(tokens, window) + 1, window)
  return jnp.concatenate([a[:, :-1], a[:, 1:]], axis=2)


def merge_blocks(a: jax.Array) -> jax.Array:
  """[B, N, C, ...] -> [B * N, C, ...]."""
  return jax.lax.collapse(a, 0, 2)


def _cut(a: jax.Array, count: Any, size: Any) -> jax.Array:
  return a.reshape(a.shape[0], count, size, *a.shape[2:])
