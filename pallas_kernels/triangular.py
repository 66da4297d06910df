"""Inverse of unit lower-triangular matrices, which the chunked delta rules need.

Blocks are inverted recursively,

    [[I + A11, 0], [A21, I + A22]]^-1 = [[X11, 0], [-X22 A21 X11, X22]],      X = (I + A)^-1,

so every intermediate result is a block of the inverse and no larger than it. The shorter formula (I - A)(I + A^2)(I + A^4)...
is not usable: for correlated keys the powers of A grow like binomial coefficients and cancel only at the end (relative error
1e18 in float32 for 64 equal keys).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .numerics import matmul

# A part of the names of all instructions of an inverse.
SCOPE = "triangular_inverse"
_BASE = 8


@jax.named_scope(SCOPE)
def unit_lower_inverse(a: jax.Array) -> jax.Array:
  """(I + a)^-1 for strictly lower-triangular `a` [..., n, n]; entries on and above the diagonal must be zero."""
  return _by_halves(a)


def _by_halves(a):
  n = a.shape[-1]
  if n <= _BASE or n % 2:
    return _eliminate(a)
  h = n // 2
  first, second = _by_halves(jnp.stack([a[..., :h, :h], a[..., h:, h:]]))
  below = -matmul(second, matmul(a[..., h:, :h], first))
  top = jnp.concatenate([first, jnp.zeros_like(below)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


@jax.named_scope(SCOPE)
def unit_lower_inverse_in_lanes(a: jax.Array, order: Sequence[int]) -> jax.Array:
  """(I + a)^-1 of many matrices a [N, n, n], for GPUs and TPUs.

  Blocks on the diagonal, with as many rows as `order` has, are inverted by substitution, one row at a time, with the matrices
  in the last axis, the lanes of a vector unit. Pairs of blocks are then joined, X <- X - X A' X, where A' is the part of `a`
  that joins them.

  Args:
    a: strictly lower-triangular if the rows of each diagonal block are taken in `order`; blocks above the diagonal are zero.
    order: the order of the rows within a diagonal block. n is its length times a power of two.
  """
  count, n, _ = a.shape
  base = len(order)
  blocks = n // base
  diagonal = jnp.stack([a[:, i : i + base, i : i + base] for i in range(0, n, base)])
  lanes = jnp.moveaxis(diagonal.reshape(-1, base, base), 0, -1)
  rows: dict[int, jax.Array] = {}
  for i in order:
    row = jnp.broadcast_to(jnp.asarray(np.eye(base)[i], a.dtype)[:, None], lanes.shape[1:])
    for j, known in rows.items():
      row = row - lanes[i, j][None] * known
    rows[i] = row
  inverse = jnp.moveaxis(jnp.stack([rows[i] for i in range(base)]), -1, 0).reshape(blocks, count, base, base)
  padded = [jnp.pad(x, ((0, 0), (0, 0), (i * base, n - (i + 1) * base))) for i, x in enumerate(inverse)]
  x = jnp.concatenate(padded, axis=1)
  index = np.arange(n)
  while base < n:
    together = index[:, None] // (2 * base) == index // (2 * base)
    joins = together & (index[:, None] // base != index // base)
    x = x - matmul(x, matmul(jnp.where(jnp.asarray(joins)[None], a, 0), x))
    base *= 2
  return x


def _eliminate(a: jax.Array) -> jax.Array:
  """Forward substitution, one column of `a` at a time, against the identity."""
  n = a.shape[-1]
  x = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape)
  for j in range(n - 1):
    x = x - a[..., :, j, None] * x[..., j, None, :]
  return x
