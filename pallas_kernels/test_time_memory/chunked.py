"""The chunk-parallel form. It computes the gradients of a whole chunk at once and never forms the weights of single tokens.

Gradients of a chunk are taken at its anchor, so like gates and steps they are known inputs of a linear recurrence. Its solution
has the same triangular coefficients for every matrix of the memory,

    W_t = A_t W_0 + f_t S_0 - sum_{j<=t} P_tj g_j        S_t = m_t S_0 - sum_{j<=t} R_tj g_j
    R = L_eta diag(theta)        P = L_a R        f = L_a m

with (L_a)_ti = a_{i+1} ... a_t, and likewise L_eta. Every g_j is an outer product x_j^T delta_j of a layer's input and the
cotangent of its output, so a read does not need W_t:

    x W_t  =  A_t x W_0 + f_t x S_0 - sum_{j<=t} P_tj (x . x_j) delta_j

Products of gates are exponentials of masked sums of logarithms, not quotients, and exact for gates of 0. A scan runs over
chunks; the backward pass keeps the carries between chunks and recomputes the rest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..documents import select_rows
from ..numerics import matmul, scaled
from ..triangular import unit_lower_inverse
from .layout import Layout
from .spec import Carry, Gates, InitialWeights, Spec, Weights, forward, length, running_average, shortened

_FORGOTTEN = -1e4


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
  writes: jax.Array
  momentum_kept: jax.Array | None
  momentum_writes: jax.Array | None

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


class _Chunk(NamedTuple):
  """A chunk of one head: q, k [C, K], v [C, V]; gates, `is_token` and `position` are [C]."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  gates: Gates
  is_token: jax.Array
  position: jax.Array


def chunked(
  spec: Spec, initial: InitialWeights, q: jax.Array, k: jax.Array, v: jax.Array, gates: Gates, carry: Carry, layout: Layout
) -> tuple[jax.Array, jax.Array, Carry]:
  """q, k, v [B, T, H, .], gates [B, T, H] and a carry [B, H, ...] to (y [B, T, H, V], loss [B, T, H], the next carry)."""
  batch, tokens, heads = q.shape[:3]

  def by_chunk(x):
    """[B, N, ...] -> [N, B, ...]"""
    return jnp.swapaxes(x, 0, 1)

  def by_head(x):
    """[B, C, H, ...] -> [B * H, C, ...]"""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(-1, *x.shape[2:])

  def by_row(x):
    """[B, ...] -> [B * H, ...]"""
    return jnp.repeat(x, heads, axis=0)

  def every_row(x):
    """[H, ...] -> [B * H, ...]"""
    return jnp.broadcast_to(x[None], (batch, *x.shape)).reshape(-1, *x.shape[1:])

  rows = jax.tree.map(every_row, initial)
  start = spec.carry(rows.weights, rows.momentum)
  incoming = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry)
  if layout.open is None:  # all chunks are whole: the weights at the end of one are the anchor of the next
    start, incoming = start._replace(anchor=None), incoming._replace(anchor=None)

  @jax.checkpoint
  def step(carry, inputs):
    of_tokens, of_rows = inputs
    q, k, v, gates = jax.tree.map(by_head, of_tokens)
    is_token, position, fresh, still_open, continues = jax.tree.map(by_row, of_rows)
    chunk = _Chunk(q, k, v, gates, is_token, position)
    carry = select_rows(fresh, start, carry)
    anchor = carry.weights
    if incoming.anchor is not None:
      anchor = select_rows(continues, incoming.anchor, anchor)
    y, loss, after = jax.vmap(lambda *args: _chunk(spec, *args))(rows, carry, anchor, chunk)
    out = jnp.concatenate([y, loss[..., None]], axis=-1).reshape(batch, heads, *y.shape[1:-1], -1)
    return _next_carry(spec, carry, anchor, after, is_token, still_open), jnp.moveaxis(out, 1, 2)

  chunks = jax.tree.map(lambda x: by_chunk(layout.chunks(x)), (q, k, v, gates)), jax.tree.map(by_chunk, tuple(layout[:5]))
  carry, out = jax.lax.scan(step, incoming, chunks)
  out = layout.tokens(by_chunk(out), tokens)  # [B, T, H, V + 1]
  if layout.open is None and spec.keeps_anchor:
    carry = carry._replace(anchor=carry.weights)
  carry = jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), carry)
  return out[..., :-1], out[..., -1], layout.poison(carry)


def _next_carry(
  spec: Spec, before: Carry, anchor: Weights, after: Carry, is_token: jax.Array, still_open: jax.Array | None
) -> Carry:
  """The carry of the next chunk. While a chunk is open, its anchor is kept."""
  if spec.average:
    closed = after._replace(momentum=jax.tree.map(jnp.zeros_like, after.momentum))
    return select_rows(still_open, after._replace(weights=anchor), closed)
  if before.anchor is None:
    return after
  kept = select_rows(jnp.any(is_token, axis=1), anchor, before.anchor)
  return after._replace(anchor=select_rows(still_open, kept, after.weights))


def _chunk(
  spec: Spec, initial: InitialWeights, carry: Carry, anchor: Weights, chunk: _Chunk
) -> tuple[jax.Array, jax.Array, Carry]:
  """One chunk of one head: (y [C, V], loss [C], the carry after it with an unchanged anchor)."""
  solution = coefficients(spec, chunk.gates, chunk.is_token, chunk.position, initial.average)
  previous = None if initial.average is None else running_average(initial.average, chunk.position - 1)
  if spec.exact:
    x, delta, loss = _exact_errors(spec, solution, carry, chunk)
  else:
    x, delta, loss = errors(spec, spec.view(anchor), initial.norm, chunk.k, chunk.v, chunk.gates.threshold)
  at_read = solution.before(spec, previous) if spec.read == "before" else solution

  def read(name, x_read):
    out = scaled(matmul(x_read, carry.weights[name]), at_read.keep)
    if at_read.carried is not None:
      out += scaled(matmul(x_read, carry.momentum[name]), at_read.carried)
    out -= matmul(matmul(x_read, x[name].T) * at_read.writes, delta[name])
    return out / spec.retention.scale(anchor[name]) if spec.retention.kind == "norm" else out

  if spec.read == "chunk_start":
    y = forward(spec, spec.view(anchor), initial.norm, chunk.q)
  else:
    y = spec.memory.apply(read, initial.norm, chunk.q)

  def end(keep, carried, writes, weights):
    def sum_up(name):
      total = keep * weights[name] - matmul(scaled(x[name], writes).T, delta[name])
      return total if carried is None else total + carried * carry.momentum[name]

    return {name: sum_up(name) for name in weights}

  last = None if solution.carried is None else solution.carried[-1]
  weights = end(solution.keep[-1], last, solution.writes[-1], carry.weights)
  momentum = None
  if spec.accumulates:
    momentum = end(solution.momentum_kept, None, solution.momentum_writes, carry.momentum)
  return y, loss, Carry(weights, momentum, carry.anchor)


def coefficients(
  spec: Spec, gates: Gates, is_token: jax.Array, position: jax.Array, average: jax.Array | None
) -> Coefficients:
  """The coefficients of a chunk from gates, `is_token` and `position`, [C] each. Empty slots change nothing."""
  theta = jnp.where(is_token, gates.step, 0)
  ones = jnp.ones_like(theta)
  if spec.average:
    share = running_average(average, position)
    writes = share[:, None] * jnp.tril(jnp.broadcast_to(theta[None], (theta.size, theta.size)))
    return Coefficients(ones, share, writes, ones[0], theta)
  log_keep, log_momentum = (None if g is None else jnp.where(is_token, g, 0) for g in (gates.log_keep, gates.log_momentum))
  keep = ones if log_keep is None else jnp.exp(jnp.cumsum(log_keep))
  decay = _products(log_keep, theta)
  if not spec.momentum:
    return Coefficients(keep, None, decay * theta[None], None, None)
  steps = _products(log_momentum, theta) * theta[None]
  kept = ones if log_momentum is None else jnp.exp(jnp.cumsum(log_momentum))
  decay = jnp.where(is_token[None], decay, 0)
  carried = matmul(decay, kept[:, None])[:, 0]
  return Coefficients(keep, carried, matmul(decay, steps), kept[-1], steps[-1])


def _products(log_gate: jax.Array | None, like: jax.Array) -> jax.Array:
  """L [C, C] with L_ti = g_{i+1} ... g_t for i <= t, and 0 above; from log g [C], -inf included."""
  size = like.size
  row, column = jnp.arange(size)[:, None], jnp.arange(size)[None]
  if log_gate is None:
    return (row >= column).astype(like.dtype)
  # A product with a matrix of ones is faster than a cumulative sum, but must not contain infinities. exp(_FORGOTTEN) is 0.
  after = jnp.where(row > column, jnp.maximum(log_gate, _FORGOTTEN)[:, None], 0)
  sums = matmul((row >= column).astype(like.dtype), after)
  return jnp.where(row >= column, jnp.exp(sums), 0)


def errors(
  spec: Spec,
  weights: Weights,
  norm: tuple[jax.Array, jax.Array] | None,
  k: jax.Array,
  v: jax.Array,
  threshold: jax.Array | None,
) -> tuple[Weights, Weights, jax.Array]:
  """Gradients of the tokens' losses at `weights`, as factors: x [C, in] and delta [C, out] of each matrix, and loss [C].

  delta is the gradient with respect to zeros that are added to the output of each matrix.
  """
  shapes = spec.memory.shapes()

  def run(zeros):
    x = {}

    def linear(name, x_in):
      x[name] = x_in
      return matmul(x_in, weights[name]) + zeros[name]

    return spec.memory.apply(linear, norm, k), x

  zeros = {name: jnp.zeros((*k.shape[:-1], columns), k.dtype) for name, (_, columns) in shapes.items()}
  out, pull_back, x = jax.vjp(run, zeros, has_aux=True)
  loss, by_out = jax.vjp(lambda out: spec.loss(out, v, threshold), out)
  (psi,) = by_out(jnp.ones_like(loss))
  if spec.clip is None:
    return x, pull_back(psi)[0], loss
  (delta,) = pull_back(shortened(psi, length(psi), spec.clip))
  return x, {name: shortened(d, length(x[name]) * length(d), spec.clip) for name, d in delta.items()}, loss


def _exact_errors(spec: Spec, solution: Coefficients, carry: Carry, chunk: _Chunk) -> tuple[Weights, Weights, jax.Array]:
  """`errors` of a linear memory at W_{t-1}. W_{t-1} contains the earlier errors, so they solve a triangular system.

      (I + 2c (P^- * K K^T)) E = A^- * K W_0 + f^- * K S_0 - V        delta = 2c E
  """
  before, name, strength = solution.before(spec, None), "0", 2 * spec.loss.scale
  if spec.order == "decay_first" and chunk.gates.log_keep is not None:
    decay = jnp.exp(jnp.where(chunk.is_token, chunk.gates.log_keep, 0))
    before = before._replace(
      keep=decay * before.keep,
      carried=None if before.carried is None else decay * before.carried,
      writes=decay[:, None] * before.writes,
    )
  x = {}

  def linear(name, x_in):
    x[name] = x_in
    out = before.keep[:, None] * matmul(x_in, carry.weights[name])
    return out if before.carried is None else out + before.carried[:, None] * matmul(x_in, carry.momentum[name])

  error = spec.memory.apply(linear, None, chunk.k) - chunk.v
  error = matmul(unit_lower_inverse(strength * before.writes * matmul(x[name], x[name].T)), error)
  return x, {name: strength * error}, spec.loss.scale * jnp.sum(error * error, axis=-1)
