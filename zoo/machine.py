"""What the machine under us can do, the yardstick that measured times are held against, and what it has had to hold."""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp

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
