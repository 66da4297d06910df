"""What a call of local linear attention is, besides its arrays."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..dispatch import Kernels


@dataclass(frozen=True)
class Spec:
  """The settings of a call.

  Attributes:
    scale: factor of q . k in the weights.
    window: number of last positions that a query sees, its own included; `None` for all.
    blocks: number of diagonal blocks that the covariance of the keys is cut to; 1 keeps all of it.
    given: x is given instead of the ridge, and no system is solved.
    iterations: of the conjugate gradients; `None` for a direct solve.
    tolerance: a query whose residual is this share of the first one is left alone.
    precision: option of the operation; see `numerics.intermediate_precision`.
    causal: keys are those of the queries' tokens, in order.
    packed: there may be several documents, and padding.
    kernels: which programs use kernels.
  """

  scale: float
  window: int | None = None
  blocks: int = 1
  given: bool = False
  iterations: int | None = None
  tolerance: float = 1e-5
  precision: str | None = None
  causal: bool = False
  packed: bool = True
  kernels: Kernels = Kernels.NEVER


class Allowed(NamedTuple):
  """Which keys a query sees: those of its document, at its position or before, within the window.

  Attributes:
    query_document, query_position: int32 [B, T]; a query in document -1 sees nothing.
    key_document, key_position: int32 [B, S]; keys in document -1 are seen by none.
  """

  query_document: jax.Array
  query_position: jax.Array
  key_document: jax.Array
  key_position: jax.Array

  def mask(self, window: int | None) -> jax.Array:
    """bool [..., T, S]: whether the query sees the key."""
    document, position = self.query_document[..., :, None], self.query_position[..., :, None]
    distance = position - self.key_position[..., None, :]
    mask = (document == self.key_document[..., None, :]) & (document >= 0) & (distance >= 0)
    return mask if window is None else mask & (distance < window)

  def may_meet(self, window: int | None) -> jax.Array:
    """bool [M, N], for blocks of queries [M, B, R] and of keys [N, B, C]: False where no query of one sees a key of the other.

    It compares ranges of documents and positions, so it may be True in vain.
    """
    (first_q, last_q), (low_q, high_q) = _ranges(self.query_document, self.query_position)
    (first_k, last_k), (low_k, high_k) = _ranges(self.key_document, self.key_position)
    meet = (first_k[None] <= last_q[:, None]) & (first_q[:, None] <= last_k[None]) & (low_k[None] <= high_q[:, None])
    if window is not None:
      meet &= low_q[:, None] - high_k[None] < window
    return jnp.any(meet, axis=-1)


def _ranges(document: jax.Array, position: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """The least and the greatest document and position of each block [N, B, C], [N, B] each; an empty range where all are -1."""
  is_token, most = document >= 0, jnp.iinfo(jnp.int32).max // 2
  return tuple(
    (jnp.min(jnp.where(is_token, x, most), axis=-1), jnp.max(jnp.where(is_token, x, -1), axis=-1)) for x in (document, position)
  )
