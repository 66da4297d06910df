"""Estimates the time of every operation on a TPU from programs compiled for it, without one.

Times are in nanoseconds per token-head, beside the roofline: the least work of the operation at the chip's published rates. For
XLA's programs they are the compiler's (`tpu_cost.py`), for kernels the bundles of their schedules (`tpu_schedule.py`).
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from . import tpu_schedule
from .tpu_cost import CHIPS, DoesNotFit, measure
from .tpu_schedule import Grid
from .workloads import DIRECTIONS, ON_ACCELERATORS, Shape, find, flat, function, least_work, make_inputs

XLA, KERNELS = "xla", "auto"

SHAPES = (Shape(1, 4096, 16), Shape(8, 4096, 16))


@dataclass(frozen=True)
class Kernel:
  """What one kernel of a program costs, by its schedule.

  Attributes:
    name: of the kernel.
    bundles: per token-head.
    vmem_bytes: fast memory that it takes.
    slots: by kind of instruction, the share of the slots that is used.
  """

  name: str
  bundles: float
  vmem_bytes: int
  slots: dict[str, float]


@dataclass(frozen=True)
class Estimate:
  """What one operation costs on one chip, in one direction.

  Attributes:
    operation, chip, direction, implementation, dtype: as in `estimates`.
    shape: shape of the inputs.
    kernels: those of the program.
    ns: nanoseconds per token-head, with kernels at the nominal clock; `None` if the program does not fit.
    roofline_ns: the least that the chip's published rates allow.
    temporary_bytes: memory that the program needs besides inputs and results.
    passes: number of executed matrix products, by the bfloat16 passes that each takes.
    custom_calls: number of executed custom calls by target; their time is not in `ns`.
    compile_seconds: time to trace and compile.
    problem: why there is no estimate, or "".
  """

  operation: str
  chip: str
  direction: str
  implementation: str
  shape: Shape
  kernels: list[Kernel]
  ns: float | None
  roofline_ns: float
  temporary_bytes: int
  passes: dict[int, int]
  custom_calls: dict[str, int]
  compile_seconds: float
  dtype: str
  problem: str = ""


def estimates(
  operations: Sequence[str] = (),
  chips: Sequence[str] = ("v5e",),
  shapes: Sequence[Shape] = SHAPES,
  directions: Sequence[str] = DIRECTIONS,
  implementations: Sequence[str] = (XLA, KERNELS),
  dtype: str = "bfloat16",
) -> Iterator[Estimate]:
  """Estimates, one after another as they are compiled.

  Args:
    operations: keys of `OPERATIONS` or `VARIANTS`; `ON_ACCELERATORS` by default.
    chips: keys of `tpu_cost.CHIPS`.
    shapes: shapes of the inputs.
    directions: "forward", "gradient" (which includes what it needs of the forward pass), or both.
    implementations: `XLA`, or `KERNELS` where there are some, or both.
    dtype: of activations, "bfloat16" or "float32".

  Raises:
    ValueError: for an unknown operation or chip.
    ImportError: if libtpu is not installed.
  """
  names = list(operations) or list(ON_ACCELERATORS)
  for name in names:
    find(name)
  for chip in chips:
    if chip not in CHIPS:
      raise ValueError(f"chip is {chip!r}; expected one of {', '.join(CHIPS)}.")
  for name in names:
    for chip in chips:
      for shape in shapes:
        for direction in directions:
          for implementation in implementations:
            grids = {} if implementation == XLA else _grids(name, shape, direction, dtype)
            if implementation == XLA or grids:
              yield _estimate(name, chip, shape, direction, implementation, dtype, grids)


def _estimate(
  name: str, chip: str, shape: Shape, direction: str, implementation: str, dtype: str, grids: dict[str, Grid]
) -> Estimate:
  each = 1e9 / shape.token_heads
  least = least_work(name, direction, *_inputs(name, shape, dtype))
  roofline = each * least.seconds(CHIPS[chip].flops, CHIPS[chip].bandwidth)
  began = time.perf_counter()
  try:
    if implementation == XLA:
      cost, kernels = _compile(name, direction, chip, shape, dtype), []
    else:
      cost, kernels = _compile_elsewhere(name, direction, chip, shape, dtype, grids)
  except DoesNotFit as problem:
    seconds = time.perf_counter() - began
    return Estimate(name, chip, direction, implementation, shape, [], None, roofline, 0, {}, {}, seconds, dtype, str(problem))
  cycles = cost.pop("cycles") + shape.token_heads * sum(kernel.bundles for kernel in kernels)
  ns, seconds = each * cycles / CHIPS[chip].clock, time.perf_counter() - began
  common = {"compile_seconds": seconds, "dtype": dtype}
  return Estimate(name, chip, direction, implementation, shape, kernels, ns, roofline, **cost, **common)


def _inputs(name: str, shape: Shape, dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
  return jax.eval_shape(lambda: make_inputs(name, shape, dtype=jnp.dtype(dtype)))


def _grids(name: str, shape: Shape, direction: str, dtype: str) -> dict[str, Grid]:
  """The kernels of the program for a TPU, and their grids."""
  program = jax.make_jaxpr(function(name, direction, KERNELS))(*_inputs(name, shape, dtype))
  return dict(tpu_schedule.grids(program.jaxpr))


def _compile(
  name: str, direction: str, chip: str, shape: Shape, dtype: str, implementation: str = XLA
) -> dict[str, Any]:
  """What the compiler says of a program, by the names of `Estimate`; and cycles, without those of kernels."""
  call, inputs = function(name, direction, implementation), _inputs(name, shape, dtype)
  if implementation != XLA:
    call, inputs = flat(call, inputs)
  cost = measure(call, *inputs, chip=chip)
  passes: Counter[int] = Counter()
  for product in cost.products:
    passes[product.passes] += product.times
  return {
    "cycles": cost.cycles,
    "temporary_bytes": cost.temporary_bytes,
    "passes": dict(sorted(passes.items())),
    "custom_calls": dict(cost.custom_calls),
  }


def _compile_elsewhere(
  name: str, direction: str, chip: str, shape: Shape, dtype: str, grids: dict[str, Grid]
) -> tuple[dict[str, Any], list[Kernel]]:
  """The same of a program with kernels, and these. Another process compiles it."""
  arguments = name, direction, chip, json.dumps(astuple(shape)), dtype
  printed, schedules = tpu_schedule.run([sys.executable, "-m", f"{__package__}.tpu_bench", *arguments], grids)
  cost = json.loads(printed.splitlines()[-1])
  if "problem" in cost:
    raise DoesNotFit(cost["problem"])
  own = [x for x in schedules if x.name in grids]
  return cost, [Kernel(x.name, grids[x.name].steps * x.bundles / shape.token_heads, x.vmem_bytes, x.slots) for x in own]


def _main(name: str, direction: str, chip: str, shape: str, dtype: str) -> None:
  """The process of `_compile_elsewhere`."""
  try:
    print(json.dumps(_compile(name, direction, chip, Shape(*json.loads(shape)), dtype, KERNELS)))
  except DoesNotFit as problem:
    print(json.dumps({"problem": str(problem)}))


if __name__ == "__main__":
  _main(*sys.argv[1:])
