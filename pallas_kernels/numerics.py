"""The arithmetic of all operations: dtypes of sums and states, and the precision of products.

Gates, cumulative sums, triangular inverses, inner weights and states are float32, or float64 if an input is. Products are made
as their operands allow:

  two 16-bit operands                        one pass, accumulated in float32, which is exact
  a float32 intermediate of a 16-bit call    `SPLIT`: three passes over bfloat16 halves, on accelerators
  a float32 or float64 call                  `FULL`: full precision on every platform

A call is 16-bit if its main operands are; `intermediate_precision` decides.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Dtype = jnp.dtype
Precision = jax.lax.Precision | jax.lax.DotAlgorithmPreset

FULL = jax.lax.Precision.HIGHEST
# x y = xh yh + xh yl + xl yh, where xh is x rounded to bfloat16 and xl the rest: a relative error of about 2^-16. On a CPU the
# same as `FULL`.
SPLIT = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3


def accumulator(*operands: jax.Array | Dtype | None) -> Dtype:
  """The dtype of sums and states: float64 if any operand (an array or a dtype) is float64, else float32; `None` is skipped."""
  wide = any(x is not None and jnp.dtype(getattr(x, "dtype", x)) == jnp.float64 for x in operands)
  return jnp.dtype(jnp.float64 if wide else jnp.float32)


def intermediate_precision(requested: str | None, *operands: jax.Array) -> Precision:
  """The precision of products with float32 intermediates, in a call with these main operands.

  Args:
    requested: the option `precision` of an operation: `None`, or "highest" for `FULL` whatever the operands are.
    *operands: the arrays that come from activations, such as queries, keys and values; gates do not count.

  Raises:
    ValueError: if `requested` is something else.
  """
  if requested not in (None, "highest"):
    raise ValueError(f"precision={requested!r}; expected None (by the operands) or 'highest'.")
  return SPLIT if requested is None and all(_is_narrow(x) for x in operands) else FULL


def einsum(equation: str, x: jax.Array, y: jax.Array, precision: Precision = FULL) -> jax.Array:
  """`jnp.einsum` of two operands, accumulated in and returned as `accumulator(x, y)`.

  Two 16-bit operands are multiplied as they are, in one pass. Operands of different dtypes are widened, and multiplied at
  `precision`.
  """
  x, y, how = _operands(x, y, precision)
  return jnp.einsum(equation, x, y, **how)


def matmul(x: jax.Array, y: jax.Array, precision: Precision = FULL) -> jax.Array:
  """`x @ y`, accumulated in and returned as `accumulator(x, y)`; precision as for `einsum`."""
  x, y, how = _operands(x, y, precision)
  return jnp.matmul(x, y, **how)


def rounded(x: jax.Array) -> jax.Array:
  """x, rounded to the precision of bfloat16. XLA may drop a conversion to bfloat16 and back, but not this."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def unfused(tree: Any) -> Any:
  """The arrays of `tree`, unchanged, in whose computation XLA on a CPU does not include what follows.

  A rounding to the precision that an array has anyway. With jaxlib 0.10.2 to 0.12 on a CPU, some products of matrices that
  are compiled together with a sum over their results, such as a norm, and a further product read memory that was never
  written. An optimization barrier does not keep them apart: it is removed before.
  """

  def apart(x: jax.Array) -> jax.Array:
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)

  return jax.tree.map(apart, tree)


@jax.custom_vjp
def exact_product(weights: jax.Array, x: jax.Array) -> jax.Array:
  """`weights @ x` to float32 precision in three passes, for float32 weights that are exact in bfloat16, such as zeros and ones.

  The weights get no gradient.
  """
  high = rounded(x)
  middle = rounded(x - high)
  low = x - high - middle
  weights = weights.astype(jnp.bfloat16)
  low, middle, high = (matmul(weights, part.astype(jnp.bfloat16)) for part in (low, middle, high))
  return low + middle + high


def _exact_product_forward(weights, x):
  return exact_product(weights, x), weights


def _exact_product_backward(weights, d):
  return jnp.zeros_like(weights), exact_product(jnp.swapaxes(weights, -1, -2), d)


exact_product.defvjp(_exact_product_forward, _exact_product_backward)


def sums(weights: jax.Array, x: jax.Array, precision: Precision) -> jax.Array:
  """`weights @ x` to float32 precision, for weights as in `exact_product`, in a call with intermediates of this precision."""
  return exact_product(weights, x) if precision is SPLIT else matmul(weights, x)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def inner_products(x: jax.Array, y: jax.Array, exact_in: Dtype | None, precision: Precision) -> jax.Array:
  """x y^T of x [..., R, K] and y [..., S, K], whose values are exact in the dtype `exact_in`: in one pass if it is 16-bit.

  `None` for values that are exact in no narrower dtype. Cotangents are not exact in it; they are multiplied at `precision`.
  """
  x, y = (x, y) if exact_in is None else (x.astype(exact_in), y.astype(exact_in))
  return matmul(x, jnp.swapaxes(y, -1, -2), precision)


def _inner_products_forward(x, y, exact_in, precision):
  return inner_products(x, y, exact_in, precision), (x, y)


def _inner_products_backward(exact_in, precision, residuals, d):
  x, y = residuals
  return matmul(d, y, precision), matmul(jnp.swapaxes(d, -1, -2), x, precision)


inner_products.defvjp(_inner_products_forward, _inner_products_backward)


def _operands(x: jax.Array, y: jax.Array, precision: Precision) -> tuple[jax.Array, jax.Array, dict]:
  """The operands of a product, of one dtype, and its options."""
  wide = accumulator(x, y)
  if _is_narrow(x) and x.dtype == y.dtype:
    precision = jax.lax.Precision.DEFAULT
  else:
    x, y = x.astype(wide), y.astype(wide)
    if wide == jnp.float64:
      precision = FULL
  return x, y, {"precision": precision, "preferred_element_type": wide}


def _is_narrow(x: jax.Array) -> bool:
  return jnp.dtype(x.dtype).itemsize == 2


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
  """Inner products of x and y [..., K] over the last axis, [...], at full precision.

  It is written as an einsum, because XLA on a CPU takes twenty times as long for a sum over a product.
  """
  return einsum("...k,...k->...", x, y)


def scaled(x: jax.Array, s: jax.Array) -> jax.Array:
  """`s[..., None] * x`, in `accumulator(x, s)`.

  It is written as an einsum so that its gradient by `s` is a batched inner product. The gradient of a broadcast product would
  be a sum over a product, for which XLA on a CPU takes twenty times as long.
  """
  dtype = accumulator(x, s)
  return einsum("...,...k->...k", s.astype(dtype), x.astype(dtype))
