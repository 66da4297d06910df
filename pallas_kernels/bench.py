"""Times every operation against its oracle and against a lower bound for this machine.

The oracle is the paper's recurrence, token by token. The lower bound ("floor") is the time that the matrix products of the
chunked form alone would take at the rate of one large product (three times that for the gradient). The oracle, the chunked form
and the large product are measured in turns in one process, after a warm-up, so that other work on the machine slows all of them
alike. The median is reported.

    python -m memzoo.pallas_kernels.bench --peak-memory gated_delta_rule 65536
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import jax

from .measure import count_flops, large_product, peak_bytes, seconds_per_call, take_turns
from .workloads import DIRECTIONS, OPERATIONS, VARIANTS, Shape, function, make_inputs

_SHAPE = Shape()
LONG = (4096, 65536)  # the time per token should be equal at these lengths


@dataclass(frozen=True)
class Timing:
  """Times of one operation in one direction, in seconds.

  Attributes:
    operation: its public name.
    direction: "forward" or "gradient" (of a weighted sum of the outputs, by every input).
    seconds: median time of a call, by implementation: "xla" and "recurrent" (the oracle).
    compile_seconds: time to trace and compile, by implementation.
    matmul_rate: float32 FLOP/s of a large product, measured in the same turns.
    floor_seconds: time of the matrix products of "xla" at that rate.
  """

  operation: str
  direction: str
  seconds: dict[str, float]
  compile_seconds: dict[str, float]
  matmul_rate: float
  floor_seconds: float


@dataclass(frozen=True)
class LongTiming:
  """Times and memory of one operation at the lengths `LONG`.

  Attributes:
    operation: its public name.
    forward_seconds, gradient_seconds: seconds per token, by length.
    peak_bytes: peak memory of a process that computes the gradient once at the greatest length, Python and compiler included.
    input_bytes: memory of the inputs, a part of `peak_bytes`.
  """

  operation: str
  forward_seconds: dict[int, float]
  gradient_seconds: dict[int, float]
  peak_bytes: int
  input_bytes: int


@dataclass(frozen=True)
class Report:
  """Results of a benchmark, and the machine they were measured on."""

  device: str
  jax: str
  shape: Shape
  timings: list[Timing]
  long: list[LongTiming]


def bench(
  operations: Sequence[str] | None = None,
  shape: Shape = _SHAPE,
  *,
  directions: Sequence[str] = DIRECTIONS,
  seconds: float = 2.0,
  long: bool = False,
  say: Callable[[str], None] = lambda line: None,
) -> Report:
  """Runs the benchmark.

  Args:
    operations: keys of `OPERATIONS` or `VARIANTS`; `None` for all `OPERATIONS`.
    shape: shape of the inputs when timing against the oracle.
    directions: which of `DIRECTIONS` to time.
    seconds: measuring time per operation and direction.
    long: whether to measure at the lengths `LONG` too.
    say: called with a line of progress before each measurement.

  Raises:
    ValueError: for an unknown operation or direction.
  """
  names = list(OPERATIONS) if operations is None else list(operations)
  for name in names:
    if name not in OPERATIONS | VARIANTS:
      raise ValueError(f"operations has {name!r}; expected some of {', '.join(OPERATIONS | VARIANTS)}.")
  if not directions or not set(directions) <= set(DIRECTIONS):
    raise ValueError(f"directions is {directions!r}; expected some of {', '.join(DIRECTIONS)}.")
  timings, long_timings = [], []
  for name in names:
    for direction in directions:
      say(f"{name}, {direction}")
      timings.append(_time(name, direction, shape, seconds))
  for name in names if long else ():
    say(f"{name}, {' and '.join(f'{length:,}' for length in LONG)} tokens")
    long_timings.append(_time_long(name, shape, seconds))
  return Report(_device(), jax.__version__, shape, timings, long_timings)


def peak_memory(operation: str, shape: Shape) -> int:
  """Peak memory in bytes of a fresh process that computes the gradient of `operation` once, inputs included."""
  arguments = [operation, *map(str, dataclasses.astuple(shape))]
  command = [sys.executable, "-m", __name__, "--peak-memory", *arguments]
  return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def compile_pass(operation: str, direction: str, implementation: str, inputs: tuple) -> tuple[Callable, float]:
  """Returns `function`, compiled for these inputs, and the seconds that this took."""
  start = time.perf_counter()
  compiled = jax.jit(function(operation, direction, implementation)).lower(*inputs).compile()
  return compiled, time.perf_counter() - start


def _time(operation: str, direction: str, shape: Shape, seconds: float) -> Timing:
  inputs = make_inputs(operation, shape)
  compiled = {name: compile_pass(operation, direction, name, inputs) for name in ("xla", "recurrent")}
  product, product_flops = large_product()
  calls = {name: partial(call, *inputs) for name, (call, _) in compiled.items()} | {"product": product}
  times = {name: statistics.median(taken) for name, taken in take_turns(calls, seconds).items()}
  rate = product_flops / times.pop("product")
  flops = count_flops(function(operation, "forward", "xla"), *inputs) * (1 if direction == "forward" else 3)
  compile_seconds = {name: compile_seconds for name, (_, compile_seconds) in compiled.items()}
  return Timing(operation, direction, times, compile_seconds, rate, flops / rate)


def _time_long(operation: str, shape: Shape, seconds: float) -> LongTiming:
  per_token: dict[str, dict[int, float]] = {direction: {} for direction in DIRECTIONS}
  for length in LONG:
    inputs = make_inputs(operation, dataclasses.replace(shape, length=length))
    for direction, found in per_token.items():
      call, _ = compile_pass(operation, direction, "xla", inputs)
      found[length] = seconds_per_call(partial(call, *inputs), seconds) / length
  longest = dataclasses.replace(shape, length=max(LONG))
  input_bytes = sum(4 * x.size for x in jax.eval_shape(lambda: make_inputs(operation, longest)))
  return LongTiming(operation, per_token["forward"], per_token["gradient"], peak_memory(operation, longest), input_bytes)


def _device() -> str:
  device = jax.devices()[0]
  return f"{os.cpu_count()} CPU threads" if device.platform == "cpu" else device.device_kind


def _print_peak_memory(operation: str, sizes: Iterable[str]) -> None:
  inputs = make_inputs(operation, Shape(*map(int, sizes)))
  jax.block_until_ready(compile_pass(operation, "gradient", "xla", inputs)[0](*inputs))
  print(peak_bytes())


if __name__ == "__main__":
  _print_peak_memory(sys.argv[2], sys.argv[3:])
