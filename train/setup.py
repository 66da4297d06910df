"""Prepares and checks everything that a run needs, before its first step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..zoo.formats import thousands
from .config import Experiment
from .data import Corpus
from .lock import Lock, check_free
from .loggers import find_loggers
from .processes import check_equal, row_share, together
from .run_folder import Result, check_same_run, check_writable, finished_result
from .sharding import layout
from .step import Program, experiment_program
from .token_writer import text_progress


class Setup(NamedTuple):
  """The fixed parts of a run; none changes from step to step.

  Attributes:
    experiment: an experiment from `memzoo.build`.
    directory: folder of the run.
    mesh: the mesh of devices.
    program: the compiled functions.
    corpus: the text, or the task.
    primary: whether this is the process that writes and prints.
  """

  experiment: Experiment
  directory: Path
  mesh: Mesh
  program: Program
  corpus: Corpus
  primary: bool

  @property
  def tokens_per_step(self) -> int:
    return self.experiment.data.batch_size * self.experiment.data.sequence_length

  def facts(self) -> dict[str, Any]:
    """What a checkpoint holds about the run besides its state."""
    data = self.experiment.data
    return {"config": self.experiment.text, "fingerprint": self.corpus.fingerprint, "tokenizer": data.tokenizer_digest}

  def check_facts(self, facts: dict[str, Any]) -> None:
    """Raises `ValueError` if a checkpoint with these facts was trained on other text."""
    self.experiment.data.check_tokenizer(facts.get("tokenizer"))
    check_text(self.corpus, facts, self.directory)


def check_text(corpus: Corpus, facts: dict[str, Any], directory: Path) -> None:
  """Raises `ValueError` if a checkpoint in `directory` with these facts was trained on another text than `corpus`.

  The split into training and validation depends on the text, so with another text a model could be tested on what it has seen.
  """
  if facts["fingerprint"] != corpus.fingerprint:
    raise ValueError(
      f"{corpus.data.source} has changed since {directory} was trained on it; expected the same text (for the standard "
      "library, the same Python) and a version of memzoo that reads it alike, or a new directory."
    )


def find_finished(experiment: Experiment, directory: Path) -> Result | None:
  """The result of the run in `directory`, if it has no steps left.

  Raises:
    ValueError: if `directory` holds another run, or processes have different configs.
  """
  check_equal(config=experiment.text)
  with together():
    check_same_run(directory, experiment.text)
    return finished_result(directory, experiment.trainer.steps)


@contextmanager
def claimed(directory: Path, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
  """Holds the lock of `directory`; the first process does it for all.

  Yields a function that all processes call before they write a checkpoint. It raises `OSError` if the lock was lost.

  Raises:
    ValueError: if another run holds its lock.
  """
  lock = None

  def check() -> None:
    with together():
      if lock:
        lock.check()

  try:
    with together():
      lock = Lock(directory, say) if jax.process_index() == 0 else None
    yield check
  finally:
    if lock:
      lock.release()


def set_up(experiment: Experiment, directory: Path, say: Callable[[str], None] = lambda message: None) -> Setup:
  """Lays out the program and loads the text, and says how far that is if it takes long. Nothing is compiled yet.

  Raises:
    ValueError: if the experiment cannot be run here, or another run uses `directory`.
  """
  data = experiment.data
  data.check_model(experiment.model)
  mesh = experiment.mesh.build()
  program = experiment_program(experiment, mesh)
  with together():
    row_share(program.batch_sharding, data.batch_size)
    check_writable(directory)
    if jax.process_index() == 0:
      check_free(directory)  # before much text is read; the lock is taken later
      find_loggers(experiment.trainer.loggers)  # only the first process logs
    corpus = data.load(text_progress(say))
    if experiment.trainer.sample_tokens and corpus.measure == "bits_per_byte":
      corpus.prompt(experiment.trainer.sample_prompt)  # the sample is written after the last step, too late for an error
  check_equal(text=corpus.fingerprint)
  return Setup(experiment, directory, mesh, program, corpus, jax.process_index() == 0)


def introduction(setup: Setup, step: int) -> list[str]:
  """Lines that say what a run will do from `step` on."""
  experiment, mesh, directory = setup.experiment, setup.mesh, setup.directory
  data, steps = experiment.data, experiment.trainer.steps
  start = f"Resuming {directory} after step {step}" if step else f"Starting {directory}"
  devices = f"{mesh.size} {mesh.devices.flat[0].device_kind} device{'s' * (mesh.size > 1)}"
  devices += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
  params = setup.program.abstract_state.params
  lines = [
    f"{start}: {steps} steps of {data.batch_size} x {data.sequence_length} tokens; {_numerics(experiment, params)}, on "
    f"{devices}.",
    setup.corpus.summary(steps),
  ]
  if experiment.ignored:
    lines.append(f"Ignored, as this version of memzoo does not know it: {'; '.join(experiment.ignored)}.")
  lines += _surprises(experiment)
  return lines + ([layout(mesh, params)] if mesh.size > 1 else [])


def _surprises(experiment: Experiment) -> list[str]:
  """Lines about settings that this run is too short for."""
  optimizer, trainer, lines = experiment.optimizer, experiment.trainer, []
  steps, accumulated = trainer.steps, optimizer.accumulate_steps
  if left := steps % accumulated:
    lines.append(
      f"Optimizer.accumulate_steps={accumulated} does not divide Trainer.steps={steps}: the last update is made of {left} "
      f"batch{'es' * (left > 1)}."
    )
  if (warmup := optimizer.warmup(steps)) < optimizer.warmup_steps:
    lines.append(f"Optimizer.warmup_steps={optimizer.warmup_steps} is more than a tenth of the run: shortened to {warmup}.")
  for name, what in (("evaluate_every", "an evaluation"), ("checkpoint_every", "a checkpoint")):
    if (every := getattr(trainer, name)) > steps:
      lines.append(f"Trainer.{name}={every} is more than Trainer.steps={steps}: {what} is due only at the end.")
  return lines


def _numerics(experiment: Experiment, params: Any) -> str:
  """The number of parameters, the dtypes, and the settings that save memory."""
  model, accumulated, leaves = experiment.model, experiment.optimizer.accumulate_steps, jax.tree.leaves(params)
  types = " and ".join(sorted({leaf.dtype.name for leaf in leaves}))
  return (
    f"{thousands(sum(leaf.size for leaf in leaves))} {types} parameters, {jnp.dtype(model.dtype).name} activations"
    + (f", remat {model.remat}" if model.remat != "none" else "")
    + (f", {accumulated} batches per update" if accumulated > 1 else "")
  )
