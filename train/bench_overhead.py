"""Measures the time that input, logging and saving add to a run's compiled step.

    python -m memzoo.train.bench_overhead models/erase_then_delta_10m --rows 4

Prints a table of medians: the step alone on one batch; a run's input and logging around the same step; and the time that
saving a checkpoint adds to the steps taken meanwhile.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
from rich.console import Console

from ..zoo.formats import milliseconds, table
from .checkpoint import Checkpoints
from .config import build
from .loop import _Run
from .runtime import start_quietly
from .setup import set_up
from .sharding import put_batch


class _Bench:
  """A run whose parts can be timed separately."""

  def __init__(self, config: str, rows: int, loggers: str, folder: Path):
    sizes = [f"TextData.batch_size={rows}", "Trainer.evaluation_batches=1", "Trainer.log_every=1"]
    self.experiment = build(config, [*sizes, f"Trainer.loggers={loggers or ()}"])
    setup, self.checkpoints = set_up(self.experiment, folder), Checkpoints(folder)
    self.run = _Run(setup, self.checkpoints, None, progress=False)
    self.batch = put_batch(next(self.run.batches), setup.program.batch_sharding)

  def bare(self) -> float:
    """Seconds of the compiled step alone."""
    began = time.perf_counter()
    self.run.state, metrics = self.run.program.train(self.run.state, self.batch)
    jax.block_until_ready(metrics)
    self.run.step += 1
    return time.perf_counter() - began

  def around(self) -> tuple[float, float]:
    """Seconds that the host spends on a step's input, and on logging its numbers."""
    began = time.perf_counter()
    batch = put_batch(next(self.run.batches), self.run.program.batch_sharding)
    read = time.perf_counter()
    self.run.state, metrics = self.run.program.train(self.run.state, batch)
    jax.block_until_ready(metrics)
    self.run.step += 1
    stepped = time.perf_counter()
    self.run.record(self.run.step, metrics, batch)
    return read - began, time.perf_counter() - stepped

  def saving(self, step: float) -> tuple[float, float, int]:
    """Seconds that a save stops the run, seconds that it adds in all until it is on disk, and the steps taken meanwhile."""
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
  parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
  parser.add_argument("--loggers", default="tensorboard", help="as Trainer.loggers, with commas")
  parser.add_argument("--rounds", type=int, default=5, help="number of measurements")
  arguments = parser.parse_args()
  start_quietly()
  with tempfile.TemporaryDirectory() as folder:
    bench, rounds = _Bench(arguments.config, arguments.rows, arguments.loggers, Path(folder)), []
    with bench.run.report:
      bench.bare(), bench.around(), bench.saving(0.0)  # compiles
      for _ in range(arguments.rounds):
        bare = statistics.median(bench.bare() for _ in range(3))
        rounds.append((bare, *bench.around(), *bench.saving(bare)))
    bench.checkpoints.wait()
  step, read, wrote, stopped, added, count = map(statistics.median, zip(*rounds, strict=True))
  every = bench.experiment.trainer.checkpoint_every
  parts = {
    "the compiled step": step,
    "input": read,
    "logging": wrote,
    "a save stops the run for": stopped,
    f"a save adds in all, during {count:.0f} steps": added,
    f"a save every {every} steps": added / every,
  }
  rows = [(name, milliseconds(seconds), f"{seconds / step:.2%}") for name, seconds in parts.items()]
  Console().print(table(f"{arguments.config}, {arguments.rows} rows", ("", "ms", "of the step"), rows))


if __name__ == "__main__":
  main()
