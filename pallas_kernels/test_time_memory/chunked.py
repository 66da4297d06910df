"""The chunk-parallel form. It computes the gradients of a whole chunk at once and never forms the weights of single tokens.

Gradients of a chunk are taken at its anchor, so like gates and steps they are known inputs of a linear recurrence. Its solution
has the same triangular coefficients for every matrix of the memory,

    W_t = A_t W_0 + f_t S_0 - sum_{j<=t} P_tj g_j        S_t = m_t S_0 - sum_{j<=t} R_tj g_j
    R = L_eta diag(theta)        P = L_a R        f = L_a m

with (L_a)_ti = a_{i+1} ... a_t, and likewise L_eta. Every g_j is an outer product x_j^T delta_j of a layer's input and the
cotangent of its output, so a read does not need W_t:

    x W_t  =  A_t x W_0 + f_t x S_0 - sum_{j<=t} P_tj (x . x_j) delta_j

Where weights decay towards the weights W_o that the document began with, W stands for the difference from them: W_o is added to
the anchor, and x W_o to a read.

Products of gates are exponentials of masked sums of logarithms, not quotients, and exact for gates of 0. A scan runs over
chunks; the backward pass keeps the carries between chunks and recomputes the rest.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..documents import select_rows
from ..numerics import FULL, SPLIT, Precision, inner_products, matmul, scaled, sums
from ..partition import varying_alike
from ..sizes import Size, known
from ..triangular import unit_lower_inverse
from .layout import Layout
from .spec import Carry, Gates, InitialWeights, Spec, Weights, length, running_average, shortened

_FORGOTTEN = -1e4
_FAST_BYTES = 32 * 2**20
# Chunks of a span that are compiled as one. A scan would copy their carries into one array.
_UNROLL = 8


class Coefficients(NamedTuple):
  """The coefficients of a chunk of C tokens; see the docstring of the module.

  Attributes:
    keep: A [C].
    carried: f [C]; `None` without momentum.
    writes: P [C, C].
    momentum_kept: m at the end of the chunk, a scalar, or `None`.
    momentum_writes: the last row of R, [C], or `None`.
  """

  keep: jax.Array
  carried: jax.Array | None
  writes: jax.Array | None
  momentum_kept: jax.Array | None
  momentum_writes: jax.Array | None

  def at_end(self) -> "Coefficients":
    """The coefficients after the chunk: without the axis of tokens that read."""
    carried = None if self.carried is None else self.carried[-1]
    return self._replace(keep=self.keep[-1], carried=carried, writes=self.writes[-1])

  def before(self, spec: Spec, average: jax.Array | None) -> "Coefficients":
    """The coefficients of the weights before each token's own write."""
    if spec.average:  # the factor differs from token to token; `average` is that of the previous token
      rows = jnp.tril(jnp.broadcast_to(self.momentum_writes[None], self.writes.shape), -1)
      return self._replace(carried=average, writes=average[:, None] * rows)
    shifted = {"keep": jnp.concatenate([jnp.ones_like(self.keep[:1]), self.keep[:-1]])}
    for name in ("carried", "writes"):
      rows = getattr(self, name)
      shifted[name] = None if rows is None else jnp.concatenate([jnp.zeros_like(rows[:1]), rows[:-1]])
    return self._replace(**shifted)


class Plan(NamedTuple):
  """What depends on the platform and the dtypes of a call.

  Attributes:
    precision: of products with float32 intermediates.
    span: the backward pass keeps the carries between spans of so many chunks, and computes those within a span again; `None` to
      keep all carries.
  """

  precision: Precision = FULL
  span: int | None = None


def plans(precision: Precision, chunks: Size) -> tuple[Plan, Plan]:
  """The plans for a CPU and for other platforms, of sequences of so many chunks.

  Spans of half the root need little more memory than the root. Shorter ones would need more time.
  """
  span = max(_UNROLL, math.isqrt(chunks) // 2) if known(chunks) else _UNROLL
  return Plan(precision), Plan(precision, span=span)


class Affine(NamedTuple):
  """A matrix [..., in, out] of the memory, and its bias [..., out] or `None`.

  They are apart, because a matrix of `in` + 1 rows does not fill the tiles of an accelerator.
  """

  matrix: jax.Array
  bias: jax.Array | None

  @classmethod
  def split(cls, w: jax.Array, biases: bool) -> "Affine":
    """From W [..., in, out], or from [..., in + 1, out] whose last row is a bias."""
    return cls(w[..., :-1, :], w[..., -1, :]) if biases else cls(w, None)

  def join(self) -> jax.Array:
    """The inverse of `split`."""
    return self.matrix if self.bias is None else jnp.concatenate([self.matrix, self.bias[..., None, :]], axis=-2)

  def __call__(self, x: jax.Array, precision: Precision) -> jax.Array:
    """x W + b of x [C, in]."""
    out = matmul(x, self.matrix, precision)
    return out if self.bias is None else out + self.bias[None]

  def scaled(self, x: jax.Array, s: jax.Array, plan: Plan) -> jax.Array:
    """`s[:, None]` times x W + b, scaled where it is narrower."""
    if self.matrix.shape[0] >= self.matrix.shape[1]:
      return _scaled_rows(self(x, plan.precision), s, plan)
    out = matmul(_scaled_rows(x, s, plan), self.matrix, plan.precision)
    return out if self.bias is None else out + s[:, None] * self.bias[None]


def _split(spec: Spec, tree: Any) -> Any:
  return jax.tree.map(lambda w: Affine.split(w, spec.memory.biases), tree)


def _join(tree: Any) -> Any:
  return jax.tree.map(Affine.join, tree, is_leaf=lambda x: isinstance(x, Affine))


def _view(spec: Spec, weights: dict[str, Affine]) -> dict[str, Affine]:
  """The weights in use."""
  return weights if spec.retention.kind == "none" else _split(spec, spec.view(_join(weights)))


def _has_origin(spec: Spec, gates: Gates) -> bool:
  """Whether the weights of a carry are differences from those that the document began with."""
  return spec.decay_to == "start" and gates.log_keep is not None


def carry_at_start(spec: Spec, initial: InitialWeights, gates: Gates) -> Carry:
  """The carry of `chunked` at the start of a document, [H, ...]."""
  zeros = _has_origin(spec, gates)
  return spec.carry(jax.tree.map(jnp.zeros_like, initial.weights) if zeros else initial.weights, initial.momentum)


class _Chunk(NamedTuple):
  """A chunk of one head: q, k [C, K], v [C, V]; gates, `is_token` and `position` are [C]."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  gates: Gates
  is_token: jax.Array
  position: jax.Array


class _Prepared(NamedTuple):
  """What a chunk of one head needs and does not depend on its carry.

  Attributes:
    q, k, v, threshold: as they came.
    at_read, at_end: coefficients of the weights that each token reads, and of those after the chunk.
    at_write: keep and carried of the weights W_{t-1}, for the token anchor, or `None`.
    scores: q k^T [C, C]; `None` if reads do not see the chunk's writes.
    inverse: [C, C], of the triangular system of the token anchor, or `None`.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  threshold: jax.Array | None
  at_read: Coefficients
  at_end: Coefficients
  at_write: Coefficients | None
  scores: jax.Array | None
  inverse: jax.Array | None


@partial(jax.jit, static_argnums=(0, 1))
def chunked(
  spec: Spec,
  plan: Plan,
  initial: InitialWeights,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: Gates,
  carry: Carry,
  layout: Layout,
) -> tuple[jax.Array, jax.Array, Carry]:
  """q, k, v [B, T, H, .], gates [B, T, H] and a carry [B, H, ...] to (y [B, T, H, V], loss [B, T, H], the next carry).

  y has the dtype of v, loss and carry that of the gates.
  """
  operands = q, k, v, gates, carry, layout
  batch = q.shape[0]
  together = batch if plan.span is None else _rows_together(carry, batch)
  if together == batch:
    return _rows(spec, plan, initial, *operands)
  groups = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), operands)
  out = jax.lax.map(lambda group: _rows(spec, plan, initial, *group), groups)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _rows_together(carry: Carry, batch: Size) -> Size:
  """Rows that are computed together on an accelerator, a divisor of `batch`: their carries should fit into its fast memory.

  All rows if `batch` is not known.
  """
  if not known(batch):
    return batch
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(carry)) / batch
  return next(n for n in range(batch, 0, -1) if batch % n == 0 and (n == 1 or n * size <= _FAST_BYTES))


def _rows(
  spec: Spec,
  plan: Plan,
  initial: InitialWeights,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: Gates,
  carry: Carry,
  layout: Layout,
) -> tuple[jax.Array, jax.Array, Carry]:
  """`chunked`, all rows together."""
  batch, tokens, heads = q.shape[:3]

  def by_chunk(x):
    """[B, T, H, ...] -> [N, B, C, H, ...]"""
    return jnp.swapaxes(layout.chunks(x), 0, 1)

  def by_token(x):
    """[N, B, C, H, ...] -> [B, T, H, ...]"""
    return layout.tokens(jnp.swapaxes(x, 0, 1), tokens)

  def heads_first(x):
    """[B, C, H, ...] -> [B * H, C, ...]"""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(-1, *x.shape[2:])

  def heads_last(x):
    """[B * H, C, ...] -> [B, C, H, ...]"""
    return jnp.moveaxis(x.reshape(batch, heads, *x.shape[1:]), 1, 2)

  def by_row(x):
    """[B, N, ...] -> [N, B * H, ...]"""
    return jnp.repeat(jnp.swapaxes(x, 0, 1), heads, axis=1)

  def every_row(x):
    """[H, ...] -> [B * H, ...]"""
    return jnp.broadcast_to(x[None], (batch, *x.shape)).reshape(-1, *x.shape[1:])

  rows = jax.tree.map(every_row, initial)
  start = _split(spec, jax.tree.map(every_row, carry_at_start(spec, initial, gates)))
  origin = _split(spec, rows.weights) if _has_origin(spec, gates) else None
  incoming = _split(spec, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry))
  rows = rows._replace(weights=None, momentum=None)
  if layout.open is None:  # all chunks are whole: the weights at the end of one are the anchor of the next
    start, incoming = start._replace(anchor=None), incoming._replace(anchor=None)
    if spec.average and initial.momentum is None:  # the sum of steps begins and ends every chunk as zeros
      start, incoming = start._replace(momentum=None), incoming._replace(momentum=None)
  arrived, incoming = incoming.anchor, varying_alike(q, incoming)

  def over(function):
    return jax.vmap(function)

  def prepare(of_tokens, of_slots):
    chunk = _Chunk(*jax.tree.map(heads_first, of_tokens), *of_slots)
    return over(lambda average, chunk: _prepare(spec, plan, average, chunk))(rows.average, chunk)

  def step(carry, inputs):
    chunk, (is_token, fresh, still_open, continues) = inputs
    carry = select_rows(fresh, start, carry)
    anchor = carry.weights
    if arrived is not None:
      anchor = select_rows(continues, arrived, anchor)
    chunk = chunk if plan.span else prepare(*chunk)
    y, loss, after = over(lambda *args: _chunk(spec, plan, *args))(rows.norm, origin, carry, anchor, chunk)
    out = (y, loss) if plan.span else jax.tree.map(heads_last, (y, loss))
    return _next_carry(spec, carry, anchor, after, is_token, still_open), out

  step = jax.checkpoint(step, prevent_cse=False)

  def walk(carry, inputs):
    chunk, of_rows = inputs
    if not plan.span:
      return jax.lax.scan(step, carry, inputs)
    unroll = _UNROLL if known(of_rows[0].shape[0]) else 1
    carry, out = jax.lax.scan(step, carry, (jax.vmap(prepare)(*chunk), of_rows), unroll=unroll)
    return carry, jax.tree.map(jax.vmap(heads_last), out)

  is_token, position, *flags = jax.tree.map(by_row, tuple(layout[:5]))
  chunks = jax.tree.map(by_chunk, (q, k, v, gates)), (is_token, position)
  carry, out = _in_spans(walk, incoming, (chunks, (is_token, *flags)), plan.span)
  y, loss = jax.tree.map(by_token, out)
  if layout.open is None and spec.keeps_anchor:
    carry = carry._replace(anchor=carry.weights)
  if spec.accumulates and carry.momentum is None:
    carry = carry._replace(momentum=jax.tree.map(jnp.zeros_like, carry.weights))
  carry = jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), _join(carry))
  return y, loss, layout.poison(carry)


def _in_spans(walk: Any, carry: Any, inputs: Any, span: int | None) -> tuple[Any, Any]:
  """`walk`, a scan over `inputs`, in pieces. The backward pass keeps the carries between spans, and computes the rest again.

  One piece if the number of inputs is not known.
  """
  length = jax.tree.leaves(inputs)[0].shape[0]
  if span is None or not known(length) or span >= length:
    return walk(carry, inputs)
  whole = length // span * span
  spans = jax.tree.map(lambda x: x[:whole].reshape(-1, span, *x.shape[1:]), inputs)
  carry, out = jax.lax.scan(jax.checkpoint(walk, prevent_cse=False), carry, spans)
  out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
  if whole == length:
    return carry, out
  carry, rest = walk(carry, jax.tree.map(lambda x: x[whole:], inputs))
  return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)


def _next_carry(
  spec: Spec, before: Carry, anchor: Weights, after: Carry, is_token: jax.Array, still_open: jax.Array | None
) -> Carry:
  """The carry of the next chunk. While a chunk is open, its anchor is kept."""
  if spec.average and after.momentum is not None:
    closed = after._replace(momentum=jax.tree.map(jnp.zeros_like, after.momentum))
    return select_rows(still_open, after._replace(weights=anchor), closed)
  if before.anchor is None:
    return after
  kept = select_rows(jnp.any(is_token, axis=1), anchor, before.anchor)
  return after._replace(anchor=select_rows(still_open, kept, after.weights))


def _prepare(spec: Spec, plan: Plan, average: jax.Array | None, chunk: _Chunk) -> _Prepared:
  """What does not depend on the carry."""
  gates = chunk.gates
  solution = coefficients(spec, plan, gates, chunk.is_token, chunk.position, average)
  previous = None if average is None else running_average(average, chunk.position - 1)
  at_read = solution.before(spec, previous) if spec.read == "before" else solution
  scores = None if spec.read == "chunk_start" else _inner_products(spec, plan, chunk.q, chunk.k, gates.step.dtype)
  at_write = inverse = None
  if spec.exact:
    at_write = solution.before(spec, None)
    if spec.order == "decay_first" and gates.log_keep is not None:
      decay = jnp.exp(jnp.where(chunk.is_token, gates.log_keep, 0))
      at_write = at_write._replace(
        keep=decay * at_write.keep,
        carried=None if at_write.carried is None else decay * at_write.carried,
        writes=decay[:, None] * at_write.writes,
      )
    products = _inner_products(spec, plan, chunk.k, chunk.k, gates.step.dtype)
    inverse = unit_lower_inverse(2 * spec.loss.scale * at_write.writes * products)
    at_write = at_write._replace(writes=None, momentum_kept=None, momentum_writes=None)
  at_end = solution.at_end()
  at_read = at_read._replace(momentum_kept=None, momentum_writes=None)
  return _Prepared(chunk.q, chunk.k, chunk.v, gates.threshold, at_read, at_end, at_write, scores, inverse)


def _chunk(
  spec: Spec, plan: Plan, norm: Any, origin: dict[str, Affine] | None, carry: Carry, anchor: dict[str, Affine], chunk: _Prepared
) -> tuple[jax.Array, jax.Array, Carry]:
  """One chunk of one head: (y [C, V], loss [C], the carry after it with an unchanged anchor)."""
  anchor = anchor if origin is None else jax.tree.map(jnp.add, origin, anchor)
  precision, at_read, at_end = plan.precision, chunk.at_read, chunk.at_end
  q, k, v = (x.astype(at_read.keep.dtype) for x in chunk[:3])
  if spec.exact:
    x, delta, loss = _exact_errors(spec, precision, chunk, origin, carry, k, v)
  else:
    x, delta, loss = errors(spec, _view(spec, anchor), norm, k, v, chunk.threshold, precision)

  def read(name, x_read):
    out = carry.weights[name].scaled(x_read, at_read.keep, plan)
    if origin is not None:
      out += origin[name](x_read, precision)
    if carry.momentum is not None and at_read.carried is not None:
      out += carry.momentum[name].scaled(x_read, at_read.carried, plan)
    scores = chunk.scores if x_read is q else _plus_ones(spec, matmul(x_read, x[name].T, precision))
    out -= matmul(scores * at_read.writes, delta[name], precision)
    return out / spec.retention.scale(anchor[name].join()) if spec.retention.kind == "norm" else out

  if spec.read == "chunk_start":
    used = _view(spec, anchor)
    y = spec.memory.apply(lambda name, x: used[name](x, precision), norm, q)
  else:
    y = spec.memory.apply(read, norm, q)

  def end(name, weights, keep, writes):
    """keep W - sum_j writes_j g_j."""
    inputs, steps, bias = x[name], delta[name], None
    if spec.memory.biases:
      bias = matmul(writes[None], steps, precision)[0]
    if inputs.shape[1] < steps.shape[1]:
      inputs = _scaled_rows(inputs, writes, plan)
    else:
      steps = _scaled_rows(steps, writes, plan)
    change = Affine(matmul(inputs.T, steps, precision), bias)
    return jax.tree.map(lambda w, change: keep * w - change, weights, change)

  weights = {name: end(name, w, at_end.keep, at_end.writes) for name, w in carry.weights.items()}
  momentum = carry.momentum
  if momentum is not None:
    if at_end.carried is not None:
      weights = jax.tree.map(lambda w, s: w + at_end.carried * s, weights, momentum)
    momentum = {name: end(name, s, at_end.momentum_kept, at_end.momentum_writes) for name, s in momentum.items()}
  return y.astype(chunk.v.dtype), loss, Carry(weights, momentum, carry.anchor)


def _scaled_rows(x: jax.Array, s: jax.Array, plan: Plan) -> jax.Array:
  """`s[:, None] * x`; see `scaled` for what a CPU needs."""
  return scaled(x, s) if plan.span is None else s[:, None] * x


def _inner_products(spec: Spec, plan: Plan, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """x y^T [C, C] of queries or keys [C, K] as they came, with the products of the ones that biases are multiplied by."""
  exact_in = x.dtype if plan.precision is SPLIT and x.dtype == y.dtype else None
  return _plus_ones(spec, inner_products(x.astype(dtype), y.astype(dtype), exact_in, plan.precision))


def _plus_ones(spec: Spec, products: jax.Array) -> jax.Array:
  """Inner products [C, C] of inputs, with the products of the ones that biases are multiplied by."""
  return products + 1 if spec.memory.biases else products


def coefficients(
  spec: Spec, plan: Plan, gates: Gates, is_token: jax.Array, position: jax.Array, average: jax.Array | None
) -> Coefficients:
  """The coefficients of a chunk from gates, `is_token` and `position`, [C] each. Empty slots change nothing."""
  theta = jnp.where(is_token, gates.step, 0)
  ones = jnp.ones_like(theta)
  if spec.average:
    share = running_average(average, position)
    writes = share[:, None] * jnp.tril(jnp.broadcast_to(theta[None], (theta.size, theta.size)))
    return Coefficients(ones, share, writes, ones[0], theta)
  log_keep, log_momentum = (None if g is None else jnp.where(is_token, g, 0) for g in (gates.log_keep, gates.log_momentum))
  decay = _decays(plan, log_keep, theta)
  keep = ones if log_keep is None else decay[:, 0] * jnp.exp(log_keep[0])
  if not spec.momentum:
    return Coefficients(keep, None, decay * theta[None], None, None)
  momentum_decay = _decays(plan, log_momentum, theta)
  steps = momentum_decay * theta[None]
  kept = ones if log_momentum is None else momentum_decay[:, 0] * jnp.exp(log_momentum[0])
  decay = jnp.where(is_token[None], decay, 0)
  carried = matmul(decay, kept[:, None], plan.precision)[:, 0]
  return Coefficients(keep, carried, matmul(decay, steps, plan.precision), kept[-1], steps[-1])


def _decays(plan: Plan, log_gate: jax.Array | None, like: jax.Array) -> jax.Array:
  """L [C, C] with L_ti = g_{i+1} ... g_t for i <= t, and 0 above; from log g [C], -inf included."""
  size = like.size
  row, column = jnp.arange(size)[:, None], jnp.arange(size)[None]
  if log_gate is None:
    return (row >= column).astype(like.dtype)
  # A product with a matrix of ones is faster than a cumulative sum, but must not contain infinities. exp(_FORGOTTEN) is 0.
  after = jnp.where(row > column, jnp.maximum(log_gate, _FORGOTTEN)[:, None], 0)
  log_decay = sums((row >= column).astype(like.dtype), after, plan.precision)
  return jnp.where(row >= column, jnp.exp(log_decay), 0)


def errors(
  spec: Spec,
  weights: dict[str, Affine],
  norm: tuple[jax.Array, jax.Array] | None,
  k: jax.Array,
  v: jax.Array,
  threshold: jax.Array | None,
  precision: Precision = FULL,
) -> tuple[Weights, Weights, jax.Array]:
  """Gradients of the tokens' losses at `weights`, as factors: x [C, in] and delta [C, out] of each matrix, and loss [C].

  delta is the gradient with respect to zeros that are added to the output of each matrix, and that of its bias.
  """

  def run(zeros):
    x = {}

    def linear(name, x_in):
      x[name] = x_in
      return weights[name](x_in, precision) + zeros[name]

    return spec.memory.apply(linear, norm, k), x

  zeros = {name: jnp.zeros((k.shape[0], columns), k.dtype) for name, (_, columns) in spec.memory.shapes().items()}
  zeros = varying_alike(k, zeros)  # else the gradient by them would be summed over devices
  out, pull_back, x = jax.vjp(run, zeros, has_aux=True)
  loss, by_out = jax.vjp(lambda out: spec.loss(out, v, threshold), out)
  (psi,) = by_out(jnp.ones_like(loss))
  if spec.clip is None:
    return x, pull_back(psi)[0], loss
  (delta,) = pull_back(shortened(psi, length(psi), spec.clip))

  def size(name):
    """Length of each token's gradient by a matrix and its bias."""
    row = jnp.concatenate([x[name], jnp.ones_like(x[name][:, :1])], axis=1) if spec.memory.biases else x[name]
    return length(row) * length(delta[name])

  return x, {name: shortened(d, size(name), spec.clip) for name, d in delta.items()}, loss


def _exact_errors(
  spec: Spec,
  precision: Precision,
  chunk: _Prepared,
  origin: dict[str, Affine] | None,
  carry: Carry,
  k: jax.Array,
  v: jax.Array,
) -> tuple[Weights, Weights, jax.Array]:
  """`errors` of a linear memory at W_{t-1}. W_{t-1} contains the earlier errors, so they solve a triangular system.

      (I + 2c (P^- * K K^T)) E = A^- * K W_0 + f^- * K S_0 - V        delta = 2c E
  """
  before, strength = chunk.at_write, 2 * spec.loss.scale

  def linear(name, x):
    out = before.keep[:, None] * carry.weights[name](x, precision)
    out = out if origin is None else out + origin[name](x, precision)
    return out if before.carried is None else out + before.carried[:, None] * carry.momentum[name](x, precision)

  error = matmul(chunk.inverse, spec.memory.apply(linear, None, k) - v, precision)
  return {"0": k}, {"0": strength * error}, spec.loss.scale * jnp.sum(error * error, axis=-1)
