"""Inverse of unit lower-triangular matrices, which the chunked delta rules need.

Blocks are inverted recursively,

    [[I + A11, 0], [A21, I + A22]]^-1 = [[X11, 0], [-X22 A21 X11, X22]],      X = (I + A)^-1,

so every intermediate result is a block of the inverse and no larger than it. The shorter formula (I - A)(I + A^2)(I + A^4)...
is not usable: for correlated keys the powers of A grow like binomial coefficients and cancel only at the end (relative error
1e18 in float32 for 64 equal keys).
"""

import jax
import jax.numpy as jnp

from .numerics import matmul

_BASE = 8


def unit_lower_inverse(a: jax.Array) -> jax.Array:
  """(I + a)^-1 for strictly lower-triangular `a` [..., n, n]; entries on and above the diagonal must be zero."""
  n = a.shape[-1]
  if n <= _BASE or n % 2:
    return _eliminate(a)
  h = n // 2
  first, second = unit_lower_inverse(jnp.stack([a[..., :h, :h], a[..., h:, h:]]))
  below = -matmul(second, matmul(a[..., h:, :h], first))
  top = jnp.concatenate([first, jnp.zeros_like(below)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def _eliminate(a: jax.Array) -> jax.Array:
  """Forward substitution, one column of `a` at a time, against the identity."""
  n = a.shape[-1]
  x = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape)
  for j in range(n - 1):
    x = x - a[..., :, j, None] * x[..., j, None, :]
  return x
