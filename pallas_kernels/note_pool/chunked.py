"""Pools of notes in chunks of tokens. What a pool holds at each token follows from counts, without inserting one by one.

A note that was dropped never returns. So after any token, the pool is the set of notes that fewer than P others beat, where a
note is beaten by every younger one ("fifo"), or by every one with a higher score and by older ones with an equal score
("priority"). For the notes of a chunk and those in the pool before it, with "before" the notes up to token t - 1,

    note j is in the pool that t reads    <=>    j before t    and    sum_{i before t} [i beats j] < P

Masks and counts are constants for the gradient, which is JAX's. It keeps the masks and computes the rest of each chunk again.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ..documents import Documents
from ..numerics import einsum
from ..partition import aligned, partitioned
from ..sizes import bounded, pad_end, pieces
from .recurrent import INPUTS, OUTPUTS, attend, locate
from .spec import Notes, Pool

_CHUNK = 32  # tokens
_KEPT = "note_pool_kept"


def chunked(
  scale: float,
  chunk_size: int | None,
  q: jax.Array,
  notes: Notes,
  pool: Pool,
  fifo: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, Pool]:
  """The same function as `recurrent`."""
  local = partial(_read_chunks, scale, bounded(q.shape[1], chunk_size or _CHUNK))
  return partitioned(local, INPUTS, OUTPUTS)(*aligned((q, notes, pool, fifo, segment_ids), INPUTS))


def _read_chunks(scale, chunk_size, q, notes, pool, fifo, segment_ids):
  docs, position = locate(q, pool, segment_ids)

  def chunks(x, axis):
    """Cuts the tokens of x, on `axis`, into chunks, which come first."""
    x = jnp.moveaxis(x, axis, 1) if axis > 1 else x
    missing = pieces(x.shape[1], chunk_size) * chunk_size - x.shape[1]
    x = pad_end(x, missing, fill=None if x.dtype == jnp.int32 else 0)  # the last document goes on
    x = x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, axis + 1)

  tokens = chunks(q, 1), jax.tree.map(lambda x: chunks(x, 2), notes), chunks(position, 1)
  step = jax.checkpoint(partial(_read_chunk, scale, fifo), policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
  docs = Documents(chunks(docs.index, 1), chunks(docs.is_token, 1))
  (pool, _), o = jax.lax.scan(step, (pool, jnp.zeros_like(docs.index[0, :, 0])), (*tokens, docs))
  o = jnp.moveaxis(o, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])
  return o[:, : q.shape[1]], pool


def _read_chunk(scale, fifo, carry, chunk):
  """One chunk: from the pools before it, and the document of the token before it, to the same after it; and its reads."""
  pool, entry = carry
  q, new, position, docs = chunk
  slots, tokens = pool.position.shape[-1], q.shape[1]
  is_note = new.is_note & docs.is_token[None]
  place = jnp.where(is_note, jnp.broadcast_to(position[None], is_note.shape), -1)
  every = Pool(
    jnp.concatenate([pool.notes, new.notes], axis=2),
    jnp.concatenate([pool.log_score, new.log_score], axis=2),
    jnp.concatenate([pool.position, place], axis=2),
    pool.length,
  )
  document = jnp.concatenate([jnp.broadcast_to(entry[:, None], (len(entry), slots)), docs.index], axis=1)
  exists = every.position >= 0

  # [L, B, J, J]: whether note i beats note j.
  older = jnp.asarray(np.tri(slots + tokens, k=-1).T.astype(bool))[None, None]  # i < j
  score = every.log_score
  higher, equal = score[..., :, None] > score[..., None, :], score[..., :, None] == score[..., None, :]
  beats = jnp.where(fifo[..., None, None], ~older, higher | (equal & older))
  beats &= (document[:, :, None] == document[:, None])[None] & exists[..., :, None]
  beats &= jnp.asarray(~np.eye(slots + tokens, dtype=bool))[None, None]

  # Row t of [T + 1, J]: the notes up to token t - 1.
  before = np.arange(slots + tokens) < slots + np.arange(tokens + 1)[:, None]
  count = einsum("ti,lbij->lbtj", jnp.asarray(before, score.dtype), beats.astype(score.dtype))
  kept = checkpoint_name(jnp.asarray(before)[None, None] & exists[:, :, None] & (count < slots), _KEPT)

  o = attend(scale, q, every, kept[:, :, :-1] & (document[:, None] == docs.index[..., None])[None])
  o = jnp.where(docs.is_token[..., None, None], o, 0).astype(q.dtype)
  last = docs.index[:, -1]
  return (_gather(slots, every, kept[:, :, -1] & (document == last[:, None])[None], _length(pool, position, docs)), last), o


def _length(pool: Pool, position: jax.Array, docs: Documents) -> jax.Array:
  """The number of tokens of the last document, [L, B]: none of a new one is at padding."""
  after = jnp.max(jnp.where(docs.is_token & (docs.index == docs.index[:, -1:]), position + 1, 0), axis=1)
  return jnp.where(after[None] > 0, after[None], pool.length)


def _gather(slots: int, every: Pool, kept: jax.Array, length: jax.Array) -> Pool:
  """Pools of the notes that are `kept` [L, B, J], at most `slots` of them, in their order."""
  rank = jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1
  chosen = kept[:, :, None] & (rank[:, :, None] == jnp.arange(slots, dtype=jnp.int32)[None, None, :, None])  # [L, B, P, J]
  pick = lambda x: einsum("lbpj,lbjm->lbpm", chosen.astype(x.dtype), x).astype(x.dtype)  # noqa: E731
  position = jnp.max(jnp.where(chosen, every.position[:, :, None], -1), axis=-1)
  return Pool(pick(every.notes), pick(every.log_score[..., None])[..., 0], position, length)
