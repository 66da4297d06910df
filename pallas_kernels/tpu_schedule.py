"""Reads the schedules of kernels compiled for a TPU, without one: how many bundles of instructions a step of the grid takes.

A core of a TPU issues one bundle per cycle, so without waits for memory, which a schedule does not tell, bundles are cycles.
These are static figures: they rank variants of a kernel, and only a TPU can say how long one takes.

libtpu writes the schedules that it makes to a folder that it is told once, when it is loaded. So a kernel is compiled in a
process of its own.
"""

import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from operator import mul
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from .dispatch import form_for


class Schedule(NamedTuple):
  """The schedule of one kernel.

  Attributes:
    name: of the kernel.
    bundles: of a step of the grid, with its inner loops, on average.
    others: of everything else.
    vmem_bytes: fast memory of its blocks, its scratch and what it spills.
    slots: by kind of instruction, the share of a step's slots that is used.
  """

  name: str
  bundles: float
  others: int
  vmem_bytes: int
  slots: dict[str, float]


class Grid(NamedTuple):
  """The grid of a kernel.

  Attributes:
    steps: of the grid.
    trips: how often the loops in a step run, in their order; a single number is that of all. A schedule does not tell. It is
      the length of the longest one, or where data decide, what a kernel's call says in `metadata={"loops": "[2, 4.5]"}`.
  """

  steps: int
  trips: tuple[float, ...]


def run(command: Sequence[str], grids: Mapping[str, Grid] = MappingProxyType({})) -> tuple[str, list[Schedule]]:
  """Runs a process that compiles kernels. Returns what it printed, and the schedules of its kernels, with these grids.

  Raises:
    RuntimeError: if it fails; the text is its last line of errors.
  """
  with tempfile.TemporaryDirectory() as folder:
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
      raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout, read(Path(folder), grids)


def grids(jaxpr: Any) -> Iterator[tuple[str, Grid]]:
  """The kernels of a program, for any platform, with their grids."""
  for equation in _equations(jaxpr):
    if equation.primitive.name == "pallas_call":
      loops = [inner.params["length"] for inner in _equations(equation.params["jaxpr"]) if inner.primitive.name == "scan"]
      said = dict(equation.params["metadata"] or {}).get("loops")
      trips = json.loads(said) if said else [max(loops, default=1)]
      yield equation.params["name"], Grid(math.prod(equation.params["grid_mapping"].grid), tuple(trips))


def _equations(jaxpr: Any) -> Iterator[Any]:
  """All equations of a program for a TPU, but for those inside of kernels."""
  for equation in jaxpr.eqns:
    yield equation
    if form := form_for(equation, "tpu"):
      yield from _equations(form.jaxpr)
    elif equation.primitive.name != "pallas_call":
      for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
          yield from _equations(getattr(inner, "jaxpr", inner))


def read(folder: Path, grids: Mapping[str, Grid]) -> list[Schedule]:
  """The schedules of kernels, with these grids, among what libtpu wrote to a folder."""
  found = []
  for path in sorted(folder.glob("*-final_bundles.txt")):
    stamped = re.fullmatch(r"\d+-(\w+?)(?:\.\d+)?-\d+-final_bundles\.txt", path.name)
    if stamped:
      start = path.name.rsplit("-", 2)[0]
      ends = "final_bundles", "final_hlo-static-per-bundle-utilization", "post-ra"
      texts = (next(folder.glob(f"{start}-[0-9]*[0-9]-{end}.txt")).read_text(errors="replace") for end in ends)
      trips = grids[stamped[1]].trips if stamped[1] in grids else (1,)
      found.append(parse(stamped[1], *texts, trips))
  return found


# A bundle's line: its address, perhaps a label, a ">" for every loop around it, and its instructions.
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2}:|:)\s*(>*)\s*\{", re.M)
_ALLOCATION = re.compile(r"#(allocation\d+\w*) \[[^\n]*?space=vmem, size = 0x([0-9a-f]+)")


def parse(name: str, bundles: str, slots: str, allocations: str, trips: Sequence[float] = (1,)) -> Schedule:
  """The schedule in the text of final bundles, in that of their slots (names, capacities, a row for every bundle), and in that
  of allocations, for `Grid.trips`.

  Raises:
    ValueError: if the texts are not those of one schedule, or it does not have so many loops.
  """
  found = [(match[1], len(match[2])) for match in _BUNDLE.finditer(bundles)]
  names, capacities, *rows = [line for line in slots.splitlines() if line.strip()][1:]
  used = [[int(x) for x in row.split()] for row in rows if re.fullmatch(r"[\d\s]+", row)]
  if len(used) != len(found):
    raise ValueError(f"the schedule of {name} has {len(found)} bundles, but slots of {len(used)}.")
  times = _times(name, found, trips)
  in_step = sum(times)
  columns = zip([x.strip() for x in names.split(",")], map(int, capacities.split()), zip(*used, strict=True), strict=True)
  shares = {column: sum(map(mul, values, times)) / (capacity * in_step) for column, capacity, values in columns}
  sizes = {each: int(size, 16) for each, size in _ALLOCATION.findall(allocations)}
  return Schedule(name, in_step, times.count(0), sum(sizes.values()), shares)


def _times(name: str, bundles: Sequence[tuple[str, int]], trips: Sequence[float]) -> list[float]:
  """How often each bundle runs in a step, for their labels and the number of loops around each, that over the grid included."""
  step = min(1, max(depth for _, depth in bundles))  # the loop over the grid, or no loop
  inner = sum(label == "LB:" and depth > step for label, depth in bundles)
  if len(trips) not in (1, inner):
    raise ValueError(f"the schedule of {name} has {inner} loops in a step; expected {len(trips)}.")
  remaining, around, times = iter(trips if len(trips) > 1 else trips * inner), [], []
  for label, depth in bundles:
    if label == "LB:" and depth > step:
      around[depth - step - 1 :] = [next(remaining)]
    # Other bundles belong to the last loop of their depth: some within a loop are not marked, and are left out.
    times.append(math.prod(around[: depth - step]) if depth >= step else 0)
  return times
