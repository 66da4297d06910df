"""What a program costs a Hopper GPU, read from the program that XLA compiles for one, without a GPU.

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12          # no GPU, no driver; JAX 0.11
    python -m memzoo.pallas_kernels.gpu_cost gated_delta_rule kimi_delta_rule

It prints, for one row of 4,096 tokens, 16 heads of 128 and bfloat16 activations, how many kernels a call launches, the bytes
that they read and write in global memory, and the time that an H100's memory takes for these: a bound that no call is faster
than, unless what one kernel writes and the next reads stays in the cache of 50 MB. For kernels of Pallas also the registers of
a thread, and the bytes of them that are kept in memory. Nothing is timed. XLA chooses its own kernels without trying them, and
divides the sums of many products into four, which are written and added up: on a GPU it may write less.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from . import hlo
from .hlo import Instruction, Module, bytes_of

BANDWIDTH = 3.35e12  # of an H100's memory, bytes per second
# The facts of an H100 that XLA's compiler asks for.
_TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84929347584
}
runtime_version { major: 12 minor: 9 patch: 0 }
dnn_version_info { major: 9 minor: 7 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_MISSING = "the compiler for GPUs is not installed; expected jax-cuda12-plugin and jax-cuda12-pjrt."
_FLAGS = "--xla_gpu_autotune_level=0"  # which would run kernels
# Instructions that launch nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_SLICES, _UPDATE = ("dynamic-slice", "slice"), "dynamic-update-slice"


class Launch(NamedTuple):
  """A kernel.

  Attributes:
    name: of its instruction.
    op_name: where it comes from in the traced program.
    times: how often a call launches it.
    bytes: that one launch reads and writes.
  """

  name: str
  op_name: str
  times: int
  bytes: int


class Cost(NamedTuple):
  """Of a call: its kernels, and the bytes of temporary memory."""

  launches: list[Launch]
  temporary_bytes: int

  @property
  def count(self) -> int:
    return sum(each.times for each in self.launches)

  @property
  def bytes(self) -> int:
    return sum(each.times * each.bytes for each in self.launches)


def measure(function: Callable[..., Any], *arguments: Any) -> Cost:
  """Compiles `function(*arguments)`, of arrays or `jax.ShapeDtypeStruct`s, for an H100.

  Raises:
    ImportError: if JAX's plugin for CUDA is not installed.
  """
  if not find_spec("jax_cuda12_plugin"):
    raise ImportError(_MISSING)
  (device,) = topologies.get_topology_desc("H100", "cuda", topology="1x1x1", target_config=_TARGET).devices
  place = SingleDeviceSharding(device)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
  compiled = jax.jit(function).lower(*shapes).compile()
  return Cost(launches(hlo.parse(compiled.as_text())), compiled.memory_analysis().temp_size_in_bytes)


def launches(module: Module) -> list[Launch]:
  """The kernels of a module that is compiled for a GPU."""
  found = []
  for each in module.executions(fused=False):
    instruction = each.instruction
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
      continue
    operands = module.operands(each)
    if instruction.opcode.removesuffix("-start") == "fusion":
      size = _of_fusion(module.computations[instruction.called("calls")[0]])
    elif instruction.opcode == _UPDATE:
      size = 2 * bytes_of(operands[1].type)
    elif instruction.opcode in _SLICES:
      size = 2 * bytes_of(instruction.type)
    else:
      size = bytes_of(instruction.type) + sum(bytes_of(operand.type) for operand in operands)
    found.append(Launch(instruction.name, instruction.op_name, each.times, size))
  return found


def _of_fusion(body: Sequence[Instruction]) -> int:
  """The bytes that a fusion reads and writes. Of an array that is only sliced, or updated in place, those are a slice's."""
  by_name, users = {each.name: each for each in body}, defaultdict(list)
  for each in body:
    for name in each.operands:
      users[name].append(each)

  def uses(instruction):
    """What is done with an array, whatever its shape."""
    for user in users[instruction.name]:
      if user.opcode in ("bitcast", "reshape"):
        yield from uses(user)
      else:
        yield user, by_name[user.operands[0]]

  def read(parameter):
    given = list(uses(parameter))
    of_parts = all(user.opcode in (*_SLICES, _UPDATE) and _source(by_name, first) is parameter for user, first in given)
    if not given or not of_parts:
      return bytes_of(parameter.type)
    return sum(bytes_of(user.type) for user, _ in given if user.opcode in _SLICES)

  def written(result):
    result = _source(by_name, result)
    return bytes_of(by_name[result.operands[1]].type if result.opcode == _UPDATE else result.type)

  root = body[-1]
  results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
  return sum(read(each) for each in body if each.opcode == "parameter") + sum(map(written, results))


def _source(by_name: dict[str, Instruction], instruction: Instruction) -> Instruction:
  """What has the elements of an instruction, whatever its shape."""
  while instruction.opcode in ("bitcast", "reshape"):
    instruction = by_name[instruction.operands[0]]
  return instruction


def _print_cost(operation: str, direction: str, implementation: str) -> None:
  """Prints a line of the table, after what the assembler says of kernels."""
  from .workloads import Shape, function, timed_inputs

  shape = Shape(1, 4096, 16, 128, 128)
  inputs = jax.eval_shape(lambda: timed_inputs(operation, direction, shape))
  cost = measure(function(operation, direction, implementation), *inputs)
  per_token_head = cost.bytes / shape.token_heads
  print(
    f"{operation:32} {implementation:7} {direction:8} {cost.count:6} launches  {per_token_head:8,.0f} bytes  "
    f"{1e9 * per_token_head / BANDWIDTH:6.2f} ns per token-head  {cost.temporary_bytes / 2**20:6.0f} MiB of temporaries"
  )


def _registers(text: str) -> str:
  """What the assembler says about kernels of Pallas, in words."""
  found = re.findall(r"properties for (\w+)_mosaic.*?(\d+) bytes spill stores.*?Used (\d+) registers", text, re.DOTALL)
  found = dict.fromkeys(found)
  return "; ".join(f"{name} {registers} registers, {spilled} bytes spilled" for name, spilled, registers in found)


def main() -> None:
  """Runs the command line. Each program is compiled in a process of its own, whose output has the assembler's words."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("operations", nargs="*", default=["gated_delta_rule"], help="default: %(default)s")
  parser.add_argument("--one", nargs=2, metavar=("DIRECTION", "IMPLEMENTATION"), help="only this, in this process")
  options = parser.parse_args()
  if options.one:
    _print_cost(options.operations[0], *options.one)
    return
  if not find_spec("jax_cuda12_plugin"):
    parser.error(_MISSING)
  found = find_spec("nvidia.cuda_nvcc") if find_spec("nvidia") else None
  tools = next(iter(getattr(found, "submodule_search_locations", None) or [""]))
  flags = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}" + (f" --xla_gpu_cuda_data_dir={tools}" if tools else "")
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
  for operation in options.operations:
    for direction in ("forward", "both"):
      for implementation in ("xla", "pallas"):
        command = [sys.executable, "-m", __spec__.name, operation, "--one", direction, implementation]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if " launches " in line]
        print(*lines or [f"{operation} {implementation} {direction}: {done.stderr.strip()[-500:]}"], sep="\n")
        if words := _registers(done.stdout + done.stderr):
          print(f"  {words}", flush=True)


if __name__ == "__main__":
  main()
