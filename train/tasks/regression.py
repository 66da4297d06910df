"""In-context regression: vectors instead of tokens, and a linear map that may change within a sequence."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .task import Example, Task, require, sequence


@dataclass(frozen=True)
class Regression(Task):
  """In-context regression (Garg et al. 2022, arXiv:2208.01066), stationary or piecewise (arXiv:2510.01450, section 5).

      token t = (k_t, W k_t + noise, k_{t+1})   ->   W k_{t+1}          k uniform on the sphere, W_ij ~ N(0, 1)

  Each token writes a pair and queries the value of the next key. W is drawn anew for every piece, without a signal; the last
  token of a piece has no query. The error is the squared distance divided by the value's dimension; an answer of zero has an
  expected error of 1.

  Attributes:
    tokens: length of the example.
    piece: number of tokens with the same W; divides `tokens`. If the two are equal, W never changes.
    key_dim, value_dim: dimensions of k and of W k.
    noise: standard deviation of the noise on written values; targets have none.
    centre: length of a vector, drawn anew for every piece, to which keys of length 1 are added before they are normalised. With
      0, keys of all pieces are alike: those of earlier pieces mislead any method that does not forget by age.
    cosine: expected cosine of any two keys of an example, c. Keys are sqrt(c) u + sqrt(1 - c) z, with a unit vector u that all
      share and a unit vector z of each key's own, orthogonal to u. The closer to 1, the more a written value disturbs the
      others. Not with a centre.
  """

  continuous: ClassVar[bool] = True
  grows: ClassVar[str] = "tokens from one map to the next"

  tokens: int = 128
  piece: int = 64
  key_dim: int = 16
  value_dim: int = 16
  noise: float = 0.0
  centre: float = 0.0
  cosine: float = 0.0

  def __post_init__(self):
    require(self, "a piece of at least 2 that divides tokens", self.piece >= 2 and self.tokens % self.piece == 0)
    require(self, "tokens, key_dim and value_dim of at least 1", min(self.tokens, self.key_dim, self.value_dim) >= 1)
    require(self, "a noise and a centre of 0 or more", self.noise >= 0 and self.centre >= 0)
    require(self, "a cosine from 0 to less than 1", 0 <= self.cosine < 1)
    possible = self.cosine == 0 or (self.centre == 0 and self.key_dim >= 2)
    require(self, "no centre and a key_dim of at least 2 with a cosine above 0", possible)

  def __repr__(self) -> str:
    """The task as text, without a cosine of 0: a run continues only if its text is as before, and older texts have none."""
    shown = [field.name for field in fields(self) if field.name != "cosine" or self.cosine]
    return f"Regression({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

  @property
  def length(self) -> int:
    return self.tokens

  @property
  def input_dim(self) -> int:
    return 2 * self.key_dim + self.value_dim

  @property
  def output_dim(self) -> int:
    return self.value_dim

  @property
  def chance(self) -> float:
    """The expected error of an answer of zero."""
    return 1.0

  @property
  def kinds(self) -> tuple[str, ...]:
    return tuple(str(i + 1) for i in range(self.piece))

  def example(self, key: jax.Array) -> Example:
    for_keys, for_maps, for_noise = jax.random.split(key, 3)
    pieces = self.tokens // self.piece
    keys = jax.random.normal(for_keys, (pieces, self.piece, self.key_dim))
    if self.cosine:
      shared = _unit(jax.random.normal(jax.random.fold_in(for_keys, 2), (1, 1, self.key_dim)))
      own = _unit(keys - jnp.sum(keys * shared, axis=-1, keepdims=True) * shared)
      keys = self.cosine**0.5 * shared + (1 - self.cosine) ** 0.5 * own
    keys = _unit(keys)
    if self.centre:
      centres = jax.random.normal(jax.random.fold_in(for_keys, 1), (pieces, 1, self.key_dim))
      keys = _unit(keys + self.centre * centres / jnp.linalg.norm(centres, axis=-1, keepdims=True))
    maps = jax.random.normal(for_maps, (pieces, self.value_dim, self.key_dim))
    values = jnp.einsum("pvk,pik->piv", maps, keys, precision=jax.lax.Precision.HIGHEST)
    written = values + self.noise * jax.random.normal(for_noise, values.shape)
    tokens = jnp.concatenate([keys, written, jnp.roll(keys, -1, axis=1)], axis=-1)
    place = jnp.arange(self.tokens) % self.piece
    return sequence(
      tokens.reshape(self.tokens, -1),
      jnp.roll(values, -1, axis=1).reshape(self.tokens, -1),
      place < self.piece - 1,
      place,
    )

  def solve(self, example: Example) -> np.ndarray:
    """The least-squares solution of least norm on the piece so far; exact after `key_dim` tokens if there is no noise."""
    tokens = np.asarray(example.tokens, np.float64).reshape(-1, self.piece, self.input_dim)
    answers = np.zeros((*tokens.shape[:2], self.value_dim))
    for piece, answer in zip(tokens, answers, strict=True):
      keys, values, asked = np.split(piece, [self.key_dim, self.key_dim + self.value_dim], axis=-1)
      for i in range(self.piece):
        answer[i] = asked[i] @ np.linalg.lstsq(keys[: i + 1], values[: i + 1], rcond=1e-6)[0]
    return answers.reshape(self.tokens, -1)

  def guess(self, example: Example, random: np.random.Generator) -> np.ndarray:
    return np.zeros((self.tokens, self.value_dim))

  def tests(self) -> dict[str, Task]:
    """Pieces of this length, and one map for the whole sequence."""
    return {str(piece): replace(self, piece=piece) for piece in dict.fromkeys((self.piece, self.tokens))}


def _unit(vectors: jax.Array) -> jax.Array:
  return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
