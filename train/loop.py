"""A run from its first step to its last, through any number of interruptions.

A run is a folder. Calling `train` on it starts it, takes it up where it stopped, or finds it finished. All that decides
a step is in its checkpoint, and every source of order is seeded, so on a CPU a run that was killed goes on to the bits
that it would have had.

The host stays one step ahead of the device: it asks for a step before it reads the numbers of the last one, so reading,
writing and drawing cost the device nothing as long as they take less than a step.
"""

import json
import signal
import time
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..pallas_kernels.measure import matmul_rate, peak_bytes, whose_peak
from ..zoo.describe import forward_flops
from ..zoo.formats import thousands
from ..zoo.generate import generate
from .checkpoint import Checkpoints, Restored, checksums
from .config import Experiment
from .data import Corpus
from .diagnosis import Spikes, first_nonfinite_module
from .evaluation import Evaluation, evaluate, mean_loss, put_rows
from .processes import Vote, check_equal, row_share, together
from .report import Report, clock, plot_losses, read_rows
from .run_folder import Result, check_same_run, check_writable, finished_result
from .runtime import Stopwatch, interruptions, start_quietly
from .sharding import layout, put_batch
from .step import Metrics, Program, TrainState, build_program
from .trainer import Trainer

__all__ = ["NonFiniteError", "Result", "Trainer", "train"]


class NonFiniteError(ArithmeticError):
  """Several steps in a row had a loss or a gradient that was not finite."""


def train(experiment: Experiment, directory: str | Path, *, progress: bool = True) -> Result:
  """Trains `experiment` in `directory`: starts, resumes, or finds that all is done, and says which.

  It leaves `config.gin`, `metrics.jsonl` (a line for every step), `tensorboard/`, `loss.png`, `sample.txt`,
  `result.json` and `checkpoints/`. SIGTERM and Ctrl-C save a checkpoint and return; a second Ctrl-C does not wait.

  Args:
    experiment: as `memzoo.build` gives it.
    directory: of the run, made where it is missing. One that holds a run must hold this one: only `Trainer` (without
      its seed) and `MeshShape` may differ.
    progress: False prints nothing.

  Raises:
    ValueError: if the experiment cannot be run here, or `directory` holds another run.
    NonFiniteError: if `Trainer.nonfinite_limit` steps in a row were not finite.
  """
  start_quietly()
  directory, trainer, data = Path(directory), experiment.trainer, experiment.data
  check_equal(config=experiment.text)
  with together():
    check_same_run(directory, experiment.text)
    finished = finished_result(directory, trainer.steps)
  if finished:
    if progress and jax.process_index() == 0:
      print(f"{directory} is finished: {finished.step} steps. To go on, ask for more with Trainer.steps.")
    return finished
  data.check_model(experiment.model)
  mesh = experiment.mesh.build()
  program = build_program(
    experiment.model,
    experiment.optimizer,
    mesh,
    steps=trainer.steps,
    batch_size=data.batch_size,
    seed=trainer.seed,
    tokens=data.one_token,
  )
  with together():
    row_share(program.batch_sharding, data.batch_size)
    check_writable(directory)
    corpus = data.load()
  check_equal(text=corpus.fingerprint)
  messages: list[str] = []
  with Checkpoints(directory, kept=trainer.checkpoints_kept, say=messages.append) as checkpoints:
    restored = checkpoints.restore(program.abstract_state)
    if restored:
      data.check_tokenizer(restored.facts.get("tokenizer"))
    if restored and restored.facts["fingerprint"] != corpus.fingerprint:
      raise ValueError(
        f"{data.source} is no longer what {directory} was trained on; want the same (and, for the standard library, the same "
        "Python), or a new directory."
      )
    if jax.process_index() == 0:
      (directory / "config.gin").write_text(experiment.text)
      (directory / "result.json").unlink(missing_ok=True)
    run = _Run(experiment, directory, mesh, program, corpus, checkpoints, restored, progress)
    with run.report:
      run.introduce(messages)
      return run.go()


class _Run:
  """The parts of a run under way, and the state that goes from step to step."""

  def __init__(
    self,
    experiment: Experiment,
    directory: Path,
    mesh: Mesh,
    program: Program,
    corpus: Corpus,
    checkpoints: Checkpoints,
    restored: Restored | None,
    progress: bool,
  ):
    self.experiment, self.trainer, self.data = experiment, experiment.trainer, experiment.data
    self.directory, self.mesh, self.program, self.corpus = directory, mesh, program, corpus
    self.checkpoints = checkpoints
    self.primary = jax.process_index() == 0
    self.batches = corpus.batches(*row_share(program.batch_sharding, self.data.batch_size))
    self.state: TrainState = restored.state if restored else program.create()
    if restored:
      self.batches.set_state(restored.data)
    self.step = self.first_step = int(self.state.step)
    self.best_loss = checkpoints.best_loss
    self.spikes, self.vote = Spikes(), Vote(mesh)
    self.pending: tuple[int, Metrics, dict[str, jax.Array]] | None = None
    self.watch = Stopwatch()
    self.validation = [
      put_rows(batch, program.batch_sharding) for batch in corpus.validation_batches(self.trainer.evaluation_batches)
    ]
    self.report = Report(
      directory,
      first_step=self.first_step,
      last_step=max(self.first_step, self.trainer.steps),
      tokens_per_step=self.data.batch_size * self.data.sequence_length,
      log_every=self.trainer.log_every,
      measure=corpus.measure,
      progress=progress,
      primary=self.primary,
    )

  def introduce(self, messages: list[str]) -> None:
    """Says what is about to happen."""
    for message in messages:
      self.report.say(message)
    trainer = self.trainer
    start = f"Resuming {self.directory} after step {self.step}" if self.step else f"Starting {self.directory}"
    devices = f"{self.mesh.size} {self.mesh.devices.flat[0].device_kind} device{'s' * (self.mesh.size > 1)}"
    devices += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    self.report.say(
      f"{start}: {trainer.steps} steps of {self.data.batch_size} x {self.data.sequence_length} tokens; {self.numerics()}, "
      f"on {devices}."
    )
    self.report.say(self.corpus.summary(trainer.steps))
    if self.mesh.size > 1:
      self.report.say(layout(self.mesh, self.program.abstract_state.params))

  def numerics(self) -> str:
    """How many parameters, in which types all is computed, and what else is traded for memory."""
    model, accumulated = self.experiment.model, self.experiment.optimizer.accumulate_steps
    leaves = jax.tree.leaves(self.state.params)
    count = thousands(sum(leaf.size for leaf in leaves))
    types = " and ".join(sorted({leaf.dtype.name for leaf in leaves}))
    return (
      f"{count} {types} parameters, {jnp.dtype(model.dtype).name} activations"
      + (f", remat {model.remat}" if model.remat != "none" else "")
      + (f", {accumulated} batches an update" if accumulated > 1 else "")
    )

  def go(self) -> Result:
    """Goes through the steps that are left, and finishes."""
    with interruptions() as caught:
      interrupted = self.train_until(caught)
    if interrupted and self.step < self.trainer.steps:
      self.save()
      self.checkpoints.wait()
      self.draw(None)
      self.report.say(
        f"Stopped by {interrupted} after step {self.step}. Saved in {self.checkpoints.path / str(self.step)}; the same "
        "command goes on from there."
      )
      return Result(str(self.directory), self.step, interrupted, int(self.state.skipped))
    return self.finish()

  def train_until(self, caught: list[signal.Signals]) -> str | None:
    """Steps until the last, or until a process has `caught` a signal, whose name it returns.

    Every step's numbers have been written on return.
    """
    trainer, stopped_by = self.trainer, 0
    began = time.perf_counter()
    while self.step < trainer.steps and not (stopped_by := self.vote(caught[0] if caught else 0)):
      with self.watch("input"):
        batch = put_batch(next(self.batches), self.program.batch_sharding)
      with self.watch("step"):
        self.state, metrics = self.program.train(self.state, batch)
      self.step += 1
      previous, self.pending = self.pending, (self.step, metrics, batch)
      if previous:
        self.record(*previous)
      if self.step == self.first_step + 1:
        self.warm_up()
        self.report.say(f"Compiled and took the first step in {time.perf_counter() - began:.1f} s.")
        self.watch.restart()
        self.report.restart_clock(self.step)
      validation_loss = None
      if _due(self.step, trainer.evaluate_every) and self.step < trainer.steps:
        validation_loss = self.drain(evaluate=True)
      is_best = validation_loss is not None and validation_loss < self.best_loss
      due = _due(self.step, trainer.checkpoint_every) or self.step == trainer.steps
      if due or (is_best and trainer.save_best):
        self.drain()
        with self.watch("checkpoints"):
          self.save(validation_loss)
      if is_best:
        self.best_loss = validation_loss
    self.drain()
    self.watch.stop()
    return signal.Signals(stopped_by).name if stopped_by else None

  def warm_up(self) -> None:
    """Finishes the first step, and compiles here and now whatever else will be called between steps."""
    self.drain()
    mean_loss(self.program, self.state.params, self.validation[:1])
    checksums(self.state)

  def drain(self, evaluate: bool = False) -> float | None:
    """Records the step under way; with `evaluate`, together with the loss on the validation text after it, returned."""
    if self.pending is None:
      return None
    (step, metrics, batch), self.pending = self.pending, None
    with self.watch("step"):
      jax.block_until_ready(metrics)
    loss, validation = None, {}
    if evaluate:
      with self.watch("evaluation"):
        loss, accuracy = mean_loss(self.program, self.state.params, self.validation)
        validation = self.validation_row(loss) | {"validation_accuracy": accuracy}
    self.record(step, metrics, batch, validation)
    return loss

  def validation_row(self, loss: float) -> dict[str, float]:
    """The validation loss under the names that `metrics.jsonl` has for it."""
    return {"validation_loss": loss, f"validation_{self.corpus.measure}": self.corpus.measured(loss, validation=True)}

  def record(
    self, step: int, metrics: Metrics, batch: dict[str, jax.Array], validation: dict[str, float] | None = None
  ) -> None:
    """Waits for a step's numbers and writes them; ends the run if too many in a row were not finite."""
    with self.watch("step"):
      metrics = jax.device_get(metrics)
    with self.watch("reporting"):
      loss, in_a_row = float(metrics.loss), int(metrics.skipped_in_a_row)
      row = {
        "step": step,
        "loss": loss,
        self.corpus.measure: self.corpus.measured(loss),
        "gradient_norm": float(metrics.gradient_norm),
        "learning_rate": float(metrics.learning_rate),
      }
      if self.trainer.log_group_norms:
        row["group_norms"] = dict(zip(self.program.groups, map(float, metrics.group_norms), strict=True))
      self.report.row(row | ({"skipped": True} if in_a_row else {}) | (validation or {}))
      usual = None if in_a_row else self.spikes(loss)
      if usual is not None:
        self.report.say(f"Step {step}: the loss jumped to {loss:.3f}, from {usual:.3f} before.")
      if in_a_row:
        self.complain(step, loss, metrics.nonfinite_groups, in_a_row, batch)

  def complain(
    self, step: int, loss: float, nonfinite: np.ndarray, in_a_row: int, batch: dict[str, jax.Array]
  ) -> None:
    """Reports a step that was skipped and which gradients were not finite; ends the run if it was one too many."""
    groups = [group for group, bad in zip(self.program.groups, nonfinite, strict=True) if bad]
    where = "every group" if len(groups) == len(nonfinite) else ", ".join(groups) or "none, but for their sum"
    what = f"loss {loss:g}; gradients not finite: {where}"
    if in_a_row < self.trainer.nonfinite_limit:
      self.report.say(f"Step {step} skipped ({what}).")
      return
    self.report.flush()
    module = first_nonfinite_module(self.experiment.model, self.state.params, batch)
    raise NonFiniteError(
      f"{in_a_row} steps in a row up to step {step} were not finite ({what}). "
      + (f"The first output that is not finite is that of {module}. " if module else "")
      + f"The parameters are still those of step {step - in_a_row}; a lower Optimizer.learning_rate or clip_norm, or a "
      "longer warm-up, may help."
    )

  def save(self, validation_loss: float | None = None) -> None:
    """Begins to save a checkpoint of this step, unless there is one."""
    if self.checkpoints.latest_step == self.step:
      return
    self.report.flush()
    facts = {
      "config": self.experiment.text,
      "fingerprint": self.corpus.fingerprint,
      "tokenizer": self.data.tokenizer_digest,
    }
    self.checkpoints.save(self.step, self.state, self.batches.get_state(), facts, validation_loss)

  def finish(self) -> Result:
    """Evaluates, writes what is left behind, and prints a summary."""
    self.checkpoints.wait()
    evaluation = evaluate(self.program, self.state.params, self.corpus, self.trainer.final_evaluation_batches)
    result = Result(
      directory=str(self.directory),
      step=self.step,
      skipped=int(self.state.skipped),
      validation_loss=evaluation.loss,
      validation_accuracy=evaluation.accuracy,
      **(_of_text(evaluation) if self.corpus.measure == "bits_per_byte" else {}),
      peak_bytes=peak_bytes(),  # before the large product that the speed is compared with
      **self.speed(),
    )
    self.draw(evaluation)
    self.write_sample()
    if self.primary:
      (self.directory / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    self.summarise(result, evaluation)
    return result

  def speed(self) -> dict[str, float]:
    """The rates among `Result`'s fields; none where there was but one step to time."""
    steps, total, inside = self.step - self.first_step - 1, self.watch.total, self.watch.seconds["step"]
    if steps < 1:
      return {}
    flops = 3 * forward_flops(self.experiment.model, self.data.batch_size, self.data.sequence_length) * steps / inside
    return {
      "tokens_per_second": steps * self.data.batch_size * self.data.sequence_length / total,
      "step_share": inside / total,
      "flops_per_second": flops,
      "matmul_share": flops / (matmul_rate() * self.mesh.size),
    }

  def draw(self, evaluation: Evaluation | None) -> None:
    """Draws `loss.png` from all of `metrics.jsonl`; a final evaluation is its last point."""
    self.report.flush()
    rows = read_rows(self.directory / "metrics.jsonl") if self.primary else []
    if not rows:
      return
    if evaluation:
      rows[-1] |= self.validation_row(evaluation.loss)
    plot_losses(rows, self.directory / "loss.png", evaluation and evaluation.baselines, self.corpus.measure)

  def write_sample(self) -> None:
    """Writes `sample.txt`: the prompt and what the model makes of it."""
    if not self.trainer.sample_tokens or jax.process_count() > 1 or self.corpus.measure != "bits_per_byte":
      return
    params = jax.device_put(self.state.params, jax.devices()[0])
    prompt = self.data.encode(self.trainer.sample_prompt)
    tokens = generate(
      self.experiment.model,
      params,
      [prompt],
      max_new_tokens=self.trainer.sample_tokens,
      temperature=0.8,
      seed=self.trainer.seed,
    )
    (self.directory / "sample.txt").write_text(self.data.decode(prompt + tokens[0]) + "\n")

  def summarise(self, result: Result, evaluation: Evaluation) -> None:
    """Prints the last table."""
    names = ("loss.png", "sample.txt", "metrics.jsonl", "tensorboard", "checkpoints")
    left = ", ".join(name for name in names if (self.directory / name).exists())
    rows = [
      (
        "validation",
        f"{evaluation.measured:.3f} {self.corpus.measure.replace('_', ' ')}, on {thousands(evaluation.tokens)} tokens, "
        f"{evaluation.accuracy:.1%} right",
      ),
      (", ".join(evaluation.baselines), ", ".join(f"{value:.3f}" for value in evaluation.baselines.values()) + " on the same"),
    ]
    if result.tokens_per_second:
      share = self.watch.shares()
      others = ", ".join(f"{name} {part:.1%}" for name, part in share.items() if name != "step")
      rows += [
        ("speed", f"{thousands(result.tokens_per_second)} tokens/s, in {clock(self.watch.total)} after the first step"),
        ("time", f"{share['step']:.1%} in the compiled step; {others}"),
        (
          "arithmetic",
          f"{thousands(result.flops_per_second)}FLOP/s in matrix products, {result.matmul_share:.0%} of one large "
          "float32 product",
        ),
      ]
    rows.append(("memory", f"{result.peak_bytes / 2**30:.2f} GiB at the peak, of {whose_peak()}"))
    if result.skipped:
      rows.append(("skipped", f"{result.skipped} steps, not finite"))
    self.report.table(f"Finished: {self.step} steps", [*rows, (str(self.directory), left)])


def _of_text(evaluation: Evaluation) -> dict[str, float]:
  """An evaluation on text under the names that `Result` has for it."""
  order_0, zlib = evaluation.baselines.values()
  return {
    "validation_bits_per_byte": evaluation.measured,
    "order_0_bits_per_byte": order_0,
    "zlib_bits_per_byte": zlib,
  }


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0
