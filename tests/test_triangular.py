"""The inverse of unit lower-triangular matrices, against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.pallas_kernels.triangular import unit_lower_inverse, unit_lower_inverse_in_lanes
from tolerances import assert_close

IN_FLOAT64 = pytest.mark.usefixtures("float64")


def matrices(n):
  """Strictly lower-triangular beta (k_i . k_j), as a chunk of n keys has it; keys are random, equal, correlated."""
  rng = np.random.default_rng(n)
  own, common = rng.normal(size=(n, 32)), rng.normal(size=32)
  keys = np.stack([own, np.broadcast_to(common, own.shape), common + (1 / 0.99 - 1) ** 0.5 * own])
  keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
  return np.tril(1.9 * keys @ np.swapaxes(keys, -1, -2), -1)


@IN_FLOAT64
@pytest.mark.parametrize("n", [1, 3, 8, 9, 24, 64])
def test_the_result_is_the_inverse_and_unit_lower_triangular(n):
  a = matrices(n)
  inverse = jax.jit(unit_lower_inverse)(a)
  for actual, expected in zip(inverse, np.linalg.inv(np.eye(n) + a), strict=True):
    assert_close(actual, expected)
  np.testing.assert_array_equal(np.triu(inverse), np.broadcast_to(np.eye(n), a.shape))


@IN_FLOAT64
@pytest.mark.parametrize("n", [1, 8, 24, 64])
def test_the_form_in_lanes_is_the_inverse_in_any_order_of_the_rows_of_a_block(n):
  """Rows 0, 1, ... of a chunk in the order of the recurrence are rows `place` of the matrix, block by block."""
  size = min(n, 16) if n != 24 else 12
  order = np.random.default_rng(0).permutation(size)
  place = np.concatenate([order + i for i in range(0, n, size)])
  a = np.empty((3, n, n))
  a[:, place[:, None], place] = matrices(n)
  inverse = jax.jit(lambda a: unit_lower_inverse_in_lanes(a, order))(a)
  assert_close(inverse, np.linalg.inv(np.eye(n) + a))


@pytest.mark.parametrize("n", [9, 48, 64])
def test_float32_loses_nothing_to_correlated_keys(n):
  a = matrices(n).astype(np.float32)
  inverse = jax.jit(unit_lower_inverse)(a)
  assert inverse.dtype == jnp.float32
  for actual, expected in zip(inverse, np.linalg.inv(np.eye(n) + a.astype(np.float64)), strict=True):
    assert_close(actual, expected, jnp.float32)


@IN_FLOAT64
def test_any_batch_shape_is_accepted():
  a = matrices(24)
  expected = np.linalg.inv(np.eye(24) + a)
  assert_close(jax.jit(unit_lower_inverse)(a[0]), expected[0])
  assert_close(jax.jit(unit_lower_inverse)(a[None, :, None]), expected[None, :, None])


@IN_FLOAT64
@pytest.mark.parametrize("n", [3, 24])
def test_the_gradient_is_that_of_a_triangular_solve(n):
  a, weight = matrices(n), np.random.default_rng(0).normal(size=(3, n, n))

  def loss(a, invert):
    return jnp.sum(invert(jnp.tril(a, -1)) * weight)

  def solve(a):
    identity = jnp.broadcast_to(jnp.eye(n), a.shape)
    return jax.scipy.linalg.solve_triangular(identity + a, identity, lower=True)

  actual, expected = (jax.jit(jax.grad(loss), static_argnums=1)(a, invert) for invert in (unit_lower_inverse, solve))
  assert_close(actual, expected, gradients=True)
