"""A task as the data of a run: batches without end, made where they are used."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from ..checks import at_least, check_seed
from ..data import check_documents
from .task import Example, Task

_VALIDATION = 2**31  # batches of validation are numbered from here: no run comes that far


@dataclass(frozen=True)
class TaskData:
  """Examples of a task to train on, made as they are needed and never twice.

  Attributes:
    task: one of `memzoo.train.tasks`; its `training()` is what is trained on.
    batch_size: examples in a batch.
    validation_batches: that all evaluations of a run are on, unless they want fewer.
    seed: of the examples.
  """

  task: Task
  batch_size: int = 32
  validation_batches: int = 32
  seed: int = 0

  def __post_init__(self):
    at_least(1, self, "batch_size", "validation_batches")
    check_seed(self)

  @property
  def vocab_size(self) -> int:
    """Number of tokens that the task is made of; a model's `vocab_size` must be at least this."""
    return self.task.vocab_size

  @property
  def sequence_length(self) -> int:
    """Tokens in an example."""
    return self.task.training().length

  @property
  def source(self) -> str:
    """The task, in words."""
    return str(self.task)

  @property
  def one_token(self) -> np.ndarray:
    """What a model may be initialised with: a batch of one sequence of one token."""
    return np.zeros((1, 1, self.task.input_dim), np.float32) if self.task.continuous else np.zeros((1, 1), np.int32)

  tokenizer_digest = None

  def check_tokenizer(self, digest: None) -> None:
    """There is none."""

  def check_model(self, model: Any) -> None:
    """Raises `ValueError` if `model` does not fit the task's tokens, or its vectors."""
    from ...zoo.language_model import VectorModel

    if self.task.continuous:
      dims = (self.task.input_dim, self.task.output_dim)
      if not isinstance(model, VectorModel) or (model.input_dim, model.output_dim) != dims:
        raise ValueError(
          f"{self.task} goes from vectors to vectors; want a VectorModel of input_dim={dims[0]} and output_dim={dims[1]}."
        )
    elif isinstance(model, VectorModel) or model.vocab_size < self.vocab_size:
      raise ValueError(
        f"LanguageModel.vocab_size is {model.vocab_size}; want at least {self.vocab_size}, the number of tokens of "
        f"{self.task}."
      )
    check_documents(model, self.task.training().documents, "choose a task with fewer examples in a row")

  def encode(self, text: str) -> list[int]:
    """Raises `ValueError`: tasks are not made of text."""
    raise ValueError(f"{self.task} is not made of text; want a run on text to generate from.")

  def load(self) -> "TaskCorpus":
    """The examples. Nothing is read; see `TaskCorpus`."""
    return TaskCorpus(self)


@dataclass(frozen=True)
class TaskCorpus:
  """The examples of a `TaskData`, with the interface of `memzoo.train.data.Corpus`."""

  data: TaskData

  @property
  def measure(self) -> str:
    """What a loss is told in."""
    return "squared_error" if self.data.task.continuous else "bits_per_answer"

  def measured(self, loss: float, validation: bool = False) -> float:
    """A loss in nats per answer, in bits; the squared error of vectors, as it is."""
    return loss if self.data.task.continuous else loss / math.log(2)

  def baselines(self, batches: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """What one without memory scores: bits, if all the answers that it guesses among are equally likely."""
    chance = self.data.task.training().chance
    return {"without memory": chance if self.data.task.continuous else -math.log2(chance)}

  @property
  def fingerprint(self) -> str:
    """A digest of all that decides the examples."""
    return hashlib.blake2b(f"{self.data.task} {self.data.seed}".encode(), digest_size=16).hexdigest()

  def summary(self, steps: int) -> str:
    """One line about the task."""
    task = self.data.task.training()
    return f"{self.data.task}: {steps * self.data.batch_size:,} examples of {task.length}, none seen twice."

  @cached_property
  def batch_on_device(self) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The batch of a number, jitted."""
    task, size, seed = self.data.task.training(), self.data.batch_size, self.data.seed
    return jax.jit(lambda number: as_batch(task.batch(jax.random.fold_in(jax.random.key(seed), number), size)))

  def batch(self, number: int) -> dict[str, np.ndarray]:
    """The batch of a number, whole."""
    return jax.device_get(self.batch_on_device(np.uint32(number)))

  def batches(self, share: int = 0, shares: int = 1) -> "TaskBatches":
    """Training batches without end; see `Corpus.batches`."""
    return TaskBatches(self, partial(_rows, share=share, shares=shares))

  def validation_batches(self, count: int) -> list[dict[str, np.ndarray]]:
    """At most `count` batches that no training step sees; 0 means all there are."""
    wanted = self.data.validation_batches if count == 0 else min(count, self.data.validation_batches)
    return [self.batch(_VALIDATION + number) for number in range(wanted)]


class TaskBatches:
  """An iterator over training batches, whose position can be saved and restored."""

  def __init__(self, corpus: TaskCorpus, rows: Any):
    self._corpus, self._rows, self._next = corpus, rows, 0

  def __iter__(self) -> "TaskBatches":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    self._next += 1
    return self._rows(self._corpus.batch(self._next - 1))

  def get_state(self) -> dict[str, int]:
    """The position."""
    return {"next": self._next}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to a position."""
    self._next = state["next"]


def as_batch(example: Example) -> dict[str, Any]:
  """What a training step takes, of a batch of examples."""
  return {name: getattr(example, name) for name in ("tokens", "targets", "weights", "segment_ids")}


def _rows(batch: dict[str, np.ndarray], share: int, shares: int) -> dict[str, np.ndarray]:
  return {name: rows[share::shares] for name, rows in batch.items()}
