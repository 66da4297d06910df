"""The inverse of unit lower-triangular matrices, against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.pallas_kernels.triangular import unit_lower_inverse
from tolerances import assert_close

SIZES = (1, 2, 3, 7, 8, 9, 16, 24, 48, 63, 64, 96)
IN_FLOAT64 = pytest.mark.usefixtures("float64")


def matrices(kind, n, batch=()):
  """Strictly lower-triangular beta (k_i . k_j), as a chunk of n keys has it; `kind` says what they are like."""
  rng = np.random.default_rng(n)
  keys = rng.normal(size=(*batch, n, 32))
  if kind != "random keys":
    noise = {"equal keys": 0.0, "keys of cosine 0.99": (1 / 0.99 - 1) ** 0.5}[kind]
    keys = rng.normal(size=32) / 32**0.5 + noise * keys / 32**0.5
  keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
  return np.tril(1.9 * keys @ np.swapaxes(keys, -1, -2), -1)


KINDS = ("random keys", "equal keys", "keys of cosine 0.99")


@IN_FLOAT64
@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_inverse(n):
  for kind in KINDS:
    a = matrices(kind, n)
    assert_close(jax.jit(unit_lower_inverse)(a), np.linalg.inv(np.eye(n) + a))


@pytest.mark.parametrize("n", SIZES)
def test_float32_loses_nothing_to_correlated_keys(n):
  for kind in KINDS:
    a = matrices(kind, n).astype(np.float32)
    inverse = jax.jit(unit_lower_inverse)(a)
    assert inverse.dtype == jnp.float32
    assert_close(inverse, np.linalg.inv(np.eye(n) + a.astype(np.float64)), jnp.float32)


@IN_FLOAT64
@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("n", [3, 24])
def test_any_batch_shape(n, batch):
  a = matrices("random keys", n, batch)
  assert_close(jax.jit(unit_lower_inverse)(a), np.linalg.inv(np.eye(n) + a))


@IN_FLOAT64
@pytest.mark.parametrize("n", [1, 5, 9, 16, 24])
def test_it_is_unit_lower_triangular(n):
  inverse = np.asarray(jax.jit(unit_lower_inverse)(matrices("equal keys", n)))
  np.testing.assert_array_equal(np.triu(inverse), np.eye(n))


@IN_FLOAT64
@pytest.mark.parametrize("n", [3, 8, 9, 24])
def test_its_gradient_is_the_solves(n):
  a, weight = matrices("random keys", n, (2,)), np.random.default_rng(0).normal(size=(2, n, n))

  def loss(invert, a):
    return jnp.sum(invert(jnp.tril(a, -1)) * weight)

  def solve(a):
    identity = jnp.broadcast_to(jnp.eye(n), a.shape)
    return jax.scipy.linalg.solve_triangular(identity + a, identity, lower=True)

  actual, expected = (jax.jit(jax.grad(loss, 1), static_argnums=0)(invert, a) for invert in (unit_lower_inverse, solve))
  assert_close(actual, expected, gradients=True)
