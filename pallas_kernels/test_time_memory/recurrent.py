"""The oracle: the gradient of each token by autodiff, one token after the other.

    S_t = eta_t S_{t-1} - theta_t grad l(f(W_anchor; k_t), v_t)     W_t = W_o + a_t (W_{t-1} - W_o) + S_t     y_t = f(W_t; q_t)
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..documents import Documents
from .spec import Carry, Gates, InitialWeights, Spec, forward, length, running_average, shortened


def recurrent(
  spec: Spec,
  initial: InitialWeights,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: Gates,
  carry: Carry,
  count: jax.Array,
  docs: Documents,
) -> tuple[jax.Array, jax.Array, Carry, jax.Array]:
  """q, k, v [B, T, H, .], gates [B, T, H], a carry [B, H, ...] and its count [B]; to (y, loss, carry, count)."""

  def one_head(initial, q, k, v, gates, carry, count, is_token, starts):
    """One head of one row: q, k [T, K], v [T, V], the rest [T]."""

    def step(memory, token):
      is_token, starts, *token = token
      fresh = spec.carry(initial.weights, initial.momentum), jnp.int32(0)
      memory = jax.tree.map(lambda a, b: jnp.where(starts, a, b), fresh, memory)
      y, loss, after = _step(spec, initial, memory, *token)
      memory = jax.tree.map(lambda a, b: jnp.where(is_token, a, b), after, memory)
      return memory, (jnp.where(is_token, y, 0), jnp.where(is_token, loss, 0))

    memory, out = jax.lax.scan(step, (carry, count), (is_token, starts, q, k, v, gates))
    return *out, *memory

  starts = docs.starts
  over_heads = jax.vmap(one_head, (0, 1, 1, 1, 1, 0, None, None, None), (1, 1, 0, None))
  over_rows = jax.vmap(over_heads, (None, *[0] * 8))
  return over_rows(initial, q, k, v, gates, carry, count, docs.is_token, starts)


def _step(spec: Spec, initial: InitialWeights, memory: Any, q: jax.Array, k: jax.Array, v: jax.Array, gates: Gates) -> Any:
  """One token of one head: its output, its loss, and the memory after it."""
  carry, count = memory
  keep = 1.0 if gates.log_keep is None else jnp.exp(gates.log_keep)
  anchor = carry.anchor if spec.keeps_anchor else carry.weights
  start = jax.tree.map(lambda w: w if spec.decay_to == "start" else 0, initial.weights)

  def decayed(weights):
    return jax.tree.map(lambda w, to: to + keep * (w - to), weights, start)

  if spec.order == "decay_first":
    anchor = decayed(anchor)

  out, pull_back = jax.vjp(lambda weights: forward(spec, weights, initial.norm, k), spec.view(anchor))
  loss, psi = jax.value_and_grad(lambda out: spec.loss(out, v, gates.threshold))(out)
  (gradient,) = pull_back(_clip(spec.clip, psi))
  gradient = jax.tree.map(lambda g: gates.step * _clip(spec.clip, g), gradient)
  if spec.average:
    share = [running_average(initial.average, place) for place in (count - 1, count)]
    momentum = jax.tree.map(lambda s, g: s - g, carry.momentum, gradient)
    before, after = (
      jax.tree.map(lambda w, s, r=r: w + r * s, carry.weights, sums)
      for r, sums in zip(share, (carry.momentum, momentum), strict=True)
    )
  else:
    kept = 1.0 if gates.log_momentum is None else jnp.exp(gates.log_momentum)
    update = jax.tree.map(lambda g: -g, gradient)
    momentum = jax.tree.map(lambda s, u: kept * s + u, carry.momentum, update) if spec.momentum else None
    before = carry.weights
    after = jax.tree.map(jnp.add, decayed(before), momentum if spec.momentum else update)

  y = _read(spec, initial, {"after": after, "before": before, "chunk_start": anchor}[spec.read], anchor, q)
  full = count == spec.chunk_size - 1
  return y, loss, (_next(spec, carry, after, momentum, full), jnp.where(full, 0, count + 1))


def _read(spec: Spec, initial: InitialWeights, weights: Any, anchor: Any, q: jax.Array) -> jax.Array:
  """f(view of the weights; q). The divisor of a "norm" retention is that of the anchor."""
  if spec.retention.kind == "norm":
    weights = jax.tree.map(lambda a, at: a / spec.retention.scale(at), weights, anchor)
  else:
    weights = spec.view(weights)
  return forward(spec, weights, initial.norm, q)


def _next(spec: Spec, carry: Carry, weights: Any, momentum: Any, full: jax.Array) -> Carry:
  def if_full(yes, no):
    return jax.tree.map(lambda a, b: jnp.where(full, a, b), yes, no)

  if spec.average:
    return Carry(if_full(weights, carry.weights), if_full(jax.tree.map(jnp.zeros_like, momentum), momentum), None)
  return Carry(weights, momentum, if_full(weights, carry.anchor) if spec.keeps_anchor else None)


def _clip(limit: float | None, x: jax.Array) -> jax.Array:
  """x, of any shape, scaled to a Euclidean norm of at most `limit`."""
  return x if limit is None else shortened(x.reshape(-1), length(x.reshape(-1)), limit).reshape(x.shape)
