"""What `memzoo bench` and `memzoo compile` do after their arguments are read: measure, show, save."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.live import Live

from ..pallas_kernels.bench import bench
from ..pallas_kernels.gpu_bench import Results, gpu_bench
from ..pallas_kernels.tpu_bench import estimates
from ..pallas_kernels.tpu_cost import DoesNotFit
from ..pallas_kernels.workloads import Shape
from .bench_report import draw, tables
from .files import write_record, write_text
from .gpu_steps import step_tasks
from .tpu_report import estimate_line, estimates_table, kernels_table, step_line, traffic_table
from .tpu_step import compile_generation, compile_step, mesh_shape


def time_here(
  console: Console, folder: Path, operations: Sequence[str], shape: Shape, directions: Sequence[str], long: bool
) -> None:
  """Times operations on this machine, and writes `bench.json` and `bench.png`."""
  with console.status("") as status:
    report = bench(operations or None, shape, directions=directions, long=long, say=status.update)
  for table in tables(report):
    console.print(table)
  write_record(folder / "bench.json", report, indent=2)
  draw(report, folder / "bench.png")
  print(f"Wrote {folder / 'bench.json'} and {folder / 'bench.png'}.")


def estimate(
  console: Console,
  folder: Path,
  operations: Sequence[str],
  chips: Sequence[str],
  shapes: Sequence[Shape],
  directions: Sequence[str],
  dtype: str,
) -> None:
  """Estimates what operations cost on TPUs, and writes `tpu.json` after each."""
  path, found = folder / "tpu.json", []
  with Live(console=console, transient=True) if console.is_terminal else nullcontext() as live:
    for each in estimates(operations, chips, shapes, directions, dtype=dtype):
      found.append(each)
      write_text(path, json.dumps({"jax": jax.__version__, "estimates": [asdict(row) for row in found]}, indent=2) + "\n")
      if live:
        live.update(estimates_table(found))
      else:
        print(estimate_line(each), flush=True)
  console.print(estimates_table(found))
  if kernels := kernels_table(found):
    console.print(kernels)
  print(f"Wrote {path}.")


def measure_gpu(folder: Path, operations: Sequence[str], minutes: float, tiny: bool) -> None:
  """Checks and times operations and training steps on the default device, and writes `gpu.json` after each."""
  path = folder / "gpu.json"
  gpu_bench(Results(path, minutes), operations, tiny=tiny, steps=step_tasks(tiny=tiny))
  print(f"Wrote {path}.")


def compile_steps(
  console: Console, experiment: Any, topology: str, meshes: Sequence[str], sequences: int | None = None
) -> bool:
  """Compiles an experiment's training step, or a step of generation for so many sequences, for each mesh, by default its own.

  Returns whether all of them fit.
  """
  shapes = [mesh_shape(text) for text in meshes] or [experiment.mesh]
  found = []
  for shape in shapes:
    try:
      with console.status(f"Compiling for {shape}"):
        if sequences is None:
          found.append(compile_step(experiment, topology, shape))
        else:
          found.append(compile_generation(experiment, topology, shape, sequences))
      print(step_line(found[-1]), flush=True)
    except DoesNotFit as problem:
      print(f"{shape} on {topology} does not fit: {problem}.", flush=True)
  if found:
    console.print(traffic_table(found))
  return len(found) == len(shapes)
