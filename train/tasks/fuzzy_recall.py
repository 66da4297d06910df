"""Recall of pairs whose keys and values have several tokens each."""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .task import Example, Task, require, sequence


@dataclass(frozen=True)
class FuzzyRecall(Task):
  """Fuzzy recall (MAD, Poli et al. 2024, arXiv:2403.17844): keys and values of one to three tokens each, without marks between.

      a b X   a X Y   c Z Z Y ...   then each pair once:   c -> Z -> Z -> Y   a -> X -> Y   a b -> X

  Keys are made of tokens from the lower half of the vocabulary, values of tokens from the upper half. Keys differ as a whole:
  one may be the beginning or the end of another. Asked are all tokens of the values of the second part, in which the tokens
  before the one that is asked for are in the sequence. All lengths occur equally often, or nearly, so all examples are
  equally long. MAD asks for one pair, or for each pair that was there before.

  Attributes:
    pairs: number of pairs to remember.
    longest: tokens of the longest keys and values.
    vocabulary: number of tokens; half are for keys, half for values.
  """

  grows: ClassVar[str] = "pairs"

  pairs: int = 6
  longest: int = 3
  vocabulary: int = 32

  def __post_init__(self):
    require(self, "a longest key of at least 1 token and at most `pairs`", 1 <= self.longest <= self.pairs)
    fewest = 2 * max(2, self._lengths.count(1))  # so that there are enough different keys of one token
    require(self, f"an even vocabulary of at least {fewest}", self.vocabulary % 2 == 0 and self.vocabulary >= fewest)
    require(self, "fewer than 2^31 different keys of a length", (self.vocabulary // 2) ** self.longest < 2**31)

  @property
  def _lengths(self) -> list[int]:
    return [i % self.longest + 1 for i in range(self.pairs)]

  @property
  def length(self) -> int:
    return 4 * sum(self._lengths)

  @property
  def vocab_size(self) -> int:
    return self.vocabulary

  @property
  def chance(self) -> float:
    """For guessing one of the tokens of all values: the one that is asked for, or any other, which may be equal to it."""
    this = 1 / sum(self._lengths)
    return this + (1 - this) / (self.vocabulary // 2)

  @property
  def kinds(self) -> tuple[str, ...]:
    return tuple(f"token {i + 1} of a value" for i in range(self.longest))

  def example(self, key: jax.Array) -> Example:
    for_keys, for_values, for_lengths, for_order, for_queries = jax.random.split(key, 5)
    half, lengths = self.vocabulary // 2, jnp.array(self._lengths)
    keys = self._keys(for_keys)
    values = jax.random.randint(for_values, keys.shape, half, self.vocabulary)
    value_lengths = jax.random.permutation(for_lengths, lengths)
    pairs = jnp.concatenate([keys, values], axis=1)
    place = jnp.arange(self.longest)[None]
    exists = jnp.concatenate([place < lengths[:, None], place < value_lengths[:, None]], axis=1)
    orders = jnp.concatenate([jax.random.permutation(each, self.pairs) for each in (for_order, for_queries)])
    kept = jnp.argsort(~exists[orders].ravel(), stable=True)[: self.length]  # where the tokens are; their order stays
    tokens = pairs[orders].ravel()[kept]
    after, place = jnp.roll(tokens, -1), jnp.roll(kept % self.longest, -1)
    asked = (jnp.arange(self.length) >= self.length // 2) & (after >= half)
    return sequence(tokens, jnp.where(asked, after, 0), asked, jnp.where(asked, place, 0))

  def _keys(self, key: jax.Array) -> jax.Array:
    """Different keys, [pairs, longest]; those of a length differ within it."""
    half, rows = self.vocabulary // 2, jnp.zeros((self.pairs, self.longest), jnp.int32)
    for length in range(1, self.longest + 1):
      which = np.arange(length - 1, self.pairs, self.longest)
      numbers = _different(jax.random.fold_in(key, length), len(which), half**length)
      digits = numbers[:, None] // half ** np.arange(length)[None] % half
      rows = rows.at[which, :length].set(digits)
    return rows

  def solve(self, example: Example) -> np.ndarray:
    tokens, answers = np.asarray(example.tokens).tolist(), [0] * self.length
    runs = [tuple(run) for _, run in itertools.groupby(tokens, lambda token: token >= self.vocabulary // 2)]
    memory, end = {}, 0
    for key, value in zip(runs[::2], runs[1::2], strict=True):
      end += len(key)
      known = memory.setdefault(key, value)
      answers[end - 1 : end - 1 + len(known)] = known
      end += len(value)
    return np.array(answers)

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    tokens = np.asarray(example.tokens)[: self.length // 2]
    return random.choice(tokens[tokens >= self.vocabulary // 2], self.length)

  def tests(self) -> dict[str, Task]:
    """Half as many pairs, this number, and twice as many, within what the lengths and the vocabulary allow."""
    most = self.longest * (self.vocabulary // 2)  # beyond it there are too few different keys of one token
    counts = sorted({max(self.longest, self.pairs // 2), self.pairs, min(most, 2 * self.pairs)})
    return {str(pairs): replace(self, pairs=pairs) for pairs in counts}


def _different(key: jax.Array, count: int, size: int) -> jax.Array:
  """`count` different integers below `size`, int32: Floyd's method, which makes no list of all integers."""
  numbers = jnp.full(count, -1, jnp.int32)
  for i, each in enumerate(jax.random.split(key, count)):
    last = size - count + i
    number = jax.random.randint(each, (), 0, last + 1)
    numbers = numbers.at[i].set(jnp.where((numbers == number).any(), last, number))
  return numbers
