"""Find the one token that two lists share."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .task import Example, Mixture, Task, distinct, require, sequence


@dataclass(frozen=True)
class SetDisjointness(Task):
  """Set disjointness (Arora et al. 2024, arXiv:2407.05483): find the one element that two lists share.

      [1] a b c [2] d b e f g [3]   ->   b

  All other elements of both lists are different. A memory must hold the whole first list, so the task is easier when the
  shorter list comes first.

  Attributes:
    first, second: number of elements of each list.
    vocabulary: number of tokens, including 0 (unused) and the three markers.
  """

  grows: ClassVar[str] = "elements of the first list, of the second"

  first: int = 4
  second: int = 16
  vocabulary: int = 2048

  def __post_init__(self):
    require(self, "at least one element in each list", min(self.first, self.second) >= 1)
    fewest = self.first + self.second + 3
    require(self, f"a vocabulary of at least {fewest}", self.vocabulary >= fewest)

  @property
  def length(self) -> int:
    return self.first + self.second + 3

  @property
  def vocab_size(self) -> int:
    return self.vocabulary

  @property
  def chance(self) -> float:
    return 1 / min(self.first, self.second)

  def example(self, key: jax.Array) -> Example:
    for_elements, for_place = jax.random.split(key)
    elements = distinct(for_elements, self.first + self.second - 1, 4, self.vocabulary)
    first, rest = elements[: self.first], elements[self.first :]
    common = first[0]
    for_first, for_second = jax.random.split(for_place)
    second = jax.random.permutation(for_second, jnp.append(rest, common))
    tokens = jnp.concatenate([
      jnp.array([1]), jax.random.permutation(for_first, first), jnp.array([2]), second, jnp.array([3])
    ])
    last = jnp.arange(self.length) == self.length - 1
    return sequence(tokens, jnp.where(last, common, 0), last)

  def _lists(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.asarray(example.tokens)
    return tokens[1 : self.first + 1], tokens[self.first + 2 : -1]

  def solve(self, example: Example) -> np.ndarray:
    (common,) = set(self._lists(example)[0].tolist()) & set(self._lists(example)[1].tolist())
    return np.full(self.length, common)

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return np.full(self.length, random.choice(min(self._lists(example), key=len)))

  def training(self) -> Task:
    """Both orders in equal numbers; both have the same length."""
    if self.first == self.second:
      return self
    return Mixture((self, replace(self, first=self.second, second=self.first)), (1, 1))

  def tests(self) -> dict[str, Task]:
    """Both orders, with the longer list at half, once and twice its length."""
    short, long = sorted((self.first, self.second))
    lengths = dict.fromkeys(min(longer, self.vocabulary - short - 3) for longer in (max(short, long // 2), long, 2 * long))
    orders = [order for longer in lengths for order in dict.fromkeys(((short, longer), (longer, short)))]
    return {f"{first}, {second}": replace(self, first=first, second=second) for first, second in orders}
