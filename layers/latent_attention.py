"""Multi-head latent attention: softmax attention whose cache holds one short vector a token, for all heads.

    c_t = RMSNorm(W_c x_t)     p_t = W_p x_t          k_t = [p_t, W_k c_t]     v_t = W_v c_t     q_t = W_q x_t = [q^p_t, q^c_t]
    o_t = sum_s softmax_s(q_t . k_s d^{-1/2}) v_s     d = shared_dim + head_dim

of each head, with c and p shared by all (DeepSeek-AI 2024, arXiv:2405.04434). Only [p_t, c_t] is cached. No key and no value is
made of it: q . W_k c = (W_k^T q) . c, and sum_s p_s W_v c_s = W_v sum_s p_s c_s, so all heads attend to the cache itself, with
queries [q^p, W_k^T q^c] and values c.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.numerics import matmul
from ..pallas_kernels.partition import HEADS, ROWS, partitioned
from ..pallas_kernels.states import exportable
from .attention import Attention, CacheState
from .axes import named
from .memory_layer import MemoryLayer, silence_padding
from .norms import RMSNorm
from .projections import INIT, dense
from .rotary import RopeScaling


@exportable
class LatentState(NamedTuple):
  """A ring of what was made of the last tokens. Slot p % slots holds the token at position p of the current document.

  Attributes:
    tokens: p, rotated, and c, [B, slots, shared_dim + latent_dim].
    length: int32 [B], number of tokens of the current document so far.
  """

  tokens: jax.Array
  length: jax.Array


class _ToItsKeys(Attention):
  """Attention whose values are its keys without their first `rope_dim` channels. Those that it is given have width 0."""

  def _over(self, q, k, v, query_tokens, key_tokens, prefix_kv) -> jax.Array:
    return super()._over(q, k, k[..., self.rope_dim :], query_tokens, key_tokens, prefix_kv)


class LatentAttention(MemoryLayer, kw_only=True):
  """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434), as in Kimi Linear (arXiv:2510.26692) without positions.

      o_t = sum_s softmax_s((q^p_t . p_s + q^c_t . W_k c_s) d^{-1/2}) W_v c_s,      c = RMSNorm(W_c x),    p = W_p x

  Attributes:
    num_heads: number of heads, H.
    head_dim: width of the part of a key that a head has for itself, W_k c.
    shared_dim: width of the part that all heads share, p. It carries rotary positions, if there are any.
    value_dim: width of a head's values; `None` for `head_dim`.
    latent_dim: width of c.
    window, max_length, rope_base, rope_scaling: as in `Attention`; by default there are no rotary positions.
    norm_epsilon: epsilon of the norm of c.
  """

  num_heads: int
  head_dim: int
  latent_dim: int
  shared_dim: int = 64
  value_dim: int | None = None
  window: int | None = None
  max_length: int = 2048
  rope_base: float | None = None
  rope_scaling: RopeScaling = RopeScaling()
  norm_epsilon: float = 1e-6

  @property
  def core(self) -> Attention:
    """The attention of all heads to the cache."""
    heads = {"num_heads": self.num_heads, "num_key_heads": 1, "head_dim": self.shared_dim + self.latent_dim}
    positions = {"rope_base": self.rope_base, "rope_dim": self.shared_dim, "rope_scaling": self.rope_scaling}
    return _ToItsKeys(**heads, **positions, window=self.window, max_length=self.max_length, parent=None)

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    self.core.check_settings()

  def initial_state(self, batch_size: int) -> LatentState:
    """An empty cache."""
    shape = batch_size, self.core.slots, self.shared_dim + self.latent_dim
    return LatentState(jnp.zeros(shape, self.activation_dtype()), jnp.zeros((batch_size,), jnp.int32))

  @nn.compact
  def __call__(
    self, x: jax.Array, state: LatentState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, LatentState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def heads(name: str, width: int) -> jax.Array:
      q = dense(self.num_heads * width, ("embed", "heads"), name=name, **types)(x)
      return q.reshape(*x.shape[:2], self.num_heads, width)

    def of_latent(name: str, width: int) -> jax.Array:
      shape = self.num_heads, self.latent_dim, width
      return self.param(name, named(INIT, "heads", None, None), shape, self.param_dtype).astype(x.dtype)

    latent = dense(self.latent_dim, ("embed", None), name="latent", **types)(x)
    latent = RMSNorm(self.norm_epsilon, self.param_dtype, axis=None, name="latent_norm")(latent)
    k = jnp.concatenate([dense(self.shared_dim, ("embed", None), name="shared_key", **types)(x), latent], axis=-1)[:, :, None]
    own = _through(heads("query", self.head_dim), of_latent("latent_key", self.head_dim).swapaxes(1, 2))
    q = jnp.concatenate([heads("shared_query", self.shared_dim), own], axis=-1)
    # The attention divides by the root of the width of these queries, which is not that of a head's keys.
    q *= ((self.shared_dim + self.latent_dim) / (self.shared_dim + self.head_dim)) ** 0.5
    cached = state.tokens[:, None]
    state = CacheState(cached, cached[..., :0], state.length)
    out, cache = self.core.attend(q, k, k[..., :0], state, segment_ids, fresh=fresh)
    out = _through(out, of_latent("latent_value", self.value_dim or self.head_dim))
    y = dense(x.shape[-1], ("heads", "embed"), name="output", **types)(out.reshape(*x.shape[:2], -1))
    return silence_padding(y, segment_ids), LatentState(cache.keys[:, 0], cache.length)


def _through(x: jax.Array, matrices: jax.Array) -> jax.Array:
  """x [B, T, H, d] times each head's matrix, [H, d, e], in x's dtype."""

  def local(x, matrices):  # XLA on a CPU has no product of 16-bit numbers with heads between the other axes
    batch, tokens, heads, width = x.shape
    out = matmul(x.transpose(2, 0, 1, 3).reshape(heads, -1, width), matrices).astype(x.dtype)
    return out.reshape(heads, batch, tokens, -1).transpose(1, 2, 0, 3)

  return partitioned(local, (P(ROWS, None, HEADS), P(HEADS)), P(ROWS, None, HEADS))(x, matrices)
