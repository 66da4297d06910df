"""How well a model predicts the validation text, beside what that text costs without a model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from .data import Baselines, Batch, Corpus, baselines, predicted_text
from .processes import row_share
from .sharding import put_batch
from .step import Program, build_program


@dataclass(frozen=True)
class Evaluation:
  """A model on a text.

  Attributes:
    loss: nats per token.
    bits_per_byte: the same per byte of text, in bits.
    tokens: predicted.
    baselines: of the same text.
  """

  loss: float
  bits_per_byte: float
  tokens: int
  baselines: Baselines


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
  """A loss in nats per token, in bits per byte of text."""
  return loss / math.log(2) / bytes_per_token


def put_rows(batch: Batch, sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
  """Puts a batch that every process has whole on the devices, each process its own rows."""
  share, shares = row_share(sharding, len(batch["tokens"]))
  own = len(batch["tokens"]) // shares
  return put_batch({name: rows[share * own : (share + 1) * own] for name, rows in batch.items()}, sharding)


def mean_loss(program: Program, params: Any, batches: Sequence[dict[str, jax.Array]]) -> float:
  """Nats per token over `batches`, which are on the devices."""
  # One after another: were all asked for at once, the devices of a mesh, on a CPU threads of one small pool, could each be
  # at another batch and wait for the others without end.
  sums = [jax.device_get(program.evaluate(params, batch)) for batch in batches]
  return sum(float(nats) for nats, _ in sums) / sum(float(tokens) for _, tokens in sums)


def evaluate(program: Program, params: Any, corpus: Corpus, batches: int = 0) -> Evaluation:
  """Evaluates `params` on so many batches of `corpus`'s validation text; 0 means all of it."""
  rows = corpus.validation_batches(batches)
  loss = mean_loss(program, params, [put_rows(batch, program.batch_sharding) for batch in rows])
  return Evaluation(
    loss=loss,
    bits_per_byte=bits_per_byte(loss, corpus.validation.bytes_per_token),
    tokens=int(sum(batch["weights"].sum() for batch in rows)),
    baselines=baselines(predicted_text(rows, corpus.data)),
  )


def load_run(
  directory: str | Path, *, best: bool = False, say: Callable[[str], None] = print
) -> tuple[Any, Any, int]:
  """A run's experiment, its newest or its best parameters (on the first device) and the step that they are from.

  Raises:
    ValueError: if `directory` is no run, or has no checkpoint that can be read.
  """
  from ..zoo.config import build_text
  from .checkpoint import restore_params

  config = Path(directory) / "config.gin"
  if not config.is_file():
    raise ValueError(f"{directory} is no run: it has no config.gin; want a folder that `memzoo train` has written.")
  experiment = build_text(config.read_text(), Path(directory).name)
  shapes = jax.eval_shape(lambda: nn.unbox(experiment.model.init(jax.random.key(0), jax.numpy.zeros((1, 1), "int32"))))

  def check(facts):
    experiment.data.check_tokenizer(facts.get("tokenizer"))

  params, step = restore_params(directory, shapes, best=best, check=check, say=say)
  return experiment, params, step


def evaluate_run(
  directory: str | Path, *, batches: int = 0, best: bool = False, say: Callable[[str], None] = print
) -> tuple[Evaluation, int]:
  """Evaluates a run's newest or best checkpoint on its validation text; see `evaluate`. Returns its step as well."""
  experiment, params, step = load_run(directory, best=best, say=say)
  mesh = type(experiment.mesh)(data=1).build(jax.devices()[:1])
  program = build_program(
    experiment.model, experiment.optimizer, mesh, steps=experiment.trainer.steps, batch_size=experiment.data.batch_size
  )
  return evaluate(program, params, experiment.data.load(), batches), step
