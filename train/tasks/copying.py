"""Copying tasks: copy scattered tokens, the token that followed a marker, or the token at a requested position."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from .state_tracking import eighth, positions
from .task import Example, Mixture, Task, multiples, require, sequence


@dataclass(frozen=True)
class SelectiveCopying(Task):
  """Selective copying (Gu & Dao 2023, arXiv:2312.00752): copy tokens that are scattered among blanks.

      . . a . b . . . c . ? ? ?   ->   a b c   at the question marks

  Attributes:
    tokens: length of the part that contains the data.
    data: number of tokens to copy.
    vocabulary: number of data tokens; the blank and the question mark are two more.
  """

  tokens: int = 128
  data: int = 16
  vocabulary: int = 16

  def __post_init__(self):
    require(self, "data of 1 to `tokens` tokens", 1 <= self.data <= self.tokens)
    require(self, "a vocabulary of at least 2", self.vocabulary >= 2)

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

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return random.integers(0, self.vocabulary, self.length)

  def tests(self) -> dict[str, Task]:
    """The same number of data tokens among up to four times as many tokens."""
    return multiples(self, "tokens", (1, 2, 4))


@dataclass(frozen=True)
class Induction(Task):
  """Induction heads (Olsson et al. 2022, arXiv:2209.11895), as in arXiv:2312.00752: repeat what followed the marker.

      . . . ! x . . . . . . !   ->   x

  Attributes:
    tokens: length of the example.
    vocabulary: number of tokens besides the marker.
  """

  tokens: int = 128
  vocabulary: int = 16

  def __post_init__(self):
    require(self, "at least 3 tokens", self.tokens >= 3)
    require(self, "a vocabulary of at least 2", self.vocabulary >= 2)

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

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return random.integers(0, self.vocabulary, self.length)

  def tests(self) -> dict[str, Task]:
    """Up to eight times as many tokens."""
    return multiples(self, "tokens", (1, 2, 4, 8))


@dataclass(frozen=True)
class Compression(Task):
  """Compression (MAD, Poli et al. 2024, arXiv:2403.17844): give any token of a list by its position.

      x_1 x_2 ... x_n   then each position once:   p_3 -> x_3   p_1 -> x_1 ...

  In MAD the model squeezes the list into one vector, that of its last token, from which an MLP decodes the token at each
  position. Here there is no such vector and no MLP: the state of the memory has to hold all tokens with their positions when
  the first question comes. Positions have tokens of their own.

  Attributes:
    tokens: length of the list, n.
    positions: number of position tokens, at least `tokens`; `None` for `tokens`.
    vocabulary: number of data tokens.
  """

  tokens: int = 16
  positions: int | None = None
  vocabulary: int = 16

  def __post_init__(self):
    require(self, "tokens of at least 1", self.tokens >= 1)
    require(self, "positions of at least `tokens`, or None", self._positions >= self.tokens)
    require(self, "a vocabulary of at least 2", self.vocabulary >= 2)

  @property
  def _positions(self) -> int:
    return self.tokens if self.positions is None else self.positions

  @property
  def length(self) -> int:
    return 2 * self.tokens

  @property
  def vocab_size(self) -> int:
    return self.vocabulary + self._positions

  @property
  def chance(self) -> float:
    return 1 / self.vocabulary

  @property
  def kinds(self) -> tuple[str, ...]:
    return positions(self.tokens)

  def example(self, key: jax.Array) -> Example:
    for_data, for_order = jax.random.split(key)
    data = jax.random.randint(for_data, (self.tokens,), 0, self.vocabulary)
    order = jax.random.permutation(for_order, self.tokens)
    before = jnp.zeros(self.tokens, jnp.int32)
    return sequence(
      jnp.concatenate([data, self.vocabulary + order]),
      jnp.concatenate([before, data[order]]),
      jnp.arange(self.length) >= self.tokens,
      jnp.concatenate([before, eighth(self.tokens)[order]]),
    )

  def solve(self, example: Example) -> np.ndarray:
    tokens = np.asarray(example.tokens).tolist()
    return np.array([0] * self.tokens + [tokens[token - self.vocabulary] for token in tokens[self.tokens :]])

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return random.integers(0, self.vocabulary, self.length)

  def _shorter(self) -> list["Compression"]:
    """The same with a quarter of the length, half, and the length, as far as they are whole numbers."""
    lengths = [self.tokens // factor for factor in (4, 2, 1) if self.tokens % factor == 0]
    return [replace(self, tokens=length, positions=self._positions) for length in lengths]

  def training(self) -> Task:
    """Lists of all lengths that are tested, in equal numbers; short ones are packed."""
    shorter = self._shorter()
    return Mixture(tuple(shorter), (1,) * len(shorter))

  def tests(self) -> dict[str, Task]:
    """Lists of a quarter of the length, half, and the length."""
    return {str(task.tokens): task for task in self._shorter()}
