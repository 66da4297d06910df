"""Tables about an experiment: its model, its run, and the memory of a training step."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..zoo.describe import Description, parts_table
from ..zoo.formats import binary, table, thousands
from ..zoo.language_model import VectorModel
from .sharding import MeshShape
from .step import experiment_program


class Peak(NamedTuple):
  """The predicted peak memory of a training step on each device, in bytes.

  Attributes:
    state: parameters, moments and counters.
    batch: a device's share of the batch.
    temporaries: the rest: activations, gradients, results that do not reuse the state's buffers, and code.
    backend: the platform that the step was compiled for.
  """

  state: int
  batch: int
  temporaries: int
  backend: str

  @property
  def total(self) -> int:
    return self.state + self.batch + self.temporaries


def predicted_peak(experiment: Any) -> Peak:
  """Compiles an experiment's training step for this machine, and returns the memory that it needs. Nothing is allocated.

  It does not include the rest of the process: Python, the text, the evaluation, other programs.

  Raises:
    ValueError: if the experiment cannot be run on any mesh of this machine.
  """
  program, _, _ = _laid_out(experiment)
  batch = abstract_batch(experiment.data, program.batch_sharding)
  found = program.train.lower(program.abstract_state, batch).compile().memory_analysis()
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  whole = found.argument_size_in_bytes + results + found.temp_size_in_bytes + found.generated_code_size_in_bytes
  held, given = bytes_on_a_device(program.abstract_state), bytes_on_a_device(batch)
  return Peak(held, given, whole - held - given, jax.default_backend())


def bytes_on_a_device(tree: Any) -> int:
  """Bytes that one device holds of `tree`: arrays, or their shapes with shardings."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def abstract_batch(data: Any, sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a batch of a `TextData` or a `TaskData`."""
  if not hasattr(data, "sources"):
    batch = jax.eval_shape(data.load().batch_on_device, jax.ShapeDtypeStruct((), jnp.uint32))
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for name, leaf in batch.items()}
  types = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}
  shape = (data.batch_size, data.sequence_length)
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in types.items()}


def _laid_out(experiment: Any) -> tuple[Any, int, str]:
  """The `Program`, its number of devices, and a remark if the mesh does not fit here and one device is used instead."""

  def on(shape: MeshShape) -> tuple[Any, int]:
    mesh = shape.build()
    return experiment_program(experiment, mesh), mesh.size

  try:
    return *on(experiment.mesh), ""
  except ValueError:
    return *on(MeshShape(data=1)), f" alone: {experiment.mesh} does not fit the {jax.device_count()} here"


def render(experiment: Any, description: Description, peak: Peak | None = None) -> list[Any]:
  """Rich tables of the parts of an experiment's model, and of its run."""
  return [parts_table(experiment.name, description), table(None, ("", ""), facts(experiment, description, peak), words=2)]


def facts(experiment: Any, description: Description, peak: Peak | None = None) -> list[tuple[str, str]]:
  """Names and descriptions of what an experiment is made of, and of the memory that it needs here."""
  model, data, optimizer, trainer = experiment.model, experiment.data, experiment.optimizer, experiment.trainer
  state = ", ".join(f"{binary(size)} in {kind}" for kind, size in description.state_bytes_by_kind().items())
  tokens = data.batch_size * data.sequence_length
  work = 3 * description.flops * tokens * trainer.steps
  found = {
    "model": f"width {model.width}, depth {model.depth}, {_interface(model)}, {jnp.dtype(model.dtype).name}",
    "state": f"{state}, for a sequence while generating",
    "data": f"{data.source}, {data.batch_size} x {data.sequence_length} per step",
    "optimiser": (
      f"AdamW, rate {optimizer.learning_rate:g} after {optimizer.warmup_steps} steps, cosine to "
      f"{optimizer.learning_rate * optimizer.final_fraction:g}, decay {optimizer.weight_decay:g}"
    ),
    "memory": _memory(experiment),
    "run": (
      f"{trainer.steps:,} steps, {thousands(tokens * trainer.steps)} tokens, {thousands(work, 'FLOPs')} in matrix products"
    ),
  }
  if peak:
    found["peak"] = (
      f"{binary(peak.total)} per device in a training step, as compiled for {peak.backend}: {binary(peak.state)} state, "
      f"{binary(peak.batch)} batch, {binary(peak.temporaries)} temporaries"
    )
  return list(found.items())


def _memory(experiment: Any) -> str:
  program, devices, remark = _laid_out(experiment)
  state = program.abstract_state
  params, optimizer = bytes_on_a_device(state.params), bytes_on_a_device(state.opt_state)
  moments = "moments" if experiment.optimizer.accumulate_steps == 1 else "moments and accumulated gradients"
  where = f"each of {devices} devices" if devices > 1 else f"one device{remark}"
  return f"{binary(params)} of parameters, {binary(optimizer)} of {moments}, on {where}"


def _interface(model: Any) -> str:
  """The inputs and outputs of a model, in words."""
  if isinstance(model, VectorModel):
    return f"vectors of {model.input_dim} to vectors of {model.output_dim}"
  return f"{model.vocab_size} tokens"
