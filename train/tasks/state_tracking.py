"""Tracking a state that every token changes: products in a group, and things that swap places."""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .task import Example, Task, multiples, require, sequence

GROUPS = ("parity", "S3", "S4", "A5", "S5")
_EIGHTHS = 8


@lru_cache
def permutations(group: str) -> np.ndarray:
  """The elements of a group as permutations, [order, n]; element 0 is the identity."""
  size = {"parity": 2, "S3": 3, "S4": 4, "A5": 5, "S5": 5}[group]
  every = np.array(list(itertools.permutations(range(size))))
  return every if group != "A5" else every[[_is_even(element) for element in every]]


def _is_even(permutation: np.ndarray) -> bool:
  return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


@lru_cache
def multiplication(group: str) -> np.ndarray:
  """int32 [order, order]: `table[a, b]` is the product a b, which applies b first."""
  elements = permutations(group)
  number = {tuple(element): i for i, element in enumerate(elements)}
  return np.array([[number[tuple(a[b])] for b in elements] for a in elements], np.int32)


@dataclass(frozen=True)
class WordProblem(Task):
  """The word problem of a group (Merrill et al. 2024, arXiv:2404.08819): give the product so far after each element.

      g_1 g_2 g_3 ...   ->   g_1,  g_2 g_1,  g_3 g_2 g_1, ...

  "parity" has two elements; S3, S4 and S5 have all permutations; A5 has the 60 even permutations of five. A5 and S5 are not
  solvable: models of constant parallel depth (attention, diagonal memories) cannot track them at every length.

  Attributes:
    group: one of `GROUPS`.
    tokens: length of the example; tests are up to four times as long.
  """

  group: str = "S3"
  tokens: int = 128

  def __post_init__(self):
    require(self, f"one of the groups {', '.join(GROUPS)}", self.group in GROUPS)
    require(self, "at least one token", self.tokens >= 1)

  @property
  def length(self) -> int:
    return self.tokens

  @property
  def vocab_size(self) -> int:
    return len(permutations(self.group))

  @property
  def chance(self) -> float:
    """For guessing an element, except at the first token, which is its own answer."""
    return 1 / self.vocab_size + (1 - 1 / self.vocab_size) / self.tokens

  @property
  def kinds(self) -> tuple[str, ...]:
    return positions(self.tokens)

  def example(self, key: jax.Array) -> Example:
    table = jnp.asarray(multiplication(self.group))
    tokens = jax.random.randint(key, (self.tokens,), 0, self.vocab_size)
    products = jax.lax.associative_scan(lambda before, after: table[after, before], tokens)
    return sequence(tokens, products, jnp.ones(self.tokens), eighth(self.tokens))

  def solve(self, example: Example) -> np.ndarray:
    elements = permutations(self.group).tolist()
    state, answers = list(range(len(elements[0]))), []
    for token in np.asarray(example.tokens):
      state = [elements[int(token)][place] for place in state]
      answers.append(elements.index(state))
    return np.array(answers)

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    answers = random.integers(0, self.vocab_size, self.tokens)
    answers[0] = example.tokens[0]
    return answers

  def tests(self) -> dict[str, Task]:
    """Up to four times as many tokens."""
    return multiples(self, "tokens", (1, 2, 4))


@dataclass(frozen=True)
class Swaps(Task):
  """Things that swap places: after each swap, say which thing lies at a third place.

      a b ?c   a' b' ?c' ...   ->   what lies at c, at c', ...

  At first, place i holds thing i. A step has three tokens: the two places, which may be equal, and the requested place; each
  of the three roles has its own tokens.

  Attributes:
    places: number of places, and of things.
    swaps: number of swaps; tests have up to four times as many.
  """

  grows: ClassVar[str] = "swaps"

  places: int = 5
  swaps: int = 32

  def __post_init__(self):
    require(self, "at least 2 places", self.places >= 2)
    require(self, "at least one swap", self.swaps >= 1)

  @property
  def length(self) -> int:
    return 3 * self.swaps

  @property
  def vocab_size(self) -> int:
    return 3 * self.places

  @property
  def chance(self) -> float:
    """For guessing that a thing never moved, which is right more often after few swaps."""
    kept = 1 - 2 * (self.places - 1) / self.places**2  # probability that a swap does not touch a given place
    back = (1 - kept) / (self.places - 1)
    ratio = kept - back
    home = 1 / self.places + (1 - 1 / self.places) * ratio * (1 - ratio**self.swaps) / (1 - ratio) / self.swaps
    return home

  @property
  def kinds(self) -> tuple[str, ...]:
    return positions(self.swaps)

  def example(self, key: jax.Array) -> Example:
    steps = jax.random.randint(key, (self.swaps, 3), 0, self.places)

    def swap(things, step):
      first, second, asked = step
      things = things.at[first].set(things[second]).at[second].set(things[first])
      return things, things[asked]

    _, answers = jax.lax.scan(swap, jnp.arange(self.places), steps)
    tokens = (steps + self.places * jnp.arange(3)[None]).ravel()
    asked = jnp.arange(self.length) % 3 == 2
    return sequence(tokens, jnp.where(asked, jnp.repeat(answers, 3), 0), asked, jnp.repeat(eighth(self.swaps), 3))

  def solve(self, example: Example) -> np.ndarray:
    things, answers = list(range(self.places)), []
    for first, second, asked in np.asarray(example.tokens).reshape(-1, 3) % self.places:
      things[first], things[second] = things[second], things[first]
      answers += [0, 0, things[asked]]
    return np.array(answers)

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return np.asarray(example.tokens) % self.places

  def tests(self) -> dict[str, Task]:
    """Up to four times as many swaps."""
    return multiples(self, "swaps", (1, 2, 4))


def eighth(length: int) -> jax.Array:
  """The eighth of the sequence that each position is in, int32 [length]; with fewer than 8 positions, the position itself."""
  return jnp.arange(length) * min(_EIGHTHS, length) // length


def positions(length: int) -> tuple[str, ...]:
  """Names of the eighths: the last position of each, counted from 1."""
  count = min(_EIGHTHS, length)
  return tuple(f"to {math.ceil((i + 1) * length / count)}" for i in range(count))
