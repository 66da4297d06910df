"""Chains of assignments: find the number that a name stands for."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .task import Example, Task, distinct, require, sequence


@dataclass(frozen=True)
class VariableTracking(Task):
  """Variable tracking (RULER, Hsieh et al. 2024, arXiv:2404.06654): follow a chain of assignments to its number.

      x = 7   y = x   u = 3   z = y ...   then each name once:   z -> 7   u -> 3   x -> 7

  An assignment is three tokens: a new name, "=", and a number or an earlier name. A chain is a number and the names that stand
  for it, each defined by the one before. Different chains have different numbers, and their assignments are interleaved at
  random. RULER asks which names have a given number, in sentences; here each name is asked for its number.

  Attributes:
    hops: names from one to the next in a chain; a chain has one more name, which is given the number itself.
    chains: number of chains.
    vocabulary: number of tokens; half are names, half are numbers; "=" is one more token.
  """

  grows: ClassVar[str] = "hops"

  hops: int = 2
  chains: int = 4
  vocabulary: int = 64

  def __post_init__(self):
    require(self, "hops of at least 0 and at least one chain", self.hops >= 0 and self.chains >= 1)
    fewest = 2 * self._names
    require(self, f"an even vocabulary of at least {fewest}", self.vocabulary % 2 == 0 and self.vocabulary >= fewest)

  @property
  def _names(self) -> int:
    return self.chains * (self.hops + 1)

  @property
  def length(self) -> int:
    return 4 * self._names

  @property
  def vocab_size(self) -> int:
    return self.vocabulary + 1

  @property
  def chance(self) -> float:
    """For guessing the number of a chain; all chains have equally many names."""
    return 1 / self.chains

  @property
  def kinds(self) -> tuple[str, ...]:
    return tuple(f"{hops} hop{'s' * (hops != 1)}" for hops in range(self.hops + 1))

  def example(self, key: jax.Array) -> Example:
    for_names, for_numbers, for_order, for_queries = jax.random.split(key, 4)
    half, total = self.vocabulary // 2, self._names
    names = distinct(for_names, total, 0, half).reshape(self.chains, -1)
    numbers = distinct(for_numbers, self.chains, half, self.vocabulary)
    sources = jnp.concatenate([numbers[:, None], names[:, :-1]], axis=1)
    chain = jax.random.permutation(for_order, total) % self.chains
    hop = jnp.zeros(total, jnp.int32)
    for i in range(self.chains):  # the assignments of a chain keep their order
      hop = jnp.where(chain == i, jnp.cumsum(chain == i) - 1, hop)
    equals = jnp.full(total, self.vocabulary)
    assignments = jnp.stack([names[chain, hop], equals, sources[chain, hop]], axis=1).ravel()
    queries = jax.random.permutation(for_queries, total)
    before = jnp.zeros_like(assignments)
    return sequence(
      jnp.concatenate([assignments, names[chain, hop][queries]]),
      jnp.concatenate([before, numbers[chain][queries]]),
      jnp.arange(self.length) >= 3 * total,
      jnp.concatenate([before, hop[queries]]),
    )

  def solve(self, example: Example) -> np.ndarray:
    tokens, total = np.asarray(example.tokens).tolist(), self._names
    assigned = dict(zip(tokens[: 3 * total : 3], tokens[2 : 3 * total : 3], strict=True))
    answers = tokens[3 * total :]
    while any(answer in assigned for answer in answers):
      answers = [assigned.get(answer, answer) for answer in answers]
    return np.array([0] * 3 * total + answers)

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    sources = np.asarray(example.tokens)[2 : 3 * self._names : 3]
    return random.choice(sources[sources >= self.vocabulary // 2], self.length)

  def tests(self) -> dict[str, Task]:
    """Chains of no hop up to this number, and of one more if there are names enough."""
    most = min(self.hops + 1, self.vocabulary // 2 // self.chains - 1)
    return {str(hops): replace(self, hops=hops) for hops in range(most + 1)}
