"""Compiles functions ahead of time for a TPU, without one, and reads what they cost there from the compiled program.

    cost = measure(gated_delta_rule, q, k, v, beta, log_decay, chip="v5e")      # arrays or their shapes; nothing is allocated
    cost.cycles, cost.temporary_bytes, cost.products

The compiler is libtpu (`pip install libtpu`). It estimates the cycles of each instruction; the sums here multiply the bodies of
loops by their trip counts. The estimates include neither asynchronous copies, which may overlap with arithmetic, nor kernels in
custom calls. They rank variants of a program; only a TPU can say how long one takes.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from . import hlo


class Chip(NamedTuple):
  """One device of a TPU generation, at its published rates: a chip, or for tpu7x one of a chip's two cores.

  Attributes:
    topology: the smallest topology with it.
    clock: cycles per second.
    flops: bfloat16 FLOP/s.
    bandwidth: bytes per second to and from its memory.
    memory_bytes: what the compiler lets a program use of its memory.
  """

  topology: str
  clock: float
  flops: float
  bandwidth: float
  memory_bytes: int


CHIPS = {
  "v4": Chip("v4:2x2x1", 1.05e9, 275e12, 1228e9, int(30.75 * 2**30)),
  "v5e": Chip("v5e:2x2", 1.5e9, 197e12, 819e9, int(15.75 * 2**30)),
  "v5p": Chip("v5p:2x2x1", 1.75e9, 459e12, 2765e9, int(95.73 * 2**30)),
  "v6e": Chip("v6e:2x2", 1.75e9, 918e12, 1640e9, int(31.24 * 2**30)),
  "tpu7x": Chip("tpu7x:2x2x1", 2.2e9, 1153e12, 3690e9, int(94.74 * 2**30)),
}

# The text of a program that does nothing.
_NOTHING = """ENTRY %main () -> () {
  ROOT %nothing = () tuple()
}
"""

# Otherwise libtpu asks the cloud's metadata server where it is, and refuses to be loaded by two processes at a time.
_ENVIRONMENT = {
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of this machine; it has no effect on what can be compiled
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


@dataclass(frozen=True)
class Cost:
  """What one run of a compiled program costs each chip.

  Attributes:
    chip: the generation, a key of `CHIPS`.
    cycles: the compiler's estimate.
    flops: FLOPs of the matrix products.
    peak_bytes: memory that the program needs: arguments, results and temporaries.
    temporary_bytes: a part of it.
    products: matrix products, with their operands' dtypes, passes and origin.
    collectives: communications between chips.
    custom_calls: executed custom calls by target; `cycles` does not include them.
    trip_counts: of every loop; `None` if unknown, and the body counts once.
    unread: why only the sizes of memory are known, or "". libtpu cannot give the text of some programs that it compiles.
  """

  chip: str
  cycles: int
  flops: int
  peak_bytes: int
  temporary_bytes: int
  products: list[hlo.Product]
  collectives: list[hlo.Collective]
  custom_calls: Counter[str]
  trip_counts: list[int | None]
  unread: str = ""

  @property
  def seconds(self) -> float:
    """`cycles` at the chip's clock."""
    return self.cycles / CHIPS[self.chip].clock


class DoesNotFit(ValueError):
  """A program needs more memory than a chip has."""


def measure(function: Callable[..., Any], *arguments: Any, chip: str = "v5e") -> Cost:
  """Compiles `function(*arguments)` for one chip, and returns its cost. Nothing is allocated or run.

  Args:
    function: a function of arrays.
    *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s.
    chip: a key of `CHIPS`.

  Raises:
    ValueError: for an unknown chip.
    DoesNotFit: if the program needs more memory than the chip has.
    ImportError: if libtpu is not installed.
  """
  if chip not in CHIPS:
    raise ValueError(f"chip is {chip!r}; expected one of {', '.join(CHIPS)}.")
  place = SingleDeviceSharding(devices(CHIPS[chip].topology)[0])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
  return compile_and_read(jax.jit(function).lower(*shapes), chip)


def devices(topology: str) -> list[jax.Device]:
  """The devices of a TPU topology such as "v5e:4x4". Programs can be compiled for them, but not run.

  Raises:
    ValueError: for a topology that libtpu does not know.
    ImportError: if libtpu is not installed.
  """
  _load_libtpu()
  try:
    return _devices(topology)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"topology is {topology!r}; expected one that libtpu knows, such as v5e:4x4. {error}") from error


def compile_and_read(lowered: jax.stages.Lowered, chip: str) -> Cost:
  """Compiles a program lowered for devices of a topology, and returns its cost.

  Raises:
    DoesNotFit: if the program needs more memory than a chip has.
  """
  try:
    with _nothing_cached():
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    sizes = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", str(error))
    raise DoesNotFit(
      f"the program needs {sizes[1]}iB of memory on a chip, which has {sizes[2]}iB" if sizes else str(error).splitlines()[0]
    ) from error
  memory = compiled.memory_analysis()
  try:
    text, unread = compiled.as_text(), ""
  except jax.errors.JaxRuntimeError as error:
    text, unread = _NOTHING, str(error).splitlines()[0]
  module = hlo.parse(text)
  needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Cost(
    chip=chip,
    cycles=module.cycles(),
    flops=module.flops(),
    peak_bytes=needed + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
    temporary_bytes=memory.temp_size_in_bytes,
    products=module.products(),
    collectives=module.collectives(),
    custom_calls=module.custom_calls(),
    trip_counts=module.trip_counts(),
    unread=unread,
  )


def _devices(topology: str) -> list[jax.Device]:
  cores = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}  # one device for both, as on a real chip
  return topologies.get_topology_desc(platform="tpu", topology_name=topology, **cores).devices


@cache
def _load_libtpu() -> None:
  """Loads libtpu with variables that are set only meanwhile. Those of `_ENVIRONMENT` that the user has set stay.

  libtpu ends the process at its first compilation if XLA_FLAGS has a flag that only other platforms know. So XLA_FLAGS is unset
  until it has compiled something; `LIBTPU_INIT_ARGS` is the variable for its flags.
  """
  if not (os.environ.get("TPU_LIBRARY_PATH") or find_spec("libtpu")):
    raise ImportError("libtpu, the compiler for TPUs, is not installed; expected `pip install libtpu` (Linux on x86-64).")
  jax.devices()  # jaxlib has read XLA_FLAGS before it is unset
  before = dict(os.environ)
  os.environ.update(_ENVIRONMENT | before)
  os.environ.pop("XLA_FLAGS", None)
  try:
    place = SingleDeviceSharding(_devices(CHIPS["v5e"].topology)[0])
    with _nothing_cached():
      jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), jax.numpy.float32, sharding=place)).compile()
  finally:
    for name in set(os.environ) - set(before):
      del os.environ[name]
    os.environ.update(before)


@contextmanager
def _nothing_cached() -> Iterator[None]:
  """Keeps programs out of JAX's persistent cache, which could not read them again without a TPU, and would warn."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, math.inf)
  try:
    yield
  finally:
    jax.config.update(name, before)
