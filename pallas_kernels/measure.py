"""Measurements: FLOPs of a function, wall time of a call, the machine's rate of matrix products, and peak memory."""

import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_SIDES = {"cpu": 1024}  # accelerators get a larger product, so that the overhead of a call is negligible
_LARGE_SIDE = 8192


def seconds_per_call(call: Callable[[], object], seconds: float = 0.5, at_least: int = 3) -> float:
  """Median wall time of `call()` in seconds, until the arrays that it returns are ready.

  Args:
    call: the function to time; it is called once beforehand, to compile and warm up.
    seconds: time to keep measuring for.
    at_least: minimum number of calls.
  """
  jax.block_until_ready(call())
  times: list[float] = []
  began = time.perf_counter()
  while len(times) < at_least or time.perf_counter() - began < seconds:
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def seconds_in_flight(call: Callable[[], object], seconds: float = 0.5, rounds: int = 5) -> float:
  """Like `seconds_per_call`, with calls queued back to back, so that an accelerator never waits for Python."""
  once = seconds_per_call(call, 0)
  queued = max(1, min(20, int(seconds / rounds / once)))
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    for _ in range(queued):
      result = call()
    jax.block_until_ready(result)
    times.append((time.perf_counter() - start) / queued)
  return statistics.median(times)


def large_product() -> tuple[Callable[[], jax.Array], int]:
  """Returns a function that multiplies two large square float32 matrices on the default device, and its FLOPs.

  A multiply-add counts as two. The product has full float32 precision, as in the operations.
  """
  side = _SIDES.get(jax.default_backend(), _LARGE_SIDE)
  a = jnp.ones((side, side), jnp.float32)
  product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
  return lambda: product(a), 2 * side**3


def matmul_rate(seconds: float = 0.5) -> float:
  """Float32 FLOP/s of a large square matrix product on the default device, measured for about `seconds`."""
  product, flops = large_product()
  return flops / seconds_per_call(product, seconds)


def reading_rate() -> float:
  """Bytes per second of a matrix-vector product that reads 256 MiB from the default device's memory."""
  matrix, vector = jnp.ones((2**14, 2**12)), jnp.ones((2**12,))
  product = jax.jit(lambda a, x: jnp.matmul(a, x, precision=jax.lax.Precision.HIGHEST))
  return matrix.nbytes / seconds_per_call(lambda: product(matrix, vector))


def peak_bytes() -> int:
  """Peak memory so far in bytes, of the fullest device of this process, or of the process if devices do not report theirs."""
  return max(_device_peaks(), default=0) or _peak_resident_bytes()


def whose_peak() -> str:
  """Whose peak `peak_bytes` returns: "the fullest device" or "this process"."""
  return "the fullest device" if any(_device_peaks()) else "this process"


def _device_peaks() -> list[int]:
  counts = (device.memory_stats() or {} for device in jax.local_devices())
  return [count.get("peak_bytes_in_use", 0) for count in counts]


def _peak_resident_bytes() -> int:
  with suppress(OSError, IndexError):  # Linux, where ru_maxrss is the parent's if that is larger
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
  import resource  # not available on every system

  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_flops(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of the matrix products (`dot_general`) in `function(*args)`, counted in its jaxpr.

  The body of a `scan` counts once per iteration, a `cond` as its most expensive branch, a Pallas kernel once per grid point.
  The body of a `while` counts once, because the number of iterations is unknown.

  Args:
    function: it is traced, not run.
    *args: arrays or `jax.ShapeDtypeStruct`s.
  """
  return sum(flops_by_scope(function, *args).values())


def flops_by_scope(function: Callable[..., Any], *args: Any) -> dict[str, int]:
  """Like `count_flops`, separately for each `jax.named_scope` (Flax opens one for every module)."""
  total: Counter[str] = Counter()
  for scope, count in _dot_flops(jax.make_jaxpr(function)(*args).jaxpr, ""):
    total[scope] += count
  return dict(total)


def _dot_flops(jaxpr: core.Jaxpr, scope: str) -> Iterator[tuple[str, int]]:
  for equation in jaxpr.eqns:
    inner = f"{scope}/{equation.source_info.name_stack}".strip("/")
    match equation.primitive.name:
      case "dot_general":
        yield inner, _dot_general_flops(equation)
      case "cond":
        branches = (list(_dot_flops(branch.jaxpr, inner)) for branch in equation.params["branches"])
        yield from max(branches, key=lambda branch: sum(count for _, count in branch))
      case name:
        times = _repetitions(name, equation.params)
        for nested in _jaxprs(equation.params.values()):
          yield from ((s, times * count) for s, count in _dot_flops(nested, inner))


def _repetitions(primitive: str, params: dict[str, Any]) -> int:
  if primitive == "scan":
    return params["length"]
  if primitive == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  if primitive == "shard_map":
    return params["mesh"].size
  return 1


def _dot_general_flops(equation: core.JaxprEqn) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _jaxprs(values: Any) -> Iterator[core.Jaxpr]:
  for value in values:
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
    elif isinstance(value, (tuple, list)):
      yield from _jaxprs(value)


def take_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
  """Wall times in seconds of all calls, taken in turns after a warm-up. Each call is timed at least three times."""
  times: dict[str, list[float]] = {name: [] for name in calls}
  for call in calls.values():
    jax.block_until_ready(call())
  began = time.perf_counter()
  while min(map(len, times.values())) < 3 or time.perf_counter() - began < seconds:
    for name, call in calls.items():
      for _ in range(_turns(times, name)):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times[name].append(time.perf_counter() - start)
  return times


def _turns(times: dict[str, list[float]], name: str) -> int:
  """How many times to time a call in its turn: fast calls up to ten times for each call of the slowest."""
  if not all(times.values()):
    return 1
  return max(1, min(10, int(max(map(min, times.values())) / min(times[name]))))
