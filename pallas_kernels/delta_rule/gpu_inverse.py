"""Inverses of unit lower-triangular matrices of 64 rows on a Hopper GPU, in one kernel.

Pairs of blocks on the diagonal are joined, X <- X - X A' X, where A' is the part of A that joins them, from single rows to the
whole matrix. X has nothing outside of its blocks, so X A X has what X A' X has where A' is; the rest of it is left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..compat import varying_shape
from .gpu_tiles import BY_LANES, COLUMNS, Parts, load, operand, product, put


def unit_lower_inverse(a: jax.Array, *, interpret: Any = False) -> jax.Array:
  """(I + a)^-1 for strictly lower-triangular float32 matrices a [N, 64, 64], with products of two bfloat16 parts."""
  parts = operand(2, COLUMNS, COLUMNS)
  return plgpu.kernel(
    _delta_rule_inverse,
    out_type=varying_shape(a.shape, jnp.float32, like=[a]),
    scratch_types=[parts, parts, parts],
    grid=a.shape[:1],
    grid_names=("matrix",),
    compiler_params=BY_LANES,
    interpret=interpret,
  )(a)


def _delta_rule_inverse(a_ref: Any, x_ref: Any, *operands: Any) -> None:
  matrix = lax.axis_index("matrix")
  x_ref[matrix] = inverse_of(load(a_ref.at[matrix], shared=False), *([ref.at[part] for part in range(2)] for ref in operands))


def inverse_of(a: jax.Array, given: Parts, inverse: Parts, between: Parts) -> jax.Array:
  """In a kernel: (I + a)^-1 of a tile; the parts are its working memory."""
  row, column = (plgpu.broadcasted_iota(jnp.int32, a.shape, axis, layout=plgpu.Layout.WGMMA) for axis in range(2))

  def together(level):
    """Whether a row and a column are in one block of 2^level."""
    return lax.shift_right_logical(row, level) == lax.shift_right_logical(column, level)

  put(given, a)
  x = jnp.where(row == column, 1.0, 0.0) - jnp.where(together(1), a, 0.0)
  for level in range(1, COLUMNS.bit_length() - 1):
    put(inverse, x)
    put(between, product(given, inverse))
    between_blocks = jnp.where(together(level), 0.0, product(inverse, between))
    x = x - jnp.where(together(level + 1), between_blocks, 0.0)
  return x
