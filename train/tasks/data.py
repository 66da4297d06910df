"""A task as the data of a run."""

from dataclasses import dataclass
from typing import Any

from .task import Example, Task


@dataclass(frozen=True)
class TaskData:
  """Examples of a task to train on, made as they are needed and never twice.

  Attributes:
    task: one of `memzoo.train.tasks`; its `training()` is what is trained on.
    batch_size: examples in a batch.
    seed: of the examples.
  """

  task: Task
  batch_size: int = 32
  seed: int = 0

  def __post_init__(self):
    if self.batch_size < 1:
      raise ValueError(f"TaskData.batch_size is {self.batch_size}; want at least 1.")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"TaskData.seed is {self.seed}; want 0 or more, and less than 2**32.")

  @property
  def vocab_size(self) -> int:
    """Number of tokens that the task is made of; a model's `vocab_size` must be at least this."""
    return self.task.vocab_size

  @property
  def sequence_length(self) -> int:
    """Tokens in an example."""
    return self.task.training().length


def as_batch(example: Example) -> dict[str, Any]:
  """What a training step takes, of a batch of examples."""
  return {name: getattr(example, name) for name in ("tokens", "targets", "weights", "segment_ids")}
