"""Needles in real text: pass keys that are hidden at some depth and queried at the end."""

from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from .task import Example, Task, distinct, require, sequence

_DIGITS = np.frombuffer(b"0123456789", np.uint8).astype(np.int32)
_NAMES = [f"{a}{b}" for a in "ABCDEFGH" for b in "KLMNPRST"]


@lru_cache
def haystack(sources: str | tuple[str, ...], size: int) -> np.ndarray:
  """The first `size` bytes of the text of `sources` (see `TextData.sources`), uint8."""
  from ..sources import read_documents

  parts, total = [], 0
  for document in read_documents(sources, "text"):
    parts.append(document.text[: size - total])
    total += len(parts[-1])
    if total >= size:
      break
  return np.frombuffer(b"".join(parts), np.uint8)


@dataclass(frozen=True)
class Needle(Task):
  """Pass keys in text (Mohtashami & Jaggi 2023, arXiv:2305.16300): recall a number that one line of the text states.

      ...text...  \\nThe pass key of AK is 40713.\\n  ...text...  \\nThe pass key of AK is   ->   40713

  Each digit of the answer is predicted from the text before it, including the previous digits. Scores count digits.

  Attributes:
    tokens: length of the example in bytes.
    needles: number of pass keys in it, each with its own name; one of them is queried.
    digits: number of digits of a pass key.
    shallowest, deepest: range of the depth of the requested needle, from 0 (the beginning) to 1 (the end).
    sources: sources of the text, as in `TextData.sources`.
    text_bytes: passages are taken from this many bytes at the start of the text.
  """

  tokens: int = 256
  needles: int = 1
  digits: int = 5
  shallowest: float = 0.0
  deepest: float = 1.0
  sources: str | tuple[str, ...] = "stdlib"
  text_bytes: int = 1_000_000

  def __post_init__(self):
    require(self, "at least one digit", self.digits >= 1)
    require(self, f"1 to {len(_NAMES)} needles", 1 <= self.needles <= len(_NAMES))
    require(self, "0 <= shallowest <= deepest <= 1", 0 <= self.shallowest <= self.deepest <= 1)
    fewest = (self.needles + 1) * self._line
    require(self, f"at least {fewest} tokens, for the needles and the question", self.tokens >= fewest)
    require(self, f"text_bytes greater than tokens={self.tokens}", self.text_bytes > self.tokens)

  @property
  def _line(self) -> int:
    return len(_sentence(_NAMES[0])) + self.digits + 2

  @property
  def length(self) -> int:
    return self.tokens

  @property
  def vocab_size(self) -> int:
    return 256

  @property
  def chance(self) -> float:
    return 0.1

  @property
  def kinds(self) -> tuple[str, ...]:
    return tuple(f"depth {i / 10:.1f}" for i in range(10))

  def example(self, key: jax.Array) -> Example:
    for_text, for_names, for_digits, for_depth, for_others = jax.random.split(key, 5)
    text = jnp.asarray(haystack(self.sources, self.text_bytes))
    question = self._line - 2  # without the full stop and the line break
    room = self.tokens - question  # for the text with its needles
    require(self, f"sources of at least {room} bytes of text; they hold {len(text)}", len(text) >= room)
    start = jax.random.randint(for_text, (), 0, max(1, len(text) - room))
    passage = jax.lax.dynamic_slice(text, (start,), (room,)).astype(jnp.int32)
    names = distinct(for_names, self.needles, 0, len(_NAMES))
    digits = jax.random.randint(for_digits, (self.needles, self.digits), 0, 10)
    lines = jax.vmap(self._needle)(names, digits)
    slots = room // self._line  # needles lie on a grid, so that none overwrites another
    depth = jax.random.uniform(for_depth, minval=self.shallowest, maxval=self.deepest)
    slot = jnp.minimum((depth * slots).astype(jnp.int32), slots - 1)
    others = (slot + distinct(for_others, self.needles - 1, 1, slots)) % slots if self.needles > 1 else jnp.zeros(0, jnp.int32)
    places = self._line * jnp.concatenate([slot[None], others])
    at = places[:, None] + jnp.arange(self._line)[None]
    tokens = jnp.concatenate([passage.at[at].set(lines), lines[0, :question]])
    answers = jnp.arange(self.tokens) >= self.tokens - self.digits - 1
    answers = answers & (jnp.arange(self.tokens) < self.tokens - 1)
    kind = jnp.minimum(10 * slot // slots, 9)
    return sequence(tokens, jnp.where(answers, jnp.roll(tokens, -1), 0), answers, kind)

  def _needle(self, name: jax.Array, digits: jax.Array) -> jax.Array:
    sentences = jnp.asarray(np.stack([np.frombuffer(_sentence(name), np.uint8) for name in _NAMES]).astype(np.int32))
    end = jnp.array([ord("."), ord("\n")], jnp.int32)
    return jnp.concatenate([sentences[name], jnp.asarray(_DIGITS)[digits], end])

  def solve(self, example: Example) -> np.ndarray:
    text = bytes(np.asarray(example.tokens).astype(np.uint8))
    question = text[text.rindex(b"\nThe pass key of ") : self.tokens - self.digits]
    found = text.index(question) + len(question)
    answer = text[found : found + self.digits]
    return np.concatenate([np.zeros(self.tokens - self.digits - 1, int), np.frombuffer(answer, np.uint8), [0]])

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return random.choice(_DIGITS, self.tokens)

  def tests(self) -> dict[str, Task]:
    """Lengths that double, up to sixteen times this one."""
    lengths = [factor * self.tokens for factor in (1, 2, 4, 8, 16) if factor * self.tokens < self.text_bytes]
    return {str(length): replace(self, tokens=length) for length in lengths}


def _sentence(name: str) -> bytes:
  return f"\nThe pass key of {name} is ".encode()
