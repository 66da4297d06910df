"""Linear attention as a layer, and the base class of all delta-rule layers.

    q = L2(silu(conv(W_q x)))    k = L2(silu(conv(W_k x)))    v = silu(conv(W_v x))
    S_t = S_{t-1} + k_t v_t^T    o_t = S_t^T q_t K^{-1/2}     y = W_o (RMSNorm(o) * gate)

Source: Katharopoulos et al. 2020 (arXiv:2006.16236) for the memory. The projections, convolutions, norm and gate around it are
those of DeltaNet (Yang et al. 2024, arXiv:2406.06484), so that the layers of this family differ only in their memory.

Differences from the papers: the feature map is silu followed by L2 normalisation ("elu" is the map of Katharopoulos et al.).
There is no normaliser but an RMSNorm over each head's output.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels import delta_rule
from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.states import exportable
from .memory_layer import count_key_heads, silence_padding
from .norms import l2_normalise
from .projected_memory import ProjectedMemory
from .projections import for_tokens

FEATURES = {"silu": nn.silu, "elu": lambda x: nn.elu(x) + 1}


@exportable
class MatrixState(NamedTuple):
  """State of the linear-attention family.

  Attributes:
    memory: S, float32 [B, H, K, V], key rows and value columns.
    query_tail, key_tail, value_tail: the last conv_width - 1 inputs of the short convolutions, [B, conv_width - 1, channels].
  """

  memory: jax.Array
  query_tail: jax.Array
  key_tail: jax.Array
  value_tail: jax.Array


class LinearAttention(ProjectedMemory, kw_only=True):
  """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): a sum of all key-value outer products, without decay.

      S_t = S_{t-1} + k_t v_t^T

  Attributes:
    key_dim: width of a head's keys and queries, K.
    value_dim: width of a head's values, V.
    num_key_heads: number of query and key heads, a divisor of `num_heads`; `None` for `num_heads`.
    feature_map: function applied to queries and keys before L2 normalisation: "silu", or "elu" for elu + 1, which is positive.
    chunk_size: option of the operation, which affects speed only; see `memzoo.pallas_kernels.delta_rule`.
    precision: of the operation and the gates: `None`, or "highest" to multiply bfloat16 activations as float32.

  The other attributes are those of `ProjectedMemory`; `num_heads` is the number of value heads.
  """

  key_dim: int
  value_dim: int
  num_key_heads: int | None = None
  feature_map: str = "silu"
  chunk_size: int | None = None
  precision: str | None = None

  def update(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Runs the memory: maps q, k [B, T, Hk, K] and v [B, T, H, V] to (o [B, T, H, V], S). Subclasses override this.

    `options` are those of the operation, such as `initial_state`; subclasses make their gates from `x`.
    """
    del x
    return delta_rule.linear_attention(q, k, v, **options)

  @property
  def gate_types(self) -> dict[str, Any]:
    """Options of the modules that make gates."""
    return {"param_dtype": self.param_dtype, "precision": self.precision}

  @property
  def writes(self) -> int:
    """Number of keys and values that each token writes."""
    return 1

  @property
  def key_heads(self) -> int:
    return count_key_heads(self.num_heads, self.num_key_heads)

  def initial_state(self, batch_size: int) -> MatrixState:
    """A memory of zeros, and zeros as the earlier inputs of the convolutions."""
    shape = batch_size, self.num_heads, self.key_dim, self.value_dim
    keys, values = self.key_heads * self.key_dim, self.num_heads * self.value_dim
    tails = (self.tail(batch_size, channels) for channels in (keys, self.writes * keys, self.writes * values))
    return MatrixState(jnp.zeros(shape, accumulator(self.activation_dtype())), *tails)

  def matrices(self, state: MatrixState) -> dict[str, jax.Array]:
    """Returns S under the name "memory"."""
    return {"memory": state.memory}

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    count_key_heads(self.num_heads, self.num_key_heads)
    if self.feature_map not in FEATURES:
      raise ValueError(f"feature_map={self.feature_map!r}; expected one of {list(FEATURES)}.")

  @nn.compact
  def __call__(
    self, x: jax.Array, state: MatrixState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, MatrixState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    keys, values = self.key_heads * self.key_dim, self.num_heads * self.value_dim
    feature_map = FEATURES[self.feature_map]
    q, query_tail = self.stream("query", keys, feature_map)(x, state.query_tail, segment_ids)
    k, key_tail = self.stream("key", self.writes * keys, feature_map)(x, state.key_tail, segment_ids)
    v, value_tail = self.stream("value", self.writes * values)(x, state.value_tail, segment_ids)
    out, memory = self.update(
      x,
      l2_normalise(self._split(q, self.key_heads, self.key_dim)),
      l2_normalise(self._split(k, self.key_heads, self.key_dim)),
      self._split(v, self.num_heads, self.value_dim),
      initial_state=state.memory,
      segment_ids=segment_ids,
      chunk_size=self.chunk_size,
      implementation=for_tokens(self.implementation, x),
      precision=self.precision,
    )
    y = self.read_out(x, out)
    return silence_padding(y, segment_ids), MatrixState(memory, query_tail, key_tail, value_tail)

  def _split(self, x: jax.Array, heads: int, width: int) -> jax.Array:
    """[B, T, r * heads * width] -> [B, T, heads, width], or [B, T, r, heads, width] for r > 1."""
    many = x.shape[-1] // (heads * width)
    return x.reshape(*x.shape[:2], *([] if many == 1 else [many]), heads, width)
