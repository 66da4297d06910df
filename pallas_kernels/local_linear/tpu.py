"""Local linear attention on a TPU: one kernel forward and one backward, with all keys and values of a head in fast memory.

The equations are those of `blockwise.py`. Keys are sublanes and queries are lanes, so that sums over keys and over channels add
registers, and what a query has one of is a row. A step of the grid has a block of queries of one head. It computes their
weights once, and keeps them in fast memory; an iteration of the solver is two products with them. The gradients by keys and
values stay in fast memory from step to step.

A query sees the keys from one place on up to its own: `causal` documents, with or without a window, after padding was moved to
the end.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..compat import varying_shape
from ..sizes import pad_end, pieces
from ..tpu_products import BY_ROWS, LANES, dot, full_precision, parts
from .spec import Allowed, Spec

# Queries of a block, fewer where more do not fit into the fast memory; and keys of a block.
_QUERIES, _KEYS, _LOG_KEYS = (256, 128), 256, 8
_ROWS = 8
_LOG2E = math.log2(math.e)
_NOTHING = -1e30  # the logarithm of a weight of 0, of which differences are finite

# What a kernel may take of the fast memory, and how much that is where the chip is not known: the least of v5 and newer.
_SHARE, _VMEM = 0.85, 64 * 2**20


def forward(
  spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, ridge: jax.Array, allowed: Allowed, *, interpret: Any = False
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """y [B, T, H, V] in v's dtype, and for the gradient log_sum [B, T, H, 1], mean and x [B, T, H, d], as in `blockwise.py`.

  Args:
    spec, q, k, v, ridge, allowed: as there.
    interpret: as for `pallas_call`.
  """
  call = _Call(spec, q, k, v, allowed)
  inputs = [call.queries(q), call.queries(ridge, fill=1), call.keys(k), call.key_columns(k), call.key_columns(v)]
  like = [(v.dtype, v.shape[3]), (jnp.float32, 1), (jnp.float32, q.shape[3]), (jnp.float32, q.shape[3])]
  loops = [call.visits, call.visits, *call.solving, call.visits]
  y, *sums = call("forward", _forward, inputs, [call.result(*x) for x in like], loops, interpret)
  return call.tokens(y), tuple(map(call.tokens, sums))


def backward(
  spec: Spec,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ridge: jax.Array,
  allowed: Allowed,
  sums: tuple[jax.Array, ...],
  dy: jax.Array,
  *,
  interpret: Any = False,
) -> tuple[jax.Array, ...]:
  """The gradients by q, k, v and ridge."""
  call = _Call(spec, q, k, v, allowed)
  log_sum, mean, x = (z.astype(jnp.float32) for z in sums)
  log_sum = jnp.where(jnp.isfinite(log_sum), log_sum, 0) * _LOG2E
  of_queries = q, ridge, log_sum, mean, x, dy.astype(v.dtype)
  inputs = [*(call.queries(z, fill=z is ridge) for z in of_queries), call.keys(k), call.key_columns(k), call.keys(v)]
  results = [call.result(z.dtype, z.shape[3]) for z in (q, ridge)] + [call.key_result(z.shape[3]) for z in (k, v)]
  loops = [call.visits, *call.solving, call.visits]
  dq, dridge, dk, dv = map(call.tokens, call("backward", _backward, inputs, results, loops, interpret))
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), dridge


def objection(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
  """Why the kernels do not compute this, or `None`."""
  if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
    return f"the kernels take bfloat16 or float32, the same for q, k and v, not {q.dtype}, {k.dtype} and {v.dtype}"
  if not spec.causal:
    return "keys are given with `allowed`, and the kernels have those of the queries' tokens"
  if spec.blocks > 1 or (spec.iterations is None and not spec.given):
    return "the kernels solve by conjugate gradients, with one block"
  if spec.precision is not None and q.dtype != jnp.float32:
    return f"precision={spec.precision!r} was asked for, and the kernels multiply weights in two parts"
  if any(width % _ROWS or width > 2 * LANES for width in (q.shape[3], v.shape[3])):
    return f"the kernels have widths up to {2 * LANES} by {_ROWS}, not {q.shape[3]} and {v.shape[3]}"
  least = _fast_memory(q, v, _QUERIES[-1])
  if least > _capacity():
    return f"keys and values of a head take {least >> 20} MiB of fast memory, of {_capacity() >> 20} MiB"
  return None


def _fast_memory(q: jax.Array, v: jax.Array, queries: int) -> int:
  """Bytes of fast memory that the gradient takes, with two buffers for what a step reads and writes."""
  tokens, widths, size = _padded(q.shape[1]), (q.shape[3], v.shape[3]), q.dtype.itemsize
  by_tokens = sum(pieces(width, LANES) * LANES for width in widths) * size
  by_channels = q.shape[3] * size + 4 * sum(widths)
  return tokens * (4 * queries + 2 * (by_tokens + by_channels)) + 2**22


def _capacity() -> int:
  """Bytes of fast memory that a kernel may take."""
  on_tpu = jax.default_backend() == "tpu"
  return int(_SHARE * (pltpu.get_tpu_info().vmem_capacity_bytes if on_tpu else _VMEM))


def _padded(tokens: int) -> int:
  return pieces(tokens, _KEYS) * _KEYS


class _Call:
  """How a call is laid out: arrays with channels as rows and tokens as lanes, and the parts of them that a step takes.

  A part is an array and its `BlockSpec`, or for a result the shape and its `BlockSpec`.
  """

  def __init__(self, spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, allowed: Allowed):
    (self.batch, self.length, self.heads, self.width), self.key_heads = q.shape, k.shape[2]
    self.spec, self.groups, self.full = spec, self.heads // self.key_heads, q.dtype == jnp.float32
    self.block = next((n for n in _QUERIES if _fast_memory(q, v, n) <= _capacity()), _QUERIES[-1])
    self.padded = _padded(self.length)
    # Columns of tokens, then those of padding; `None` where all are tokens.
    self.order = jnp.argsort(allowed.query_document < 0, axis=1, stable=True) if spec.packed else None
    self.grid = self.batch, self.key_heads, self.groups, self.padded // self.block
    self.places = self._places(allowed)
    # How often loops run in a causal step, on average, for estimates.
    seen = min(self.length, spec.window or self.length)
    self.visits = max(1.0, seen * (1 - seen / (2 * self.length)) / _KEYS + 0.5)
    self.solving = [spec.iterations, self.visits] if spec.iterations else []

  def _places(self, allowed: Allowed) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """The blocks of keys from and up to which a block of queries sees some, and the same places for every query."""
    position = self._ordered(allowed.query_position)
    is_token, index = self._ordered(allowed.query_document) >= 0, jnp.arange(self.length, dtype=jnp.int32)[None]
    reach = position if self.spec.window is None else jnp.minimum(position, self.spec.window - 1)
    missing = self.padded - self.length
    first = pad_end(jnp.where(is_token, index - reach, self.padded), missing, self.padded)
    last = pad_end(jnp.where(is_token, index, -1), missing, -1)
    blocks = [x.reshape(self.batch, -1, self.block) for x in (first, last)]
    from_block, to_block = jnp.min(blocks[0], axis=2) >> _LOG_KEYS, (jnp.max(blocks[1], axis=2) >> _LOG_KEYS) + 1
    ranges = pl.BlockSpec(memory_space=pltpu.SMEM)
    row = pl.BlockSpec((1, 1, self.block), lambda b, h, g, m: (b, 0, m))
    return [(from_block, ranges), (to_block, ranges), (first[:, None], row), (last[:, None], row)]

  def __call__(self, name: str, kernel: Callable, inputs: list, results: list, loops: list, interpret: Any) -> list[jax.Array]:
    """Calls a kernel; `loops` is how often its loops run, in their order."""
    operands, in_specs = zip(*self.places, *inputs, strict=True)
    shapes, out_specs = zip(*results, strict=True)

    def run(from_ref, to_ref, first_ref, last_ref, *refs):
      here = pl.program_id(0), pl.program_id(3)
      kernel(self.spec, _Seen(from_ref[here], to_ref[here], first_ref[0], last_ref[0]), *refs)

    return pl.pallas_call(
      full_precision(run) if self.full else run,
      grid=self.grid,
      in_specs=in_specs,
      out_specs=out_specs,
      out_shape=[varying_shape(x.shape, x.dtype, like=operands) for x in shapes],
      scratch_shapes=[
        pltpu.VMEM((self.padded, self.block), jnp.float32),
        pltpu.VMEM((3, self.width, self.block), jnp.float32),
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=int(_capacity() / _SHARE)
      ),
      interpret=interpret,
      name=f"local_linear_{name}",
      metadata={"loops": json.dumps(loops)},
    )(*operands)

  def queries(self, x: jax.Array, fill: int = 0) -> tuple[jax.Array, pl.BlockSpec]:
    """[B, T, H, c] -> [B, H, c, T], and a block of it. Missing tokens are `fill`."""
    return self._pad(x, fill).transpose(0, 2, 3, 1), self._block(x.shape[3])

  def result(self, dtype: jnp.dtype, width: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    """A result like `queries`."""
    return jax.ShapeDtypeStruct((self.batch, self.heads, width, self.padded), dtype), self._block(width)

  def keys(self, x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
    """[B, T, Hk, c] -> [B, Hk, T, c], and all of one head."""
    return self._pad(x).transpose(0, 2, 1, 3), self._head(self.padded, x.shape[3])

  def key_columns(self, x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
    """[B, T, Hk, c] -> [B, Hk, c, T], and all of one head."""
    return self._pad(x).transpose(0, 2, 3, 1), self._head(x.shape[3], self.padded)

  def key_result(self, width: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    """A result like `key_columns`, float32."""
    shape = self.batch, self.key_heads, width, self.padded
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._head(width, self.padded)

  def tokens(self, x: jax.Array) -> jax.Array:
    """[B, H, c, T] -> [B, T, H, c]"""
    x = x.transpose(0, 3, 1, 2)[:, : self.length]
    return x if self.order is None else _columns(x, jnp.argsort(self.order, axis=1))

  def _block(self, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, width, self.block), lambda b, h, g, m: (b, h * self.groups + g, 0, m))

  def _head(self, *shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, *shape), lambda b, h, g, m: (b, h, 0, 0))

  def _pad(self, x: jax.Array, fill: int = 0) -> jax.Array:
    return pad_end(self._ordered(x), self.padded - self.length, fill)

  def _ordered(self, x: jax.Array) -> jax.Array:
    return x if self.order is None else _columns(x, self.order)


def _columns(x: jax.Array, order: jax.Array) -> jax.Array:
  """The tokens of x [B, T, ...] in the order [B, T]."""
  return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


class _Seen(NamedTuple):
  """Which keys the queries of a step see.

  Attributes:
    from_block, to_block: the blocks of keys from and up to which one of them sees some.
    first, last: the first and the last place that each one sees, [1, R].
  """

  from_block: jax.Array
  to_block: jax.Array
  first: jax.Array
  last: jax.Array

  def over_keys(self, step: Callable, carry: Any) -> Any:
    """The last carry of `step` over these blocks."""
    return jax.lax.fori_loop(self.from_block, self.to_block, step, carry)


def _forward(
  spec: Spec,
  seen: _Seen,
  q_ref: Any,
  ridge_ref: Any,
  k_ref: Any,
  k_columns_ref: Any,
  v_ref: Any,
  y_ref: Any,
  log_sum_ref: Any,
  mean_ref: Any,
  x_ref: Any,
  p_ref: Any,
  solver_ref: Any,
) -> None:
  q, over_keys = q_ref[0, 0], seen.over_keys
  logits = partial(_logits, spec, seen, q, k_ref)

  def highest(t, top):
    return jnp.maximum(top, _by_eights(logits(t), jnp.max))

  top = over_keys(highest, jnp.full((_ROWS, q.shape[1]), _NOTHING, jnp.float32))
  top = jnp.maximum(jnp.max(top, axis=0, keepdims=True), _NOTHING / 2)  # so that what is not seen has weight 0

  def weigh(t, carry):
    total, mean = carry
    w = jnp.exp2(logits(t) - top)
    p_ref[_rows(t)] = w
    return total + _by_eights(w, jnp.sum), mean + _by_keys(k_columns_ref, t, w)

  zeros = jnp.zeros((_ROWS, q.shape[1]), jnp.float32), jnp.zeros(q.shape, jnp.float32)
  total, mean = over_keys(weigh, zeros)
  total = jnp.sum(total, axis=0, keepdims=True)
  sees = total > 0
  each = 1 / jnp.where(sees, total, 1)
  mean *= each
  if spec.given:
    x = ridge_ref[0, 0]
  else:
    right = jnp.where(sees, q.astype(jnp.float32) - mean, 0)
    x = _solve(spec, partial(_apply, over_keys, p_ref, k_ref, k_columns_ref, mean, each, ridge_ref[0, 0]), right, solver_ref)
  x_parts, shift = parts(x), 1 - _dots(x, mean)

  def read(t, y):
    return y + _by_keys(v_ref, t, p_ref[_rows(t)] * (_products(k_ref, t, x_parts) + shift))

  y = over_keys(read, jnp.zeros((y_ref.shape[2], q.shape[1]), jnp.float32))
  y_ref[0, 0] = (y * each).astype(y_ref.dtype)
  log_sum_ref[0, 0] = jnp.where(sees, (top + jnp.log2(jnp.where(sees, total, 1))) / _LOG2E, -jnp.inf)
  mean_ref[0, 0], x_ref[0, 0] = mean, x


def _backward(
  spec: Spec,
  seen: _Seen,
  q_ref: Any,
  ridge_ref: Any,
  log_sum_ref: Any,
  mean_ref: Any,
  x_ref: Any,
  dy_ref: Any,
  k_ref: Any,
  k_columns_ref: Any,
  v_ref: Any,
  dq_ref: Any,
  dridge_ref: Any,
  dk_ref: Any,
  dv_ref: Any,
  p_ref: Any,
  solver_ref: Any,
) -> None:
  @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
  def _():
    dk_ref[...], dv_ref[...] = jnp.zeros_like(dk_ref), jnp.zeros_like(dv_ref)

  q, dy, mean, x = (ref[0, 0] for ref in (q_ref, dy_ref, mean_ref, x_ref))
  over_keys, logits = seen.over_keys, partial(_logits, spec, seen, q, k_ref)

  def weigh(t, carry):
    a, total = carry
    p = jnp.exp2(logits(t) - log_sum_ref[0, 0])
    p_ref[_rows(t)] = p
    gain = p * dot(v_ref[0, 0, _rows(t)], dy)
    return a + _by_keys(k_columns_ref, t, gain), total + _by_eights(gain, jnp.sum)

  a, mean_gain = over_keys(weigh, (jnp.zeros_like(mean), jnp.zeros((_ROWS, q.shape[1]), jnp.float32)))
  mean_gain = jnp.sum(mean_gain, axis=0, keepdims=True)
  a -= mean_gain * mean
  if spec.given:
    z, constant = jnp.zeros_like(x), _dots(x, a)
  else:
    ridge = ridge_ref[0, 0]
    z = _solve(spec, partial(_apply, over_keys, p_ref, k_ref, k_columns_ref, mean, jnp.ones_like(ridge), ridge), a, solver_ref)
    constant = ridge * _dots(x, z)
  shift_x, shift_z = 1 - _dots(x, mean), _dots(z, mean)
  x_parts, z_parts = parts(x), parts(z)

  def pair(t, dq):
    p, f = p_ref[_rows(t)], _products(k_ref, t, x_parts) + shift_x
    rest = dot(v_ref[0, 0, _rows(t)], dy) - mean_gain
    if not spec.given:
      rest -= _products(k_ref, t, z_parts) - shift_z
    pf, pe = p * f, p * rest
    ds = spec.scale * (pe * f - constant * p)
    ds_parts = parts(ds)
    dk = sum(dot(q, d, BY_ROWS) for d in ds_parts) + _of_two(x_parts, parts(pe))
    if not spec.given:
      dk -= _of_two(z_parts, parts(pf))
    dk_ref[0, 0, :, _rows(t)] += dk
    dv_ref[0, 0, :, _rows(t)] += sum(dot(dy, d, BY_ROWS) for d in parts(pf))
    return dq + sum(dot(k_columns_ref[0, 0, :, _rows(t)], d) for d in ds_parts)

  dq_ref[0, 0] = over_keys(pair, z).astype(dq_ref.dtype)
  dridge_ref[0, 0] = a if spec.given else -_dots(x, z)


def _of_two(x: tuple[jax.Array, ...], y: tuple[jax.Array, ...]) -> jax.Array:
  """x y^T of float32 matrices in parts."""
  return sum(dot(a, b, BY_ROWS) for i, a in enumerate(x) for j, b in enumerate(y) if i + j < 2)


def _solve(spec: Spec, apply: Callable[[jax.Array], jax.Array], right: jax.Array, ref: Any) -> jax.Array:
  """A^{-1} `right` [d, R] by conjugate gradients, as in `blockwise.py`; in `ref` are x, the residual and the direction."""
  size = _dots(right, right)
  small = spec.tolerance**2 * size
  ref[0] = jnp.zeros_like(right)
  ref[1] = ref[2] = right

  def unfinished(carry):
    step, size = carry
    return (step < spec.iterations) & (jnp.max(size - small) > 0)

  def iterate(carry):
    step, size = carry
    direction = ref[2]
    moved = apply(direction)
    curvature = _dots(direction, moved)
    active = (size > small) & (curvature > 0)
    length = jnp.where(active, size / jnp.where(active, curvature, 1), 0)
    ref[0] += length * direction
    residual = ref[1] - length * moved
    ref[1] = residual
    next_size = _dots(residual, residual)
    turned = residual + next_size / jnp.where(active, size, 1) * direction
    ref[2] = jnp.where(active, turned, direction)
    return step + 1, next_size

  jax.lax.while_loop(unfinished, iterate, (jnp.int32(0), size))
  return ref[0]


def _apply(
  over_keys: Callable,
  p_ref: Any,
  k_ref: Any,
  k_columns_ref: Any,
  mean: jax.Array,
  each: jax.Array,
  ridge: jax.Array,
  b: jax.Array,
) -> jax.Array:
  """A b, for weights in `p_ref` that sum to 1 / `each`."""
  b_parts, shift = parts(b), _dots(b, mean)

  def add(t, carry):
    total, rounding = carry
    weights = p_ref[_rows(t)] * (_products(k_ref, t, b_parts) - shift)
    return total + _by_keys(k_columns_ref, t, weights), rounding + _by_eights(weights, jnp.sum)

  total, rounding = over_keys(add, (jnp.zeros_like(b), jnp.zeros((_ROWS, b.shape[1]), jnp.float32)))
  rounding = jnp.sum(rounding, axis=0, keepdims=True)  # these weights sum to zero, but for rounding
  return ridge * b + each * (total - rounding * mean)


def _rows(t: jax.Array) -> Any:
  return pl.ds(pl.multiple_of(t * _KEYS, _KEYS), _KEYS)


def _logits(spec: Spec, seen: _Seen, q: jax.Array, k_ref: Any, t: jax.Array) -> jax.Array:
  """scale q . k [C, R] for powers of two."""
  products = (spec.scale * _LOG2E) * dot(k_ref[0, 0, _rows(t)], q)
  place = t * _KEYS + jax.lax.broadcasted_iota(jnp.int32, products.shape, 0)
  return jnp.where((place >= seen.first) & (place <= seen.last), products, _NOTHING)


def _products(k_ref: Any, t: jax.Array, xs: tuple[jax.Array, ...]) -> jax.Array:
  """k . x [C, R] for x [d, R] in parts."""
  k = k_ref[0, 0, _rows(t)]
  if len(xs) * k.shape[1] > LANES:
    return sum(dot(k, x) for x in xs)
  return dot(jnp.concatenate([k] * len(xs), axis=1), jnp.concatenate(xs))


def _by_keys(k_columns_ref: Any, t: jax.Array, weights: jax.Array) -> jax.Array:
  """sum_j w_j k_j [d, R] for w [C, R]."""
  return sum(dot(k_columns_ref[0, 0, :, _rows(t)], x) for x in parts(weights))


def _dots(x: jax.Array, y: jax.Array) -> jax.Array:
  """Inner products of columns, [1, R]."""
  return jnp.sum(x * y, axis=0, keepdims=True)


def _by_eights(x: jax.Array, reduce: Callable) -> jax.Array:
  """The sum or maximum over every eighth row of x [C, R], [8, R]."""
  return reduce(x.reshape(-1, _ROWS, x.shape[1]), axis=0)
