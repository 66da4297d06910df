"""A walk through the chunks of a block in one kernel for Hopper GPUs, forward and backward: see `chunked.walk`.

A block of threads takes 64 or 128 columns of the state of one head through all chunks. Its consumers, warp groups, keep 64 of
these columns each in registers; its producer, another one, copies to shared memory what the chunks need: queries, keys, values,
P and (I + A)^-1, which XLA has computed for all chunks at once. With the symbols of `chunked`, a chunk is

    U = (I + A)^-1 (s v - (s k e^G) S)      O = scale (q e^G) S + P U      S <- e^{G_C} S + (k e^{G_C - G})^T U

and back, where D marks the cotangent of the quantity that follows it,

    DU = P^T DO + (k e^{G_C - G}) DS      DW = (I + A)^-T DU      DS <- e^{G_C} DS + scale (q e^G)^T DO - (s k e^G)^T DW

Decays that are one number per token scale rows of results. Decays per channel scale queries and keys before the kernel.
Products with float32 operands are made of two parts of each, as on a TPU.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..compat import varying_shape
from .chunked import Chunks, rows_of
from .gpu_tiles import COLUMNS, load, operand, product, put, rows, split, transposed
from .terms import Plan

_SHARED_MEMORY = 227 * 1024  # bytes of a block of threads
_REGISTERS, _REGISTERS_TO_COPY = 232, 40  # of a thread, where there are three warp groups
# Factors of rows: of what queries read, of values, of what keys read, of what keys write; and of the rows of the state.
_READ, _STRENGTH, _ERASE, _WRITE, _KEEP = range(5)


class _Step(NamedTuple):
  """What is known when a kernel is traced: n, the consumers, whether there is an (I + A)^-1, and decays are per channel."""

  chunks: int
  consumers: int
  erases: bool
  by_channel: bool


class _Place(NamedTuple):
  """Where a consumer is: the chunk, matrix and columns of the state that it computes."""

  chunk: jax.Array
  matrix: jax.Array
  columns: Any


class _Own(NamedTuple):
  """Shared memory of a consumer: the state and rows of updates, in parts, and an output on its way out."""

  state: Any
  rows: Any
  out: Any


class _Source(NamedTuple):
  """An operand of every chunk.

  Attributes:
    array: of n chunks of M states, parts of a matrix, [n, M, parts, rows, columns]; of the columns of all consumers,
      [n, M, rows, V]; or vectors, float32 [n, M, 5, width].
    slots: how many chunks of it shared memory holds.
  """

  array: jax.Array
  slots: int = 1

  @property
  def is_by_columns(self) -> bool:
    return self.array.ndim == 4 and self.array.dtype == jnp.bfloat16

  @property
  def is_in_parts(self) -> bool:
    return self.array.ndim == 5

  def copies(self, consumers: int) -> int:
    """How many copies fill a slot. Each has at most five axes, of which tiles take four."""
    return self.array.shape[2] if self.is_in_parts else consumers if self.is_by_columns else 1

  def shape(self, consumers: int) -> tuple[int, ...]:
    """Of its shared memory."""
    shape = self.array.shape[2:]
    return (self.slots, consumers, shape[0], COLUMNS) if self.is_by_columns else (self.slots, *shape)

  def memory(self, consumers: int) -> Any:
    shape = self.shape(consumers)
    return operand(*shape) if self.array.dtype == jnp.bfloat16 else plgpu.SMEM(shape, jnp.float32)


class _Queue:
  """An operand in a kernel, on its way to shared memory. A slot is filled, used by all consumers, and filled again."""

  def __init__(self, source: _Source, array: Any, slots: Any, full: Any, free: Any):
    self._source, self._array, self._slots, self._full, self._free = source, array, slots, full, free

  def _slot(self, step: jax.Array) -> jax.Array:
    return lax.rem(step, jnp.int32(self._source.slots))

  def fill(self, step: jax.Array, index: jax.Array, columns: Sequence[Any]) -> None:
    """The producer copies what a step needs, as soon as there is room; `columns` of each consumer."""
    slot, copies = self._slot(step), self._source.copies(len(columns))
    pl.when(step >= self._source.slots)(lambda: plgpu.barrier_wait(self._free.at[slot]))
    for i in range(copies):
      place = (slot,) if self._source.array.dtype == jnp.float32 else (slot, i)
      given = self._array.at[index, :, columns[i]] if self._source.is_by_columns else self._array.at[index * copies + i]
      plgpu.copy_gmem_to_smem(given, self._slots.at[place], self._full.at[slot])

  def get(self, step: jax.Array, consumer: jax.Array) -> Any:
    """What a step needs, once it is there: parts, or vectors."""
    slot = self._slot(step)
    plgpu.barrier_wait(self._full.at[slot])
    if self._source.is_by_columns:
      return [self._slots.at[slot, consumer]]
    if self._source.is_in_parts:
      return [self._slots.at[slot, part] for part in range(self._source.array.shape[2])]
    return self._slots.at[slot]

  def done(self, step: jax.Array) -> None:
    """A consumer does not read any more what `get` returned. What threads have loaded themselves, they must have committed."""
    plgpu.barrier_arrive(self._free.at[self._slot(step)])


def _forward(
  step: _Step, at: _Place, get: Callable, done: Callable, own: _Own, results: Sequence[Any], state: jax.Array
) -> jax.Array:
  """A chunk: from the state before it to the state after it."""
  out_ref, states_ref = results
  states_ref[at.chunk, at.matrix, :, at.columns] = state
  put(own.state, state)
  gates, keys, added = get("gates"), get("keys"), load(*get("values"))
  if step.erases:
    held = product(keys, own.state)
    put(own.rows, rows(gates.at[_STRENGTH], added) - rows(gates.at[_ERASE], held))
    added = product(get("inverse"), own.rows)
    done("inverse")
  out = product(get("queries"), own.state)
  done("queries")
  put(own.rows, added)
  done("values")
  out = rows(gates.at[_READ], out) + product(get("scores"), own.rows)
  done("scores")
  _write_out(at, own, out_ref, out)
  if not step.by_channel:
    put(own.rows, rows(gates.at[_WRITE], added))
  written = get("written") if step.by_channel else keys
  state = rows(gates.at[_KEEP], state) + product(transposed(written), own.rows)
  plgpu.commit_smem()
  for name in ("gates", "keys", *["written"] * step.by_channel):
    done(name)
  return state


def _write_out(at: _Place, own: _Own, out_ref: Any, out: jax.Array) -> None:
  """Begins to copy an output, without the rows of padding."""
  plgpu.wait_smem_to_gmem(0)
  own.out[...] = out.astype(jnp.bfloat16)
  plgpu.commit_smem()
  tokens = pl.ds(0, out_ref.shape[2])
  plgpu.copy_smem_to_gmem(own.out.at[tokens], out_ref.at[at.chunk, at.matrix, :, at.columns])


def _backward(
  step: _Step, at: _Place, get: Callable, done: Callable, own: _Own, results: Sequence[Any], state: jax.Array
) -> jax.Array:
  """A chunk: from the cotangent of the state after it to that of the state before it."""
  d_after_ref, d_rows_ref = results
  d_after_ref[at.chunk, at.matrix, :, at.columns] = state
  put(own.state, state)
  gates, keys = get("gates"), get("keys")
  d_rows = product(get("written") if step.by_channel else keys, own.state)
  if step.by_channel:
    done("written")
  else:
    d_rows = rows(gates.at[_WRITE], d_rows)
  d_out = get("d_out")
  d_rows = d_rows + product(transposed(get("scores")), d_out)
  done("scores")
  if step.erases:
    put(own.rows, d_rows)
    d_rows = product(transposed(get("inverse")), own.rows)
    done("inverse")
  d_rows_ref[at.chunk, at.matrix, :, at.columns] = d_rows
  state = rows(gates.at[_KEEP], state)
  if step.erases:
    put(own.rows, rows(gates.at[_ERASE], d_rows))
    state = state - product(transposed(keys), own.rows)
  if not step.by_channel:
    put(own.rows, rows(gates.at[_READ], load(*d_out)))
    d_out = own.rows
  state = state + product(transposed(get("queries")), d_out)
  plgpu.commit_smem()
  for name in ("gates", "keys", "queries", "d_out"):
    done(name)
  return state


def walk(plan: Plan, chunks: Chunks, state: jax.Array, *, interpret: Any = False) -> tuple[jax.Array, ...]:
  """As `chunked.walk`."""
  (n, m, tokens, _), (key_dim, width) = chunks.tokens.q.shape, state.shape[1:]
  values = _Source(_whole_tiles(chunks.tokens.values, -1))
  sources = _sources(plan, chunks)
  order = "keys", "gates", "inverse", "queries", "values", "scores", "written"
  columns = values.array.shape[-1]
  results = ((n, m, tokens, columns), jnp.bfloat16), ((n, *_whole_tiles(state, -1, -2).shape), jnp.float32)
  call = partial(_call, "delta_rule_walk", _forward, order, interpret=interpret)
  state, out, states = call(sources | {"values": values}, state, results)
  return state, out[..., :width], states[..., :key_dim, :width], None


def walk_back(
  plan: Plan, chunks: Chunks, d_out: jax.Array, d_state: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, ...]:
  """As `chunked.walk_back`."""
  key_dim, width = d_state.shape[1:]
  sources = _sources(plan, chunks)
  d_out = _Source(_whole_tiles(d_out.astype(jnp.bfloat16), -1, -2))
  (n, m, _, columns), updates = d_out.array.shape, chunks.tokens.keys.shape[2]
  order = "written", "keys", "gates", "scores", "inverse", "queries", "d_out"
  results = ((n, *_whole_tiles(d_state, -1, -2).shape), jnp.float32), ((n, m, updates, columns), jnp.float32)
  call = partial(_call, "delta_rule_walk_back", _backward, order, interpret=interpret, backwards=True)
  d_state, d_after, d_rows = call(sources | {"d_out": d_out}, d_state, results)
  return d_state, d_after[..., :key_dim, :width], d_rows[..., :width]


def _sources(plan: Plan, chunks: Chunks) -> dict[str, _Source]:
  """What both directions need, with channels and rows in multiples of 64."""
  tokens, terms, inverse = chunks
  by_channel = terms.keep.shape[-1] > 1
  per_row = jax.vmap(lambda x: rows_of(plan, x, jax.tree.map(lambda y: y[0], tokens)))
  read = jnp.asarray(plan.scale, plan.dtype) * terms.entering
  entering, leaving = per_row(terms.entering), per_row(terms.leaving)
  strength = jnp.ones_like(entering[..., 0]) if inverse is None else tokens.strengths.astype(plan.dtype)
  if by_channel:
    q, k = (x.astype(plan.dtype) for x in (tokens.q, tokens.keys))
    queries, keys, written = split(q * read), split(k * entering), split(k * leaving)
    vectors = jnp.ones_like(read[..., 0]), strength, strength, strength
  else:
    queries, keys, written = tokens.q[:, :, None], tokens.keys[:, :, None], None
    vectors = read[..., 0], strength, strength * entering[..., 0], leaving[..., 0]
  key_dim = tokens.q.shape[-1]
  width = max(COLUMNS, _multiple(key_dim), tokens.keys.shape[2])
  keep = jnp.broadcast_to(terms.keep, (*terms.keep.shape[:2], key_dim))
  gates = jnp.stack([_padded(x, -1, width) for x in (*vectors, keep)], axis=2)
  found = {
    "queries": _Source(_whole_tiles(queries, -1, -2)),
    "keys": _Source(_whole_tiles(keys, -1), slots=1 if by_channel else 2),
    "written": written if written is None else _Source(_whole_tiles(written, -1)),
    "scores": _Source(_whole_tiles(split(terms.scores), -2)),
    "inverse": inverse if inverse is None else _Source(split(inverse)),
    "gates": _Source(gates, slots=2),
  }
  return {name: source for name, source in found.items() if source is not None}


def _call(
  name: str,
  step_of: Callable[..., jax.Array],
  order: Sequence[str],
  sources: dict[str, _Source],
  state: jax.Array,
  results: Sequence[tuple[tuple[int, ...], Any]],
  *,
  interpret: Any,
  backwards: bool = False,
) -> tuple[jax.Array, ...]:
  """The state [M, K, V] after all chunks, and other results of their steps, of whole tiles.

  Args:
    name: of the kernel.
    step_of: what a consumer does at each chunk.
    order: of the operands, as steps are done with them.
    sources: the operands.
    state: before all steps.
    results: shapes and dtypes.
    interpret: as for `plgpu.kernel`.
    backwards: whether the last chunk comes first.
  """
  sources = {name: sources[name] for name in order if name in sources}
  key_dim, width = state.shape[1:]
  state = _whole_tiles(state, -1, -2)
  chunks, matrices = sources["gates"].array.shape[:2]
  updates = sources["keys"].array.shape[3]
  tokens = sources["queries"].array.shape[3]

  def memory(consumers):
    """Shared memory of a block of threads."""
    own = [(consumers, 2, state.shape[1], COLUMNS), (consumers, 2, max(updates, tokens), COLUMNS), (consumers, tokens, COLUMNS)]
    return [source.memory(consumers) for source in sources.values()], _Own(*(operand(*shape) for shape in own))

  def fits(consumers):
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(memory(consumers))]
    return state.shape[2] % (consumers * COLUMNS) == 0 and sum(sizes) + 1024 <= _SHARED_MEMORY

  consumers = 2 if fits(2) else 1
  step = _Step(chunks, consumers, "inverse" in sources, "written" in sources)

  def kernel(*refs):
    given, (state_ref, final_ref, *refs) = refs[: len(sources)], refs[len(sources) :]
    outputs, ((slots, own), full, free) = refs[: len(results)], refs[len(results) :]
    queues = dict(zip(sources, map(_Queue, sources.values(), given, slots, full, free), strict=True))
    matrix, consumer = lax.axis_index("matrix"), lax.axis_index("group")
    first = lax.axis_index("columns") * consumers
    parts = [pl.ds((first + i) * COLUMNS, COLUMNS) for i in range(consumers)]

    def chunk_of(i):
      return chunks - 1 - i if backwards else i

    @pl.when(consumer == consumers)
    def _copy():
      if consumers == 2:
        plgpu.set_max_registers(_REGISTERS_TO_COPY, action="decrease")

      @pl.loop(0, chunks)
      def _(i):
        for queue in queues.values():
          queue.fill(i, chunk_of(i) * matrices + matrix, parts)

    @pl.when(consumer < consumers)
    def _compute():
      if consumers == 2:
        plgpu.set_max_registers(_REGISTERS, action="increase")
      columns = pl.ds((first + consumer) * COLUMNS, COLUMNS)
      mine = _Own(*(ref.at[consumer] for ref in own))
      mine = _Own([mine.state.at[i] for i in range(2)], [mine.rows.at[i] for i in range(2)], mine.out)

      def one(i, state):
        at = _Place(chunk_of(i), matrix, columns)
        get, done = (lambda name: queues[name].get(i, consumer)), (lambda name: queues[name].done(i))
        return step_of(step, at, get, done, mine, outputs, state)

      end = lax.fori_loop(0, chunks, one, load(state_ref.at[matrix, :, columns], shared=False))
      plgpu.wait_smem_to_gmem(0)
      final_ref[matrix, :, columns] = end

  kernel.__name__ = name
  barriers = [
    [plgpu.Barrier(num_arrivals=arrivals(source), num_barriers=source.slots) for source in sources.values()]
    for arrivals in (lambda source: source.copies(consumers), lambda _: consumers)
  ]
  arrays = [source.array.reshape(-1, *source.array.shape[-2:]) for source in sources.values()]
  like = partial(varying_shape, like=[*arrays, state])
  final, *found = plgpu.kernel(
    kernel,
    out_type=[like(state.shape, jnp.float32), *(like(*shape) for shape in results)],
    scratch_types=[memory(consumers), *barriers],
    grid=(matrices, state.shape[2] // (consumers * COLUMNS)),
    grid_names=("matrix", "columns"),
    num_threads=consumers + 1,
    thread_name="group",
    interpret=interpret,
  )(*arrays, state)
  return final[:, :key_dim, :width], *found


def _multiple(size: int) -> int:
  """`size`, or the next multiple of 64."""
  return -(-size // COLUMNS) * COLUMNS


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
  """x with zeros at the end of an axis, so that it has a size."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths) if size > x.shape[axis] else x


def _whole_tiles(x: jax.Array, *axes: int) -> jax.Array:
  """x with zeros at the end of axes, so that they are multiples of 64."""
  for axis in axes:
    x = _padded(x, axis, _multiple(x.shape[axis]))
  return x
