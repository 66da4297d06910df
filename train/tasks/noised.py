"""Any task with noise between its tokens."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .recall import MultiQueryRecall
from .task import Example, Task, require

_RECALL = MultiQueryRecall()


@dataclass(frozen=True)
class Noised(Task):
  """A task with noise between its tokens: MAD's noisy recall and selective copying (Poli et al. 2024, arXiv:2403.17844).

      k v ~ j w ~ ~ ... k ~ ...   ->   the answers of the task, at the same tokens as without the noise

  Noise tokens are random tokens that the task does not have. They are put at random places between the tokens of the task, also
  between a key and its value, where MAD has none; the task's tokens keep their order and their answers. Noise says nothing, and
  no written value is wrong: wrong values are in `NoisyRecall`.

  Attributes:
    task: the task; its inputs are tokens.
    share: share of noise among the tokens of an example.
    noise_vocabulary: number of different noise tokens, which follow those of the task.
  """

  grows: ClassVar[str] = "noise"

  task: Task = _RECALL
  share: float = 0.2
  noise_vocabulary: int = 16

  def __post_init__(self):
    require(self, "a task whose inputs are tokens", not self.task.continuous)
    require(self, "a share from 0 to less than 1", 0 <= self.share < 1)
    require(self, "a noise_vocabulary of at least 1", self.noise_vocabulary >= 1)

  @property
  def length(self) -> int:
    return round(self.task.length / (1 - self.share))

  @property
  def vocab_size(self) -> int:
    return self.task.vocab_size + self.noise_vocabulary

  @property
  def chance(self) -> float:
    return self.task.chance

  @property
  def documents(self) -> int:
    return self.task.documents

  @property
  def kinds(self) -> tuple[str, ...]:
    return self.task.kinds

  def example(self, key: jax.Array) -> Example:
    for_task, for_places, for_noise = jax.random.split(key, 3)
    plain = self.task.example(for_task)
    is_noise = jax.random.permutation(for_places, jnp.arange(self.length) >= self.task.length)
    # The token of the task at each place or before it; noise at the beginning belongs to the first document.
    which = jnp.maximum(jnp.cumsum(~is_noise) - 1, 0)
    first = self.task.vocab_size
    noise = jax.random.randint(for_noise, (self.length,), first, first + self.noise_vocabulary)
    spread = Example(*(field[which] for field in plain))
    return spread._replace(
      tokens=jnp.where(is_noise, noise, spread.tokens),
      targets=jnp.where(is_noise, 0, spread.targets),
      weights=jnp.where(is_noise, 0.0, spread.weights),
    )

  def _without_noise(self, example: Example) -> tuple[np.ndarray, Example]:
    """The places of the task's tokens, and the task's example."""
    places = np.flatnonzero(np.asarray(example.tokens) < self.task.vocab_size)
    return places, Example(*(np.asarray(field)[places] for field in example))

  def _with_noise(self, places: np.ndarray, answers: np.ndarray) -> np.ndarray:
    spread = np.zeros(self.length, answers.dtype)
    spread[places] = answers
    return spread

  def solve(self, example: Example) -> np.ndarray:
    places, plain = self._without_noise(example)
    return self._with_noise(places, self.task.solve(plain))

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    places, plain = self._without_noise(example)
    return self._with_noise(places, self.task.guess(plain, random))

  def training(self) -> Task:
    """The task's own training examples, with this share of noise."""
    return replace(self, task=self.task.training())

  def tests(self) -> dict[str, Task]:
    """Increasing shares of noise, from none to half of what lies between this share and noise alone."""
    shares = sorted({0.0, self.share, (1 + self.share) / 2})
    return {f"{share:.0%}": replace(self, share=share) for share in shares}
