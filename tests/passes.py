"""The rounding of a TPU's products, on a CPU, which multiplies float32 at full precision whatever is asked."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
from jax.interpreters import mlir
from memzoo.pallas_kernels import numerics


@contextlib.contextmanager
def of_a_tpu():
  """Functions compiled in this context multiply as on a TPU, in gradients too. Products that `numerics` does not make fail."""
  table, product = mlir._platform_specific_lowerings["cpu"], jax.lax.dot_general_p
  ordinary = table[product].rule

  def emulated(precision, params, x, y):
    full = functools.partial(product.bind, precision=(numerics.FULL,) * 2, **params)
    if precision == numerics.SPLIT:
      return _three_passes(full, x, y)
    if x.dtype == y.dtype and x.dtype.itemsize == 2:  # exact, but not every such product runs on a CPU
      return full(x.astype(jnp.float32), y.astype(jnp.float32))
    raise AssertionError(f"{x.dtype} x {y.dtype} at precision {precision}")

  def lower(context, x, y, *, precision, **params):
    if precision in (numerics.FULL, (numerics.FULL,) * 2):
      return ordinary(context, x, y, precision=precision, **params)
    return mlir.lower_fun(functools.partial(emulated, precision, params), multiple_results=False)(context, x, y)

  jax.clear_caches()  # of programs compiled without emulation
  with mock.patch.dict(table):
    mlir.register_lowering(product, lower, platform="cpu")
    yield
  jax.clear_caches()


def _three_passes(product, x, y):
  """x y from bfloat16 halves, without the product of the two low ones."""
  (x_high, x_low), (y_high, y_low) = map(_halves, (x, y))
  return product(x_high, y_high) + (product(x_high, y_low) + product(x_low, y_high))


def _halves(x):
  high = numerics.rounded(x)
  return high, numerics.rounded(x - high)
