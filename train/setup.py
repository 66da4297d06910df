"""Prepares and checks everything that a run needs, before its first step."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..zoo.formats import thousands
from .config import Experiment
from .data import Corpus
from .processes import check_equal, row_share, together
from .run_folder import Result, check_same_run, check_writable, finished_result
from .sharding import layout
from .step import Program, experiment_program


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
    data = self.experiment.data
    data.check_tokenizer(facts.get("tokenizer"))
    if facts["fingerprint"] != self.corpus.fingerprint:
      raise ValueError(
        f"{data.source} has changed since {self.directory} was trained on it; expected the same text (for the standard "
        "library, the same Python), or a new directory."
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


def set_up(experiment: Experiment, directory: Path) -> Setup:
  """Lays out the program and loads the text. Nothing is compiled yet.

  Raises:
    ValueError: if the experiment cannot be run here.
  """
  data = experiment.data
  data.check_model(experiment.model)
  mesh = experiment.mesh.build()
  program = experiment_program(experiment, mesh)
  with together():
    row_share(program.batch_sharding, data.batch_size)
    check_writable(directory)
    corpus = data.load()
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
  return lines + ([layout(mesh, params)] if mesh.size > 1 else [])


def _numerics(experiment: Experiment, params: Any) -> str:
  """The number of parameters, the dtypes, and the settings that save memory."""
  model, accumulated, leaves = experiment.model, experiment.optimizer.accumulate_steps, jax.tree.leaves(params)
  types = " and ".join(sorted({leaf.dtype.name for leaf in leaves}))
  return (
    f"{thousands(sum(leaf.size for leaf in leaves))} {types} parameters, {jnp.dtype(model.dtype).name} activations"
    + (f", remat {model.remat}" if model.remat != "none" else "")
    + (f", {accumulated} batches per update" if accumulated > 1 else "")
  )
