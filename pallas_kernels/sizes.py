"""Choices by sizes that may be symbolic, as in programs that `jax.export` makes for any batch or length.

    batch, length = jax.export.symbolic_shape("b, t")
    exported = jax.export.export(jax.jit(f))(jax.ShapeDtypeStruct((batch, length, 64), jnp.float32))

A comparison with a symbolic size may have no answer. Code that chooses by sizes asks here: it gets a choice that is right for
every value of a symbolic size, and the usual one where sizes are known.
"""

from typing import Any

import jax
import jax.numpy as jnp

Size = Any  # an integer, or a symbolic dimension


def known(*sizes: Size) -> bool:
  """Whether all sizes are integers."""
  return all(isinstance(size, int) for size in sizes)


def at_most(size: Size, limit: int) -> bool:
  """Whether `size <= limit` is sure. Constraints of a symbolic size count."""
  try:
    return bool(size <= limit)
  except jax.errors.InconclusiveDimensionOperation:
    return False


def bounded(size: Size, limit: int) -> int:
  """The smaller of both; `limit` if the size is not known."""
  return min(size, limit) if known(size) else limit


def quotient(limit: int, size: Size) -> int:
  """How often `size` fits into `limit`, and at least 1; 1 if the size is not known."""
  return max(1, limit // size) if known(size) else 1


def pieces(size: Size, step: Size) -> Size:
  """The number of pieces of length `step` that `size` is cut into, the last of which may be shorter."""
  return (size + step - 1) // step  # of symbolic sizes, JAX knows the sign of this, but not that of -(-size // step)


def as_array(size: Size) -> jax.Array | int:
  """`size` for arithmetic with int32 arrays: an integer as it is, a symbolic size as an array."""
  return size if known(size) else jnp.asarray(size, jnp.int32)


def pad_end(x: jax.Array, missing: Size, fill: Any = 0) -> jax.Array:
  """Appends `missing` tokens to x [B, T, ...]: the constant `fill`, or copies of the last token if it is `None`."""
  widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
  if known(missing):
    return jnp.pad(x, widths, mode="edge") if fill is None else jnp.pad(x, widths, constant_values=fill)
  if fill is None:
    return jnp.concatenate([x, jnp.broadcast_to(x[:, -1:], (x.shape[0], missing, *x.shape[2:]))], axis=1)
  return jax.lax.pad(x, jnp.asarray(fill, x.dtype), [(*width, 0) for width in widths])
