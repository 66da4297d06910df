"""Strictness for the whole suite: no implicit dtype or rank promotion, four devices, warnings are errors (pyproject)."""

import gc
import itertools
import os
from importlib.metadata import version
from pathlib import Path

# Before jax is imported: tests run on the CPU unless told otherwise, split into four devices for the sharding laws. Most of
# their time is compilation, so machine code is not optimised; XLA's own passes, which decide what is computed, are all on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ["XLA_FLAGS"] = " ".join([
  os.environ.get("XLA_FLAGS", ""),
  "--xla_force_host_platform_device_count=4",
  "--xla_backend_optimization_level=0",
  "--xla_cpu_parallel_codegen_split_count=1",  # each process has about one core
  # XLA's older emitters of fusions compile twice as fast; JAX 0.11 no longer has them and would not start with this flag.
  "--xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else "",
])

import jax
import pytest

# JAX makes objects by the million and little garbage in cycles: a twelfth of the time was spent on looking for it.
gc.set_threshold(100_000, 20, 100)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Not by environment variables: processes that tests kill, or whose disk is full, would leave broken entries.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

_TESTS = itertools.count(1)


def pytest_collection_finish():
  """Imported modules are not searched for garbage."""
  gc.freeze()


@pytest.fixture(autouse=True)
def few_memory_maps():
  """Clears compiled programs before their memory maps reach Linux's limit of 65,530 per process, at which XLA crashes."""
  yield
  maps = Path("/proc/self/maps")
  if next(_TESTS) % 8 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:  # reading takes 20 ms
    jax.clear_caches()


@pytest.fixture
def float64():
  """Float64 for one test."""
  with jax.enable_x64(True):
    yield


def pytest_terminal_summary(terminalreporter):
  """Prints what the laws cost for each layer, beside the budgets of `subjects.py`."""
  reports = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "user_properties")]
  costs = {}
  for report in reports:
    for cost in (value for name, value in report.user_properties if name == "law_cost"):
      costs[cost[0]] = max(costs.get(cost[0], cost), cost, key=lambda cost: cost[1])
  if not costs:
    return
  terminalreporter.section("what the laws cost: CPU seconds (budget), programs compiled (budget)")
  for name, seconds, programs, *budget in costs.values():
    terminalreporter.line(f"{name:24s}{seconds:8.1f} ({budget[0]}){programs:6d} ({budget[1]})")
  seconds, programs = (sum(cost[i] for cost in costs.values()) for i in (1, 2))
  terminalreporter.line(f"{'all':24s}{seconds:8.1f}     {programs:6d}")
