"""What a run adds to its compiled step: reading, logging, and saving beside it.

    python -m memzoo.train.bench_overhead models/erase_then_delta_10m --rows 4

Prints a table. Three things in turns, on the same compiled step and medians of each: the step alone, over and over on one
batch; the step with input and logging around it, as a run has them; and the steps beside a checkpoint being saved.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from . import loop
from .checkpoint import Checkpoints
from .config import build
from .runtime import start_quietly


class _Bench:
  """A run whose parts can be timed apart."""

  def __init__(self, config: str, rows: int, folder: Path):
    self.experiment = build(config, [f"TextData.batch_size={rows}", "Trainer.evaluation_batches=1", "Trainer.log_every=1"])
    experiment, data = self.experiment, self.experiment.data
    mesh = experiment.mesh.build()
    program = loop.build_program(
      experiment.model, experiment.optimizer, mesh, steps=experiment.trainer.steps, batch_size=data.batch_size
    )
    self.checkpoints = Checkpoints(folder)
    self.run = loop._Run(experiment, folder, mesh, program, data.load(), self.checkpoints, None, progress=False)
    self.batch = loop.put_batch(next(self.run.batches), program.batch_sharding)

  def bare(self) -> float:
    """Seconds of the compiled step alone."""
    began = time.perf_counter()
    self.run.state, metrics = self.run.program.train(self.run.state, self.batch)
    jax.block_until_ready(metrics)
    self.run.step += 1
    return time.perf_counter() - began

  def around(self) -> tuple[float, float]:
    """Seconds that the host spends on a step's input, and on writing down its numbers."""
    began = time.perf_counter()
    batch = loop.put_batch(next(self.run.batches), self.run.program.batch_sharding)
    read = time.perf_counter()
    self.run.state, metrics = self.run.program.train(self.run.state, batch)
    jax.block_until_ready(metrics)
    self.run.step += 1
    stepped = time.perf_counter()
    self.run.record(self.run.step, metrics, batch)
    return read - began, time.perf_counter() - stepped

  def saving(self, step: float) -> tuple[float, float, int]:
    """Seconds that a save stops the run for, seconds that it adds until it is on disk, and the steps taken meanwhile."""
    began = time.perf_counter()
    self.run.save()
    stopped, count = time.perf_counter() - began, 0
    while self.checkpoints.saving or not count:
      self.bare()
      count += 1
    return stopped, time.perf_counter() - began - count * step, count


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config", nargs="?", default="models/erase_then_delta_10m")
  parser.add_argument("--rows", type=int, default=4, help="of a batch")
  parser.add_argument("--rounds", type=int, default=5)
  arguments = parser.parse_args()
  start_quietly()
  with tempfile.TemporaryDirectory() as folder:
    bench = _Bench(arguments.config, arguments.rows, Path(folder))
    bench.bare(), bench.around(), bench.saving(0.0)  # compiles
    rounds = []
    for _ in range(arguments.rounds):
      bare = statistics.median(bench.bare() for _ in range(3))
      rounds.append((bare, *bench.around(), *bench.saving(bare)))
    bench.checkpoints.wait()
  step, read, wrote, stopped, added, count = map(statistics.median, zip(*rounds, strict=True))
  table = Table("", "seconds", "of the step", box=SIMPLE, title=f"{arguments.config}, {arguments.rows} rows")
  parts = {
    "the compiled step": step,
    "input": read,
    "logging": wrote,
    "a save stops the run for": stopped,
    f"a save adds in all, beside {count:.0f} steps": added,
  }
  for name, seconds in parts.items():
    table.add_row(name, f"{seconds:.4f}", f"{seconds / step:.2%}")
  every = bench.experiment.trainer.checkpoint_every
  table.add_row(f"a save every {every} steps", f"{added / every:.4f}", f"{added / every / step:.2%}")
  Console().print(table)


if __name__ == "__main__":
  main()
