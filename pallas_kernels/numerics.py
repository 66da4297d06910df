"""The arithmetic of all operations: dtypes of sums and states, and the precision of products.

Gates, cumulative sums, triangular inverses, inner weights and states are float32, or float64 if an input is. Float32 operands
are multiplied at full float32 precision on every platform. Products of bfloat16 operands are accumulated in float32.
"""

import jax
import jax.numpy as jnp

Dtype = jnp.dtype


def accumulator(*operands: jax.Array | Dtype | None) -> Dtype:
  """The dtype of sums and states: float64 if any operand (an array or a dtype) is float64, else float32; `None` is skipped."""
  wide = any(x is not None and jnp.dtype(getattr(x, "dtype", x)) == jnp.float64 for x in operands)
  return jnp.dtype(jnp.float64 if wide else jnp.float32)


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """`jnp.einsum` of two operands at full precision, accumulated in and returned as `accumulator(x, y)`."""
  return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=accumulator(x, y))


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """`x @ y` at full precision, accumulated in and returned as `accumulator(x, y)`."""
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=accumulator(x, y))


def scaled(x: jax.Array, s: jax.Array) -> jax.Array:
  """`s[..., None] * x`, in `accumulator(x, s)`.

  It is written as an einsum so that its gradient by `s` is a batched inner product. The gradient of a broadcast product would
  be a sum over a product, for which XLA on a CPU takes twenty times as long.
  """
  dtype = accumulator(x, s)
  return einsum("...,...k->...k", s.astype(dtype), x.astype(dtype))
