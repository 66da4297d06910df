"""How well a model predicts the validation text, and the baselines on the same text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from .checkpoint import restore_params
from .config import Experiment, build_text
from .data import Batch, Corpus
from .files import read_text
from .processes import row_share
from .setup import check_text
from .sharding import MeshShape, put_batch
from .step import Program, experiment_program


@dataclass(frozen=True)
class Evaluation:
  """A model on a text, or on a task.

  Attributes:
    loss: nats per token; for vectors, the squared error.
    measured: the loss in the unit `measure`.
    measure: the name of that unit, such as "bits_per_byte".
    accuracy: share of tokens whose likeliest prediction is right.
    tokens: number of tokens predicted.
    baselines: values without a model in the same unit, by name.
  """

  loss: float
  measured: float
  measure: str
  accuracy: float
  tokens: int
  baselines: dict[str, float]


def put_rows(batch: Batch, sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
  """Puts a batch that every process holds in full on the devices; each process puts its own rows."""
  share, shares = row_share(sharding, len(batch["tokens"]))
  own = len(batch["tokens"]) // shares
  return put_batch({name: rows[share * own : (share + 1) * own] for name, rows in batch.items()}, sharding)


def mean_loss(program: Program, params: Any, batches: Sequence[dict[str, jax.Array]]) -> tuple[float, float]:
  """Nats per token over `batches`, which are on the devices, and the share of tokens predicted right."""
  # One after another. The devices of a CPU mesh are threads of one small pool: given all batches at once, the devices could
  # begin different batches and wait for each other forever.
  sums = [jax.device_get(program.evaluate(params, batch)) for batch in batches]
  nats, right, tokens = (sum(map(float, column)) for column in zip(*sums, strict=True))
  return nats / tokens, right / tokens


def validation_row(corpus: Corpus, loss: float) -> dict[str, float]:
  """A validation loss, under its names in `metrics.jsonl`."""
  return {"validation_loss": loss, f"validation_{corpus.measure}": corpus.measured(loss, validation=True)}


def evaluate(program: Program, params: Any, corpus: Corpus, batches: int = 0) -> Evaluation:
  """Evaluates `params` on at most `batches` validation batches of `corpus`; 0 means all of them."""
  rows = corpus.validation_batches(batches)
  loss, accuracy = mean_loss(program, params, [put_rows(batch, program.batch_sharding) for batch in rows])
  return Evaluation(
    loss=loss,
    measured=corpus.measured(loss, validation=True),
    measure=corpus.measure,
    accuracy=accuracy,
    tokens=int(sum(batch["weights"].sum() for batch in rows)),
    baselines=corpus.baselines(rows),
  )


def load_run(
  directory: str | Path, *, best: bool = False, say: Callable[[str], None] = print
) -> tuple[Experiment, Any, int]:
  """A run's experiment, its newest or best parameters (on the first device) and their step.

  Raises:
    ValueError: if `directory` is not a run, or has no checkpoint that can be read.
  """
  return _load(_experiment(directory), directory, best, say, lambda facts: None)


def load_run_and_text(
  directory: str | Path, *, best: bool = False, say: Callable[[str], None] = print
) -> tuple[Experiment, Any, int, Corpus]:
  """Like `load_run`, with the text or task of the run. Raises `ValueError` if that has changed since."""
  experiment = _experiment(directory)
  corpus = experiment.data.load()
  return *_load(experiment, directory, best, say, lambda facts: check_text(corpus, facts, directory)), corpus


def _experiment(directory: str | Path) -> Experiment:
  config = Path(directory) / "config.gin"
  if not config.is_file():
    raise ValueError(f"{directory} is no run: it has no config.gin; expected a folder that `memzoo train` has written.")
  text = read_text(config, "a checkpoint's facts hold it as well")
  try:
    return build_text(text, Path(directory).resolve().name, config.parent)
  except ValueError as error:
    raise ValueError(f"{config} cannot be used: {error}") from None


def _load(
  experiment: Experiment, directory: str | Path, best: bool, say: Callable[[str], None], check_facts: Callable[[dict], None]
) -> tuple[Experiment, Any, int]:
  shapes = jax.eval_shape(lambda: nn.unbox(experiment.model.init(jax.random.key(0), experiment.data.one_token)))

  def check(facts):
    experiment.data.check_tokenizer(facts.get("tokenizer"))
    check_facts(facts)

  params, step = restore_params(directory, shapes, best=best, check=check, say=say)
  return experiment, params, step


def evaluate_run(
  directory: str | Path, *, batches: int = 0, best: bool = False, say: Callable[[str], None] = print
) -> tuple[Evaluation, int]:
  """Evaluates a run's newest or best checkpoint on its validation text; see `evaluate`. Returns its step as well."""
  experiment, params, step, corpus = load_run_and_text(directory, best=best, say=say)
  mesh = MeshShape(data=1).build(jax.devices()[:1])
  program = experiment_program(experiment, mesh)
  return evaluate(program, params, corpus, batches), step
