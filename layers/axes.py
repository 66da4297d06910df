"""Logical names of parameter axes. `memzoo.train.sharding` maps them to the axes of a device mesh."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import struct


@struct.dataclass
class Named(nn.LogicallyPartitioned):
  """A parameter with a name for each axis; `flax.linen.unbox` returns the array.

  It differs from `nn.LogicallyPartitioned` under `flax.nnx` only: there Flax would shard such a parameter at once, and raises
  outside a mesh. This class keeps the names as plain metadata.
  """

  def to_nnx_metadata(self) -> dict[str, Any]:
    return {"value": self.value, "logical_axes": self.names}

  @classmethod
  def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "Named":
    return cls(metadata["value"], names=metadata["logical_axes"])


def named(init: Callable[..., Any], *names: str | None) -> Callable[..., Named]:
  """Returns the initialiser `init` with names for the axes of its result."""

  def named_init(*args: Any) -> Named:
    return Named(init(*args), names=names)

  return named_init
