"""How a mixture of memories uses its memories while it is trained, with its balance loss and without.

    python -m memzoo.train.tasks.routing

trains a small model on `overwriting` import argparse
from three seeds, with `MixtureOfMemories.balance` 0.01 and 0, and draws the share of the
tokens that each memory gets against the training step (`routing.png`). It takes about ten minutes of one CPU core.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from ...zoo.inspect import routing
from ..compare import Budget, VmappedRuns, enter
from ..files import save_figure
from ..runtime import start_quietly

if TYPE_CHECKING:
  from matplotlib.figure import Figure

TASK, LAYER, OTHER = "overwriting", "MixtureOfMemories", "unbalanced/MixtureOfMemories"
EVERY = 50  # steps between two points


def shares_in_training(layer: str, budget: Budget, every: int = EVERY) -> tuple[np.ndarray, np.ndarray]:
  """Trains a model with a mixture of memories on `overwriting`.

  Args:
    layer: as for `enter`.
    budget: with one learning rate.
    every: steps between two measurements.

  Returns:
    The share of the tokens that each memory gets, [points, seeds, M], and the share of right answers, [points, seeds].
  """
  (entrant,) = enter(TASK, [layer], [f"{OTHER}.balance=0.0"])
  runs, task = VmappedRuns(entrant, budget), entrant.task.training()
  tokens = task.batch(jax.random.key(1), 64).tokens

  @jax.jit
  @jax.vmap
  def shares(params):
    (found,) = routing(runs.model, params, tokens).values()
    return found.mean(axis=0)

  points = []
  for step in range(every, budget.steps + 1, every):
    runs.train(step)
    points.append((np.asarray(shares(runs.state.params)), runs.score(task)[0]))
  return tuple(np.stack(each) for each in zip(*points, strict=True))


def draw(results: dict[str, tuple[np.ndarray, np.ndarray]], every: int = EVERY) -> "Figure":
  """A row for each of `results` of `shares_in_training`, a column for each seed: a line for each memory."""
  from matplotlib.figure import Figure

  seeds = next(iter(results.values()))[1].shape[1]
  figure = Figure(figsize=(3.2 * seeds, 2.1 * len(results) + 0.4), layout="constrained")
  grid = figure.subplots(len(results), seeds, sharex=True, sharey=True, squeeze=False)
  for row, (name, (shares, scores)) in zip(grid, results.items(), strict=True):
    steps = every * np.arange(1, len(shares) + 1)
    for seed, ax in enumerate(row):
      ax.plot(steps, shares[:, seed])
      ax.axhline(shares[0, seed].mean(), color="0.2", linewidth=1, linestyle="--")
      ax.set_title(f"{name}, seed {seed}: {scores[-1, seed]:.2f} right", fontsize="small")
      ax.set(ylim=(0, 1), xlim=(0, steps[-1]))
      ax.spines[["right", "top"]].set_visible(False)
    row[0].set_ylabel("share of tokens")
  for ax in grid[-1]:
    ax.set_xlabel("step")
  return figure


def main(arguments: list[str] | None = None) -> None:
  """Trains, prints the shares at the end, and draws."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--steps", type=int, default=1500, help="training steps (default %(default)s)")
  parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default %(default)s)")
  parser.add_argument("--out", type=Path, default=Path("routing.png"), help="the picture (default %(default)s)")
  given = parser.parse_args(arguments)
  start_quietly()
  budget = Budget(learning_rates=(3e-3,), seeds=given.seeds, steps=given.steps)
  results = {name: shares_in_training(layer, budget) for name, layer in (("balance 0.01", LAYER), ("balance 0", OTHER))}
  for name, (shares, scores) in results.items():
    for seed in range(given.seeds):
      print(f"{name}, seed {seed}: shares {np.round(shares[-1, seed], 2)}, {scores[-1, seed]:.2f} right")
  save_figure(draw(results), given.out)
  print(f"Wrote {given.out}.")


if __name__ == "__main__":
  main()
