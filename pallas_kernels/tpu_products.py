"""Products of matrices in kernels for TPUs.

Operands are bfloat16. A float32 matrix is given as two parts, its rounding and the rest. In `full_precision` all operands are
float32, with one part, and XLA splits them into as many as that takes.
"""

from collections.abc import Callable
from contextvars import ContextVar

import jax
import jax.numpy as jnp

LANES = 128  # width and depth of the matrix unit, and of a register
BY_ROWS = ((1,), (1,))  # x y^T
BY_TOKENS = ((0,), (0,))  # x^T y

# The rounding of a float32 matrix to bfloat16 and the rest, or at full precision the matrix.
Parts = tuple[jax.Array, ...]

_FULL: ContextVar[bool] = ContextVar("full", default=False)


def full_precision(kernel: Callable[..., None]) -> Callable[..., None]:
  """A kernel that multiplies float32 operands at full precision."""

  def run(*refs):
    token = _FULL.set(True)
    try:
      kernel(*refs)
    finally:
      _FULL.reset(token)

  return run


def is_full() -> bool:
  """Whether this is traced in `full_precision`."""
  return _FULL.get()


def dot(x: jax.Array, y: jax.Array, contract: tuple = ((1,), (0,))) -> jax.Array:
  """A product of bfloat16 operands in one pass, or of float32 operands at full precision, in float32."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def parts(x: jax.Array) -> Parts:
  """The parts of a float32 matrix."""
  if is_full():
    return (x,)
  high = x.astype(jnp.bfloat16)
  return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def by_parts(x: jax.Array, y: jax.Array, contract: tuple = ((1,), (0,))) -> jax.Array:
  """A product of an activation x with a float32 matrix y."""
  return sum(dot(x, part, contract) for part in parts(y))
