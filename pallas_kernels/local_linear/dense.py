"""The reference: all pairs at once, and a direct solve for every query."""

from typing import Any

import jax.numpy as jnp

from ..numerics import accumulator, einsum
from .spec import Allowed, Spec


def dense(spec: Spec, q: Any, k: Any, v: Any, ridge: Any, allowed: Allowed) -> Any:
  """The operation for q [B, T, H, d], k [B, S, Hk, d], v [B, S, Hk, V], ridge [B, T, H]; y [B, T, H, V] in v's dtype.

  It keeps arrays of [B, H, T, S, d]. JAX differentiates it in both modes.
  """
  wide, groups = accumulator(q, k, v), q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, groups, axis=2).astype(wide) for x in (k, v))
  q, ridge = q.astype(wide), ridge.astype(wide)
  mask = allowed.mask(spec.window)[:, None]
  logits = jnp.where(mask, spec.scale * einsum("bthd,bshd->bhts", q, k), -jnp.inf)
  seen = jnp.any(mask, axis=-1, keepdims=True)
  weights = jnp.where(mask, jnp.exp(logits - jnp.where(seen, jnp.max(logits, axis=-1, keepdims=True), 0)), 0)
  p = weights / jnp.where(seen, jnp.sum(weights, axis=-1, keepdims=True), 1)
  mean = einsum("bhts,bshd->bhtd", p, k)
  centred = jnp.moveaxis(k, 1, 2)[:, :, None] - mean[:, :, :, None]  # [B, H, T, S, d]
  covariance = jnp.einsum("bhts,bhtsd,bhtse->bhtde", p, centred, centred, precision="highest")
  block = jnp.arange(q.shape[-1]) // (q.shape[-1] // spec.blocks)
  covariance = jnp.where((block[:, None] == block[None])[None, None, None], covariance, 0)
  ridge = jnp.moveaxis(ridge, 1, 2)[..., None]
  shift = jnp.moveaxis(q, 1, 2) - mean
  identity = jnp.eye(q.shape[-1], dtype=wide)[None, None, None]
  x = jnp.linalg.solve(covariance + ridge[..., None] * identity, shift[..., None])[..., 0]
  factor = 1 + einsum("bhtsd,bhtd->bhts", centred, x)
  return einsum("bhts,bshv->bthv", p * factor, v).astype(v.dtype)
