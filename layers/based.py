"""Based: linear attention whose kernel is the Taylor polynomial of exp, beside a sliding window of softmax attention.

    phi(q) . phi(k) = 1 + s + s^2 / 2        s = q . k F^{-1/2}, for queries and keys of F channels
    S_t = S_{t-1} + phi(k_t) [v_t, 1]^T      [n_t, z_t] = S_t^T phi(q_t)        y_t = W_o n_t / z_t + window(x)_t

Each read is an average of values with positive weights; see `memzoo.pallas_kernels.taylor_attention`.

Source: Arora et al. 2024 (arXiv:2402.18668). In the paper the window is a layer of its own, above this one. So it is here with
`window=None`, and a layer of `Attention`; else one layer adds both, each with its own maps.

The paper leaves open -> we do: a denominator of z + 1e-12, as in its code · a window of 64 tokens and the token itself, as its
code makes of a configured 128 · rotary positions in the window only.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.states import exportable
from ..pallas_kernels.taylor_attention import count_features, taylor_attention
from .attention import Attention, CacheState
from .memory_layer import MemoryLayer, silence_padding
from .projections import dense, for_tokens
from .rotary import check_rotated


@exportable
class BasedState(NamedTuple):
  """State of `Based`.

  Attributes:
    memory: S, float32 [B, H, features, V + 1]; its last column is the sum of all keys' features.
    cache: of the window's attention, or `None`.
  """

  memory: jax.Array
  cache: CacheState | None


class Based(MemoryLayer):
  """Based (Arora et al. 2024, arXiv:2402.18668): a polynomial in place of the exponential of attention, beside a short window.

      y_t = W_o sum_{s <= t} (1 + a_ts + a_ts^2 / 2) v_s / sum_{s <= t} (1 + a_ts + a_ts^2 / 2)  +  attention(x over a window)_t
      a_ts = q_t . k_s F^{-1/2}

  Attributes:
    num_heads: number of heads, of both parts.
    feature_dim: channels of a head's queries and keys, F. The state has 1 + F + F (F + 1) / 2 rows.
    head_dim: channels of a head's values, V, and of the heads of the window's attention.
    window: number of tokens that the attention sees, the token itself included; `None` for no attention.
    chunk_size, precision, implementation: of the operation, as in `LinearAttention`.
  """

  num_heads: int
  head_dim: int
  feature_dim: int = 16
  window: int | None = 65
  chunk_size: int | None = None
  precision: str | None = None
  implementation: str = "auto"

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    if self.window is not None:
      check_rotated(self.head_dim)

  def initial_state(self, batch_size: int) -> BasedState:
    """An empty memory, and an empty cache."""
    shape = batch_size, self.num_heads, count_features(self.feature_dim), self.head_dim + 1
    cache = None if self.window is None else self._attention(parent=None).initial_state(batch_size)
    return BasedState(jnp.zeros(shape, accumulator(self.activation_dtype())), cache)

  def matrices(self, state: BasedState) -> dict[str, jax.Array]:
    """Returns S without its last column, under the name "memory"."""
    return {"memory": state.memory[..., :-1]}

  @nn.compact
  def __call__(
    self, x: jax.Array, state: BasedState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, BasedState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    q, k, v = (self._heads(x, *of) for of in (("query", self.feature_dim), ("key", self.feature_dim), ("value", self.head_dim)))
    out, memory = taylor_attention(
      q,
      k,
      v,
      initial_state=state.memory,
      segment_ids=segment_ids,
      chunk_size=self.chunk_size,
      precision=self.precision,
      implementation=for_tokens(self.implementation, x),
    )
    out = out.reshape(*out.shape[:2], -1)
    y = dense(x.shape[-1], ("heads", "embed"), name="output", dtype=self.dtype, param_dtype=self.param_dtype)(out)
    cache = None
    if self.window is not None:
      local, cache = self._attention(name="attention")(x, None if fresh else state.cache, segment_ids)
      y += local
    return silence_padding(y, segment_ids), BasedState(memory, cache)

  def _heads(self, x: jax.Array, name: str, width: int) -> jax.Array:
    """The map from x to [B, T, H, width]."""
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    heads = dense(self.num_heads * width, ("embed", "heads"), name=name, **types)(x)
    return heads.reshape(*x.shape[:2], self.num_heads, width)

  def _attention(self, **where: Any) -> Attention:
    sizes = {"num_heads": self.num_heads, "head_dim": self.head_dim, "window": self.window}
    return Attention(**sizes, dtype=self.dtype, param_dtype=self.param_dtype, **where)
