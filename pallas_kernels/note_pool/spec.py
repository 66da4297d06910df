"""What a pool of notes is, and what a call of the operation has besides its queries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..numerics import accumulator
from ..states import exportable

RULES = ("fifo", "priority")


@exportable
class Pool(NamedTuple):
  """The notes in a pool of P slots, oldest first, then the empty slots.

  Attributes:
    notes: [..., P, M].
    log_score: [..., P], float32 (float64 where the notes are); 0 in an empty slot.
    position: int32 [..., P], the place of the note's token in its document; -1 in an empty slot.
    length: int32 [...], number of tokens of the document so far.
  """

  notes: jax.Array
  log_score: jax.Array
  position: jax.Array
  length: jax.Array


class Notes(NamedTuple):
  """What the tokens of a call write.

  Attributes:
    notes: [..., T, M].
    log_score: [..., T], float32 (float64 where the notes are), at most 0.
    is_note: bool [..., T], whether the token leaves a note.
  """

  notes: jax.Array
  log_score: jax.Array
  is_note: jax.Array


def empty_pool(rows: tuple[int, ...], slots: int, width: int, dtype: jnp.dtype = jnp.float32) -> Pool:
  """Empty pools for rows of this shape, for notes of `width` numbers of `dtype`."""
  notes, log_score = jnp.zeros((*rows, slots, width), dtype), jnp.zeros((*rows, slots), accumulator(dtype))
  return Pool(notes, log_score, jnp.full((*rows, slots), -1, jnp.int32), jnp.zeros(rows, jnp.int32))
