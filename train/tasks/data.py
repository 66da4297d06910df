"""A task as the data of a run: an endless series of batches, made on demand."""

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
from ..keys import new_key
from .task import Example, Task

_VALIDATION = 2**31  # validation batches are numbered from here, beyond any training batch


@dataclass(frozen=True)
class TaskData:
  """Training examples of a task, made on demand and never repeated.

  Attributes:
    task: one of `memzoo.train.tasks`; the run trains on its `training()`.
    batch_size: examples in a batch.
    validation_batches: number of batches of a full evaluation.
    seed: random seed of the examples.
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
    """Number of different tokens; the model's `vocab_size` must be at least this."""
    return self.task.vocab_size

  @property
  def sequence_length(self) -> int:
    """Tokens in an example."""
    return self.task.training().length

  @property
  def source(self) -> str:
    """The task with its parameters, as text."""
    return str(self.task)

  @property
  def one_token(self) -> np.ndarray:
    """An input to initialise a model with: one sequence of one token."""
    return np.zeros((1, 1, self.task.input_dim), np.float32) if self.task.continuous else np.zeros((1, 1), np.int32)

  tokenizer_digest = None

  def check_tokenizer(self, digest: None) -> None:
    """Does nothing: a task has no tokenizer."""

  def check_model(self, model: Any) -> None:
    """Raises `ValueError` if `model` does not fit the task's tokens or vectors."""
    from ...zoo.language_model import VectorModel

    if self.task.continuous:
      dims = (self.task.input_dim, self.task.output_dim)
      if not isinstance(model, VectorModel) or (model.input_dim, model.output_dim) != dims:
        raise ValueError(
          f"{self.task} maps vectors to vectors; expected a VectorModel of input_dim={dims[0]} and output_dim={dims[1]}."
        )
    elif isinstance(model, VectorModel) or model.vocab_size < self.vocab_size:
      raise ValueError(
        f"LanguageModel.vocab_size is {model.vocab_size}; expected at least {self.vocab_size}, the number of tokens of "
        f"{self.task}."
      )
    check_documents(model, self.task.training().documents, "choose a task with fewer examples in a row")

  def encode(self, text: str) -> list[int]:
    """Raises `ValueError`: a task is not made of text."""
    raise ValueError(f"{self.task} is not made of text; expected a run on text to generate from.")

  encode_prompt = encode

  def load(self, report: Callable[[int, int], None] | None = None) -> "TaskCorpus":
    """The corpus of the task's examples. It reads no file, so there is nothing to report."""
    del report
    return TaskCorpus(self)


@dataclass(frozen=True)
class TaskCorpus:
  """The examples of a `TaskData`, with the interface of `memzoo.train.data.Corpus`."""

  data: TaskData

  @property
  def measure(self) -> str:
    """The unit of a reported loss."""
    return "squared_error" if self.data.task.continuous else "bits_per_answer"

  def measured(self, loss: float, validation: bool = False) -> float:
    """Converts a loss: nats per answer to bits; a squared error stays as it is."""
    return loss if self.data.task.continuous else loss / math.log(2)

  def baselines(self, batches: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """The loss without memory: a squared error, or bits if the answers to guess from are equally likely."""
    chance = self.data.task.training().chance
    return {"without memory": chance if self.data.task.continuous else -math.log2(chance)}

  @property
  def fingerprint(self) -> str:
    """A digest of everything that determines the examples."""
    return hashlib.blake2b(f"{self.data.task} {self.data.seed}".encode(), digest_size=16).hexdigest()

  def summary(self, steps: int) -> str:
    """One line about the task."""
    task = self.data.task.training()
    return f"{self.data.task}: {steps * self.data.batch_size:,} examples of {task.length} tokens, none repeated."

  @cached_property
  def batch_on_device(self) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """A jitted function from a batch's number to the batch."""
    task, size, seed = self.data.task.training(), self.data.batch_size, self.data.seed
    return jax.jit(lambda number: as_batch(task.batch(jax.random.fold_in(new_key(seed), number), size)))

  def batch(self, number: int) -> dict[str, np.ndarray]:
    """The whole batch of a number, on the host."""
    return jax.device_get(self.batch_on_device(np.uint32(number)))

  def batches(self, share: int = 0, shares: int = 1) -> "TaskBatches":
    """An endless iterator over training batches; see `Corpus.batches`."""
    return TaskBatches(self, partial(_rows, share=share, shares=shares))

  def validation_batches(self, count: int) -> list[dict[str, np.ndarray]]:
    """At most `count` batches that no training step uses; 0 means `validation_batches`."""
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
    """The position, to be saved."""
    return {"next": self._next}

  def set_state(self, state: dict[str, int]) -> None:
    """Restores a position."""
    self._next = state["next"]


def as_batch(example: Example) -> dict[str, Any]:
  """The fields of a batch of examples that a training step takes."""
  return {name: getattr(example, name) for name in ("tokens", "targets", "weights", "segment_ids")}


def _rows(batch: dict[str, np.ndarray], share: int, shares: int) -> dict[str, np.ndarray]:
  return {name: rows[share::shares] for name, rows in batch.items()}
