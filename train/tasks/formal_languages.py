"""Formal languages: words a^n b^n, and brackets of several kinds that are interleaved."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .state_tracking import eighth, positions
from .task import Example, Task, multiples, require, sequence

_A, _B, _END = range(3)


@dataclass(frozen=True)
class EqualCounts(Task):
  """The language a^n b^n (Deletang et al. 2022, arXiv:2207.02098; Hope, arXiv:2512.24695): as many b as there were a.

      a a a b b b ; a b ; a a b b ; ...   ->   after each b: another b, or the end ";" of the word

  Only what is determined is asked: the token after each b. Words come in pairs of lengths n and longest + 1 - n, with n from 1
  to `longest` at random, in random order, so all examples are equally long and every n is equally likely.

  Attributes:
    words: number of words; even.
    longest: greatest number of a in a word; tests have up to four times as many.
  """

  grows: ClassVar[str] = "a in the longest word"

  words: int = 8
  longest: int = 6

  def __post_init__(self):
    require(self, "an even number of words, at least 2", self.words >= 2 and self.words % 2 == 0)
    require(self, "a longest word of at least 2 a", self.longest >= 2)

  @property
  def length(self) -> int:
    return self.words * (self.longest + 2)  # a pair of words has longest + 1 a, as many b, and two ends

  @property
  def vocab_size(self) -> int:
    return 3

  @property
  def chance(self) -> float:
    """For always giving the likelier answer: b, or the end if no word has more than 3 b."""
    b = self.words * (self.longest + 1) // 2
    return max(self.words, b - self.words) / b

  @property
  def kinds(self) -> tuple[str, ...]:
    return ("b", "end")

  def example(self, key: jax.Array) -> Example:
    for_lengths, for_order = jax.random.split(key)
    n = jax.random.randint(for_lengths, (self.words // 2,), 1, self.longest + 1)
    n = jax.random.permutation(for_order, jnp.concatenate([n, self.longest + 1 - n]))
    runs = jnp.stack([n, n, jnp.ones_like(n)], axis=1).ravel()
    letters = jnp.tile(jnp.array([_A, _B, _END]), self.words)
    tokens = jnp.repeat(letters, runs, total_repeat_length=self.length)
    after = jnp.roll(tokens, -1)
    asked = tokens == _B
    return sequence(tokens, jnp.where(asked, after, 0), asked, asked & (after == _END))

  def solve(self, example: Example) -> np.ndarray:
    a = b = 0
    answers = []
    for token in np.asarray(example.tokens):
      a, b = (0, 0) if token == _END else (a + (token == _A), b + (token == _B))
      answers.append(_END if a == b else _B)
    return np.array(answers)

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return np.full(self.length, _B if self.longest > 3 else _END)

  def tests(self) -> dict[str, Task]:
    """Words of up to four times as many a."""
    return multiples(self, "longest", (1, 2, 4))


@dataclass(frozen=True)
class Shuffle(Task):
  """Brackets of several kinds, interleaved: after each bracket, say which kinds are open.

      ( [ ( ) ] { ) ...   ->   {(}  {( [}  {( [}  {( [}  {(}  {( {}  {{} ...

  Brackets of a kind are matched among themselves, whatever lies between them: the shuffle of Dyck languages (Deletang et al.
  2022, arXiv:2207.02098; Hope, arXiv:2512.24695). A memory needs a counter for each kind. The answer is a number whose bit i is
  1 if kind i is open. Each bracket is drawn at random from those that are possible: one that closes an open bracket, or one
  that opens another if fewer than `deepest` of its kind are open.

  Attributes:
    brackets: kinds of brackets, k; there are 2^k answers.
    deepest: the most brackets of a kind that are open at a time.
    tokens: length of the example; tests are up to four times as long.
  """

  brackets: int = 3
  deepest: int = 3
  tokens: int = 48

  def __post_init__(self):
    require(self, "1 to 6 kinds of brackets", 1 <= self.brackets <= 6)
    require(self, "deepest of at least 1 and tokens of at least 1", min(self.deepest, self.tokens) >= 1)
    states = (self.deepest + 1) ** self.brackets
    require(self, "at most 10,000 states, (deepest + 1)^brackets", states <= 10_000)

  @property
  def length(self) -> int:
    return self.tokens

  @property
  def vocab_size(self) -> int:
    return max(2 * self.brackets, 2**self.brackets)

  @property
  def chance(self) -> float:
    """For the likeliest answer after the last token, over all positions."""
    return float(_answers(self).max(axis=1).sum())

  @property
  def kinds(self) -> tuple[str, ...]:
    return positions(self.tokens)

  def example(self, key: jax.Array) -> Example:
    def add(depth, key):
      possible = jnp.concatenate([depth < self.deepest, depth > 0])
      token = jax.random.categorical(key, jnp.where(possible, 0.0, -jnp.inf))
      depth = depth.at[token % self.brackets].add(jnp.where(token < self.brackets, 1, -1))
      return depth, (token, jnp.sum(jnp.where(depth > 0, 2 ** jnp.arange(self.brackets), 0)))

    _, (tokens, answers) = jax.lax.scan(add, jnp.zeros(self.brackets, jnp.int32), jax.random.split(key, self.tokens))
    return sequence(tokens, answers, jnp.ones(self.tokens), eighth(self.tokens))

  def solve(self, example: Example) -> np.ndarray:
    tokens, answers = np.asarray(example.tokens).tolist(), []
    for i in range(self.tokens):
      read = tokens[: i + 1]
      depths = [read.count(kind) - read.count(kind + self.brackets) for kind in range(self.brackets)]
      answers.append(sum(2**kind for kind, depth in enumerate(depths) if depth > 0))
    return np.array(answers)

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return _answers(self).argmax(axis=1)[np.asarray(example.tokens)]

  def tests(self) -> dict[str, Task]:
    """Up to four times as many tokens."""
    return multiples(self, "tokens", (1, 2, 4))


@lru_cache
def _answers(task: Shuffle) -> np.ndarray:
  """The probability [2 * brackets, 2^brackets] of a token together with the answer after it, mean over positions.

  It is computed exactly, from the probabilities of all depths: an array with an axis for each kind.
  """
  k, size = task.brackets, task.deepest + 1
  depths = np.indices((size,) * k)
  moves = np.sum((depths < task.deepest).astype(int) + (depths > 0), axis=0)  # how many brackets are possible
  answer = np.sum([2**kind * (depths[kind] > 0) for kind in range(k)], axis=0)
  state, found = np.zeros((size,) * k), np.zeros((2 * k, 2**k))
  state[(0,) * k] = 1
  for _ in range(task.tokens):
    share, state = state / moves, np.zeros_like(state)
    for token in range(2 * k):
      step, kind = (1, token) if token < k else (-1, token - k)
      moved = np.where(depths[kind] == (0 if step == 1 else task.deepest), 0, np.roll(share, step, axis=kind))
      np.add.at(found[token], answer, moved / task.tokens)
      state += moved
  return found
