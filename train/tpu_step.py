"""Compiles an experiment's training step, or a step of generation, ahead of time for a TPU topology, without a TPU.

Nothing is allocated.
"""

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..pallas_kernels.tpu_cost import CHIPS, Cost, compile_and_read, devices
from .experiment_report import abstract_batch, bytes_on_a_device
from .sharding import AXES, BATCH, MeshShape, batch_sharding, split_operations
from .step import experiment_program


@dataclass(frozen=True)
class StepCost:
  """What a step costs each chip.

  Attributes:
    topology: such as "v5e:4x4".
    mesh: sizes of the mesh's axes, in the order of `sharding.AXES`.
    compile_seconds: time to trace and compile.
    held: bytes on a chip from step to step, by what they are, a part of `cost.peak_bytes`.
    cost: as compiled.
    sequences: number of sequences of a step of generation; `None` for a training step.
  """

  topology: str
  mesh: tuple[int, ...]
  compile_seconds: float
  held: dict[str, int]
  cost: Cost
  sequences: int | None = None

  @property
  def floor_seconds(self) -> float:
    """The time to read once what is held."""
    return sum(self.held.values()) / CHIPS[self.cost.chip].bandwidth

  @property
  def memory_bytes(self) -> int:
    """The memory that a chip has."""
    return CHIPS[self.cost.chip].memory_bytes

  def traffic(self) -> dict[tuple[str, str], "Traffic"]:
    """The collectives by place and kind; see `place`."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for each in self.cost.collectives:
      found[place(each.files), each.kind].append((each.times, each.times * each.bytes))
    sums = {key: Traffic(*map(sum, zip(*each, strict=True))) for key, each in found.items()}
    return dict(sorted(sums.items(), key=lambda item: (item[0][0] == REST, -item[1].bytes)))


class Traffic(NamedTuple):
  """Collectives of one kind: how many are executed in a step, and the bytes that a chip contributes or receives in them."""

  times: int
  bytes: int


REST = "the rest"


def place(files: Sequence[str]) -> str:
  """The operation in whose files a collective originates, a folder of `pallas_kernels` such as "delta_rule"; or `REST`."""
  found = (re.search(r"/pallas_kernels/(\w+)/", file) for file in files)
  return next((match[1] for match in found if match), REST)


def mesh_shape(text: str) -> MeshShape:
  """From "16x1x1": sizes of the axes data, fsdp and tensor.

  Raises:
    ValueError: for any other text.
  """
  sizes = text.split("x")
  if len(sizes) != len(AXES) or not all(re.fullmatch(r"-1|\d+", size) for size in sizes):
    raise ValueError(f"--mesh is {text!r}; expected sizes for {', '.join(AXES)}, such as 16x1x1.")
  return MeshShape(*map(int, sizes))


def compile_step(experiment: Any, topology: str, shape: MeshShape) -> StepCost:
  """Compiles the training step of `memzoo train` for a mesh on a topology such as "v5e:4x4".

  Raises:
    ValueError: for an unknown topology, or a batch or parameters that do not divide over the mesh.
    DoesNotFit: if a chip has too little memory.
    ImportError: if libtpu is not installed.
  """
  mesh, began = _mesh(topology, shape), time.perf_counter()
  program = experiment_program(experiment, mesh)
  lowered = program.train.lower(program.abstract_state, abstract_batch(experiment.data, program.batch_sharding))
  state = program.abstract_state
  held = {"parameters": bytes_on_a_device(state.params)}
  held["optimiser"] = bytes_on_a_device(state) - held["parameters"]
  return _cost(topology, mesh, began, held, lowered)


def compile_generation(experiment: Any, topology: str, shape: MeshShape, sequences: int) -> StepCost:
  """Compiles the step that makes the next, likeliest token of so many sequences, of `memzoo.generate`.

  Sequences and their states are split over `data` and `fsdp`, parameters as in training.

  Raises:
    ValueError: for an unknown topology, or sequences or parameters that do not divide over the mesh.
    DoesNotFit: if a chip has too little memory.
    ImportError: if libtpu is not installed.
  """
  mesh, began = _mesh(topology, shape), time.perf_counter()
  model, params = experiment.model, experiment_program(experiment, mesh).abstract_state.params
  rows = batch_sharding(mesh, sequences, "--generate")
  state = _split_states(model, mesh, sequences)
  tokens = jax.ShapeDtypeStruct((sequences,), jnp.int32, sharding=rows)

  @split_operations(mesh)
  def step(params, tokens, state):
    logits, state = model.apply(params, tokens[:, None], state)
    return jnp.argmax(logits[:, -1], axis=-1), state

  of_states = jax.tree.map(lambda leaf: leaf.sharding, state)
  jitted = jax.jit(step, out_shardings=(rows, of_states), donate_argnums=2)
  held = {"parameters": bytes_on_a_device(params), "states": bytes_on_a_device(state)}
  return _cost(topology, mesh, began, held, jitted.lower(params, tokens, state), sequences)


def _split_states(model: nn.Module, mesh: Mesh, sequences: int) -> Any:
  """The shapes of the states of so many sequences, whose axis is split: the one that is twice as long for twice as many."""
  one, two = (jax.eval_shape(partial(model.apply, {}, n, method="initial_state")) for n in (sequences, 2 * sequences))

  def split(leaf, other):
    axes = [BATCH[0] if n != m else None for n, m in zip(leaf.shape, other.shape, strict=True)]
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

  return jax.tree.map(split, one, two)


def _mesh(topology: str, shape: MeshShape) -> Mesh:
  chip = topology.partition(":")[0]
  if chip not in CHIPS:
    raise ValueError(f"--topology is {topology!r}; expected one of {', '.join(CHIPS)} and its sizes, such as v5e:4x4.")
  return shape.build(devices(topology))


def _cost(
  topology: str, mesh: Mesh, began: float, held: dict[str, int], lowered: jax.stages.Lowered, sequences: int | None = None
) -> StepCost:
  cost = compile_and_read(lowered, topology.partition(":")[0])
  return StepCost(topology, tuple(mesh.shape.values()), time.perf_counter() - began, held, cost, sequences)
