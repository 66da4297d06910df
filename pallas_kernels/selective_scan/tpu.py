"""The selective scan on a TPU: one kernel forward, and one backward, with the recurrence of `chunked.py` in registers.

Channels are lanes and states are sublanes. A step of the grid is a chunk of tokens of up to 512 channels: its tokens follow one
another, and the channels go side by side. The state stays in fast memory from step to step. Nothing of the size of tokens times
channels times states leaves it: backwards, the states within a chunk are computed again from that at its start.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..compat import varying_shape
from ..documents import Documents
from ..sizes import pad_end
from .chunked import at_tokens

LANES, ROWS = 128, 8
# Tokens of a chunk, of which so many are written out one after another; and channels of a step.
CHUNK, GROUP = 128, 16
_CHANNELS = 512
_LOG2E = 1 / math.log(2)


def forward(
  docs: Documents | None,
  x: jax.Array,
  step: jax.Array,
  a: jax.Array,
  b: jax.Array,
  c: jax.Array,
  state: jax.Array,
  *,
  keep: bool = True,
  interpret: Any = False,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
  """(y [B, T, D] in x's dtype, the final state [B, N, D]), and if `keep` the states before all chunks, [chunks, B, N, D].

  Args:
    docs: document boundaries and padding; `None` for one document without padding.
    x, step: [B, T, D]; a: [N, D]; b, c: [B, T, N]; state: [B, N, D], float32.
    interpret: as for `pallas_call`.
  """
  tokens = x.shape[1]
  x, step, b, c, goes_on = _arrange(docs, x, step, b, c)
  operands = goes_on, x, step, _by_two(a), b, c, state
  blocks, like = _Blocks(*x.shape, len(a)), partial(varying_shape, like=operands)
  chunks = x.shape[1] // CHUNK
  kept = [like((chunks, *state.shape), jnp.float32)] if keep else []
  y, final, *kept = pl.pallas_call(
    partial(_forward, docs is not None),
    grid=blocks.grid,
    in_specs=[blocks.goes_on, blocks.tokens, blocks.tokens, blocks.rates, blocks.shared, blocks.shared, blocks.state],
    out_specs=[blocks.tokens, blocks.state, blocks.states][: 2 + len(kept)],
    out_shape=[like(x.shape, x.dtype), like(state.shape, jnp.float32), *kept],
    scratch_shapes=[pltpu.VMEM((2, GROUP, blocks.width), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name="selective_scan_forward",
  )(*operands)
  return (y[:, :tokens], final), kept[0] if keep else None


def backward(
  docs: Documents | None,
  x: jax.Array,
  step: jax.Array,
  a: jax.Array,
  b: jax.Array,
  c: jax.Array,
  kept: jax.Array,
  dy: jax.Array,
  d_state: jax.Array,
  parts: int,
  *,
  interpret: Any = False,
) -> tuple[jax.Array, ...]:
  """The gradients by x, step, a (for each row, [B, N, D]), b and c (for each part of the channels, [B, T, parts, N]), state.

  Other arguments are those of `forward`.
  """
  tokens, like_step = x.shape[1], step
  x, step, b, c, goes_on = _arrange(docs, x, step, b, c)
  dy = pad_end(at_tokens(docs, dy).astype(x.dtype), x.shape[1] - tokens)
  operands = goes_on, x, step, _by_two(a), b, c, kept, dy, d_state
  blocks, like = _Blocks(*x.shape, len(a), parts, backwards=True), partial(varying_shape, like=operands)
  of_tokens, of_state, width = like(x.shape, x.dtype), like(d_state.shape, jnp.float32), blocks.width
  sums = like((len(x), blocks.grid[1], len(a), x.shape[1]), jnp.float32)
  scratch = [(CHUNK + 1, len(a), width), (3, GROUP, width)]
  shared, of_sums = [blocks.shared] * 2, [blocks.sums] * 2
  dx, d_step, d_a, db, dc, d_initial = pl.pallas_call(
    partial(_backward, docs is not None),
    grid=blocks.grid,
    in_specs=[
      *(blocks.goes_on, blocks.tokens, blocks.tokens, blocks.rates, *shared, blocks.states, blocks.tokens, blocks.state),
    ],
    out_specs=[blocks.tokens, blocks.tokens, blocks.state, *of_sums, blocks.state],
    out_shape=[of_tokens, like(x.shape, jnp.float32), of_state, sums, sums, of_state],
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name="selective_scan_backward",
  )(*operands)

  def by_part(z):
    z = z[..., :tokens].reshape(len(z), parts, -1, *z.shape[2:-1], tokens)
    return jnp.sum(z, axis=2).transpose(0, 3, 1, 2)

  d_step = at_tokens(docs, d_step[:, :tokens].astype(like_step.dtype))
  return dx[:, :tokens], d_step, d_a, by_part(db), by_part(dc), d_initial


class _Blocks:
  """The parts of arrays that a step takes."""

  def __init__(self, batch: int, tokens: int, channels: int, states: int, parts: int = 1, backwards: bool = False):
    width, chunks = _width(channels // parts), tokens // CHUNK
    self.grid = batch, channels // width, chunks
    self.width = width

    def spec(shape, index, **options):
      return pl.BlockSpec(shape, lambda b, d, n: index(b, d, chunks - 1 - n if backwards else n), **options)

    self.tokens = spec((1, CHUNK, width), lambda b, d, n: (b, n, d))
    self.shared = spec((1, states, CHUNK), lambda b, d, n: (b, 0, n))
    self.sums = spec((1, 1, states, CHUNK), lambda b, d, n: (b, d, 0, n))
    self.rates = spec((states, width), lambda b, d, n: (0, d))
    self.state = spec((1, states, width), lambda b, d, n: (b, 0, d))
    self.states = spec((1, 1, states, width), lambda b, d, n: (n, b, 0, d))
    self.goes_on = spec((1, 1, CHUNK), lambda b, d, n: (b, 0, n), memory_space=pltpu.SMEM)


def objection(dtype: jnp.dtype, x: jax.Array, state: tuple[int, ...]) -> str | None:
  """Why the kernels do not compute this, or `None`.

  Args:
    dtype: of the arithmetic and of the state.
    x: [B, T, D].
    state: shape of the state, (B, N, D).
  """
  if dtype != jnp.float32 or x.dtype not in (jnp.bfloat16, jnp.float32):
    return f"the kernels take bfloat16 or float32 and compute in float32, not {x.dtype} in {jnp.dtype(dtype)}"
  if state[1] % ROWS or state[2] % LANES:
    return f"the kernels have states by {ROWS} and channels by {LANES}, not {state[1]} and {state[2]}"
  return None


def _width(channels: int) -> int:
  return max(n for n in range(LANES, min(channels, _CHANNELS) + 1, LANES) if channels % n == 0)


def _arrange(docs, x, step, b, c):
  """Tokens of whole chunks, with zeros at padding; b and c [B, N, T]; and 0 where a document starts, else 1, [B, 1, T]."""
  starts = jnp.zeros(x.shape[:2], bool) if docs is None else docs.starts
  missing = -x.shape[1] % CHUNK
  x, step, b, c, starts = (pad_end(z, missing) for z in (*(at_tokens(docs, z) for z in (x, step, b, c)), starts))
  goes_on = (~starts).astype(jnp.float32)[:, None]
  return x, step.astype(jnp.float32), *(z.astype(jnp.float32).swapaxes(1, 2) for z in (b, c)), goes_on


def _by_two(a: jax.Array) -> jax.Array:
  """Rates for powers of two."""
  return a.astype(jnp.float32) * _LOG2E


def _forward(
  packed: bool,
  goes_on_ref: Any,
  x_ref: Any,
  step_ref: Any,
  a_ref: Any,
  b_ref: Any,
  c_ref: Any,
  initial_ref: Any,
  y_ref: Any,
  state_ref: Any,
  *others: Any,
) -> None:
  @pl.when(pl.program_id(2) == 0)
  def _():
    state_ref[...] = initial_ref[...]

  *states_ref, row_ref = others
  for ref in states_ref:
    ref[0] = state_ref[...]
  tiles, decay = _tiles(x_ref), partial(_decay, goes_on_ref if packed else None, row_ref, a_ref)

  @pl.loop(0, CHUNK // GROUP)
  def _(g):
    rows, b, c = _load(g, x_ref, step_ref, b_ref, c_ref, row_ref)
    h, reads = [state_ref[0, :, tile] for tile in tiles], [[] for _ in tiles]
    for t in range(GROUP):
      write, read = (jnp.broadcast_to(z[:, t : t + 1], h[0].shape) for z in (b, c))
      for i, tile in enumerate(tiles):
        h[i] = decay(g, t, tile) * h[i] + row_ref[1, t : t + 1, tile] * write
        reads[i].append(_by_eights(read * h[i]))
    for i, tile in enumerate(tiles):
      state_ref[0, :, tile] = h[i]
      y = jnp.concatenate([_sums(reads[i][n : n + ROWS]) for n in range(0, GROUP, ROWS)])
      y_ref[0, rows, tile] = y.astype(y_ref.dtype)


def _backward(
  packed: bool,
  goes_on_ref: Any,
  x_ref: Any,
  step_ref: Any,
  a_ref: Any,
  b_ref: Any,
  c_ref: Any,
  kept_ref: Any,
  dy_ref: Any,
  d_final_ref: Any,
  dx_ref: Any,
  d_step_ref: Any,
  d_a_ref: Any,
  db_ref: Any,
  dc_ref: Any,
  d_state_ref: Any,
  h_ref: Any,
  row_ref: Any,
) -> None:
  @pl.when(pl.program_id(2) == 0)
  def _():
    d_state_ref[...] = d_final_ref[...]
    d_a_ref[...] = jnp.zeros_like(d_a_ref)

  tiles, groups = _tiles(x_ref), CHUNK // GROUP
  decay = partial(_decay, goes_on_ref if packed else None, row_ref, a_ref)
  load = partial(_load, x_ref=x_ref, step_ref=step_ref, b_ref=b_ref, c_ref=c_ref, row_ref=row_ref)
  h_ref[0] = kept_ref[0, 0]

  @pl.loop(0, groups)
  def _(g):
    _, b, _ = load(g)
    h = [h_ref[g * GROUP, :, tile] for tile in tiles]
    for t in range(GROUP):
      write = jnp.broadcast_to(b[:, t : t + 1], h[0].shape)
      for i, tile in enumerate(tiles):
        h[i] = decay(g, t, tile) * h[i] + row_ref[1, t : t + 1, tile] * write
        h_ref[g * GROUP + t + 1, :, tile] = h[i]

  @pl.loop(0, groups)
  def _(n):
    g = groups - 1 - n
    rows, b, c = load(g)
    row_ref[2] = dy_ref[0, rows].astype(jnp.float32)
    d_h, d_a = ([ref[0, :, tile] for tile in tiles] for ref in (d_state_ref, d_a_ref))
    by_write, by_decay = ([[None] * GROUP for _ in tiles] for _ in range(2))
    lanes = jax.lax.broadcasted_iota(jnp.int32, b.shape, 1)
    d_b, d_c = db_ref[0, 0], dc_ref[0, 0]
    for t in reversed(range(GROUP)):
      write, read = (jnp.broadcast_to(z[:, t : t + 1], d_h[0].shape) for z in (b, c))
      of_b = of_c = 0.0
      for i, tile in enumerate(tiles):
        step, written, dy = (row_ref[k, t : t + 1, tile] for k in range(3))
        d_h[i] = d_h[i] + read * dy
        of_b = of_b + written * d_h[i]
        of_c = of_c + dy * h_ref[g * GROUP + t + 1, :, tile]
        by_write[i][t] = _by_eights(write * d_h[i])
        d_h[i] = decay(g, t, tile) * d_h[i]
        of_rate = d_h[i] * h_ref[g * GROUP + t, :, tile]  # by the exponent step a
        d_a[i] = d_a[i] + step * of_rate
        by_decay[i][t] = _by_eights(a_ref[:, tile] * of_rate)
      here = lanes == g * GROUP + t
      d_b = jnp.where(here, jnp.sum(of_b, axis=1, keepdims=True), d_b)
      d_c = jnp.where(here, jnp.sum(of_c, axis=1, keepdims=True), d_c)
    db_ref[0, 0], dc_ref[0, 0] = d_b, d_c
    for i, tile in enumerate(tiles):
      d_state_ref[0, :, tile], d_a_ref[0, :, tile] = d_h[i], d_a[i]
      write, rate = (
        jnp.concatenate([_sums(z[i][n : n + ROWS]) for n in range(0, GROUP, ROWS)]) for z in (by_write, by_decay)
      )
      dx_ref[0, rows, tile] = (row_ref[0, :, tile] * write).astype(dx_ref.dtype)
      d_step_ref[0, rows, tile] = x_ref[0, rows, tile].astype(jnp.float32) * write + rate * (1 / _LOG2E)


def _load(g: jax.Array, x_ref: Any, step_ref: Any, b_ref: Any, c_ref: Any, row_ref: Any) -> tuple[Any, jax.Array, jax.Array]:
  """Of group g of tokens: their rows, and b and c from its first token on. Steps, and steps times x, go to `row_ref`."""
  rows = pl.ds(g * GROUP, GROUP)
  row_ref[0] = step_ref[0, rows]
  row_ref[1] = row_ref[0] * x_ref[0, rows].astype(jnp.float32)
  return rows, *(pltpu.roll(ref[0], CHUNK - g * GROUP, 1) for ref in (b_ref, c_ref))


def _decay(goes_on_ref: Any | None, row_ref: Any, a_ref: Any, g: jax.Array, t: int, tile: slice) -> jax.Array:
  """e^{step a} of token t of group g, [N, 128], or 0 where a document starts."""
  decay = jnp.exp2(row_ref[0, t : t + 1, tile] * a_ref[:, tile])
  return decay if goes_on_ref is None else decay * goes_on_ref[0, 0, g * GROUP + t]


def _tiles(ref: Any) -> list[slice]:
  """Channels of a step, 128 by 128."""
  return [slice(i, i + LANES) for i in range(0, ref.shape[2], LANES)]


def _by_eights(x: jax.Array) -> jax.Array:
  """The sum over every eighth row of x [N, 128], [8, 128]."""
  return sum(x[n : n + ROWS] for n in range(0, len(x), ROWS))


def _sums(xs: Sequence[jax.Array]) -> jax.Array:
  """The sums of the rows of eight arrays [8, 128], one in each row of the result."""
  row = jax.lax.broadcasted_iota(jnp.int32, xs[0].shape, 0)
  # Rows that are four apart meet by one rotation, which is the same in both directions.
  first = row & 4 == 0
  xs = [
    jnp.where(first, x, y) + pltpu.roll(jnp.where(first, y, x), 4, 0) for x, y in zip(xs[:4], xs[4:], strict=True)
  ]
  for width in (2, 1):
    first = row & width == 0
    xs = [
      jnp.where(first, x + pltpu.roll(x, ROWS - width, 0), y + pltpu.roll(y, width, 0))
      for x, y in zip(xs[:width], xs[width:], strict=True)
    ]
  return xs[0]
