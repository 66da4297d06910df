"""Logical names of parameter axes, from which `memzoo.train.sharding` lays a model out over devices."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import struct


@struct.dataclass
class Named(nn.LogicallyPartitioned):
  """A parameter with a name for each axis; `flax.linen.unbox` gives the array.

  As `nn.LogicallyPartitioned`, but under `flax.nnx` the names stay what they are: there Flax takes its class for an
  order to shard at once, and refuses to make a parameter outside a mesh.
  """

  def to_nnx_metadata(self) -> dict[str, Any]:
    return {"value": self.value, "logical_axes": self.names}

  @classmethod
  def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "Named":
    return cls(metadata["value"], names=metadata["logical_axes"])


def named(init: Callable[..., Any], *names: str | None) -> Callable[..., Named]:
  """The initialiser `init`, its result's axes named."""

  def named_init(*args: Any) -> Named:
    return Named(init(*args), names=names)

  return named_init
