"""Differences between versions of JAX, in one place."""

from collections.abc import Iterable
from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[str]:
  """The manual mesh axes over which the value of x differs from device to device; empty outside of `jax.shard_map`."""
  kind = jax.typeof(x)
  manual = getattr(kind, "manual_axis_type", None)  # JAX 0.10 and later
  return kind.vma if manual is None else manual.varying


def varying_shape(shape: tuple[int, ...], dtype: Any, like: Iterable[jax.Array]) -> jax.ShapeDtypeStruct:
  """The shape of a result that differs from device to device as the arrays `like` do; kernels must say so of their results."""
  varying = frozenset().union(*map(varying_axes, like))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying))
