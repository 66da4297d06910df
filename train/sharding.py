"""The placement of parameters and batches on a mesh with the axes data, fsdp and tensor.

* `data`: each device has a copy of the parameters and its share of the batch.
* `fsdp`: the batch is split further, and so are the parameters, along their embedding axis (Rajbhandari et al. 2020,
  arXiv:1910.02054, stage 3).
* `tensor`: heads, the MLP's inner axis, experts and the vocabulary are split (Shoeybi et al. 2019, arXiv:1909.08053).

Modules give the axes of their parameters logical names; `RULES` maps each name to a mesh axis. `split_operations` splits the
operations over rows and heads. XLA's partitioner derives the rest, collectives included.
"""

import math
from collections.abc import Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..pallas_kernels.partition import split_over

AXES = ("data", "fsdp", "tensor")
RULES = (
  *[(name, "tensor") for name in ("vocab", "heads", "mlp", "experts")],
  ("embed", "fsdp"),
  *[(name, None) for name in ("norm", "layers")],
)
BATCH = PartitionSpec(("data", "fsdp"))


@dataclass(frozen=True)
class MeshShape:
  """Devices along each axis of the mesh. One axis may be -1: all remaining devices.

  Attributes:
    data: copies of the model, each with its share of the batch.
    fsdp: devices that share one copy of the parameters, and split the batch as well.
    tensor: devices that split each matrix product.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = (self.data, self.fsdp, self.tensor)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
      raise ValueError(f"{self} is not a mesh; expected sizes of at least 1, and -1 (the rest) for at most one of them.")

  def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, by default all of them. If the sizes need fewer, the rest stay unused.

    Raises:
      ValueError: if the sizes need more devices than there are, or do not divide their number where one size is -1.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [self.data, self.fsdp, self.tensor]
    named = math.prod(size for size in sizes if size != -1)
    if named > len(devices) or (-1 in sizes and len(devices) % named):
      raise ValueError(
        f"{self} needs {'a multiple of ' if -1 in sizes else ''}{named} devices, but there are {len(devices)}; expected "
        "sizes whose product divides that number."
      )
    if -1 in sizes:
      sizes[sizes.index(-1)] = len(devices) // named
    used = devices[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=used)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def split_operations(mesh: Mesh) -> ContextDecorator:
  """A context, or a decorator of functions to jit, in which each device computes its own rows and heads of operations."""
  return split_over(mesh, rows=BATCH[0], heads="tensor")


def batch_sharding(mesh: Mesh, batch_size: int, name: str = "TextData.batch_size") -> NamedSharding:
  """The sharding of a batch's arrays: rows over `data` and `fsdp`.

  Raises:
    ValueError: if `batch_size` does not divide over these axes; the text calls it by its name.
  """
  shares = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % shares:
    raise ValueError(
      f"{name} is {batch_size}, which does not divide over {shares} devices (data {mesh.shape['data']} x "
      f"fsdp {mesh.shape['fsdp']}); expected a multiple of {shares}, or a smaller MeshShape.data."
    )
  return NamedSharding(mesh, BATCH)


def parameter_shardings(mesh: Mesh, boxed: Any) -> Any:
  """A sharding for every parameter, from the logical axis names in its box.

  Args:
    mesh: a mesh with the axes of `MeshShape`.
    boxed: what `model.init` returns, or its shapes under `jax.eval_shape`, boxes included.

  Raises:
    ValueError: if an axis of a parameter does not divide over the mesh axis that `RULES` gives it.
  """
  shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
  for (path, leaf), sharding in zip(
    jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(shardings), strict=True
  ):
    _check_divides(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, sharding)
  return shardings


def _check_divides(name: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
  for size, axis in zip(shape, sharding.spec, strict=False):
    shares = math.prod(sharding.mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
    if size % shares:
      raise ValueError(
        f"parameter {name} of shape {list(shape)} does not divide over MeshShape.{axis}={shares}; expected a multiple "
        f"of {shares} instead of {size}, or a smaller MeshShape.{axis}."
      )


def layout(mesh: Mesh, params: Any) -> str:
  """One line about the mesh and how many of `params` (arrays or shapes, with shardings) each device holds."""
  leaves = jax.tree.leaves(params)
  whole = sum(leaf.size for leaf in leaves)
  own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
  axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
  return f"Mesh: {axes}; each device holds {own:,} of {whole:,} parameters ({own / whole:.0%})."


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """Puts this process's rows of a batch on its devices; the result is the global batch."""
  return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
