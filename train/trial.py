"""A trial trains one entrant at several learning rates and from several seeds, and tests the best learning rate.

A trial that was stopped continues: at evaluations it writes the state of its runs to a file. If the learning rate does not fall
with the number of steps (`Optimizer.final_fraction=1`), a finished trial also continues when the budget has more steps.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .files import read_record, replacing
from .run_folder import settings
from .tasks import Task
from .vmapped_runs import Budget, Entrant, VmappedRuns

_SAVE_EVERY = 60.0  # seconds
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Trial:
  """The result of an entrant. Scores are shares of right answers, or squared errors for continuous tasks.

  Attributes:
    name, state_bytes, parameters: the entrant's.
    steps: training steps taken.
    seconds: their duration, compilation included.
    learning_rate: the best one.
    scores: for each test, the score of each seed.
    kinds: for each test and each kind of answer, the score of each seed.
    training: for each learning rate, (step, loss of each seed, score of each seed) at every evaluation.
    reached: whether training ended because it had reached `Budget.stop_at`.
    tokens_per_second: in training, of all runs together.
    made: where and when it was made: "machine", "commit", "date".
  """

  name: str
  state_bytes: int
  parameters: int
  steps: int
  seconds: float
  learning_rate: float
  scores: dict[str, list[float]]
  kinds: dict[str, dict[str, list[float]]]
  training: dict[str, list[list[Any]]] = field(default_factory=dict)
  reached: bool = False
  tokens_per_second: float = 0.0
  made: dict[str, str] = field(default_factory=dict)

  @property
  def curve(self) -> list[list[Any]]:
    """The part of `training` at the best learning rate."""
    return self.training[f"{self.learning_rate:g}"]


def finished_trial(budget: Budget, path: Path) -> Trial | None:
  """The trial in `path`, if it needs no more training."""
  if not path.exists():
    return None
  trial = read_record(Trial, path, "remove it, and its trial is run again")
  return trial if trial.reached or trial.steps >= budget.steps else None


def run_trial(entrant: Entrant, budget: Budget, state: Path | None = None, report: Report = lambda progress: None) -> Trial:
  """Trains and tests an entrant.

  Args:
    state: an .npz file for the state of training. If it is there, training goes on from it. It stays if more steps can follow.
    report: called with the progress: "step", "loss" and "score" of the best learning rate.
  """
  training = _Training(entrant, budget)
  if state is not None and state.exists():
    training.load(state)
  written = time.monotonic()
  while not training.ended:
    report(training.advance())
    if state is not None and time.monotonic() - written > _SAVE_EVERY:
      training.save(state)
      written = time.monotonic()
  trial = training.result()
  if state is not None and (training.reached or not _is_open_ended(entrant)):
    state.unlink(missing_ok=True)
  elif state is not None:
    training.save(state)
  return trial


def digest(entrant: Entrant, budget: Budget) -> str:
  """A digest of everything that a trial's numbers depend on. The steps are left out if more of them only add numbers."""
  shown = asdict(budget)
  if _is_open_ended(entrant):
    shown["steps"] = [optimizer.warmup(budget.steps) for optimizer in budget.optimizers(entrant.experiment.optimizer)]
  text = f"{entrant.name}\n{settings(entrant.experiment.text)}\n{shown}"
  return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _is_open_ended(entrant: Entrant) -> bool:
  return entrant.experiment.optimizer.final_fraction == 1


class _Training:
  """The runs of a trial with their history so far."""

  def __init__(self, entrant: Entrant, budget: Budget):
    self.entrant, self.budget, self.reached = entrant, budget, False
    self.runs, self.before, self.started = VmappedRuns(entrant, budget), 0.0, time.perf_counter()
    self.history: dict[str, list[list[Any]]] = {f"{rate:g}": [] for rate in budget.learning_rates}
    self.speeds: list[float] = []

  @property
  def ended(self) -> bool:
    return self.reached or self.runs.step >= self.budget.steps

  @property
  def seconds(self) -> float:
    return self.before + time.perf_counter() - self.started

  def advance(self) -> dict[str, Any]:
    """Trains to the next evaluation; returns the progress."""
    every, halve = self.budget.evaluate_every, self.budget.halve_every
    before, began = self.runs.step, time.perf_counter()
    step, loss = self.runs.train(min(self.budget.steps, (before // every + 1) * every))
    tokens = (step - before) * self.budget.batch_size * self.entrant.task.training().length * loss.size
    self.speeds.append(tokens / (time.perf_counter() - began))
    score = self.runs.score(self.entrant.task.training())
    for rate, losses, scores in zip(self._names(), loss, score, strict=True):
      self.history[rate].append([step, losses.tolist(), scores.tolist()])
    quality = goodness(self.entrant.task, score)
    order = np.argsort(-quality.mean(axis=1), kind="stable")
    self.reached = bool(quality[order[0]].min() >= self.budget.stop_at)
    if halve and step // halve > before // halve and len(order) > 1 and not self.reached:
      self.runs.keep(sorted(order[: (len(order) + 1) // 2].tolist()))
    return {"step": step, "loss": float(loss[order[0]].mean()), "score": float(score[order[0]].mean())}

  def _names(self) -> list[str]:
    return [f"{self.budget.learning_rates[rate]:g}" for rate in self.runs.rates]

  def result(self) -> Trial:
    """Tests the best learning rate."""
    last = [self.history[name][-1][2] for name in self._names()]
    best = int(goodness(self.entrant.task, np.asarray(last)).mean(axis=1).argmax())
    scores, kinds = {}, {}
    for name, test in self.entrant.task.tests().items():
      scores[name], kinds[name] = self.runs.test(test, best)
    return Trial(
      name=self.entrant.name,
      state_bytes=self.entrant.state_bytes,
      parameters=self.entrant.parameters,
      steps=self.runs.step,
      seconds=self.seconds,
      learning_rate=self.budget.learning_rates[self.runs.rates[best]],
      scores=scores,
      kinds=kinds,
      training=self.history,
      reached=self.reached,
      tokens_per_second=max(self.speeds, default=0.0),
      made=made(),
    )

  def save(self, path: Path) -> None:
    """Writes everything that `load` needs."""
    about = {"step": self.runs.step, "rates": self.runs.rates, "seconds": self.seconds, "history": self.history}
    about["speeds"] = self.speeds
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.runs.state))}
    with replacing(path) as temporary:
      np.savez(temporary, about=json.dumps(about), **leaves)

  def load(self, path: Path) -> None:
    """Goes on from what `save` wrote. Raises `ValueError` if the file is damaged."""
    try:
      with np.load(path) as found:
        about = json.loads(str(found["about"]))
        leaves = [found[f"leaf{i}"] for i in range(len(found.files) - 1)]
      self.runs.state = jax.tree.unflatten(jax.tree.structure(self.runs.state), [jax.device_put(leaf) for leaf in leaves])
    except (OSError, KeyError, ValueError, EOFError) as error:
      raise ValueError(f"{path} is damaged ({error}); remove it, and its trial begins anew.") from None
    self.runs.step, self.runs.rates = about["step"], about["rates"]
    self.before, self.history, self.speeds = about["seconds"], about["history"], about["speeds"]


def goodness(task: Task, scores: np.ndarray) -> np.ndarray:
  """Scores as shares: of right answers, or for continuous tasks of the error without memory that is avoided; NaN as -inf."""
  shares = 1 - scores / task.training().chance if task.continuous else scores
  return np.nan_to_num(shares, nan=-np.inf)


def made() -> dict[str, str]:
  """The machine, the version of memzoo and the date of what is measured now."""
  kind = jax.devices()[0].device_kind
  machine = f"{jax.device_count()} x {kind}" if jax.default_backend() != "cpu" else f"{os.cpu_count()} cores, {_processor()}"
  return {"machine": machine, "commit": _commit(), "date": datetime.now().strftime("%Y-%m-%d")}


def _processor() -> str:
  with suppress(OSError):
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()
  return platform.machine()


def _commit() -> str:
  """The commit of a checkout of memzoo, or the version that is installed."""
  from .. import __version__

  root = Path(__file__).parent.parent
  if (root / ".git").exists():
    with suppress(OSError, subprocess.SubprocessError):
      command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
      return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
  return __version__
