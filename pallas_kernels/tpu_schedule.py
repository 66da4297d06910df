"""Reads the schedule of kernels compiled for a TPU, without one: how many bundles of instructions a step of the grid takes.

    python -m memzoo.pallas_kernels.tpu_schedule v5e v6e       prints a table

A core of a TPU issues one bundle per cycle, so without waits for memory, which a schedule does not tell, bundles are cycles.
These are static figures: they rank variants of a kernel, and only a TPU can say how long one takes.

libtpu writes the schedules that it makes to a folder that it is told once, when it is loaded. So a kernel is compiled in a
process of its own.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .delta_rule import tpu
from .delta_rule.chunked import Kept
from .delta_rule.terms import Plan, Update
from .documents import documents
from .tpu_cost import CHIPS, measure
from .workloads import Shape, least_work, make_inputs


class Schedule(NamedTuple):
  """The schedule of one kernel.

  Attributes:
    name: of the kernel.
    bundles: of a step of the grid, without its inner loops.
    others: of everything else, loops counted once.
    slots: by kind of instruction, the share of a step's slots that is used.
  """

  name: str
  bundles: int
  others: int
  slots: dict[str, float]


class Figure(NamedTuple):
  """What a kernel takes on one chip.

  Attributes:
    kernel, chip: as in `figures`.
    schedule: of the kernel.
    bundles: per token and head.
    nanoseconds: per token and head, at the nominal clock.
    roofline: the least that the chip's published rates allow, in nanoseconds per token and head; of a backward pass with the
      forward pass.
    compile_seconds: time to trace and compile.
  """

  kernel: str
  chip: str
  schedule: Schedule
  bundles: float
  nanoseconds: float
  roofline: float
  compile_seconds: float


def _delta_rule(
  shape: Shape, erases: bool = True, packed: bool = False, backward: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """A kernel of `delta_rule/tpu.py`, of projections [B, T, H * width], and its arguments."""

  def call(q, k, v, beta, log_decay, state, segment_ids, kept):
    plan = Plan(lambda q, k, v, s: (q, [Update(k, s, v)]), shape.heads, shape.key_dim**-0.5, jnp.dtype(jnp.float32), tpu.CHUNK)
    docs = None if segment_ids is None else documents(segment_ids)
    operands = *(x.reshape(*x.shape[:2], shape.heads, -1) for x in (q, k, v)), beta
    if backward:
      d_out = operands[2]
      gradients = tpu.backward(plan, docs, operands, log_decay[..., None], Kept(kept, None, None), d_out, state)
      return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1), gradients)
    (out, state), _ = tpu.forward(plan, docs, operands, log_decay[..., None], state, keep=False)
    return out.reshape(v.shape), state

  tokens, widths = (shape.batch, shape.length), (shape.key_dim, shape.key_dim, shape.value_dim)
  wide = [jax.ShapeDtypeStruct((*tokens, shape.heads * width), jnp.bfloat16) for width in widths]
  gate = jax.ShapeDtypeStruct((*tokens, shape.heads), jnp.float32)
  state = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.key_dim, shape.value_dim), jnp.float32)
  ids = jax.ShapeDtypeStruct(tokens, jnp.int32) if packed else None
  kept = jax.ShapeDtypeStruct((shape.length // tpu.CHUNK, *state.shape), jnp.float32) if backward else None
  return call, (*wide, gate if erases else None, gate, state, ids, kept)


SHAPE = Shape(1, 4096, 16)
# The operation that a kernel computes, and the function that makes the call and its arguments.
KERNELS = {
  "gated delta rule": ("gated_delta_rule", _delta_rule),
  "gated delta rule, packed documents": ("gated_delta_rule", partial(_delta_rule, packed=True)),
  "linear attention, a decay per head": ("linear_attention", partial(_delta_rule, erases=False)),
  "gated delta rule, backward": ("gated_delta_rule", partial(_delta_rule, backward=True)),
  "linear attention, a decay per head, backward": ("linear_attention", partial(_delta_rule, erases=False, backward=True)),
}


def figures(kernels: Sequence[str] = (), chips: Sequence[str] = ("v5e",), shape: Shape = SHAPE) -> Iterator[Figure]:
  """Figures, one after another as kernels are compiled, with bfloat16 activations.

  Args:
    kernels: keys of `KERNELS`; all by default.
    chips: keys of `tpu_cost.CHIPS`.
    shape: of the inputs.

  Raises:
    ValueError: for an unknown kernel or chip.
    RuntimeError: if a kernel does not compile; the text is the compiler's.
  """
  for given, known, name in ((kernels, KERNELS, "kernel"), (chips, CHIPS, "chip")):
    for key in given:
      if key not in known:
        raise ValueError(f"{name} is {key!r}; expected one of {', '.join(known)}.")
  for kernel in kernels or KERNELS:
    operation, _ = KERNELS[kernel]
    direction = "gradient" if kernel.endswith("backward") else "forward"
    least = least_work(operation, direction, *jax.eval_shape(partial(make_inputs, operation, shape, dtype=jnp.bfloat16)))
    for chip in chips:
      steps, schedule, seconds = _compile(kernel, chip, shape)
      bundles = steps * schedule.bundles / shape.token_heads
      roofline = 1e9 * least.seconds(CHIPS[chip].flops, CHIPS[chip].bandwidth) / shape.token_heads
      yield Figure(kernel, chip, schedule, bundles, 1e9 * bundles / CHIPS[chip].clock, roofline, seconds)


def _compile(kernel: str, chip: str, shape: Shape) -> tuple[int, Schedule, float]:
  """Compiles a kernel in another process. Returns the steps of its grid, its schedule and the seconds that it took."""
  with tempfile.TemporaryDirectory() as folder:
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    command = [sys.executable, "-m", f"{__package__}.{Path(__file__).stem}", "--one", kernel, chip, json.dumps(shape.__dict__)]
    environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
      raise RuntimeError(f"{kernel} does not compile for {chip}: {done.stderr.strip().splitlines()[-1]}")
    grids = json.loads(done.stdout.splitlines()[-1])
    ((name, steps),) = grids.items()
    (schedule,) = [found for found in read(Path(folder)) if found.name == name]
    return steps, schedule, time.perf_counter() - began


def _compile_here(kernel: str, chip: str, shape: Shape) -> dict[str, int]:
  """Compiles a kernel. Returns the number of steps of every grid in the program, by the kernel's name."""
  call, arguments = KERNELS[kernel][1](shape)
  grids = dict(_grids(jax.make_jaxpr(call)(*arguments).jaxpr))
  measure(call, *arguments, chip=chip)
  return grids


def _grids(jaxpr: Any) -> Iterator[tuple[str, int]]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation.params["name"], math.prod(equation.params["grid_mapping"].grid)
    else:
      for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
        if hasattr(inner, "jaxpr"):
          yield from _grids(inner.jaxpr)


def read(folder: Path) -> list[Schedule]:
  """The schedules of kernels among what libtpu wrote to a folder."""
  found = []
  for path in sorted(folder.glob("*-final_bundles.txt")):
    stamped = re.fullmatch(r"\d+-(\w+?)(?:\.\d+)?-\d+-final_bundles\.txt", path.name)
    if stamped:
      slots = next(folder.glob(path.name.rsplit("-", 2)[0] + "-*-final_hlo-static-per-bundle-utilization.txt"))
      found.append(parse(stamped[1], path.read_text(errors="replace"), slots.read_text()))
  return found


# A bundle's line: its address, perhaps a label, a ">" for every loop around it, and its instructions.
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}:|:)\s*(>*)\s*\{", re.M)


def parse(name: str, bundles: str, slots: str) -> Schedule:
  """The schedule in the text of final bundles, and in that of their slots: names, capacities, and a row for every bundle."""
  depths = [len(match[1]) for match in _BUNDLE.finditer(bundles)]
  names, capacities, *rows = [line for line in slots.splitlines() if line.strip()][1:]
  used = [[int(x) for x in row.split()] for row in rows if re.fullmatch(r"[\d\s]+", row)]
  if len(used) != len(depths):
    raise ValueError(f"the schedule of {name} has {len(depths)} bundles, but slots of {len(used)}.")
  step = min(1, max(depths))  # the loop over the grid, or no loop
  in_step = [row for row, depth in zip(used, depths, strict=True) if depth == step]
  columns = zip([x.strip() for x in names.split(",")], map(int, capacities.split()), zip(*in_step, strict=True), strict=True)
  shares = {column: sum(values) / (capacity * len(in_step)) for column, capacity, values in columns}
  return Schedule(name, len(in_step), len(depths) - len(in_step), shares)


def table(found: Sequence[Figure]) -> str:
  """Figures as a table in Markdown."""
  titles = "kernel, static", "chip", "bundles per token-head", "ns", "roofline", "ratio", "matrix unit, stores", "compiled in"
  lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
  for x in found:
    shares = x.schedule.slots
    busy = f"{shares['MATMUL']:.0%}, {shares['VSTORE']:.0%}"
    ratio = x.nanoseconds / x.roofline
    lines.append(
      f"| {x.kernel} | {x.chip} | {x.bundles:.2f} | {x.nanoseconds:.2f} | {x.roofline:.2f} | {ratio:.1f} | {busy} "
      f"| {x.compile_seconds:.0f} s |"
    )
  return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints a table of all kernels for the given chips."""
  parser = argparse.ArgumentParser(prog="python -m memzoo.pallas_kernels.tpu_schedule", description=__doc__.split("\n")[0])
  parser.add_argument("chips", nargs="*", metavar="CHIP", help=f"one of {', '.join(CHIPS)}; v5e by default")
  parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # what the other process does
  given = parser.parse_args(arguments)
  if given.one:
    kernel, chip, shape = given.one
    print(json.dumps(_compile_here(kernel, chip, Shape(**json.loads(shape)))))
  else:
    try:
      print(table(list(figures(chips=given.chips or ["v5e"]))))
    except ValueError as error:
      parser.error(str(error))


if __name__ == "__main__":
  main()
