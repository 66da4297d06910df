"""The highest scores so far: at each step, which of the tokens offered until then have the M highest scores of their document.

    token j is held at step t    <=>    j was offered by step t,    and    #{i offered by step t: i beats j} < M
    i beats j                    <=>    s_i > s_j,    or    s_i = s_j and i was offered before j

One token, or none, is offered in each step. A full memory of M tokens that replaces its lowest score, of several the youngest,
whenever a higher one is offered holds these tokens: one that was dropped never returns.

Steps are taken in blocks. A block starts from at most M tokens and has a count for each of them and of its own; only scores and
indices are carried on. Cost O(T (M + C)) for blocks of C steps, and O(M (M + C)) for each block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .documents import Documents


class Held(NamedTuple):
  """The tokens that are held, the highest score first, of equal scores the older first; then the empty slots.

  Attributes:
    score: floats [B, M]; 0 in an empty slot.
    index: int32 [B, M], a number for each token; -1 in an empty slot.
  """

  score: jax.Array
  index: jax.Array


class Offered(NamedTuple):
  """What is offered in each step, in the order of age.

  Attributes:
    score: floats [B, T].
    index: int32 [B, T], the token's number.
    document: int32 [B, T], its document. The token is offered only if this is the document of the step.
  """

  score: jax.Array
  index: jax.Array
  document: jax.Array


def hold_highest(offered: Offered, steps: Documents, held: Held, block: int) -> tuple[jax.Array, jax.Array, Held]:
  """Which tokens are held at each of T steps.

  Args:
    offered: what is offered in each step.
    steps: the documents of the steps [B, T], `held` belonging to document 0. Nothing is offered in a step that is no token, and
      all such steps come last.
    held: the tokens before the first step.
    block: C, the number of steps in a block, a divisor of T.

  Returns:
    index: int32 [B, N, M], the tokens that each of the N = T / C blocks starts from; -1 for none.
    mask: bool [B, N, C, M + C], for each step of a block whether these tokens, and those offered in the block, are held and of
      the document of the step.
    held: the tokens after the last step.
  """

  def blocks(a):
    return jnp.moveaxis(a.reshape(a.shape[0], -1, block, *a.shape[2:]), 1, 0)

  xs = jax.tree.map(blocks, (offered, steps))
  (held, _), (index, mask) = jax.lax.scan(_one_block, (held, jnp.zeros_like(steps.index[:, 0])), xs)
  return jnp.moveaxis(index, 0, 1), jnp.moveaxis(mask, 0, 1), held


def _one_block(carry, block):
  """One block: from the tokens held before it, and their document [B], to the same after it; and what the block sees."""
  held, entry = carry
  new, steps = block
  slots, size = held.index.shape[1], new.score.shape[1]
  is_offered = steps.is_token & (new.document == steps.index)
  exists = jnp.concatenate([held.index >= 0, is_offered], axis=1)
  score = jnp.concatenate([held.score, new.score], axis=1)
  index = jnp.concatenate([held.index, new.index], axis=1)
  document = jnp.concatenate([jnp.broadcast_to(entry[:, None], held.index.shape), new.document], axis=1)

  place = jnp.arange(slots + size, dtype=jnp.int32)  # in the order of age among equal scores
  higher, equal = score[:, :, None] > score[:, None], score[:, :, None] == score[:, None]
  beats = higher | (equal & (place[:, None] < place[None])[None])
  beats &= exists[:, :, None] & (document[:, :, None] == document[:, None])
  before = jnp.sum(beats[:, :slots], axis=1, dtype=jnp.int32)
  count = before[:, None] + jnp.cumsum(beats[:, slots:], axis=1, dtype=jnp.int32)  # of those that beat it by each step
  since = place[None] <= slots + jnp.arange(size, dtype=jnp.int32)[:, None]
  mask = since[None] & exists[:, None] & (count < slots) & (document[:, None] == steps.index[:, :, None])

  found, chosen = jax.lax.top_k(jnp.where(mask[:, -1], score, -jnp.inf), slots)  # of equal ones the first
  is_full = found > -jnp.inf
  kept = Held(jnp.where(is_full, found, 0), jnp.where(is_full, jnp.take_along_axis(index, chosen, axis=1), -1))
  return (kept, steps.index[:, -1]), (held.index, mask)
