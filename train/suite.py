"""Suites: many layers on many tasks, under one protocol.

The protocol: the layers of a task have equally many parameters, the same grid of learning rates and the same seeds. Each is
trained until it has learned the task or the budget ends. A task counts only if its reference layer, which is known to solve it,
has learned it too. What a layer has not learned is "not within the budget": it may be slow to learn, or unable to.

Every cell of the table is a file in the suite's folder, `TASK/LAYER.json`. Cells that are there are not made again, stopped
ones continue, and several processes may share the folder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .compare import enter
from .files import read_record, write_record
from .lock import Lock
from .trial import Trial, digest, goodness, run_trial
from .vmapped_runs import Budget, Entrant

LEARNED = 0.95  # the share of right answers at which a layer has learned a task
_ROWS = 30  # of a cell's curve, at most


@dataclass(frozen=True)
class Challenge:
  """A task of a suite.

  Attributes:
    name: its name in tables and paths.
    asks: what it asks of a memory, in a few words.
    task: a task's name, or a config.
    reference: the layer that is known to solve it.
    settings: bindings, as in `memzoo compare --set`.
    tests: the columns of the table: for each title the name of one of the task's `tests()`. "" is the training task.
  """

  name: str
  asks: str
  task: str
  reference: str = "Attention"
  settings: tuple[str, ...] = ()
  tests: dict[str, str] = field(default_factory=dict)

  @property
  def columns(self) -> dict[str, str]:
    return self.tests or {self.name: ""}


@dataclass(frozen=True)
class Suite:
  """Challenges, the layers that take them, and their budget.

  Attributes:
    settings: bindings for all challenges, such as sizes of layers.
  """

  challenges: tuple[Challenge, ...]
  layers: tuple[str, ...]
  settings: tuple[str, ...]
  budget: Budget

  def selected(self, layers: Sequence[str] | None, challenges: Sequence[str] | None) -> "Suite":
    """The suite with some of its layers and challenges, and with other layers of the zoo or of your own.

    Raises:
      ValueError: if there is no such challenge.
    """
    known = {challenge.name: challenge for challenge in self.challenges}
    for name in challenges or ():
      if name not in known:
        raise ValueError(f"--tasks names {name!r}; expected some of {', '.join(known)}.")
    kept = tuple(known[name] for name in challenges or known)
    return replace(self, challenges=kept, layers=tuple(layers or self.layers))

  def enter(self, challenge: Challenge, layer: str, parameters: int | None = None) -> Entrant:
    """The entrant of a cell, with about this number of parameters; `None` keeps the config's width."""
    from ..zoo.registry import LAYERS

    settings = (*self.settings, *challenge.settings)
    return enter(challenge.task, [layer], settings, parameters=parameters, others=list(LAYERS))[0]


@dataclass(frozen=True)
class Cell:
  """What a layer did on a challenge.

  Attributes:
    digest: stands for everything that the numbers depend on, apart from the number of steps.
    steps, seconds, learning_rate, parameters, state_bytes, made: the trial's.
    tokens_per_second: in training, of all runs together.
    training: the score of each seed on the training task, as a share (`trial.goodness`).
    scores: the same for each test.
    curve: step and mean score on the training task.
  """

  digest: str
  steps: int
  seconds: float
  learning_rate: float
  parameters: int
  state_bytes: int
  tokens_per_second: float
  training: list[float]
  scores: dict[str, list[float]]
  curve: list[list[float]]
  made: dict[str, str]

  @property
  def learned(self) -> bool:
    return float(np.mean(self.training)) >= LEARNED

  def share(self, test: str) -> float:
    """The mean score of a test; "" is the training task."""
    return float(np.mean(self.scores[test] if test else self.training))


Report = Callable[[Challenge, str, dict[str, Any]], None]


def run(suite: Suite, folder: Path, report: Report = lambda challenge, layer, progress: None) -> None:
  """Makes the cells that are missing or have had fewer steps: those of the references first, then layer by layer.

  Args:
    report: called with the challenge, the layer and its progress: "step", "loss" and "score", then "cell".
  """
  for challenge, layer in _order(suite):
    entrant = suite.enter(challenge, layer)
    wanted = digest(entrant, suite.budget)
    cell = read(folder, challenge.name, layer)
    if cell is None or cell.digest != wanted or not _is_finished(cell, suite.budget):
      cell = _make(suite, challenge, layer, folder, wanted, lambda progress, at=(challenge, layer): report(*at, progress))
    if cell is not None:
      report(challenge, layer, {"cell": cell})


def _order(suite: Suite) -> Iterator[tuple[Challenge, str]]:
  for challenge in suite.challenges:
    yield challenge, challenge.reference
  for layer in suite.layers:
    yield from ((challenge, layer) for challenge in suite.challenges if layer != challenge.reference)


def read(folder: Path, challenge: str, layer: str) -> Cell | None:
  """A cell that was made before."""
  path = _path(folder, challenge, layer)
  return read_record(Cell, path, "remove it, and it is made again") if path.exists() else None


def _path(folder: Path, challenge: str, layer: str) -> Path:
  return folder / challenge.replace(" ", "_") / f"{layer.replace('/', '_')}.json"


def _is_finished(cell: Cell, budget: Budget) -> bool:
  return min(cell.training) >= budget.stop_at or cell.steps >= budget.steps


def _make(
  suite: Suite, challenge: Challenge, layer: str, folder: Path, wanted: str, report: Callable[[dict[str, Any]], None]
) -> Cell | None:
  """Trains a layer on a challenge and writes the cell; `None` if another process is doing so."""
  path = _path(folder, challenge.name, layer)
  work = folder / "work" / path.parent.name / f"{path.stem}-{wanted}"
  work.mkdir(parents=True, exist_ok=True)
  path.parent.mkdir(exist_ok=True)
  try:
    lock = Lock(work, say=lambda message: None)
  except ValueError:
    return None
  try:
    entrant = suite.enter(challenge, layer, suite.enter(challenge, challenge.reference).parameters)
    trial = run_trial(entrant, suite.budget, work / "state.npz", report)
    cell = _cell(entrant, trial, wanted)
    write_record(path, cell)
  finally:
    lock.release()
  return cell


def _cell(entrant: Entrant, trial: Trial, wanted: str) -> Cell:
  def shares(scores: list[float]) -> list[float]:
    return np.round(np.maximum(goodness(entrant.task, np.asarray(scores)), 0.0), 4).tolist()

  every = -(-len(trial.curve) // _ROWS)
  rows = trial.curve[::-1][::every][::-1]  # the last one is among them
  return Cell(
    digest=wanted,
    steps=trial.steps,
    seconds=round(trial.seconds, 1),
    learning_rate=trial.learning_rate,
    parameters=trial.parameters,
    state_bytes=trial.state_bytes,
    tokens_per_second=round(trial.tokens_per_second),
    training=shares(trial.curve[-1][2]),
    scores={test: shares(scores) for test, scores in trial.scores.items()},
    curve=[[step, round(float(np.mean(shares(scores))), 3)] for step, _, scores in rows],
    made=trial.made,
  )
