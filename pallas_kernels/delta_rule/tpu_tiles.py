"""Products of the tiles of a chunk, in the kernels for TPUs.

Operands are those of `tpu_products.py`, and a product of two matrices in parts takes three passes, as `numerics.SPLIT` says.
Chunks have 64 updates; the matrix unit is 128 wide and 128 deep, so

- two matrices [64, 64] lie side by side in [64, 128];
- a product over 64 updates leaves half of the depth free, which takes a second part: [P P] [U_high; U_low] = P U in one pass;
- a product over 32 updates has room for three: `in_one_pass`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from ..tpu_products import BY_ROWS, BY_TOKENS, LANES, Parts, dot, is_full, parts

CHUNK, HALF, BASE = 64, 32, 16
# Of two updates per token, those of so many tokens lie together.
GROUP = 8
# Kernels shift and mask: a division of integers asks for the chip at hand, also when compiling for another.
_LOG_HALF, _LOG_BASE = 5, 4
MASKED = -1e4  # e^-10000 is 0


def order(updates: int) -> np.ndarray:
  """The place of each of a chunk's updates in their order, of so many per token, [64]."""
  return np.arange(CHUNK).reshape(-1, GROUP, updates).swapaxes(1, 2).reshape(-1)


def masks(updates: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Constants of the kernels, for so many updates per token.

  Returns:
    [5, 64, 128], for two matrices side by side: what is added to log-decays, 0 up to the diagonal; 1 strictly below it; both
      for transposed matrices; and 1 for earlier tokens.
    [2, 128, 128]: 1 in diagonal blocks of 16; and in the blocks below those that are the first of two.
  """
  i, j = order(updates)[np.indices((CHUNK, LANES)) % CHUNK]
  r, c = np.indices((LANES, LANES)) // BASE
  of_tokens = [np.where(i >= j, 0, MASKED), i > j, np.where(i <= j, 0, MASKED), i < j, i // updates > j // updates]
  of_blocks = [r == c, (r == c + 1) & (c % 2 == 0)]
  return np.stack(of_tokens).astype(np.float32), np.stack(of_blocks).astype(np.float32)


def three_passes(x: Parts, y: Parts) -> jax.Array:
  """x y^T of two matrices in parts."""
  if is_full():
    return dot(*x, *y, BY_ROWS)
  n, by_high = len(x[0]), dot(jnp.concatenate(x), y[0], BY_ROWS)
  return by_high[:n] + by_high[n:] + dot(x[0], y[1], BY_ROWS)


def three(x: Parts, y: Parts, contract: tuple = ((1,), (0,))) -> jax.Array:
  """A product of two matrices in parts, in three passes."""
  if is_full():
    return dot(*x, *y, contract)
  return dot(x[0], y[0], contract) + dot(x[1], y[0], contract) + dot(x[0], y[1], contract)


def lane(shape: tuple[int, ...]) -> jax.Array:
  """The number of each lane."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def is_left(n: int = CHUNK) -> jax.Array:
  """Which elements of [n, 128] belong to the left matrix."""
  return lane((n, LANES)) < CHUNK


def swapped(x: jax.Array) -> jax.Array:
  """The right matrix of x [n, 128] on the left, and the left one on the right."""
  return pltpu.roll(x, CHUNK, 1)


def grams(xs: Sequence[jax.Array], ys: Sequence[jax.Array], shared: bool = False) -> jax.Array:
  """x y^T of two pairs x [n, K], y [64, K], side by side, [n, 128]; of one product if both pairs are the same."""
  if shared:
    return dot(xs[0], jnp.concatenate([ys[0]] * 2), BY_ROWS)
  zeros = jnp.zeros_like(ys[0])
  return dot(xs[0], jnp.concatenate([ys[0], zeros]), BY_ROWS) + dot(xs[1], jnp.concatenate([zeros, ys[1]]), BY_ROWS)


def by_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
  """x^T y of x [64, K], an activation or float32, and a float32 matrix y [64, V]. The parts of y take one pass."""
  if is_full():
    return dot(x, y, BY_TOKENS)
  x, high = (parts(x) if x.dtype == jnp.float32 else (x,)), parts(y)
  both = dot(jnp.concatenate([x[0]] * 2), jnp.concatenate(high), BY_TOKENS)
  return sum((dot(low, high[0], BY_TOKENS) for low in x[1:]), start=both)


def two(x: jax.Array) -> Callable[[int, jax.Array], jax.Array]:
  """The function from a side and y [64, V] to the product of the left (0) or right (1) half of x [n, 128] with y."""
  left = is_left(len(x))
  if is_full():
    halves = jnp.where(left, x, 0), jnp.where(left, 0, x)
    return lambda side, y: dot(halves[side], jnp.concatenate([y, y]))
  low = parts(x)[1]
  other = swapped(x)
  twice = [jnp.where(left, a, b).astype(jnp.bfloat16) for a, b in ((x, other), (other, x))]

  def times(side, y):
    high, rest = parts(y)
    zeros = jnp.zeros_like(high)
    by_low = dot(low, jnp.concatenate([zeros, high] if side else [high, zeros]))
    return dot(twice[side], jnp.concatenate([high, rest])) + by_low

  return times


def two_of_exact(x: jax.Array) -> Callable[[int, jax.Array], jax.Array]:
  """The same for an activation y: the high half of a side in its place, and its low half in place of the other side."""
  if is_full():
    return two(x)
  left, high = is_left(), x.astype(jnp.bfloat16).astype(jnp.float32)
  low = swapped(x - high)
  halves = [jnp.where(left, a, b).astype(jnp.bfloat16) for a, b in ((high, low), (low, high))]
  return lambda side, y: dot(halves[side], jnp.concatenate([y, y]))


def in_one_pass(x: jax.Array) -> Callable[[int, jax.Array], jax.Array]:
  """The function from b and y [32, V] to the product of block b of x [32, 128], four blocks [32, 32], with y.

  The left operand has the high half of block b in its place, the low half in the next one, and the high half again in the one
  after that; the right operand has the high half of y twice, then its low half.
  """
  block = lane(x.shape) >> _LOG_HALF
  if is_full():
    return lambda b, y: dot(jnp.where(block == b, x, 0), jnp.concatenate([y] * 4))
  high = x.astype(jnp.bfloat16).astype(jnp.float32)
  low, again = pltpu.roll(x - high, HALF, 1), pltpu.roll(high, 2 * HALF, 1)

  def times(b, y):
    y_high, y_low = parts(y)
    right = [y_high, y_high, y_low, jnp.zeros_like(y_high)]
    places = [(b + i) % 4 for i in range(3)]
    left = jnp.where(block == places[0], high, jnp.where(block == places[1], low, jnp.where(block == places[2], again, 0)))
    return dot(left.astype(jnp.bfloat16), jnp.concatenate([right[(i - b) % 4] for i in range(4)]))

  return times


def beside(x: jax.Array, y: jax.Array) -> list[jax.Array]:
  """For the left and the right side of x and y [64, 128], [x_side y_side]."""
  return [jnp.where(is_left(), x, swapped(y)), jnp.where(is_left(), swapped(x), y)]


def row_sums(x: jax.Array) -> jax.Array:
  """Sums of rows, [n, 1]."""
  return jnp.sum(x, axis=1, keepdims=True)


def of_token_before(x: jax.Array) -> jax.Array:
  """Row i - 1 of x [n, K] in row i, and zeros in row 0."""
  return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == 0, 0, pltpu.roll(x, 1, 0))


def sums_of_tokens(x: jax.Array, later: bool = False) -> jax.Array:
  """Sums of rows 0 to i of x [n, K], for every i, or if `later` of rows i to n - 1."""
  n, row, width = len(x), jax.lax.broadcasted_iota(jnp.int32, x.shape, 0), 1
  while width < n:
    there = row < n - width if later else row >= width
    x = x + jnp.where(there, pltpu.roll(x, n - width if later else width, 0), 0)
    width *= 2
  return x


def transposed(x: jax.Array) -> jax.Array:
  """Transposes the square blocks of x [n, 128], which lie side by side."""
  n, columns = len(x), x.T
  return jnp.concatenate([columns[i : i + n] for i in range(0, LANES, n)], axis=1)


def inverses(matrices: Sequence[jax.Array], block_ref: Any, updates: int = 1) -> list[jax.Array]:
  """(I + A)^-1 of the diagonal blocks of 32 of matrices [64, 128], four of them side by side, [32, 128].

  They grow by rows up to 16 tokens, and from 16 to 32 by [X, 0; -Y A X, Y] for inverses X and Y.
  """
  block = lane((BASE, LANES)) >> _LOG_BASE

  def gather(x, first):
    """For every block of 16 lanes, 16 rows: those of the diagonal, or of the block below, for the first of two blocks."""
    per_head = CHUNK // BASE
    rows = [x[i * BASE : (i + 1) * BASE] for i in range(per_head)]
    out = jnp.zeros_like(rows[0]) if first else rows[0]
    for i in range(0, per_head, 2) if first else range(1, per_head):
      out = jnp.where(block & per_head - 1 == i, rows[i + first], out)
    return out

  diagonal = _by_rows(jnp.stack([gather(x, 0) for x in matrices]), np.argsort(order(updates)[:BASE]))
  below = [gather(x, 1) for x in matrices]
  inner = _of_blocks(below, diagonal, block_ref[0])
  corner = _of_blocks(diagonal, inner, block_ref[1])
  even = block & 1 == 0
  return [
    jnp.concatenate([jnp.where(even, x, 0), jnp.where(even, -y, x)]) for x, y in zip(diagonal, corner, strict=True)
  ]


def _by_rows(a: jax.Array, rows: np.ndarray) -> list[jax.Array]:
  """(I + A)^-1 of matrices [16, 16], strictly lower in this order of rows, eight side by side in each of a [n, 16, 128]."""
  flat = a.reshape(-1, LANES)
  place = lane(flat.shape)
  identity = (lane(a.shape[1:]) & BASE - 1 == jax.lax.broadcasted_iota(jnp.int32, a.shape[1:], 0)).astype(jnp.float32)
  x = jnp.broadcast_to(identity, a.shape)
  for j in map(int, rows[:-1]):
    column = jnp.take_along_axis(flat, (place & -BASE) + j, axis=1).reshape(a.shape)
    x = x - column * x[:, j : j + 1]
  return list(x)


def _of_blocks(xs: Sequence[jax.Array], ys: Sequence[jax.Array], mask: jax.Array) -> list[jax.Array]:
  """Products of blocks x [16, 128] with y [16, 128], eight of each. The mask says which y belongs to which x."""

  def spread(y):
    # Masked in float32: on packed bfloat16 it goes through memory.
    return (jnp.concatenate([y.astype(jnp.float32)] * (LANES // BASE)) * mask).astype(y.dtype)

  if is_full():
    return [dot(x, spread(y)) for x, y in zip(xs, ys, strict=True)]
  x_parts = [parts(x) for x in xs]
  y_parts = [tuple(map(spread, parts(y))) for y in ys]
  by_high = [dot(jnp.concatenate(x), high) for x, (high, _) in zip(x_parts, y_parts, strict=True)]
  by_low = [dot(high, low) for (high, _), (_, low) in zip(x_parts, y_parts, strict=True)]
  return [x[:BASE] + x[BASE:] + y for x, y in zip(by_high, by_low, strict=True)]
