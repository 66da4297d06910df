"""Attention that reads a local linear model of the values instead of their local mean.

    m_t = sum_s p_s k_s      A_t = sum_s p_s (k_s - m_t)(k_s - m_t)^T + ridge I      x_t = A_t^{-1} (q_t - m_t)
    o_t = sum_s p_s (1 + (k_s - m_t) . x_t) v_s           over the last `window` tokens s <= t of t's document

with softmax weights p. Near the edge of the keys a local mean is biased; a local linear model is not. Sources: local linear
attention (Zuo et al. 2025, arXiv:2510.01450); Parallax (Zuo et al. 2026, arXiv:2605.29157), which learns x. The operations
are in `memzoo.pallas_kernels.local_linear`; the cache, windows and positions are those of `attention.py`.

The papers leave open -> we do:

- the layer around the operation of local linear attention -> that of `Attention` with normalised queries and keys
- the ridge -> learned, one for each head, at least `min_ridge`. Normalised keys have length sqrt(d), so their covariance is
  about I, and a ridge of 1 is moderate.
- the start of Parallax -> W_r = 0, which is softmax attention
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels.documents import Documents
from ..pallas_kernels.local_linear import Allowed, causal, local_linear_attention, parallax_attention, squared_distance
from ..pallas_kernels.numerics import accumulator
from .attention import Attention, CacheState
from .axes import named
from .projections import dense


class _LocalModel(Attention, kw_only=True):
  """What both layers share."""

  reference: ClassVar[str] = "dense"

  qk_norm: bool = True
  implementation: str = "auto"

  def _attend(self, q, k, v, state: CacheState | None, docs: Documents, position, prefix_kv, extra) -> jax.Array:
    if state is None and prefix_kv is None:
      return self._read(q, k, v, extra, position, segment_ids=jnp.where(docs.is_token, docs.index + 1, 0), **self._options)
    k, v, key_tokens = self._after_cache(k, v, state, docs, position)
    query_tokens = key_tokens._replace(document=jnp.where(docs.is_token, docs.index, -1), position=position)
    return self._over(q, k, v, query_tokens, key_tokens, prefix_kv, extra)

  def _over(self, q, k, v, query_tokens, key_tokens, prefix_kv, extra) -> jax.Array:
    if prefix_kv is not None:
      raise ValueError(f"{type(self).__name__} was given a prefix; expected none, which only Attention takes.")
    return self._read(q, k, v, extra, query_tokens.position, allowed=Allowed(*query_tokens, *key_tokens), **self._options)

  @property
  def _options(self) -> dict[str, Any]:
    return {"window": self.slots, "implementation": self.implementation}


class LocalLinearAttention(_LocalModel, kw_only=True):
  """Local linear attention (Zuo et al. 2025, arXiv:2510.01450).

      o_t = sum_s p_s (1 + (k_s - m_t) . x_t) v_s,    x_t = (Cov_p(k) + ridge I)^{-1} (q_t - m_t),    m_t = sum_s p_s k_s

  Attributes:
    ridge: initial ridge; with a large one this is softmax attention.
    min_ridge: the least that it can become.
    blocks: the covariance of the keys is cut to this many diagonal blocks, which costs less.
    solver: "direct", "cg" (conjugate gradients) or "auto"; see `explain_solver` in `memzoo.pallas_kernels.local_linear`.
    iterations: of the conjugate gradients.
    implementation: "auto", "pallas", "xla" or "dense" (the reference: memory O(T^2 d), but with derivatives of every mode).

  The other attributes are those of `Attention`.
  """

  ridge: float = 1.0
  min_ridge: float = 1e-2
  blocks: int = 1
  solver: str = "auto"
  iterations: int = 16

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    if self.ridge <= self.min_ridge:
      raise ValueError(f"ridge={self.ridge}; expected more than min_ridge={self.min_ridge}.")
    if self.head_dim % self.blocks:
      raise ValueError(f"blocks={self.blocks}; expected a divisor of head_dim={self.head_dim}.")

  def _extras(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """The ridge [B, T, H]."""
    start = math.log(math.expm1(self.ridge - self.min_ridge))
    logit = self.param("ridge", named(nn.initializers.constant(start), "heads"), (self.num_heads,), self.param_dtype)
    ridge = nn.softplus(logit.astype(accumulator(x))) + self.min_ridge
    return (jnp.broadcast_to(ridge[None, None], (*x.shape[:2], self.num_heads)),)

  def attend(self, *args: Any, **options: Any) -> tuple[jax.Array, CacheState]:
    """See `Attention`. Unlike there, it is a method of the module, so that `memzoo.zoo.inspect` sees its arguments."""
    return super().attend(*args, **options)

  @nn.nowrap
  def distances(self, q: jax.Array, k: jax.Array, ridge: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """`squared_distance` [B, T, H] in a call without a state, for the arguments of `attend`."""
    if self.rope_base is not None:
      position = causal(*q.shape[:2], segment_ids).query_position
      q, k = (self._rotate(a, position) for a in (q, k))
    return squared_distance(q, k, ridge, segment_ids=segment_ids, window=self.slots, **self._solving)

  @property
  def _solving(self) -> dict[str, Any]:
    return {"blocks": self.blocks, "solver": self.solver, "iterations": self.iterations}

  def _read(self, q, k, v, ridge, position, **options) -> jax.Array:
    return local_linear_attention(q, k, v, ridge, **options, **self._solving)


class Parallax(_LocalModel, kw_only=True):
  """Parallax, local linear attention with a learned direction (Zuo et al. 2026, arXiv:2605.29157).

      o_t = sum_s p_s (1 - (k_s - m_t) . r_t) v_s,    r_t = W_r x_t,    m_t = sum_s p_s k_s

  W_r starts at zero, so the layer starts as softmax attention. r carries the rotary positions of q.

  Attributes:
    implementation: "auto", "pallas", "xla" or "dense" (the reference: memory O(T^2 d), but with derivatives of every mode).

  The other attributes are those of `Attention`.
  """

  def _extras(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """r [B, T, H, d], not yet rotated."""
    width = self.num_heads * self.head_dim
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    r = dense(width, ("embed", "heads"), kernel=nn.initializers.zeros, name="direction", **types)(x)
    return (r.reshape(*x.shape[:2], self.num_heads, self.head_dim),)

  def _read(self, q, k, v, r, position, **options) -> jax.Array:
    r = r if self.rope_base is None else self._rotate(r, position)
    return parallax_attention(q, k, v, r, **options)
