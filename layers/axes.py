"""What parameters say of themselves: logical names of their axes, and whether weight decay applies to them.

`memzoo.train.sharding` maps the names to the axes of a device mesh; `memzoo.train.optimizer` reads the decay.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import struct


@struct.dataclass
class Named(nn.LogicallyPartitioned):
  """A parameter with a name for each axis; `flax.linen.unbox` returns the array.

  Attributes:
    decays: whether weight decay applies to it.

  It differs from `nn.LogicallyPartitioned` under `flax.nnx` only: there Flax would shard such a parameter at once, and raises
  outside a mesh. This class keeps the names as plain metadata.
  """

  decays: bool = struct.field(default=True, pytree_node=False)

  def to_nnx_metadata(self) -> dict[str, Any]:
    return {"value": self.value, "logical_axes": self.names, "decays": self.decays}

  @classmethod
  def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "Named":
    return cls(metadata["value"], names=metadata["logical_axes"], decays=metadata["decays"])


def named(init: Callable[..., Any], *names: str | None, decays: bool | None = None) -> Callable[..., Named]:
  """Returns the initialiser `init` with names for the axes of its result.

  Args:
    init: the initialiser.
    *names: a name for each axis, or `None`.
    decays: whether weight decay applies. By default it does to arrays of two or more axes: matrices and embeddings. It should
      not apply to gates, offsets and scales, because zero is not a neutral value for them.
  """

  def named_init(*args: Any) -> Named:
    return Named(init(*args), names=names, decays=len(names) > 1 if decays is None else decays)

  return named_init
