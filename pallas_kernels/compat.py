"""Differences between versions of JAX, in one place."""

import inspect
from collections.abc import Iterable
from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[str]:
  """The manual mesh axes over which the value of x differs from device to device; empty outside of `jax.shard_map`."""
  return jax.typeof(x).manual_axis_type.varying


def varying_shape(shape: tuple[int, ...], dtype: Any, like: Iterable[jax.Array]) -> jax.ShapeDtypeStruct:
  """The shape of a result that differs from device to device as the arrays `like` do; kernels must say so of their results."""
  varying = frozenset().union(*map(varying_axes, like))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying))


def load_on_gpu(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
  """The array of a reference in a kernel for GPUs, in registers in this layout."""
  from jax.experimental.pallas import mosaic_gpu as plgpu  # takes an eighth of a second, and few need it

  index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # until JAX 0.11
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def transposed_on_gpu(ref: Any) -> Any:
  """A reference to the transposed matrix in a kernel for GPUs."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.transpose_ref(ref, (1, 0)) if jax.__version_info__ < (0, 11) else ref.transpose((1, 0))
