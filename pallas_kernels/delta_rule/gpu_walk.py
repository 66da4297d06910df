"""A walk through the chunks of a block in one kernel for Hopper GPUs, forward and backward: see `chunked.walk`.

A block of threads takes 64 or 128 columns of the state of one head through all chunks. Its consumers, warp groups, keep 64 of
these columns each in registers; its producer, another one, copies to shared memory what the chunks need: queries, keys, values,
P and (I + A)^-1, which are computed for all chunks at once, before. With the symbols of `chunked`, a chunk is

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
from .gpu_sources import Parts, Place, Queue, Rows, Size, Source, Vectors
from .gpu_tiles import BY_LANES, COLUMNS, load, operand, product, put, rows, split, transposed
from .terms import Plan

_SHARED_MEMORY = 227 * 1024  # bytes of a block of threads
_REGISTERS, _REGISTERS_TO_COPY = 232, 40  # of a thread, where there are three warp groups
# Factors of rows: of what queries read, of values, of what keys read, of what keys write; and of the rows of the state.
_READ, _STRENGTH, _ERASE, _WRITE, _KEEP = range(5)


class _Step(NamedTuple):
  """What is known when a kernel is traced: whether there is an (I + A)^-1, decays are per channel, and where outputs go."""

  erases: bool
  by_channel: bool
  keep: bool = True
  out: Rows | None = None


class _Own(NamedTuple):
  """Shared memory of a consumer: the state and rows of updates, in parts, and an output on its way out."""

  state: Any
  rows: Any
  out: Any


def _forward(
  step: _Step, at: Place, get: Callable, done: Callable, own: _Own, results: Sequence[Any], state: jax.Array
) -> jax.Array:
  """A chunk: from the state before it to the state after it."""
  out_ref, *states_ref = results
  if step.keep:
    states_ref[0][at.index, :, at.columns] = state
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
  _write_out(step.out, at, own, out_ref, out)
  if not step.by_channel:
    put(own.rows, rows(gates.at[_WRITE], added))
  written = get("written") if step.by_channel else keys
  state = rows(gates.at[_KEEP], state) + product(transposed(written), own.rows)
  plgpu.commit_smem()
  for name in ("gates", "keys", *["written"] * step.by_channel):
    done(name)
  return state


def _write_out(rows_of_out: Rows, at: Place, own: _Own, out_ref: Any, out: jax.Array) -> None:
  """Begins to copy an output, without the rows of padding."""
  plgpu.wait_smem_to_gmem(0)
  own.out[...] = out.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(own.out.at[pl.ds(0, rows_of_out.rows)], rows_of_out.place(out_ref, at, at.columns))


def _backward(
  step: _Step, at: Place, get: Callable, done: Callable, own: _Own, results: Sequence[Any], state: jax.Array
) -> jax.Array:
  """A chunk: from the cotangent of the state after it to that of the state before it."""
  d_after_ref, d_rows_ref = results
  d_after_ref[at.index, :, at.columns] = state
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
  d_rows_ref[at.index, :, at.columns] = d_rows
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
  values = _by_columns(chunks.tokens.values)
  out = Rows(jax.ShapeDtypeStruct((n * m * tokens, values.array.shape[1]), jnp.bfloat16), tokens, values.width)
  sources = _sources(plan, chunks) | {"values": values}
  state, out, states = forward(sources, _size(chunks, state), state, out, interpret=interpret)
  shape = n, m, tokens, out.shape[-1]
  return state, out.reshape(shape)[..., :width], states.reshape(n, m, *states.shape[1:])[..., :key_dim, :width], None


def walk_back(
  plan: Plan, chunks: Chunks, d_out: jax.Array, d_state: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, ...]:
  """As `chunked.walk_back`."""
  key_dim, width = d_state.shape[1:]
  n, m, updates = chunks.tokens.keys.shape[:3]
  sources = _sources(plan, chunks) | {"d_out": _by_columns(whole_tiles(d_out.astype(jnp.bfloat16), -2))}
  order = "written", "keys", "gates", "scores", "inverse", "queries", "d_out"
  wide = whole_tiles(d_state, -1, -2)
  results = [(n * m, *wide.shape[1:]), jnp.float32], [(n * m, updates, wide.shape[2]), jnp.float32]
  step = _Step(chunks.inverse is not None, "written" in sources)
  call = partial(_call, "delta_rule_walk_back", partial(_backward, step), order, interpret=interpret, backwards=True)
  d_state, d_after, d_rows = call(sources, _size(chunks, d_state), d_state, results)
  d_after, d_rows = (x.reshape(n, m, *x.shape[1:])[..., :width] for x in (d_after, d_rows))
  return d_state, d_after[..., :key_dim, :], d_rows


def forward(
  sources: dict[str, Source], size: Size, state: jax.Array, out: Rows, *, keep: bool = True, interpret: Any = False
) -> tuple[jax.Array, ...]:
  """The state after all chunks, the output of whole tiles, and if `keep` the states before all chunks, [n * B * H, K, V].

  Args:
    sources: "queries", "keys", "values", "scores" and "gates", and "inverse" for updates that erase. With decays per channel
      keys are those that read, and "written" are those that write.
    size: of the call.
    state: [B * H, K, V].
    out: the shape of the output, and where chunks are in it.
    keep: whether to return the states before all chunks.
    interpret: as for `plgpu.kernel`.
  """
  order = "keys", "gates", "inverse", "queries", "values", "scores", "written"
  wide = whole_tiles(state, -1, -2)
  *others, columns = out.array.shape
  results = [[(math.prod(others), columns), out.array.dtype], [(size.chunks * size.matrices, *wide.shape[1:]), jnp.float32]]
  step = _Step("inverse" in sources, "written" in sources, keep, out)
  call = partial(_call, "delta_rule_walk", partial(_forward, step), order, interpret=interpret)
  return call(sources, size, state, results[: 1 + keep])


def _size(chunks: Chunks, state: jax.Array) -> Size:
  n, m = chunks.tokens.q.shape[:2]
  return Size(n, 1, m, *state.shape[1:])


def _by_columns(x: jax.Array) -> Rows:
  """Values [n, M, rows, V] of chunks."""
  x = whole_tiles(x, -1)
  return Rows(x.reshape(-1, x.shape[-1]), x.shape[2], x.shape[-1], by_columns=True)


def _sources(plan: Plan, chunks: Chunks) -> dict[str, Source]:
  """What both directions need, with channels and rows in multiples of 64."""
  tokens, terms, inverse = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), chunks)
  by_channel = terms.keep.shape[-1] > 1
  entering, leaving = (rows_of(plan, x, tokens) for x in (terms.entering, terms.leaving))
  read = jnp.asarray(plan.scale, plan.dtype) * terms.entering
  strength = jnp.ones_like(entering[..., 0]) if inverse is None else tokens.strengths.astype(plan.dtype)
  found: dict[str, Source] = {}
  if by_channel:
    q, k = (x.astype(plan.dtype) for x in (tokens.q, tokens.keys))
    factors = jnp.ones_like(read[..., 0]), strength, strength, strength
    found["queries"] = Parts(whole_tiles(split(q * read), -1, -2))
    found |= {name: Parts(whole_tiles(split(k * x), -1)) for name, x in (("keys", entering), ("written", leaving))}
  else:
    factors = read[..., 0], strength, strength * entering[..., 0], leaving[..., 0]
    found["queries"] = Parts(whole_tiles(tokens.q, -1, -2)[:, None])
    found["keys"] = Parts(whole_tiles(tokens.keys, -1)[:, None], slots=2)
  if inverse is not None:
    found["inverse"] = Parts(split(inverse))
  found["scores"] = Parts(whole_tiles(split(terms.scores), -2))
  return found | {"gates": gates(factors, terms.keep, tokens.q.shape[-1])}


def gates(factors: Sequence[jax.Array], keep: jax.Array, key_dim: int) -> Vectors:
  """Factors of rows, [N, rows] each: `_READ`, `_STRENGTH`, `_ERASE` and `_WRITE`; and `keep` [N, K or 1] for the state."""
  keep = jnp.broadcast_to(keep, (keep.shape[0], key_dim))
  width = max(_multiple(x.shape[1]) for x in (*factors, keep))
  return Vectors(jnp.stack([_padded(x, -1, width) for x in (*factors, keep)], axis=1), slots=2)


def _call(
  name: str,
  step: Callable[..., jax.Array],
  order: Sequence[str],
  sources: dict[str, Source],
  size: Size,
  state: jax.Array,
  results: Sequence[tuple[tuple[int, ...], Any]],
  *,
  interpret: Any,
  backwards: bool = False,
) -> tuple[jax.Array, ...]:
  """The state [B * H, K, V] after all chunks, and other results of their steps, of whole tiles.

  Args:
    name: of the kernel.
    step: what a consumer does at each chunk.
    order: of the operands, as steps are done with them.
    sources: the operands.
    size: of the call.
    state: before all steps.
    results: shapes and dtypes.
    interpret: as for `plgpu.kernel`.
    backwards: whether the last chunk comes first.
  """
  sources = {name: sources[name] for name in order if name in sources}
  wide = whole_tiles(state, -1, -2)

  def memory(consumers):
    """Shared memory of a block of threads."""
    own = (2, wide.shape[1], COLUMNS), (2, COLUMNS, COLUMNS), (COLUMNS, COLUMNS)
    return [each.memory(consumers) for each in sources.values()], _Own(*(operand(consumers, *shape) for shape in own))

  def fits(consumers):
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(memory(consumers))]
    return wide.shape[2] % (consumers * COLUMNS) == 0 and sum(sizes) + 1024 <= _SHARED_MEMORY

  consumers = 2 if fits(2) else 1

  def kernel(*refs):
    given, (state_ref, final_ref, *refs) = refs[: len(sources)], refs[len(sources) :]
    outputs, ((slots, own), full, free) = refs[: len(results)], refs[len(results) :]
    queues = dict(zip(sources, map(Queue, sources.values(), given, slots, full, free), strict=True))
    matrix, consumer = lax.axis_index("matrix"), lax.axis_index("group")
    first = lax.axis_index("columns") * consumers

    def place(i, columns):
      return Place(size, size.chunks - 1 - i if backwards else i, matrix, columns)

    @pl.when(consumer == consumers)
    def _copy():
      if consumers == 2:
        plgpu.set_max_registers(_REGISTERS_TO_COPY, action="decrease")
      columns = [pl.ds((first + w) * COLUMNS, COLUMNS) for w in range(consumers)]

      @pl.loop(0, size.chunks)
      def _(i):
        for queue in queues.values():
          queue.fill(i, place(i, columns))

    @pl.when(consumer < consumers)
    def _compute():
      if consumers == 2:
        plgpu.set_max_registers(_REGISTERS, action="increase")
      columns = pl.ds((first + consumer) * COLUMNS, COLUMNS)
      mine = _Own(*(ref.at[consumer] for ref in own))
      mine = _Own([mine.state.at[i] for i in range(2)], [mine.rows.at[i] for i in range(2)], mine.out)

      def one(i, state):
        get, done = (lambda name: queues[name].get(i, consumer)), (lambda name: queues[name].done(i))
        return step(place(i, columns), get, done, mine, outputs, state)

      end = lax.fori_loop(0, size.chunks, one, load(state_ref.at[matrix, :, columns], shared=False))
      plgpu.wait_smem_to_gmem(0)
      final_ref[matrix, :, columns] = end

  kernel.__name__ = name
  barriers = [
    [plgpu.Barrier(num_arrivals=arrivals(source), num_barriers=source.slots) for source in sources.values()]
    for arrivals in (lambda source: source.copies(consumers), lambda _: consumers)
  ]
  arrays = [source.given() for source in sources.values()]
  like = partial(varying_shape, like=[*arrays, state])
  final, *found = plgpu.kernel(
    kernel,
    out_type=[like(wide.shape, jnp.float32), *(like(*shape) for shape in results)],
    scratch_types=[memory(consumers), *barriers],
    grid=(size.matrices, wide.shape[2] // (consumers * COLUMNS)),
    grid_names=("matrix", "columns"),
    num_threads=consumers + 1,
    thread_name="group",
    compiler_params=BY_LANES,
    interpret=interpret,
  )(*arrays, wide)
  return final[:, : state.shape[1], : state.shape[2]], *found


def _multiple(size: int) -> int:
  """`size`, or the next multiple of 64."""
  return -(-size // COLUMNS) * COLUMNS


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
  """x with zeros at the end of an axis, so that it has a size."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths) if size > x.shape[axis] else x


def whole_tiles(x: jax.Array, *axes: int) -> jax.Array:
  """x with zeros at the end of axes, so that they are multiples of 64."""
  for axis in axes:
    x = _padded(x, axis, _multiple(x.shape[axis]))
  return x
