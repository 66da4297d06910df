"""Estimates the time of every operation on a TPU from programs compiled for it, without one; see `tpu_cost`.

Times are in nanoseconds per token-head, beside the roofline: the least work of the operation at the chip's published rates.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .tpu_cost import CHIPS, DoesNotFit, measure
from .workloads import DIRECTIONS, ON_ACCELERATORS, Shape, find, function, least_work, make_inputs

SHAPES = (Shape(1, 4096, 16), Shape(8, 4096, 16))


@dataclass(frozen=True)
class Estimate:
  """What one operation costs on one chip, in one direction.

  Attributes:
    operation, chip, direction: as in `estimates`.
    shape: shape of the inputs.
    ns: the compiler's estimate, nanoseconds per token-head; `None` if the program does not fit.
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
  shape: Shape
  ns: float | None
  roofline_ns: float
  temporary_bytes: int
  passes: dict[int, int]
  custom_calls: dict[str, int]
  compile_seconds: float
  problem: str = ""


def estimates(
  operations: Sequence[str] = (),
  chips: Sequence[str] = ("v5e",),
  shapes: Sequence[Shape] = SHAPES,
  directions: Sequence[str] = DIRECTIONS,
) -> Iterator[Estimate]:
  """Estimates, one after another as they are compiled, with bfloat16 activations.

  Args:
    operations: keys of `OPERATIONS` or `VARIANTS`; `ON_ACCELERATORS` by default.
    chips: keys of `tpu_cost.CHIPS`.
    shapes: shapes of the inputs.
    directions: "forward", "gradient" (which includes what it needs of the forward pass), or both.

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
          yield _estimate(name, chip, shape, direction)


def _estimate(name: str, chip: str, shape: Shape, direction: str) -> Estimate:
  inputs = jax.eval_shape(lambda: make_inputs(name, shape, dtype=jnp.bfloat16))
  rates = CHIPS[chip].flops, CHIPS[chip].bandwidth
  each = 1e9 / shape.token_heads
  roofline = each * least_work(name, direction, *inputs).seconds(*rates)
  began = time.perf_counter()
  try:
    cost = measure(function(name, direction), *inputs, chip=chip)
  except DoesNotFit as problem:
    return Estimate(name, chip, direction, shape, None, roofline, 0, {}, {}, time.perf_counter() - began, str(problem))
  passes: Counter[int] = Counter()
  for product in cost.products:
    passes[product.passes] += product.times
  return Estimate(
    name,
    chip,
    direction,
    shape,
    ns=each * cost.seconds,
    roofline_ns=roofline,
    temporary_bytes=cost.temporary_bytes,
    passes=dict(sorted(passes.items())),
    custom_calls=dict(cost.custom_calls),
    compile_seconds=time.perf_counter() - began,
  )
