"""Compiles an experiment's training step ahead of time for a TPU topology. No TPU is needed, and nothing is allocated."""

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..pallas_kernels.tpu_cost import CHIPS, Cost, compile_and_read, devices
from .experiment_report import abstract_batch, bytes_on_a_device
from .sharding import AXES, MeshShape
from .step import experiment_program


@dataclass(frozen=True)
class StepCost:
  """What a training step costs each chip.

  Attributes:
    topology: such as "v5e:4x4".
    mesh: sizes of the mesh's axes, in the order of `sharding.AXES`.
    compile_seconds: time to trace and compile.
    state_bytes: parameters, moments and counters on a chip, a part of `cost.peak_bytes`.
    cost: as compiled.
  """

  topology: str
  mesh: tuple[int, ...]
  compile_seconds: float
  state_bytes: int
  cost: Cost

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
  chip = topology.partition(":")[0]
  if chip not in CHIPS:
    raise ValueError(f"--topology is {topology!r}; expected one of {', '.join(CHIPS)} and its sizes, such as v5e:4x4.")
  mesh = shape.build(devices(topology))
  began = time.perf_counter()
  program = experiment_program(experiment, mesh)
  lowered = program.train.lower(program.abstract_state, abstract_batch(experiment.data, program.batch_sharding))
  cost = compile_and_read(lowered, chip)
  seconds = time.perf_counter() - began
  return StepCost(topology, tuple(mesh.shape.values()), seconds, bytes_on_a_device(program.abstract_state), cost)
