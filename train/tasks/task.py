"""What every memory task is: a seeded source of sequences, some of whose positions ask about earlier ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Example(NamedTuple):
  """One sequence, or with a leading axis a batch of them.

  Attributes:
    tokens: int32 [T]; or float32 [T, input_dim], for tasks whose inputs are continuous.
    targets: int32 [T], the answer to give at each position; or float32 [T, output_dim].
    weights: float32 [T]; 1 where an answer is asked for, 0 elsewhere.
    segment_ids: int32 [T]; documents that are packed into the sequence, counted from 1; 0 is padding.
    kind: int32 [T]; which of the task's `kinds` an answer is counted under.
  """

  tokens: jax.Array
  targets: jax.Array
  weights: jax.Array
  segment_ids: jax.Array
  kind: jax.Array


@dataclass(frozen=True)
class Task:
  """A task is a frozen dataclass: its fields are its parameters, checked when it is made.

  `example` is a pure function of a random key, of one shape whatever the key, that jits and vmaps.

  Class attributes:
    continuous: inputs and answers are vectors, and the error is squared; otherwise tokens, and answers are right or not.
    grows: what it is that grows over `tests()`.
  """

  continuous: ClassVar[bool] = False
  grows: ClassVar[str] = "tokens"

  @property
  def length(self) -> int:
    """Tokens in an example."""
    raise NotImplementedError

  @property
  def vocab_size(self) -> int:
    """Tokens that examples are made of, answers included."""
    raise NotImplementedError

  @property
  def chance(self) -> float:
    """The share of answers that `guess` gets right: one who knows the rules and the last token, and remembers nothing else."""
    raise NotImplementedError

  @property
  def documents(self) -> int:
    """Documents in an example, at most."""
    return 1

  @property
  def kinds(self) -> tuple[str, ...]:
    """What results are broken down by, such as positions or distances."""
    return ("all",)

  def example(self, key: jax.Array) -> Example:
    """The example of a random key."""
    raise NotImplementedError

  def batch(self, key: jax.Array, size: int) -> Example:
    """`size` examples, each of a key of its own."""
    return jax.vmap(self.example)(jax.random.split(key, size))

  def solve(self, example: Example) -> np.ndarray:
    """The answers [T] (any where none is asked for) by brute force, from what the example shows and nothing else."""
    raise NotImplementedError

  def guess(self, example: Example, chance: np.random.Generator) -> np.ndarray:
    """Answers [T] of one who has no memory; see `chance`."""
    raise NotImplementedError

  def training(self) -> "Task":
    """The task to train on in order to be tested on this one and on `tests()`."""
    return self

  def tests(self) -> dict[str, "Task"]:
    """The tasks, easy to hard, that tell how far a memory goes; by what it is that grows."""
    return {str(self.length): self}


def sequence(tokens: jax.Array, targets: jax.Array, weights: jax.Array, kind: jax.Array | int = 0) -> Example:
  """An `Example` that is one document."""
  length = tokens.shape[0]
  return Example(
    tokens if jnp.issubdtype(tokens.dtype, jnp.floating) else tokens.astype(jnp.int32),
    targets if jnp.issubdtype(targets.dtype, jnp.floating) else targets.astype(jnp.int32),
    weights.astype(jnp.float32),
    jnp.ones(length, jnp.int32),
    jnp.broadcast_to(jnp.asarray(kind, jnp.int32), (length,)),
  )


def want(task: Task, what: str, condition: bool) -> None:
  """Raises `ValueError` with the task as it was written, and what it should be, unless `condition` holds."""
  if not condition:
    raise ValueError(f"{task} cannot be; want {what}.")


def distinct(key: jax.Array, count: int, first: int, end: int) -> jax.Array:
  """`count` different integers out of first .. end - 1, int32, in random order."""
  return jax.random.choice(key, jnp.arange(first, end, dtype=jnp.int32), (count,), replace=False)


@dataclass(frozen=True)
class Mixture(Task):
  """Rows of `row_length` tokens, each filled with examples of one of `tasks`, packed as documents of their own.

  Attributes:
    tasks: each of a length that divides `row_length`.
    counts: examples of each, relative to each other.
    row_length: tokens in a row; the longest task's unless given.
  """

  tasks: tuple[Task, ...] = ()
  counts: tuple[float, ...] = ()
  row_length: int | None = None

  def __post_init__(self):
    want(self, "at least one task, and a positive count for each", bool(self.tasks) and min(self.counts, default=0) > 0)
    want(self, "a count for each task", len(self.tasks) == len(self.counts))
    lengths = [task.length for task in self.tasks]
    want(self, f"a row_length that all of {lengths} divide", all(self.length % length == 0 for length in lengths))

  @property
  def length(self) -> int:
    return self.row_length or max(task.length for task in self.tasks)

  @property
  def vocab_size(self) -> int:
    return max(task.vocab_size for task in self.tasks)

  @property
  def kinds(self) -> tuple[str, ...]:
    return tuple(f"{type(task).__name__} of {task.length}" for task in self.tasks)

  @property
  def chance(self) -> float:
    return float(np.average([task.chance for task in self.tasks], weights=self._answers()))

  @property
  def documents(self) -> int:
    return max(self.length // task.length * task.documents for task in self.tasks)

  def _answers(self) -> np.ndarray:
    """Answers that each task asks for, relative to each other: those of an example may differ, so count some."""
    asked = [float(task.batch(jax.random.key(0), 64).weights.sum()) for task in self.tasks]
    return np.array(self.counts) * np.array(asked)

  def example(self, key: jax.Array) -> Example:
    which, contents = jax.random.split(key)
    rows = jnp.array([count * task.length for task, count in zip(self.tasks, self.counts, strict=True)], jnp.float32)
    branches = [lambda key, i=i: self._row(i, key) for i in range(len(self.tasks))]
    return jax.lax.switch(jax.random.categorical(which, jnp.log(rows)), branches, contents)

  def _row(self, number: int, key: jax.Array) -> Example:
    task = self.tasks[number]
    copies = self.length // task.length
    examples = task.batch(key, copies)
    row = Example(*(field.reshape(self.length, *field.shape[2:]) for field in examples))
    documents = 1 + jnp.arange(self.length, dtype=jnp.int32) // task.length
    return row._replace(segment_ids=documents, kind=jnp.full(self.length, number, jnp.int32))

  def _apart(self, example: Example) -> Sequence[tuple[Task, Example]]:
    """The examples that a row was packed from, each with its task."""
    task = self.tasks[int(example.kind[0])]
    bounds = range(0, self.length, task.length)
    return [(task, Example(*(field[start : start + task.length] for field in example))) for start in bounds]

  def solve(self, example: Example) -> np.ndarray:
    return np.concatenate([task.solve(part) for task, part in self._apart(example)])

  def guess(self, example: Example, chance: np.random.Generator) -> np.ndarray:
    return np.concatenate([task.guess(part, chance) for task, part in self._apart(example)])
