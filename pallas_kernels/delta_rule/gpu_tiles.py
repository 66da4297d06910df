"""Products of tiles on a Hopper GPU, in Pallas' Mosaic GPU dialect.

A warp group of 128 threads keeps float32 tiles of 64 columns in its registers, spread over them as its matrix unit does. That
unit reads bfloat16 operands from shared memory. A float32 tile becomes an operand as two parts, its rounding and the rest.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..compat import load_on_gpu, transposed_on_gpu
from ..numerics import rounded

COLUMNS = 64  # of a tile in registers; and the fewest rows of a product

# Layouts are stated by the code. From JAX 0.11 on, the default is to infer them, which takes minutes for some of these kernels.
BY_LANES = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)

# The parts of a matrix in shared memory, bfloat16.
Parts = Sequence[Any]


def operand(*shape: int) -> Any:
  """Shared memory for bfloat16 matrices [..., rows, columns] in the order that the matrix unit reads."""
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def split(x: jax.Array) -> jax.Array:
  """Outside of a kernel: the parts of float32 matrices [..., rows, columns], [..., 2, rows, columns]."""
  high = rounded(x)
  return jnp.stack([high, x - high], axis=-3).astype(jnp.bfloat16)


def load(ref: Any, *, shared: bool = True) -> jax.Array:
  """A tile, float32, from shared or global memory."""
  return load_on_gpu(ref, plgpu.Layout.WGMMA, optimized=shared).astype(jnp.float32)


def rows(ref: Any, tile: jax.Array) -> jax.Array:
  """`tile` times a factor for each of its rows, the first elements of a vector in shared memory."""
  return by_row(ref, tile.shape) * tile


def by_column(ref: Any, shape: tuple[int, int]) -> jax.Array:
  """A tile of this shape whose rows are the first elements of a vector in shared memory."""
  return _spread(ref, shape, 1)


def by_row(ref: Any, shape: tuple[int, int]) -> jax.Array:
  """The same with columns in place of rows."""
  return _spread(ref, shape, 0)


def _spread(ref, shape, axis):
  vector = load_on_gpu(ref.at[pl.ds(0, shape[axis])], plgpu.Layout.WGMMA.reduce(1 - axis))
  return lax.broadcast_in_dim(vector, shape, [axis])


def put(refs: Parts, tile: jax.Array) -> None:
  """Makes a tile an operand. No thread may be reading the last one: every thread waits before and after."""
  high = tile.astype(jnp.bfloat16)
  plgpu.commit_smem()
  refs[0][...] = high
  refs[1][...] = (tile - high.astype(jnp.float32)).astype(jnp.bfloat16)
  plgpu.commit_smem()


def transposed(parts: Parts) -> Parts:
  """The parts of the transposed matrix."""
  return [transposed_on_gpu(part) for part in parts]


def product(x: Parts, y: Parts) -> jax.Array:
  """x y, a tile, without the product of two remainders."""
  shape = x[0].shape[0], y[0].shape[1]

  def run(total):
    for i, one in enumerate(x):
      for j, other in enumerate(y):
        if i + j < 2:
          plgpu.wgmma(total, one, other)
    return total[...]

  # Without the barrier what reads this result may be moved into a later product, which then cannot be asynchronous.
  return lax.optimization_barrier(pl.run_scoped(run, plgpu.ACC(shape, jnp.float32)))
