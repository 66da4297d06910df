"""Products of rows with the matrix of each row's group, as a mixture of experts needs.

    y_i = x_i W_{g_i}

Rows are sorted into blocks of one group each, and a loop multiplies one block at a time. The last block of a group is filled
up with zeros: the cost is that of all rows and of at most one block for each group. A matrix is read once for each block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .numerics import FULL, accumulator, matmul
from .partition import varying_alike
from .sizes import bounded, known

_LARGEST = 256  # rows of a block, from which on a product costs more than reading its matrix


class Blocks(NamedTuple):
  """How rows are sorted into blocks.

  Attributes:
    group: of each block, int32 [blocks].
    row: in each place of a block, int32 [blocks, size]; the number of rows where there is none.
    place: of each row, in the blocks one after another, int32 [rows]; the number of places for a row without a group.
  """

  group: jax.Array
  row: jax.Array
  place: jax.Array

  def gather(self, x: jax.Array, copies: int = 1) -> jax.Array:
    """Rows x [rows / copies, D], each standing for `copies` rows, in blocks [blocks, size, D], zeros where there is none."""
    return x.at[self.row // copies].get(mode="fill", fill_value=0)

  def scatter(self, y: jax.Array) -> jax.Array:
    """The inverse: [blocks, size, D] to [rows, D], zeros in rows without a group."""
    return y.reshape(-1, y.shape[-1]).at[self.place].get(mode="fill", fill_value=0)


def blocks_of(group: jax.Array, groups: int, largest: int = _LARGEST) -> Blocks:
  """Sorts rows by their groups, int32 [rows] from 0 on; those of group `groups` and above are in no block.

  Blocks have at most `largest` rows, a power of two. The rows of a group stay in their order.
  """
  (rows,) = group.shape
  size = _size(rows, groups, largest)
  used = bounded(groups, rows) if known(rows) else groups
  count = (rows + used * (size - 1)) // size
  counts = jnp.bincount(group, length=groups + 1)[:groups]
  order = jnp.argsort(group, stable=True)
  sorted_at = jnp.zeros_like(order).at[order].set(jnp.arange(rows, dtype=order.dtype), unique_indices=True)
  rank = sorted_at - (jnp.cumsum(counts) - counts)[jnp.minimum(group, groups - 1)]
  ends = jnp.cumsum(-(-counts // size) * size)  # of the groups' places
  starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])[:-1]
  place = jnp.where(group < groups, starts[jnp.minimum(group, groups - 1)] + rank, count * size).astype(jnp.int32)
  row = jnp.full((count * size,), rows, jnp.int32).at[place].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
  of_block = jnp.searchsorted(ends, jnp.arange(count) * size, side="right")
  return Blocks(jnp.minimum(of_block, groups - 1).astype(jnp.int32), row.reshape(count, size), place)


def _size(rows: int, groups: int, largest: int) -> int:
  """Rows of a block: a power of two, so many that about a fifth of all places stay empty."""
  if not known(rows):
    return largest
  return min(largest, 1 << max(0, (rows // (2 * groups)).bit_length() - 1))


@jax.custom_vjp
def grouped_matmul(x: jax.Array, weights: jax.Array, group: jax.Array) -> jax.Array:
  """x_b W_{g_b} for blocks x [blocks, size, D], weights [groups, D, F] and group [blocks]: [blocks, size, F], in x's dtype.

  Products are accumulated in float32 (float64 where an operand is).
  """
  return jax.lax.map(lambda block: _times(block[0], weights[block[1]]), (x, group))


def _times(x: jax.Array, weights: jax.Array) -> jax.Array:
  return matmul(x, weights.astype(x.dtype), FULL).astype(x.dtype)


def _forward(x, weights, group):
  return grouped_matmul(x, weights, group), (x, weights, group)


def _backward(operands, dy):
  x, weights, group = operands

  def step(dw, block):
    x, dy, g = block
    dx = _times(dy, weights[g].T)
    return dw.at[g].add(matmul(x.T, dy, FULL)), dx  # in place: a derivative of the loop would add whole arrays

  zeros = varying_alike((x, weights, dy), jnp.zeros(weights.shape, accumulator(x, weights)))
  dw, dx = jax.lax.scan(step, zeros, (x, dy, group))
  return dx, dw.astype(weights.dtype), None


grouped_matmul.defvjp(_forward, _backward)
