"""Differences between versions of JAX, in one place."""

from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[str]:
  """The manual mesh axes over which the value of x differs from device to device; empty outside of `jax.shard_map`."""
  kind = jax.typeof(x)
  manual = getattr(kind, "manual_axis_type", None)  # JAX 0.10 and later
  return kind.vma if manual is None else manual.varying
