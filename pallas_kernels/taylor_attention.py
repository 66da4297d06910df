"""Attention with the Taylor polynomial 1 + s + s^2 / 2 in place of e^s, as linear attention over features.

    phi(q) . phi(k) = 1 + s + s^2 / 2        s = q . k F^{-1/2}, for queries and keys of F channels
    S_t = S_{t-1} + phi(k_t) [v_t, 1]^T      [n_t, z_t] = S_t^T phi(q_t)      o_t = n_t / (z_t + 1e-12)

The weights are at least 1/2, so z is positive, and o an average of values. phi has 1 + F + F (F + 1) / 2 channels: products of
two different channels occur once, not twice. Source: Based (Arora et al. 2024, arXiv:2402.18668).
"""

from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp

from . import delta_rule
from .numerics import accumulator

_EPSILON = 1e-12
# The backward pass computes the features again, and keeps no more than queries, keys and values.
_KEPT = jax.checkpoint_policies.save_only_these_names(delta_rule.OUTPUT, delta_rule.KEPT)


def taylor_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, *, initial_state: jax.Array | None = None, **options: Unpack[delta_rule.Options]
) -> tuple[jax.Array, jax.Array]:
  """Averages of values with weights 1 + s + s^2 / 2, s = q . k F^{-1/2}, over the tokens so far.

  Args:
    q, k: [B, T, Hk, F], of any length.
    v: [B, T, Hv, V].
    initial_state: S, [B, Hv, features, V + 1], whose last column is the sum of all keys' features; zeros by default.
    **options: of `delta_rule.linear_attention`, except `scale`.

  Returns:
    The averages [B, T, Hv, V] in v's dtype, and the final state, float32 (float64 where inputs are).

  Raises:
    ValueError, TypeError: as `delta_rule.linear_attention`.
  """

  def run(q, k, v, state):
    values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    features = taylor_features(q), taylor_features(k)
    total, state = delta_rule.linear_attention(*features, values, scale=1.0, initial_state=state, **options)
    wide = total.astype(state.dtype)
    return (wide[..., :-1] / (wide[..., -1:] + _EPSILON)).astype(v.dtype), state

  return jax.checkpoint(run, policy=_KEPT)(q, k, v, initial_state)


def taylor_features(x: jax.Array) -> jax.Array:
  """phi(x), [..., features] in the dtype of x [..., F]."""
  width, dtype = x.shape[-1], accumulator(x)
  number = partial(jnp.asarray, dtype=dtype)
  wide = x.astype(dtype) * number(width**-0.25)
  # Products of channels that are n apart. One of two different channels stands for two terms of the square.
  products = (wide[..., : width - n] * wide[..., n:] * number(1.0 if n else 0.5**0.5) for n in range(width))
  return jnp.concatenate([jnp.ones_like(wide[..., :1]), wide, *products], axis=-1).astype(x.dtype)


def count_features(width: int) -> int:
  """The number of channels of phi(x), for x of `width` channels."""
  return 1 + width + width * (width + 1) // 2
