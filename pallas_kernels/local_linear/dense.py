"""The reference: all pairs at once, and a direct solve for every query."""

import jax
import jax.numpy as jnp

from ..numerics import accumulator, einsum
from .spec import Allowed, Spec


def dense(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, ridge: jax.Array, allowed: Allowed) -> jax.Array:
  """The operation for q [B, T, H, d], k [B, S, Hk, d], v [B, S, Hk, V], ridge [B, T, H, 1]; y [B, T, H, V] in v's dtype.

  With `spec.given`, x [B, T, H, d] is in place of the ridge. It keeps arrays of [B, H, T, S, d]. JAX differentiates it.
  """
  wide, groups = accumulator(q, k, v), q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, groups, axis=2).astype(wide) for x in (k, v))
  q, ridge = q.astype(wide), jnp.moveaxis(ridge.astype(wide), 1, 2)
  mask = allowed.mask(spec.window)[:, None]
  logits = jnp.where(mask, spec.scale * einsum("bthd,bshd->bhts", q, k), -jnp.inf)
  seen = jnp.any(mask, axis=-1, keepdims=True)
  weights = jnp.where(mask, jnp.exp(logits - jnp.where(seen, jnp.max(logits, axis=-1, keepdims=True), 0)), 0)
  p = weights / jnp.where(seen, jnp.sum(weights, axis=-1, keepdims=True), 1)
  mean = einsum("bhts,bshd->bhtd", p, k)
  centred = jnp.moveaxis(k, 1, 2)[:, :, None] - mean[:, :, :, None]  # [B, H, T, S, d]
  x = ridge if spec.given else _solution(spec, p, centred, ridge, jnp.moveaxis(q, 1, 2) - mean)
  factor = 1 + einsum("bhtsd,bhtd->bhts", centred, x)
  return einsum("bhts,bshv->bthv", p * factor, v).astype(v.dtype)


def _solution(spec: Spec, p: jax.Array, centred: jax.Array, ridge: jax.Array, shift: jax.Array) -> jax.Array:
  """x [B, H, T, d]."""
  width = shift.shape[-1]
  covariance = jnp.einsum("bhts,bhtsd,bhtse->bhtde", p, centred, centred, precision="highest")
  block = jnp.arange(width) // (width // spec.blocks)
  covariance = jnp.where((block[:, None] == block[None])[None, None, None], covariance, 0)
  identity = jnp.eye(width, dtype=shift.dtype)[None, None, None]
  return jnp.linalg.solve(covariance + ridge[..., None] * identity, shift[..., None])[..., 0]
