"""Copying what was scattered, and going on as it went on before."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from .task import Example, Task, sequence, want


@dataclass(frozen=True)
class SelectiveCopying(Task):
  """Selective copying (Gu & Dao 2023, arXiv:2312.00752): tokens scattered among blanks, to be given back in order.

      . . a . b . . . c . ? ? ?   ->   a b c   at the question marks

  Attributes:
    tokens: among which the data is scattered.
    data: tokens to copy.
    vocabulary: of the data; the blank and the question mark are two tokens more.
  """

  tokens: int = 128
  data: int = 16
  vocabulary: int = 16

  def __post_init__(self):
    want(self, "data of at least one token, and no more than there are tokens", 1 <= self.data <= self.tokens)
    want(self, "a vocabulary of at least 2", self.vocabulary >= 2)

  @property
  def length(self) -> int:
    return self.tokens + self.data

  @property
  def vocab_size(self) -> int:
    return self.vocabulary + 2

  @property
  def chance(self) -> float:
    return 1 / self.vocabulary

  def example(self, key: jax.Array) -> Example:
    for_data, for_places = jax.random.split(key)
    blank, question = self.vocabulary, self.vocabulary + 1
    data = jax.random.randint(for_data, (self.data,), 0, self.vocabulary)
    places = jnp.sort(jax.random.choice(for_places, self.tokens, (self.data,), replace=False))
    scattered = jnp.full(self.tokens, blank).at[places].set(data)
    return sequence(
      jnp.concatenate([scattered, jnp.full(self.data, question)]),
      jnp.concatenate([jnp.zeros(self.tokens, jnp.int32), data]),
      jnp.arange(self.length) >= self.tokens,
    )

  def solve(self, example: Example) -> np.ndarray:
    tokens = np.asarray(example.tokens)[: self.tokens]
    return np.concatenate([np.zeros(self.tokens, int), tokens[tokens != self.vocabulary]])

  def guess(self, example: Example, chance: np.random.Generator) -> np.ndarray:
    return chance.integers(0, self.vocabulary, self.length)

  def tests(self) -> dict[str, Task]:
    """Scattered over more and more tokens, up to four times these."""
    return {str(factor * self.tokens): replace(self, tokens=factor * self.tokens) for factor in (1, 2, 4)}


@dataclass(frozen=True)
class Induction(Task):
  """Induction heads (Olsson et al. 2022, arXiv:2209.11895), in the form of arXiv:2312.00752: what followed the sign before?

      . . . ! x . . . . . . !   ->   x

  Attributes:
    tokens: of the example.
    vocabulary: of what is not the sign.
  """

  tokens: int = 128
  vocabulary: int = 16

  def __post_init__(self):
    want(self, "at least 3 tokens", self.tokens >= 3)
    want(self, "a vocabulary of at least 2", self.vocabulary >= 2)

  @property
  def length(self) -> int:
    return self.tokens

  @property
  def vocab_size(self) -> int:
    return self.vocabulary + 1

  @property
  def chance(self) -> float:
    return 1 / self.vocabulary

  def example(self, key: jax.Array) -> Example:
    for_tokens, for_place = jax.random.split(key)
    tokens = jax.random.randint(for_tokens, (self.tokens,), 0, self.vocabulary)
    place = jax.random.randint(for_place, (), 0, self.tokens - 2)
    tokens = tokens.at[place].set(self.vocabulary).at[-1].set(self.vocabulary)
    last = jnp.arange(self.tokens) == self.tokens - 1
    return sequence(tokens, jnp.where(last, tokens[place + 1], 0), last)

  def solve(self, example: Example) -> np.ndarray:
    tokens = np.asarray(example.tokens)
    return np.full(self.tokens, tokens[np.flatnonzero(tokens == self.vocabulary)[0] + 1])

  def guess(self, example: Example, chance: np.random.Generator) -> np.ndarray:
    return chance.integers(0, self.vocabulary, self.length)

  def tests(self) -> dict[str, Task]:
    """Longer and longer, up to eight times these."""
    return {str(factor * self.tokens): replace(self, tokens=factor * self.tokens) for factor in (1, 2, 4, 8)}
