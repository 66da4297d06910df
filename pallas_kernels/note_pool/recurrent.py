"""The oracle of pools of notes: token by token, with the pool as a list. Each token reads, then writes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ..documents import Documents, documents, positions, undivided
from ..numerics import accumulator, einsum
from ..partition import ROWS, aligned, partitioned
from .spec import Notes, Pool, empty_pool

OF_ROWS, OF_POOLS = P(ROWS), P(None, ROWS)  # the axes of q and ids, and of notes and pools
INPUTS = (OF_ROWS, OF_POOLS, OF_POOLS, OF_POOLS, OF_ROWS)
OUTPUTS = (OF_ROWS, OF_POOLS)


def recurrent(
  scale: float, q: jax.Array, notes: Notes, pool: Pool, fifo: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, Pool]:
  """o [B, T, H, M] and the pools after the last token; arguments as for `read_notes`, with `fifo` [L, B] for the rule."""

  def local(q, notes, pool, fifo, segment_ids):
    docs, position = locate(q, pool, segment_ids)
    starts = docs.starts
    fresh = empty_pool(pool.length.shape, *pool.notes.shape[2:], pool.notes.dtype)

    def one(entering, token):
      q, notes, position, starts, is_token = token
      pool = jax.tree.map(lambda new, a: jnp.where(_like(starts, a), new, a), fresh, entering)
      o = attend(scale, q[:, None], pool, (pool.position >= 0)[:, :, None])[:, 0]
      after = _insert(fifo, pool, notes, position)._replace(length=jnp.broadcast_to(position + 1, pool.length.shape))
      after = jax.tree.map(lambda a, b: jnp.where(_like(is_token, a), a, b), after, entering)
      return after, jnp.where(is_token[:, None, None], o, 0).astype(q.dtype)

    by_token = lambda x, axis: jnp.moveaxis(x, axis, 0)  # noqa: E731
    rows = (by_token(x, 1) for x in (position, starts, docs.is_token))
    pool, o = jax.lax.scan(one, pool, (by_token(q, 1), jax.tree.map(lambda x: by_token(x, 2), notes), *rows))
    return jnp.moveaxis(o, 0, 1), pool

  inputs = aligned((q, notes, pool, fifo, segment_ids), INPUTS)
  return partitioned(local, INPUTS, OUTPUTS)(*inputs)


def locate(q: jax.Array, pool: Pool, segment_ids: jax.Array | None) -> tuple[Documents, jax.Array]:
  """The documents of the tokens, and each token's place in its own, int32 [B, T]."""
  docs = undivided(*q.shape[:2]) if segment_ids is None else documents(segment_ids)
  return docs, positions(docs, pool.length[0])


def attend(scale: float, q: jax.Array, notes: Any, visible: jax.Array) -> jax.Array:
  """o [B, T, H, M] for q [B, T, H, M], notes [L, B, J, M] with log_score [L, B, J], and visible [L, B, T, J]."""
  wide = accumulator(q, notes.log_score)
  mask = jnp.moveaxis(visible, 0, 2)[:, :, None]  # [B, T, 1, L, J]
  logits = jnp.asarray(scale, wide) * einsum("bthm,lbjm->bthlj", q, notes.notes).astype(wide)
  logits += jnp.swapaxes(notes.log_score, 0, 1)[:, None, None].astype(wide)
  most = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=(3, 4), keepdims=True)
  weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - jnp.where(jnp.isfinite(most), most, 0), 0)), 0)
  total = jnp.sum(weights, axis=(3, 4), keepdims=True)
  return einsum("bthlj,lbjm->bthm", weights / jnp.where(total > 0, total, 1), notes.notes)


def _insert(fifo: jax.Array, pool: Pool, new: Notes, position: jax.Array) -> Pool:
  """The pools [L, B, ...] with the notes of one token at `position` [B] added."""
  slots = pool.position.shape[-1]
  count = jnp.sum(pool.position >= 0, axis=-1, keepdims=True, dtype=jnp.int32)
  place = jnp.arange(slots + 1, dtype=jnp.int32)[None, None]
  position = jnp.broadcast_to(position[None], new.is_note.shape)

  def appended(old, new):
    """The list with one more element, behind the last one that is filled."""
    more = jnp.concatenate([old, new[:, :, None]], axis=2)
    return jnp.where(_like(place == count, more), new[:, :, None], more)

  longer = jax.tree.map(appended, (pool.notes, pool.log_score, pool.position), (new.notes, new.log_score, position))
  lowest = slots - jnp.argmin(jnp.flip(longer[1], -1), axis=-1, keepdims=True).astype(jnp.int32)  # of equal ones the last
  dropped = jnp.where(count < slots, slots, jnp.where(fifo[..., None], 0, lowest))  # the last place is empty if there is room

  def without(old, more):
    kept = jnp.where(_like(place[..., :-1] < dropped, old), more[:, :, :-1], more[:, :, 1:])
    return jnp.where(_like(new.is_note, old), kept, old)

  notes, log_score, position = jax.tree.map(without, (pool.notes, pool.log_score, pool.position), longer)
  return Pool(notes, log_score, position, pool.length)


def _like(mask: jax.Array, x: jax.Array) -> jax.Array:
  """A mask of rows [B], of pools [L, B] or of slots [L, B, J], with the axes of x [L, B, ...]."""
  mask = mask[None] if mask.ndim == 1 else mask
  return jnp.expand_dims(mask, range(mask.ndim, x.ndim))
