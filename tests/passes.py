"""The rounding of a TPU's products, on a CPU, which multiplies float32 at full precision whatever is asked."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
from memzoo.pallas_kernels import numerics


def _halves(x):
  high = numerics.rounded(x)
  return high, numerics.rounded(x - high)


def _three_passes(x, y, product):
  (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
  return product(x_high, y_high) + product(x_high, y_low) + product(x_low, y_high)


def _in_three_passes(product):
  """A bilinear function in three passes. Its cotangents are multiplied likewise, as JAX does with `numerics.SPLIT`."""

  @jax.custom_vjp
  def run(x, y):
    return _three_passes(x, y, product)

  def by_x(y, d, x):
    return jax.vjp(lambda x: product(x, y), x)[1](d)[0]

  def by_y(x, d, y):
    return jax.vjp(lambda y: product(x, y), y)[1](d)[0]

  def backward(residuals, d):
    x, y = residuals
    return _three_passes(d, y, lambda d, y: by_x(y, d, x)), _three_passes(d, x, lambda d, x: by_y(x, d, y))

  run.defvjp(lambda x, y: (run(x, y), (x, y)), backward)
  return run


@contextlib.contextmanager
def of_a_tpu():
  """Functions traced in this context multiply as on a TPU, where `numerics` says how. A product it does not know fails."""

  def emulated(original):
    def run(*args, precision, preferred_element_type):
      *equation, x, y = args

      def product(x, y):
        return original(*equation, x, y, precision=numerics.FULL, preferred_element_type=preferred_element_type)

      if precision is numerics.SPLIT:
        return _in_three_passes(product)(x, y)
      if precision is numerics.FULL or x.dtype == y.dtype == jnp.bfloat16:
        return product(x, y)
      raise AssertionError(f"{x.dtype} x {y.dtype} at precision {precision}")

    return run

  with mock.patch.multiple(numerics.jnp, einsum=emulated(jnp.einsum), matmul=emulated(jnp.matmul)):
    yield
