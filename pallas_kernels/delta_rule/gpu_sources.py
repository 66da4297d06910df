"""Operands of kernels for Hopper GPUs: where chunks are in global memory, and their way to shared memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .gpu_tiles import COLUMNS, operand


class Size(NamedTuple):
  """Of a call: n chunks of the states of B rows and H heads, which have K x V elements."""

  chunks: int
  batch: int
  heads: int
  key_dim: int
  value_dim: int

  @property
  def matrices(self) -> int:
    return self.batch * self.heads


class Place(NamedTuple):
  """A chunk of a state in a kernel, and columns of the state."""

  size: Size
  chunk: jax.Array
  matrix: jax.Array
  columns: Any = None

  @property
  def index(self) -> jax.Array:
    """In arrays [n * B * H, ...]."""
    return self.chunk * self.size.matrices + self.matrix


class Parts(NamedTuple):
  """Matrices of every chunk in parts, bfloat16 [n * B * H, parts, rows, columns]."""

  array: jax.Array
  slots: int = 1

  def copies(self, consumers: int) -> int:
    return self.array.shape[1]  # a copy has at most five axes, of which tiles take four

  def memory(self, consumers: int) -> Any:
    return operand(self.slots, *self.array.shape[1:])

  def given(self) -> jax.Array:
    return self.array.reshape(-1, *self.array.shape[2:])

  def piece(self, ref: Any, at: Place, i: int) -> Any:
    return ref.at[at.index * self.array.shape[1] + i]

  def view(self, slot: Any, consumer: jax.Array) -> list[Any]:
    return [slot.at[part] for part in range(self.array.shape[1])]


class Vectors(NamedTuple):
  """Vectors of every chunk, float32 [n * B * H, vectors, width]."""

  array: jax.Array
  slots: int = 1

  def copies(self, consumers: int) -> int:
    return 1

  def memory(self, consumers: int) -> Any:
    return plgpu.SMEM((self.slots, 1, *self.array.shape[1:]), jnp.float32)

  def given(self) -> jax.Array:
    return self.array

  def piece(self, ref: Any, at: Place, i: int) -> Any:
    return ref.at[at.index]

  def view(self, slot: Any, consumer: jax.Array) -> Any:
    return slot.at[0]


class Rows(NamedTuple):
  """Rows of heads, bfloat16 [B, n * rows, heads * width], or arranged by chunk, [n * B * H * rows, width].

  Attributes:
    array: these.
    rows: of a chunk.
    width: of a head.
    shared: how many heads of the state share one of these.
    by_columns: whether consumers need only their columns.
    slots: how many chunks of it shared memory holds.
  """

  array: jax.Array
  rows: int
  width: int
  shared: int = 1
  by_columns: bool = False
  slots: int = 1

  def copies(self, consumers: int) -> int:
    return consumers if self.by_columns else 1

  def memory(self, consumers: int) -> Any:
    tile = max(self.rows, COLUMNS), COLUMNS if self.by_columns else self.width
    return operand(self.slots, self.copies(consumers), *tile)

  def given(self) -> jax.Array:
    return self.array.reshape(-1, self.array.shape[-1])

  def piece(self, ref: Any, at: Place, i: int) -> Any:
    return self.place(ref, at, at.columns[i] if self.by_columns else pl.ds(0, self.width))

  def place(self, ref: Any, at: Place, columns: Any) -> Any:
    """A chunk's rows, of some columns of a head."""
    if self.array.ndim == 2:
      return ref.at[pl.ds(at.index * self.rows, self.rows), columns]
    batch, head = lax.div(at.matrix, jnp.int32(at.size.heads)), lax.rem(at.matrix, jnp.int32(at.size.heads))
    first = lax.div(head, jnp.int32(self.shared)) * self.width
    rows = pl.ds((batch * at.size.chunks + at.chunk) * self.rows, self.rows)
    return ref.at[rows, pl.ds(first + columns.start, columns.size)]

  def view(self, slot: Any, consumer: jax.Array) -> list[Any]:
    return [slot.at[consumer if self.by_columns else 0]]


Source = Parts | Vectors | Rows


class Queue:
  """An operand in a kernel, on its way to shared memory. A slot is filled, used by all consumers, and filled again."""

  def __init__(self, source: Source, array: Any, slots: Any, full: Any, free: Any):
    self._source, self._array, self._slots, self._full, self._free = source, array, slots, full, free

  def _slot(self, step: jax.Array) -> jax.Array:
    return lax.rem(step, jnp.int32(self._source.slots))

  def fill(self, step: jax.Array, at: Place) -> None:
    """The producer copies what a step needs, as soon as there is room. `at` has the columns of each consumer."""
    slot = self._slot(step)
    pl.when(step >= self._source.slots)(lambda: plgpu.barrier_wait(self._free.at[slot]))
    for i in range(self._source.copies(len(at.columns))):
      place = self._slots.at[slot, i]
      if isinstance(self._source, Rows) and self._source.rows < COLUMNS:
        place = place.at[pl.ds(0, self._source.rows)]
      plgpu.copy_gmem_to_smem(self._source.piece(self._array, at, i), place, self._full.at[slot])

  def get(self, step: jax.Array, consumer: jax.Array) -> Any:
    """What a step needs, once it is there: parts, or vectors."""
    slot = self._slot(step)
    plgpu.barrier_wait(self._full.at[slot])
    return self._source.view(self._slots.at[slot], consumer)

  def done(self, step: jax.Array) -> None:
    """A consumer gives the slot of a step back. A `commit_smem` must have followed its loads from the slot into registers."""
    plgpu.barrier_arrive(self._free.at[self._slot(step)])
