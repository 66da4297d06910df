"""A run from its first step to its last, through any number of interruptions.

A run is a folder. Calling `train` on it starts it, resumes it, or finds it finished. A checkpoint holds everything that a step
depends on, and every order is seeded. So on a CPU a run that was killed and resumed has bitwise the losses of one that was not.

The host stays one step ahead of the device: it starts a step before it reads the numbers of the last one. Reading,
writing and drawing then cost the device nothing as long as they take less than a step.
"""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax

from .checkpoint import Checkpoints, Restored, checksums
from .config import Experiment
from .diagnosis import NonFiniteError, Spikes, first_nonfinite_module, nonfinite_groups
from .evaluation import mean_loss, put_rows, validation_row
from .finish import draw, finish
from .processes import Vote, row_share, together
from .report import Report
from .run_folder import Result, settings, write_config
from .runtime import Stopwatch, interruptions, start_quietly
from .setup import Setup, claimed, find_finished, introduction, set_up
from .sharding import put_batch
from .step import Metrics, TrainState
from .trainer import Trainer

__all__ = ["NonFiniteError", "Result", "Trainer", "train"]


def train(experiment: Experiment, directory: str | Path, *, progress: bool = True) -> Result:
  """Trains `experiment` in `directory`: starts, resumes, or finds the run finished, and says which.

  It leaves `config.gin`, `metrics.jsonl` (a line for every step), `loss.png`, `sample.txt`, `result.json`, `checkpoints/` and
  what `Trainer.loggers` write, such as `tensorboard/`. SIGTERM and Ctrl-C save a checkpoint and return; a second Ctrl-C stops
  at once. One run at a time uses the folder; see `lock.py`.

  Args:
    experiment: an experiment from `memzoo.build`.
    directory: folder of the run, created if missing. If it holds a run, the configs may differ only in `MeshShape` and
      `Trainer` (without its seed).
    progress: False prints nothing.

  Raises:
    ValueError: if the experiment cannot be run here, or `directory` holds another run or is in use.
    NonFiniteError: if `Trainer.nonfinite_limit` steps in a row were not finite.
  """
  start_quietly()
  directory, shown = Path(directory), progress and jax.process_index() == 0
  say = print if shown else lambda message: None
  finished = find_finished(experiment, directory)
  if not finished:
    setup = set_up(experiment, directory, say)
    with claimed(directory, say) as check_lock:
      finished = find_finished(experiment, directory)  # again, as the folder may have changed before it was claimed
      if not finished:
        return _train(setup, progress, check_lock)
  say(f"{directory} is finished: {finished.step} steps. To continue, raise Trainer.steps.")
  return finished


def _train(setup: Setup, progress: bool, check_lock: Callable[[], None]) -> Result:
  """Starts or resumes a run whose lock is held."""
  experiment, directory, messages = setup.experiment, setup.directory, []
  with Checkpoints(directory, kept=experiment.trainer.checkpoints_kept, say=messages.append) as checkpoints:
    restored = checkpoints.restore(setup.program.abstract_state)
    if restored:
      setup.check_facts(restored.facts)
    with together():
      if setup.primary:
        write_config(directory, experiment.text)
        (directory / "result.json").unlink(missing_ok=True)
    run = _Run(setup, checkpoints, restored, progress, check_lock)
    with run.report:
      for line in (*messages, *introduction(setup, run.step)):
        run.report.say(line)
      return run.go()


class _Run:
  """A run in progress: everything that changes from step to step."""

  def __init__(
    self,
    setup: Setup,
    checkpoints: Checkpoints,
    restored: Restored | None,
    progress: bool,
    check_lock: Callable[[], None] = lambda: None,
  ):
    self.check_lock, self.evaluated = check_lock, (0, None)  # the last step that was evaluated, and its validation loss
    self.setup, self.trainer, self.program = setup, setup.experiment.trainer, setup.program
    self.checkpoints, self.best_loss = checkpoints, checkpoints.best_loss
    rows = self.program.batch_sharding
    self.batches = setup.corpus.batches(*row_share(rows, setup.experiment.data.batch_size))
    self.state: TrainState = restored.state if restored else self.program.create()
    if restored:
      self.batches.set_state(restored.data)
    self.step = self.first_step = int(self.state.step)
    self.pending: tuple[int, Metrics, dict[str, jax.Array]] | None = None  # the last step, whose numbers are not read yet
    self.spikes, self.vote, self.watch = Spikes(), Vote(setup.mesh), Stopwatch()
    self.validation = [put_rows(batch, rows) for batch in setup.corpus.validation_batches(self.trainer.evaluation_batches)]
    with together():
      self.report = Report(
        setup.directory,
        first_step=self.first_step,
        last_step=max(self.first_step, self.trainer.steps),
        tokens_per_step=setup.tokens_per_step,
        log_every=self.trainer.log_every,
        measure=setup.corpus.measure,
        loggers=self.trainer.loggers,
        settings=settings(setup.experiment.text),
        progress=progress,
        primary=setup.primary,
      )

  def go(self) -> Result:
    """Takes the remaining steps, and finishes."""
    with interruptions() as caught:
      interrupted = self.train_until(caught)
    if interrupted and self.step < self.trainer.steps:
      return self.stop(interrupted)
    self.checkpoints.wait()
    return finish(self.setup, self.state, self.report, self.watch, self.step - self.first_step)

  def stop(self, interrupted: str) -> Result:
    """Saves after the signal `interrupted`."""
    self.save()
    self.checkpoints.wait()
    draw(self.setup, self.report)
    self.report.say(
      f"Stopped by {interrupted} after step {self.step}. Saved in {self.checkpoints.path / str(self.step)}; the same command "
      "resumes from there."
    )
    return Result(str(self.setup.directory), self.step, interrupted, int(self.state.skipped))

  def train_until(self, caught: list[signal.Signals]) -> str | None:
    """Takes steps until the last one, or until a process has `caught` a signal; returns the signal's name.

    When it returns, the numbers of every step are written.
    """
    stopped_by, began = 0, time.perf_counter()
    while self.step < self.trainer.steps and not (stopped_by := self.vote(caught[0] if caught else 0)):
      self.take_step()
      if self.step == self.first_step + 1:
        self.warm_up(began)
      self.evaluate_and_save()
    self.drain()
    self.watch.stop()
    return signal.Signals(stopped_by).name if stopped_by else None

  def take_step(self) -> None:
    """Starts a step on the device, and meanwhile records the previous one."""
    with self.watch("input"):
      batch = put_batch(next(self.batches), self.program.batch_sharding)
    with self.watch("step"):
      self.state, metrics = self.program.train(self.state, batch)
    self.step += 1
    previous, self.pending = self.pending, (self.step, metrics, batch)
    if previous:
      self.record(*previous)

  def warm_up(self, began: float) -> None:
    """Waits for the first step, compiles the functions that run between steps, and restarts the clocks."""
    jax.block_until_ready(self.state)
    mean_loss(self.program, self.state.params, self.validation[:1])
    checksums(self.state)
    self.report.say(f"Compiled and took the first step in {time.perf_counter() - began:.1f} s.")
    self.watch.restart()
    self.report.restart_clock(self.step)

  def evaluate_and_save(self) -> None:
    """Evaluates and saves, if that is due after this step. Both are due after the last."""
    trainer, loss, last = self.trainer, None, self.step == self.trainer.steps
    if _due(self.step, trainer.evaluate_every) or last:
      loss = self.drain(evaluate=True)
      self.evaluated = self.step, loss
    is_best = loss is not None and loss < self.best_loss
    if _due(self.step, trainer.checkpoint_every) or last or (is_best and trainer.save_best):
      self.drain()
      with self.watch("checkpoints"):
        self.save()
    if is_best:
      self.best_loss = loss

  def drain(self, evaluate: bool = False) -> float | None:
    """Records the pending step. With `evaluate`, also evaluates after it, and returns the validation loss."""
    if self.pending is None:
      return None
    (step, metrics, batch), self.pending = self.pending, None
    with self.watch("step"):
      jax.block_until_ready(metrics)
    loss, validation = None, {}
    if evaluate:
      with self.watch("evaluation"):
        loss, accuracy = mean_loss(self.program, self.state.params, self.validation)
        validation = validation_row(self.setup.corpus, loss) | {"validation_accuracy": accuracy}
    self.record(step, metrics, batch, validation)
    return loss

  def record(
    self, step: int, metrics: Metrics, batch: dict[str, jax.Array], validation: dict[str, float] | None = None
  ) -> None:
    """Waits for a step's numbers and writes them; raises if too many steps in a row were not finite."""
    with self.watch("step"):
      metrics = jax.device_get(metrics)
    with self.watch("reporting"):
      loss, skipped = float(metrics.loss), bool(metrics.skipped_in_a_row)
      self.report.row(self.row(step, metrics) | ({"skipped": True} if skipped else {}) | (validation or {}))
      usual = None if skipped else self.spikes(loss)
      if usual is not None:
        self.report.say(f"Step {step}: the loss jumped to {loss:.3f}, from {usual:.3f} before.")
      if skipped:
        self.report_skip(step, metrics, batch)

  def row(self, step: int, metrics: Metrics) -> dict:
    """A step's numbers, under their names in `metrics.jsonl`."""
    loss, corpus = float(metrics.loss), self.setup.corpus
    row = {
      "step": step,
      "loss": loss,
      "targets": float(metrics.targets),
      corpus.measure: corpus.measured(loss),
      "gradient_norm": float(metrics.gradient_norm),
      "learning_rate": float(metrics.learning_rate),
    }
    if self.setup.experiment.optimizer.accumulate_steps > 1 and math.isfinite(metrics.update_loss):
      row["update_loss"] = float(metrics.update_loss)
    if metrics.balance is not None:
      row["balance"] = float(metrics.balance)
    if self.trainer.log_group_norms:
      row["group_norms"] = dict(zip(self.program.groups, map(float, metrics.group_norms), strict=True))
    return row

  def report_skip(self, step: int, metrics: Metrics, batch: dict[str, jax.Array]) -> None:
    """Reports a skipped step and the gradients that were not finite; raises if too many in a row were."""
    in_a_row, groups = int(metrics.skipped_in_a_row), nonfinite_groups(self.program.groups, metrics.nonfinite_groups)
    what = f"loss {float(metrics.loss):g}; gradients not finite: {groups}"
    if in_a_row < self.trainer.nonfinite_limit:
      self.report.say(f"Step {step} skipped ({what}).")
      return
    self.report.flush()
    module = first_nonfinite_module(self.setup.experiment.model, self.state.params, batch)
    raise NonFiniteError(
      f"{in_a_row} steps in a row up to step {step} were not finite ({what}). "
      + (f"The first output that is not finite is that of {module}. " if module else "")
      + f"The parameters are still those of step {step - in_a_row}; a lower Optimizer.learning_rate or clip_norm, or a "
      "longer warm-up, may help."
    )

  def save(self) -> None:
    """Begins to save a checkpoint of this step, unless it exists."""
    if self.checkpoints.latest_step == self.step:
      return
    self.check_lock()
    self.report.flush()
    step, loss = self.evaluated
    loss = loss if step == self.step else None
    self.checkpoints.save(self.step, self.state, self.batches.get_state(), self.setup.facts(), loss)


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0
