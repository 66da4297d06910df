"""Local linear attention in blocks of queries and keys: memory O(T d), and a gradient of its own.

With weights p_ij of query i and key j, m_i = sum_j p_ij k_j and A_i = sum_j p_ij (k_j - m_i)(k_j - m_i)^T + ridge_i I,

    x_i = A_i^{-1} (q_i - m_i)        f_ij = 1 + (k_j - m_i) . x_i        y_i = sum_j p_ij f_ij v_j

A block of queries passes over the keys once for m_i and the logarithm of the sum of weights, once in each step of the conjugate
gradients for x_i, and once for y_i. Weights are computed again in every pass and never stored. The gradient solves a second
system with the same operator. With g_ij = dy_i . v_j and g_i = sum_j p_ij g_ij,

    a_i = sum_j p_ij g_ij (k_j - m_i)        z_i = A_i^{-1} a_i        t_ij = (k_j - m_i) . z_i        c_i = ridge_i x_i . z_i
    ds_ij = p_ij ((g_ij - g_i) f_ij - t_ij - t_ij (f_ij - 1) - c_i)
    dq_i = scale sum_j ds_ij k_j + z_i        dridge_i = -x_i . z_i        dv_j = sum_i p_ij f_ij dy_i
    dk_j = sum_i scale ds_ij q_i + p_ij ((g_ij - g_i - t_ij) x_i - f_ij z_i)

If A is cut to diagonal blocks, the product t_ij (f_ij - 1) is a sum over blocks, and dk_j takes t and f of its own block. If x
is given, z = 0, c_i = a_i . x_i and dx_i = a_i.

Shapes: a block has rows [B, Hk, n, R, d / n], in which R counts queries times the query heads that share a key head, and n the
diagonal blocks. Arrays without channels have n = 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ..derivatives import reverse_only
from ..dispatch import Forms, Kernels, by_platform, objection_to_kernels
from ..numerics import Precision, intermediate_precision, matmul
from ..partition import HEADS, ROWS, aligned, partitioned, varying_alike, with_gradient
from ..sizes import bounded, pad_end, pieces
from . import tpu
from .spec import Allowed, Spec

QUERIES, KEYS = 128, 256  # tokens of a block

_TOKENS = P(ROWS, None, HEADS)
_INPUTS = (_TOKENS, _TOKENS, _TOKENS, _TOKENS, P(ROWS))
_SUMS = (_TOKENS, _TOKENS, _TOKENS)  # of the log of the sum of weights, m and x


class _Keys(NamedTuple):
  """A block of keys: k [B, Hk, n, C, d / n], v [B, Hk, 1, C, V], document and position [B, C]."""

  k: jax.Array
  v: jax.Array
  document: jax.Array
  position: jax.Array


class _Rows(NamedTuple):
  """A block of queries: q [B, Hk, n, R, d / n], ridge [B, Hk, 1, R, 1], document and position [B, R].

  `visible` [N] tells which blocks of keys it may see. Passes over keys add log_sum [B, Hk, 1, R, 1], and mean and x, like q.
  """

  q: jax.Array
  ridge: jax.Array
  document: jax.Array
  position: jax.Array
  visible: jax.Array
  log_sum: jax.Array | None = None
  mean: jax.Array | None = None
  x: jax.Array | None = None


def by_blocks(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, ridge: jax.Array, allowed: Allowed) -> jax.Array:
  """The same function as `dense`."""
  return _attend(spec, *reverse_only(aligned((q, k, v, ridge, allowed), _INPUTS)))


def distances(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, ridge: jax.Array, allowed: Allowed) -> jax.Array:
  """(q_i - m_i) . x_i [B, T, H], zero for a query that sees nothing."""
  inputs = aligned((q, k, v, ridge, allowed), _INPUTS)
  _, (_, mean, x) = partitioned(partial(_forward, spec), _INPUTS, (_TOKENS, _SUMS), differentiable=False)(*inputs)
  return jnp.sum((q.astype(x.dtype) - mean) * x, axis=-1)


def objection(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, ridge: jax.Array, allowed: Allowed) -> str | None:
  """Why there is no kernel for such a call, or `None`."""
  return objection_to_kernels((q, k, v, ridge, allowed), _INPUTS, None, partial(tpu.objection, spec, q, k, v))


# Compiled functions within a program are traced once for equal settings and shapes, so once for equal layers.
@partial(jax.jit, static_argnums=(0, 1))
def _compiled(function, spec, *inputs):
  return function(spec, *inputs)


def _forms(spec, function, kernel):
  """A function of the arrays, by platform."""
  plain, kernel = (partial(_compiled, f, spec) for f in (function, kernel))
  forms = {
    Kernels.NEVER: Forms(plain, plain),
    Kernels.ON_TPU: Forms(plain, plain, kernel),
    Kernels.ALWAYS: Forms(kernel, kernel),
  }
  return partial(by_platform, forms[spec.kernels])


def _attended(spec, *inputs):
  return _attend_forward(spec, *inputs)[0]


def _attend_forward(spec, *inputs):
  local = _forms(spec, _forward, tpu.forward)
  y, sums = partitioned(local, _INPUTS, (_TOKENS, _SUMS), differentiable=False)(*inputs)
  return y, (inputs, sums)


def _attend_backward(spec, residuals, dy):
  inputs, sums = residuals
  specs = (*_INPUTS, _SUMS, _TOKENS)
  local = _forms(spec, _backward, tpu.backward)
  gradients = partitioned(local, specs, _INPUTS[:4], differentiable=False)(*inputs, sums, dy)
  return *gradients, None


_attend = with_gradient(_attended, _attend_forward, _attend_backward)


def _forward(spec, q, k, v, ridge, allowed):
  """y [B, T, H, V], and for the gradient (log_sum [B, T, H, 1], mean and x [B, T, H, d])."""
  arrange = _Arrangement(spec, q, k)
  rows, keys = arrange(q, k, v, ridge, allowed)

  def one(rows):
    rows = _with_mean(spec, rows, keys)
    if not spec.given:
      shift = jnp.where(jnp.isfinite(rows.log_sum), rows.q.astype(rows.mean.dtype) - rows.mean, 0)
      rows = rows._replace(x=_solve(spec, rows, keys, shift))

    def add(y, block):
      factor = 1 + jnp.sum(_inner(spec, rows.x, rows, block), axis=2, keepdims=True)
      return y + matmul(_weights(spec, rows, block) * factor, block.v, _precision(spec, block))

    y = _over_keys(add, jnp.zeros((*rows.log_sum.shape[:4], v.shape[-1]), rows.mean.dtype), rows, keys)
    return y.astype(v.dtype), (rows.log_sum, rows.mean, rows.x)

  return jax.tree.map(arrange.tokens, jax.lax.map(one, rows))


def _backward(spec, q, k, v, ridge, allowed, sums, dy):
  """The gradients by q, k, v and ridge."""
  arrange = _Arrangement(spec, q, k)
  rows, keys = arrange(q, k, v, ridge, allowed)
  sums = jax.tree.map(arrange.rows, sums)
  rows = rows._replace(log_sum=sums[0], mean=arrange.cut(sums[1]), x=arrange.cut(sums[2]))

  def one(gradients, inputs):
    rows, dy = inputs
    a, mean_gain = _gain_of_keys(spec, rows, keys, dy)
    z = jnp.zeros_like(a) if spec.given else _solve(spec, rows, keys, a)
    shared = jnp.sum(rows.x * (a if spec.given else z), axis=(2, 4), keepdims=True)
    constant = shared if spec.given else rows.ridge * shared

    def pair(dq, block):
      p, precision = _weights(spec, rows, block), _precision(spec, block)
      gain = matmul(dy, _transposed(block.v), precision) - mean_gain
      f, t = 1 + _inner(spec, rows.x, rows, block), _inner(spec, z, rows, block)
      whole = 1 + jnp.sum(f - 1, axis=2, keepdims=True)
      ds = p * (gain * whole - jnp.sum(t * f, axis=2, keepdims=True) - constant)
      dk = spec.scale * matmul(_transposed(ds), rows.q, precision)
      dk += matmul(_transposed(p * (gain - t)), rows.x, precision) - matmul(_transposed(p * f), z, precision)
      dv = matmul(_transposed(p * whole), dy, precision)
      return dq + spec.scale * matmul(ds, block.k, precision), (dk, dv)

    nothing = tuple(jnp.zeros(x.shape[1:], z.dtype) for x in (keys.k, keys.v))
    dq, by_keys = _over_keys(pair, z, rows, keys, nothing)
    return jax.tree.map(jnp.add, gradients, by_keys), (dq, a if spec.given else -shared)

  start = varying_alike(rows.q, tuple(jnp.zeros(x.shape, rows.x.dtype) for x in (keys.k, keys.v)))
  (dk, dv), (dq, dridge) = jax.lax.scan(one, start, (rows, arrange.rows(dy)))
  dq, dridge = arrange.tokens(dq), arrange.tokens(dridge)
  return dq.astype(q.dtype), arrange.keys(dk).astype(k.dtype), arrange.keys(dv).astype(v.dtype), dridge.astype(ridge.dtype)


def _gain_of_keys(spec: Spec, rows: _Rows, keys: _Keys, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  """a like q, and g_i [B, Hk, 1, R, 1]."""

  def add(carry, block):
    a, total = carry
    gain = _weights(spec, rows, block) * matmul(dy, _transposed(block.v), _precision(spec, block))
    return a + matmul(gain, block.k, _precision(spec, block)), total + jnp.sum(gain, axis=-1, keepdims=True)

  a, total = _over_keys(add, (jnp.zeros_like(rows.mean), jnp.zeros_like(rows.log_sum)), rows, keys)
  return a - total * rows.mean, total


def _with_mean(spec: Spec, rows: _Rows, keys: _Keys) -> _Rows:
  """The rows with log_sum, which is -inf for a query that sees nothing, and mean, which is zero there."""

  def add(carry, block):
    top, total, mean = carry
    logits = _logits(spec, rows, block)
    higher = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
    anchor = jnp.where(jnp.isfinite(higher), higher, 0)
    kept, weights = jnp.exp(top - anchor), jnp.exp(logits - anchor)
    mean = kept * mean + matmul(weights, block.k, _precision(spec, block))
    return higher, kept * total + jnp.sum(weights, axis=-1, keepdims=True), mean

  zeros = jnp.zeros(rows.ridge.shape, rows.ridge.dtype)
  top, total, mean = _over_keys(add, (zeros - jnp.inf, zeros, jnp.zeros(rows.q.shape, zeros.dtype)), rows, keys)
  return rows._replace(log_sum=top + jnp.log(total), mean=mean / jnp.where(total > 0, total, 1))


def _solve(spec: Spec, rows: _Rows, keys: _Keys, right: jax.Array) -> jax.Array:
  """A^{-1} `right`, which is like q."""
  return _solve_directly(spec, rows, keys, right) if spec.iterations is None else _conjugate_gradients(spec, rows, keys, right)


def _solve_directly(spec: Spec, rows: _Rows, keys: _Keys, right: jax.Array) -> jax.Array:
  """By the matrices A = sum_j p_j (k_j - m) (k_j - o)^T + ridge I, which are the same for any o.

  m, and an o among the keys, save the digits that long keys and distant keys would cost.
  """
  origin = jnp.mean(rows.mean, axis=3, keepdims=True)

  def add(total, block):
    k = block.k.astype(right.dtype)
    centred = _transposed(k)[:, :, :, None] - rows.mean[..., None]  # [B, Hk, n, R, d / n, C]
    weighted = _weights(spec, rows, block)[..., None, :] * centred
    return total + matmul(weighted, (k - origin)[:, :, :, None], _precision(spec, block))

  size = right.shape[-1]
  identity = jnp.eye(size, dtype=right.dtype)[None, None, None, None]
  total = _over_keys(add, jnp.zeros((*right.shape, size), right.dtype), rows, keys)
  factor = jnp.linalg.cholesky(total + rows.ridge[..., None] * identity)
  solved = jax.scipy.linalg.solve_triangular(factor, right[..., None], lower=True)
  return jax.scipy.linalg.solve_triangular(factor, solved, lower=True, trans=1)[..., 0]


def _conjugate_gradients(spec: Spec, rows: _Rows, keys: _Keys, right: jax.Array) -> jax.Array:
  """By at most `spec.iterations` steps. Rows that have converged are left alone.

  There is no preconditioner. A query that sees fewer keys than channels has a matrix of low rank plus ridge I, for which few
  steps suffice; division by the diagonal of A spoils that. It cost one to three steps on all keys tried, anisotropic ones too.
  """

  def apply(b):
    def add(carry, block):
      total, rounding = carry
      weights = _weights(spec, rows, block) * _inner(spec, b, rows, block)
      return total + matmul(weights, block.k, _precision(spec, block)), rounding + jnp.sum(weights, axis=-1, keepdims=True)

    total, rounding = _over_keys(add, (rows.ridge * b, jnp.zeros_like(b[..., :1])), rows, keys)
    return total - rounding * rows.mean  # these weights sum to zero, but for rounding

  size = _dot(right, right)
  small = spec.tolerance**2 * size

  def unfinished(carry):
    step, *_, size = carry
    return (step < spec.iterations) & jnp.any(size > small)

  def iterate(carry):
    step, x, residual, direction, size = carry
    moved = apply(direction)
    curvature = _dot(direction, moved)
    active = (size > small) & (curvature > 0)
    length = jnp.where(active, size / jnp.where(active, curvature, 1), 0)
    x, residual = x + length * direction, residual - length * moved
    next_size = _dot(residual, residual)
    turned = residual + next_size / jnp.where(active, size, 1) * direction
    return step + 1, x, residual, jnp.where(active, turned, direction), next_size

  return jax.lax.while_loop(unfinished, iterate, (0, jnp.zeros_like(right), right, right, size))[1]


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """Inner products of rows, [B, Hk, n, R, 1]: each diagonal block is a system of its own."""
  return jnp.sum(x * y, axis=-1, keepdims=True)


def _over_keys(step: Callable, carry: Any, rows: _Rows, keys: _Keys, nothing: Any = None) -> Any:
  """The last carry of `step` over the blocks of keys that the rows may see.

  With `nothing`, `step` also returns a result like it; these are stacked, with `nothing` for the blocks that are passed over.
  """
  carry, nothing = varying_alike(rows.q, (carry, nothing))
  with_result = nothing is not None

  def visit(carry, block):
    after = step(carry, block)
    return after if with_result else (after, None)

  def one(carry, inputs):
    block, visible = inputs
    return jax.lax.cond(visible, visit, lambda carry, block: (carry, nothing), carry, block)

  carry, results = jax.lax.scan(one, carry, (keys, rows.visible))
  return (carry, results) if with_result else carry


def _logits(spec: Spec, rows: _Rows, block: _Keys) -> jax.Array:
  """scale q . k, [B, Hk, 1, R, C]; -inf for keys that the query does not see."""
  products = jnp.sum(matmul(rows.q, _transposed(block.k), _precision(spec, block)), axis=2, keepdims=True)
  mask = Allowed(rows.document, rows.position, block.document, block.position).mask(spec.window)
  return jnp.where(mask[:, None, None], spec.scale * products, -jnp.inf)


def _weights(spec: Spec, rows: _Rows, block: _Keys) -> jax.Array:
  """p [B, Hk, 1, R, C]."""
  log_sum = jnp.where(jnp.isfinite(rows.log_sum), rows.log_sum, 0)
  return jnp.exp(_logits(spec, rows, block) - log_sum)


def _inner(spec: Spec, x: jax.Array, rows: _Rows, block: _Keys) -> jax.Array:
  """(k - mean) . x of each diagonal block, [B, Hk, n, R, C]."""
  return matmul(x, _transposed(block.k), _precision(spec, block)) - _dot(x, rows.mean)


def _precision(spec: Spec, block: _Keys) -> Precision:
  return intermediate_precision(spec.precision, block.k)


def _transposed(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


class _Arrangement:
  """How tokens are arranged in blocks: queries in M of them, keys in N."""

  def __init__(self, spec: Spec, q: jax.Array, k: jax.Array):
    (self.batch, self.length, heads, _), self.key_heads = q.shape, k.shape[2]
    self.groups, self.blocks, self.key_length = heads // self.key_heads, spec.blocks, k.shape[1]
    self.window, self.given = spec.window, spec.given
    self.query_size, self.key_size = bounded(self.length, QUERIES), bounded(self.key_length, KEYS)

  def __call__(self, q, k, v, ridge, allowed: Allowed) -> tuple[_Rows, _Keys]:
    """The blocks of queries, with a leading axis M, and those of keys, with a leading axis N."""
    queries = [self._split(x, self.query_size, -1) for x in allowed[:2]]
    keys = [self._split(x, self.key_size, -1) for x in allowed[2:]]
    visible = Allowed(*queries, *keys).may_meet(self.window)
    per_row = [jnp.repeat(x, self.groups, axis=2) for x in queries]
    rows = _Rows(self.cut(self.rows(q)), self.rows(ridge, fill=1), *per_row, visible)
    if self.given:
      rows = rows._replace(ridge=rows.ridge[..., :1], x=self.cut(rows.ridge))
    k, v = (jnp.moveaxis(self._split(x, self.key_size), 3, 2)[:, :, :, None] for x in (k, v))
    return rows, _Keys(self.cut(k), v, *keys)

  def rows(self, x: jax.Array, fill: int = 0) -> jax.Array:
    """[B, T, H, c] -> [M, B, Hk, 1, R, c], R being tokens times query heads of a key head. Missing tokens are `fill`."""
    x = self._split(x, self.query_size, fill)
    x = x.reshape(*x.shape[:3], self.key_heads, self.groups, x.shape[-1])
    x = jnp.moveaxis(x, 3, 2)
    return x.reshape(*x.shape[:3], 1, -1, x.shape[-1])

  def tokens(self, x: jax.Array) -> jax.Array:
    """The inverse of `rows`, of diagonal blocks side by side too."""
    x = jnp.moveaxis(x, 3, 4).reshape(*x.shape[:3], self.query_size, self.groups, -1)
    x = jnp.moveaxis(jnp.moveaxis(x, 2, 3), 0, 1)
    return x.reshape(self.batch, -1, self.key_heads * self.groups, x.shape[-1])[:, : self.length]

  def keys(self, x: jax.Array) -> jax.Array:
    """[N, B, Hk, n, C, c] -> [B, S, Hk, n c]"""
    x = jnp.moveaxis(x, 3, 4)
    x = jnp.moveaxis(x.reshape(*x.shape[:4], -1), (0, 3), (1, 2))
    return x.reshape(self.batch, -1, self.key_heads, x.shape[-1])[:, : self.key_length]

  def cut(self, x: jax.Array) -> jax.Array:
    """[..., 1, C, d] -> [..., n, C, d / n]"""
    *others, _, count, width = x.shape
    return jnp.moveaxis(x.reshape(*others, count, self.blocks, width // self.blocks), -2, -3)

  def _split(self, x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """[B, T, ...] -> [M, B, size, ...], padded at its end."""
    x = pad_end(x, pieces(x.shape[1], size) * size - x.shape[1], fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
