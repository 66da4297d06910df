"""The base of all memory tasks: sequences made from random keys, in which some positions ask about earlier ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..keys import new_key


class Example(NamedTuple):
  """One sequence, or a batch of them with a leading axis.

  Attributes:
    tokens: int32 [T]; float32 [T, input_dim] for continuous tasks.
    targets: the right answer at each position, int32 [T]; float32 [T, output_dim] for continuous tasks.
    weights: float32 [T]; 1 where an answer is required, 0 elsewhere.
    segment_ids: int32 [T]; the number of the packed document, from 1; 0 is padding.
    kind: int32 [T]; the index of the answer's kind in the task's `kinds`.
  """

  tokens: jax.Array
  targets: jax.Array
  weights: jax.Array
  segment_ids: jax.Array
  kind: jax.Array


@dataclass(frozen=True)
class Task:
  """A task is a frozen dataclass whose fields are its parameters; they are checked when it is made.

  `example` is a pure function of a random key with one output shape for all keys; it can be jitted and vmapped.

  Class attributes:
    continuous: inputs and answers are vectors, scored by squared error; otherwise tokens, scored as right or wrong.
    grows: the quantity that grows over `tests()`.
  """

  continuous: ClassVar[bool] = False
  grows: ClassVar[str] = "tokens"

  @property
  def length(self) -> int:
    """Number of tokens in an example."""
    raise NotImplementedError

  @property
  def vocab_size(self) -> int:
    """Number of different tokens in examples and answers."""
    raise NotImplementedError

  @property
  def chance(self) -> float:
    """The expected share of right answers of `guess`, which knows the rules and the last token but nothing else."""
    raise NotImplementedError

  @property
  def documents(self) -> int:
    """The largest number of documents in an example."""
    return 1

  @property
  def kinds(self) -> tuple[str, ...]:
    """Names of the groups that results are divided into, such as positions or distances."""
    return ("all",)

  def example(self, key: jax.Array) -> Example:
    """The example for a random key."""
    raise NotImplementedError

  def batch(self, key: jax.Array, size: int) -> Example:
    """`size` examples, each from its own key."""
    return jax.vmap(self.example)(jax.random.split(key, size))

  def solve(self, example: Example) -> np.ndarray:
    """The answers [T] by brute force, from the example's inputs alone; arbitrary where no answer is required."""
    raise NotImplementedError

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    """Answers [T] without memory; see `chance`."""
    raise NotImplementedError

  def training(self) -> "Task":
    """The task to train on for this task and its `tests()`."""
    return self

  def tests(self) -> dict[str, "Task"]:
    """The tasks to test on, from easy to hard, keyed by the quantity that grows."""
    return {str(self.length): self}


def sequence(tokens: jax.Array, targets: jax.Array, weights: jax.Array, kind: jax.Array | int = 0) -> Example:
  """An `Example` of one document."""
  length = tokens.shape[0]
  return Example(
    tokens if jnp.issubdtype(tokens.dtype, jnp.floating) else tokens.astype(jnp.int32),
    targets if jnp.issubdtype(targets.dtype, jnp.floating) else targets.astype(jnp.int32),
    weights.astype(jnp.float32),
    jnp.ones(length, jnp.int32),
    jnp.broadcast_to(jnp.asarray(kind, jnp.int32), (length,)),
  )


def require(task: Task, expected: str, condition: bool) -> None:
  """Raises a `ValueError` with the task and what is expected, unless `condition` holds."""
  if not condition:
    raise ValueError(f"{task} is impossible; expected {expected}.")


def multiples(task: Task, field: str, factors: Sequence[int]) -> dict[str, Task]:
  """The task with this field multiplied by each of `factors`, keyed by the field's value."""
  values = [factor * getattr(task, field) for factor in factors]
  return {str(value): replace(task, **{field: value}) for value in values}


def distinct(key: jax.Array, count: int, first: int, end: int) -> jax.Array:
  """`count` different integers from first to end - 1, int32, in random order."""
  return jax.random.choice(key, jnp.arange(first, end, dtype=jnp.int32), (count,), replace=False)


@dataclass(frozen=True)
class Mixture(Task):
  """Rows of `row_length` tokens, each filled with examples of one of `tasks` that are packed as separate documents.

  Attributes:
    tasks: their lengths divide `row_length`.
    counts: the relative number of examples of each task.
    row_length: tokens in a row; `None` means the length of the longest task.
  """

  tasks: tuple[Task, ...] = ()
  counts: tuple[float, ...] = ()
  row_length: int | None = None

  def __post_init__(self):
    require(self, "at least one task, and a positive count for each", bool(self.tasks) and min(self.counts, default=0) > 0)
    require(self, "a count for each task", len(self.tasks) == len(self.counts))
    lengths = [task.length for task in self.tasks]
    require(self, f"a row_length that is a multiple of each of {lengths}", all(self.length % length == 0 for length in lengths))

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
    """The relative number of answers of each task, counted in 64 examples because examples of a task may differ."""
    key = new_key(0)
    asked = [float(jax.jit(lambda key, task=task: task.batch(key, 64).weights.sum())(key)) for task in self.tasks]
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
    """The examples of a packed row, each with its task."""
    task = self.tasks[int(example.kind[0])]
    bounds = range(0, self.length, task.length)
    return [(task, Example(*(field[start : start + task.length] for field in example))) for start in bounds]

  def solve(self, example: Example) -> np.ndarray:
    return np.concatenate([task.solve(part) for task, part in self._apart(example)])

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return np.concatenate([task.guess(part, random) for task, part in self._apart(example)])
