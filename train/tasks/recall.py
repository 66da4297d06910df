"""Recall by key: plain, after overwriting, from noisy writes, and of superseded facts."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .task import Example, Mixture, Task, distinct, require, sequence


@dataclass(frozen=True)
class MultiQueryRecall(Task):
  """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927), with its authors' generator.

      k_1 v_1 k_2 v_2 ... k_n v_n   then, among filler, each key once:  ... k_i ...  -> v_i

  Keys are different tokens from the lower half of the vocabulary (without 0), values from the upper half. Queries are at
  even positions. The gap of each query, in slots of two tokens after the pairs, is drawn without replacement with
  probability proportional to slot^(power - 1), so most queries come soon.

  Attributes:
    tokens: length of the example; even, at least four for each pair.
    pairs: number of pairs to remember.
    vocabulary: number of tokens; half are keys, half are values.
    power: how soon queries come; with 1 all gaps are equally likely.
    filler: whether random tokens fill the positions between queries; otherwise they are 0.
  """

  grows: ClassVar[str] = "pairs"

  tokens: int = 64
  pairs: int = 8
  vocabulary: int = 8192
  power: float = 0.01
  filler: bool = True

  def __post_init__(self):
    require(self, "pairs of at least 1", self.pairs >= 1)
    require(self, "an even number of tokens", self.tokens % 2 == 0)
    require(self, f"at least {4 * self.pairs} tokens, four for each of pairs={self.pairs}", self.tokens >= 4 * self.pairs)
    fewest = 2 * (self.pairs + 1)
    require(self, f"an even vocabulary of at least {fewest}", self.vocabulary % 2 == 0 and self.vocabulary >= fewest)
    require(self, "a power between 0 and 1, 0 excluded", 0 < self.power <= 1)

  @property
  def length(self) -> int:
    return self.tokens

  @property
  def vocab_size(self) -> int:
    return self.vocabulary

  @property
  def chance(self) -> float:
    return 1 / self.pairs

  def example(self, key: jax.Array) -> Example:
    for_keys, for_values, for_gaps, for_filler = jax.random.split(key, 4)
    half, context, slots = self.vocabulary // 2, 2 * self.pairs, self.tokens // 2 - self.pairs
    keys = distinct(for_keys, self.pairs, 1, half)
    values = distinct(for_values, self.pairs, half, self.vocabulary)
    likelihood = jnp.arange(1, slots + 1, dtype=jnp.float32) ** (self.power - 1)
    gaps = jax.random.choice(for_gaps, slots, (self.pairs,), replace=False, p=likelihood / likelihood.sum())
    asked = context + 2 * gaps
    tokens = jnp.zeros(self.tokens, jnp.int32)
    tokens = tokens.at[:context].set(jnp.stack([keys, values], axis=1).ravel()).at[asked].set(keys)
    if self.filler:
      tokens = jnp.where(tokens == 0, jax.random.randint(for_filler, tokens.shape, 0, self.vocabulary), tokens)
    empty = jnp.zeros(self.tokens, jnp.int32)
    return sequence(tokens, empty.at[asked].set(values), empty.at[asked].set(1))

  def solve(self, example: Example) -> np.ndarray:
    pairs = np.asarray(example.tokens)[: 2 * self.pairs].reshape(-1, 2)
    memory = {int(key): int(value) for key, value in pairs}
    return np.array([memory.get(int(token), 0) for token in example.tokens])

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return random.choice(np.asarray(example.tokens)[1 : 2 * self.pairs : 2], self.tokens)

  def training(self) -> Task:
    """The authors' mix of 4 to 64 pairs in 64 to 256 tokens, up to the size of this task, plus this task; packed."""
    sizes = [size for size in _TRAINING if size[1] <= self.pairs and size[0] <= self.tokens]
    if self.tokens <= _TRAINING[-1][0] and (self.tokens, self.pairs) not in [size[:2] for size in sizes]:
      sizes.append((self.tokens, self.pairs, 20))
    tasks = tuple(replace(self, tokens=tokens, pairs=pairs) for tokens, pairs, _ in sizes)
    return Mixture(tasks, tuple(count for *_, count in sizes))

  def tests(self) -> dict[str, Task]:
    """Numbers of pairs that double, up to this task's; each at its shortest length."""
    sizes = [size for size in _TESTS if size[1] <= self.pairs and size[0] <= self.tokens]
    sizes = sizes if (self.tokens, self.pairs) in sizes else [*sizes, (self.tokens, self.pairs)]
    return {str(pairs): replace(self, tokens=tokens, pairs=pairs) for tokens, pairs in sizes}


# (tokens, pairs, thousands of examples) and (tokens, pairs) of the authors' figure.
_TRAINING = ((64, 4, 100), (128, 8, 20), (256, 16, 20), (256, 32, 20), (256, 64, 20))
_TESTS = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))


class _Rewritten(Task):
  """`pairs` keys, each written `writes` times and then queried once."""

  @property
  def length(self) -> int:
    return 2 * self.pairs * self.writes + self.pairs

  @property
  def vocab_size(self) -> int:
    return self.vocabulary


@dataclass(frozen=True)
class Overwriting(_Rewritten):
  """Recall of the last value of a key (Schlag et al. 2021, arXiv:2102.11174, section 6.1). A sum of writes has no last value.

      k v  j w  k u  j x ...   then each key once:   k -> u   j -> x

  Attributes:
    pairs: number of keys.
    writes: writes of each key, all with different values; the writes of all keys are in random order.
    vocabulary: number of tokens; half are keys, half are values.
  """

  grows: ClassVar[str] = "writes of a key"

  pairs: int = 8
  writes: int = 3
  vocabulary: int = 128

  def __post_init__(self):
    require(self, "pairs and writes of at least 1", min(self.pairs, self.writes) >= 1)
    fewest = 2 * max(self.pairs + 1, self.pairs * self.writes)
    require(self, f"an even vocabulary of at least {fewest}", self.vocabulary % 2 == 0 and self.vocabulary >= fewest)

  @property
  def chance(self) -> float:
    return 1 / (self.pairs * self.writes)

  def example(self, key: jax.Array) -> Example:
    for_keys, for_values, for_order, for_queries = jax.random.split(key, 4)
    half, total = self.vocabulary // 2, self.pairs * self.writes
    keys = distinct(for_keys, self.pairs, 1, half)
    values = distinct(for_values, total, half, self.vocabulary)
    which = jax.random.permutation(for_order, total) % self.pairs
    last = jnp.zeros(self.pairs, jnp.int32).at[which].max(jnp.arange(total, dtype=jnp.int32))
    queries = jax.random.permutation(for_queries, self.pairs)
    writes = jnp.stack([keys[which], values], axis=1).ravel()
    tokens = jnp.concatenate([writes, keys[queries]])
    asked = jnp.arange(self.length) >= 2 * total
    return sequence(tokens, jnp.concatenate([jnp.zeros_like(writes), values[last][queries]]), asked)

  def solve(self, example: Example) -> np.ndarray:
    tokens, total = np.asarray(example.tokens), 2 * self.pairs * self.writes
    memory = {int(key): int(value) for key, value in tokens[:total].reshape(-1, 2)}
    return np.array([0] * total + [memory[int(key)] for key in tokens[total:]])

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return random.choice(np.asarray(example.tokens)[1 : 2 * self.pairs * self.writes : 2], self.length)

  def tests(self) -> dict[str, Task]:
    """Increasing numbers of writes of each key, from one up to `writes`."""
    return {str(writes): replace(self, writes=writes) for writes in sorted({1, (1 + self.writes) // 2, self.writes})}


@dataclass(frozen=True)
class NoisyRecall(_Rewritten):
  """Recall of values that were written several times, sometimes wrongly: the answer is the most frequent value of a key.

      k v  k v'  j w  k v  j w ...   then each key once:   k -> v

  Values are wrong here. MAD calls another task noisy recall: right values, with noise between the tokens (`Noised`).

  Attributes:
    pairs: number of pairs to remember.
    writes: writes of each pair; the writes of all pairs are in random order.
    outliers: share of writes with a wrong value; always fewer than half of a pair's writes.
    vocabulary: number of tokens; half are keys, half are values.
  """

  grows: ClassVar[str] = "writes that are wrong"

  pairs: int = 8
  writes: int = 3
  outliers: float = 0.1
  vocabulary: int = 256

  def __post_init__(self):
    require(self, "pairs of at least 1", self.pairs >= 1)
    require(self, "at least 3 writes of each pair, so that one can be wrong", self.writes >= 3)
    require(self, "outliers from 0 to less than 0.5", 0 <= self.outliers < 0.5)
    fewest = 2 * (self.pairs + 2)
    require(self, f"an even vocabulary of at least {fewest}", self.vocabulary % 2 == 0 and self.vocabulary >= fewest)

  @property
  def chance(self) -> float:
    return 1 / self.pairs

  def example(self, key: jax.Array) -> Example:
    for_keys, for_values, for_order, for_outliers, for_wrong, for_queries = jax.random.split(key, 6)
    half, total = self.vocabulary // 2, self.pairs * self.writes
    keys = distinct(for_keys, self.pairs, 1, half)
    values = distinct(for_values, self.pairs, half, self.vocabulary)
    wrong = jax.random.bernoulli(for_outliers, self.outliers, (self.pairs, self.writes))
    wrong = wrong & (jnp.cumsum(wrong, axis=1) <= (self.writes - 1) // 2)  # keeps fewer wrong than right writes of each pair
    shift = jax.random.randint(for_wrong, wrong.shape, 1, half)
    written = jnp.where(wrong, half + (values[:, None] - half + shift) % half, values[:, None])
    order = jax.random.permutation(for_order, total)
    writes = jnp.stack([jnp.repeat(keys, self.writes), written.ravel()], axis=1)[order].ravel()
    queries = jax.random.permutation(for_queries, self.pairs)
    tokens = jnp.concatenate([writes, keys[queries]])
    asked = jnp.arange(self.length) >= 2 * total
    return sequence(tokens, jnp.concatenate([jnp.zeros_like(writes), values[queries]]), asked)

  def solve(self, example: Example) -> np.ndarray:
    tokens = np.asarray(example.tokens)
    total = 2 * self.pairs * self.writes
    keys, values = tokens[:total].reshape(-1, 2).T
    most = [np.bincount(values[keys == key]).argmax() for key in tokens[total:]]
    return np.concatenate([np.zeros(total, int), most])

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return random.choice(np.unique(self.solve(example)[-self.pairs :]), self.length)

  def tests(self) -> dict[str, Task]:
    """Increasing shares of outliers, from none up to `outliers`."""
    shares = sorted({0.0, self.outliers / 2, self.outliers})
    return {f"{share:.0%}": replace(self, outliers=share) for share in shares}


@dataclass(frozen=True)
class StaleFacts(Task):
  """Facts of which some are superseded by a write under another key: the old key must then read as "gone".

      - k v    - j w    ...    k m u    ...    k -> gone    m -> u    j -> w

  A write is three tokens: the key that it supersedes ("-" for none), its own key, its value. A key is superseded at most
  once, by a key that was not in use. Queries, one for each key, follow the writes: the value, or "gone".

  Attributes:
    facts: number of facts that supersede no other.
    superseded: number of these facts that are superseded later.
    vocabulary: number of keys and values, half each; "-" and "gone" are two more tokens.
  """

  grows: ClassVar[str] = "facts superseded"

  facts: int = 8
  superseded: int = 4
  vocabulary: int = 128

  def __post_init__(self):
    require(self, "facts of at least 1, and superseded from 0 to facts", 0 <= self.superseded <= self.facts >= 1)
    fewest = 2 * (self.facts + self.superseded)
    require(self, f"an even vocabulary of at least {fewest}", self.vocabulary % 2 == 0 and self.vocabulary >= fewest)

  @property
  def _keys(self) -> int:
    return self.facts + self.superseded

  @property
  def length(self) -> int:
    return 4 * self._keys

  @property
  def vocab_size(self) -> int:
    return self.vocabulary + 2

  @property
  def chance(self) -> float:
    """For guessing "gone" as often as it is the answer, and otherwise one of the values."""
    gone = self.superseded / self._keys
    return gone**2 + (1 - gone) * (1 - gone) / self._keys

  @property
  def kinds(self) -> tuple[str, ...]:
    return ("never superseded", "superseded", "superseding")

  def example(self, key: jax.Array) -> Example:
    for_keys, for_values, for_old, for_order, for_queries = jax.random.split(key, 5)
    half, none, gone, total = self.vocabulary // 2, self.vocabulary, self.vocabulary + 1, self._keys
    keys = distinct(for_keys, total, 0, half)
    values = distinct(for_values, total, half, self.vocabulary)
    old = jax.random.choice(for_old, self.facts, (self.superseded,), replace=False)
    supersedes = jnp.full(total, none).at[self.facts :].set(keys[old])
    # A random order. Where a fact would come after the one that supersedes it, the two are swapped.
    place = jax.random.permutation(for_order, total)
    first, second = place[old], place[self.facts :]
    place = place.at[old].set(jnp.minimum(first, second)).at[self.facts :].set(jnp.maximum(first, second))
    order = jnp.argsort(place)
    writes = jnp.stack([supersedes, keys, values], axis=1)[order].ravel()
    kind = jnp.zeros(total, jnp.int32).at[old].set(1).at[self.facts :].set(2)
    answers = jnp.where(kind == 1, gone, values)
    queries = jax.random.permutation(for_queries, total)
    before = jnp.zeros(3 * total, jnp.int32)
    return sequence(
      jnp.concatenate([writes, keys[queries]]),
      jnp.concatenate([before, answers[queries]]),
      jnp.arange(self.length) >= 3 * total,
      jnp.concatenate([before, kind[queries]]),
    )

  def solve(self, example: Example) -> np.ndarray:
    tokens, total = np.asarray(example.tokens), self._keys
    memory: dict[int, int] = {}
    for old, key, value in tokens[: 3 * total].reshape(-1, 3):
      memory[int(key)] = int(value)
      if old != self.vocabulary:
        memory[int(old)] = self.vocabulary + 1
    return np.array([0] * 3 * total + [memory[int(key)] for key in tokens[3 * total :]])

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    values = np.asarray(example.tokens)[2 : 3 * self._keys : 3]
    gone = random.random(self.length) < self.superseded / self._keys
    return np.where(gone, self.vocabulary + 1, random.choice(values, self.length))

  def tests(self) -> dict[str, Task]:
    """The same number of facts, of which increasing numbers are superseded."""
    counts = sorted({self.superseded // 2, self.superseded, self.facts})
    return {str(count): replace(self, superseded=count) for count in counts}
