"""A dictionary that is the same in all examples."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ..keys import new_key
from .task import Example, Task, multiples, require, sequence


@dataclass(frozen=True)
class Memorisation(Task):
  """Memorisation (MAD, Poli et al. 2024, arXiv:2403.17844): the values of keys, by a dictionary that no example contains.

      k ? j ? ...   ->   the value of k, the value of j, ... at the question marks

  The dictionary is the same in every example and has to be learned in training. So this task measures what the parameters hold,
  not what the state holds, which is only the last key.

  Attributes:
    tokens: length of the example; even.
    vocabulary: number of keys and values, half each; the question mark is one more token.
    dictionary: seed of the dictionary, in which each value belongs to one key.
  """

  tokens: int = 32
  vocabulary: int = 256
  dictionary: int = 0

  def __post_init__(self):
    require(self, "an even number of tokens, at least 2", self.tokens >= 2 and self.tokens % 2 == 0)
    require(self, "an even vocabulary of at least 4", self.vocabulary >= 4 and self.vocabulary % 2 == 0)
    require(self, "a dictionary from 0 to 2^32 - 1", 0 <= self.dictionary < 2**32)

  @property
  def length(self) -> int:
    return self.tokens

  @property
  def vocab_size(self) -> int:
    return self.vocabulary + 1

  @property
  def chance(self) -> float:
    """For guessing a value; the key is not the last token."""
    return 2 / self.vocabulary

  def values(self) -> jax.Array:
    """The dictionary: the value of each key, int32 [vocabulary / 2]."""
    half = self.vocabulary // 2
    return half + jax.random.permutation(new_key(self.dictionary), half)

  def example(self, key: jax.Array) -> Example:
    keys = jax.random.randint(key, (self.tokens // 2,), 0, self.vocabulary // 2)
    asked = jnp.arange(self.tokens) % 2 == 1
    tokens = jnp.where(asked, self.vocabulary, jnp.repeat(keys, 2))
    return sequence(tokens, jnp.where(asked, jnp.repeat(self.values()[keys], 2), 0), asked)

  def solve(self, example: Example) -> np.ndarray:
    """The answers, by the dictionary, which the tokens do not contain."""
    dictionary = dict(enumerate(np.asarray(self.values()).tolist()))
    keys = np.asarray(example.tokens)[::2].tolist()
    return np.array([answer for key in keys for answer in (0, dictionary[key])])

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return random.integers(self.vocabulary // 2, self.vocabulary, self.tokens)

  def tests(self) -> dict[str, Task]:
    """Up to four times as many tokens, with the same dictionary."""
    return multiples(self, "tokens", (1, 2, 4))
