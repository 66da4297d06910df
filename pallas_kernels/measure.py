"""Measurements: FLOPs of a function, wall time of a call, this machine's matrix product rate, and peak memory."""

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

_SIDES = {"cpu": 1024}  # an accelerator needs more work per call before the call itself stops mattering
_LARGE_SIDE = 8192


def seconds_per_call(call: Callable[[], object], seconds: float = 0.5, at_least: int = 3) -> float:
  """Median wall time of `call()`, in seconds; `call` returns arrays, which are waited for.

  Args:
    call: what to time; it is called once beforehand, to compile and warm up.
    seconds: how long to keep measuring.
    at_least: how many calls to make however long they take.
  """
  jax.block_until_ready(call())
  times: list[float] = []
  began = time.perf_counter()
  while len(times) < at_least or time.perf_counter() - began < seconds:
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def large_product() -> tuple[Callable[[], jax.Array], int]:
  """A call that multiplies two large square float32 matrices on the default device, and its FLOPs.

  A multiply-add counts as two. The product is asked for in full float32 precision, as the operations' products are.
  """
  side = _SIDES.get(jax.default_backend(), _LARGE_SIDE)
  a = jnp.ones((side, side), jnp.float32)
  product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
  return lambda: product(a), 2 * side**3


def matmul_rate(seconds: float = 0.5) -> float:
  """Float32 FLOP/s of a large square matrix product on the default device, measured for about `seconds`."""
  product, flops = large_product()
  return flops / seconds_per_call(product, seconds)


def peak_bytes() -> int:
  """Bytes at the peak until now: of the fullest of this process's devices, or of this process where they do not count."""
  return max(_device_peaks(), default=0) or _peak_resident_bytes()


def whose_peak() -> str:
  """What `peak_bytes` are those of: "the fullest device" or "this process"."""
  return "the fullest device" if any(_device_peaks()) else "this process"


def _device_peaks() -> list[int]:
  counts = (device.memory_stats() or {} for device in jax.local_devices())
  return [count.get("peak_bytes_in_use", 0) for count in counts]


def _peak_resident_bytes() -> int:
  with suppress(OSError, IndexError):  # Linux: the next line's number would be that of the parent, if that is larger
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
  import resource  # not on every system

  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_flops(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of the matrix products (`dot_general`) in `function(*args)`, counted in its jaxpr.

  Bodies of `scan` count once per iteration, of `cond` as the dearest branch, of a Pallas kernel once per grid point.
  The number of turns of a `while` is not known beforehand: its body counts once.

  Args:
    function: to be traced, not run.
    *args: arrays or `jax.ShapeDtypeStruct`s.
  """
  return sum(flops_by_scope(function, *args).values())


def flops_by_scope(function: Callable[..., Any], *args: Any) -> dict[str, int]:
  """As `count_flops`, separately for each `jax.named_scope` (Flax names one after every module)."""
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
  """Times in seconds of every call, warm. The slow ones get fewer turns: as many as fit, three at least."""
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
  """How often to call one before the next gets its turn: the quickest up to ten times as often as the slowest."""
  if not all(times.values()):
    return 1
  return max(1, min(10, int(max(map(min, times.values())) / min(times[name]))))
