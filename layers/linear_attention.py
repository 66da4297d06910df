"""Linear attention as a layer, and the frame that every delta-rule layer fills in.

    q = L2(silu(conv(W_q x)))    k = L2(silu(conv(W_k x)))    v = silu(conv(W_v x))
    S_t = S_{t-1} + k_t v_t^T    o_t = S_t^T q_t K^{-1/2}     y = W_o (RMSNorm(o) * gate)

Source: Katharopoulos et al. 2020 (arXiv:2006.16236) for the memory; the block around it is that of DeltaNet (Yang et al.
2024, arXiv:2406.06484), so that layers of this family differ in their memory alone.

Differs from the papers: the feature map is silu, then unit length ("elu" is the map of Katharopoulos et al.); no normaliser,
but RMSNorm over each head's output.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels import delta_rule
from ..pallas_kernels.precision import accumulator
from .memory_layer import MemoryLayer, count_key_heads, silence_padding
from .norms import RMSNorm, l2_normalise
from .projections import LowRank, ShortConv, dense

FEATURES = {"silu": nn.silu, "elu": lambda x: nn.elu(x) + 1}
GATES = {"none": None, "silu": nn.silu, "sigmoid": nn.sigmoid}


class MatrixState(NamedTuple):
  """State of the linear-attention family.

  Attributes:
    memory: S, float32 [B, H, K, V], key rows and value columns.
    query_tail, key_tail, value_tail: the last inputs of the short convolutions, [B, conv_width - 1, channels].
  """

  memory: jax.Array
  query_tail: jax.Array
  key_tail: jax.Array
  value_tail: jax.Array


class LinearAttention(MemoryLayer):
  """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236): adds every value under its key and never forgets.

      S_t = S_{t-1} + k_t v_t^T

  Attributes:
    num_heads: value heads, H.
    key_dim: key width of a head, K.
    value_dim: value width of a head, V.
    num_key_heads: key heads, a divisor of `num_heads`; as many unless given.
    conv_width: tokens that the short convolutions see.
    feature_map: of queries and keys, before they are brought to unit length: "silu", or "elu" for elu + 1, which is positive.
    output_gate: "none", "silu" or "sigmoid" of W_g x, on the normalised output.
    gate_rank: of W_g, which then also has a bias; `None` for full rank without.
    norm_epsilon: of the output norm.
    chunk_size, implementation: of the operation; see `memzoo.pallas_kernels.delta_rule`. Speed only.
  """

  num_heads: int
  key_dim: int
  value_dim: int
  num_key_heads: int | None = None
  conv_width: int = 4
  feature_map: str = "silu"
  output_gate: str = "none"
  gate_rank: int | None = None
  norm_epsilon: float = 1e-5
  chunk_size: int | None = None
  implementation: str = "auto"

  def update(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """The memory: q, k [B, T, Hk, K] and v [B, T, H, V], in `options` the operation's, to (o [B, T, H, V], S)."""
    del x
    return delta_rule.linear_attention(q, k, v, **options)

  @property
  def writes(self) -> int:
    """Keys and values a token."""
    return 1

  @property
  def key_heads(self) -> int:
    return count_key_heads(self.num_heads, self.num_key_heads)

  @property
  def output_gate_rank(self) -> int | None:
    return self.gate_rank

  def initial_state(self, batch_size: int) -> MatrixState:
    """An empty memory and no tokens before."""
    dtype = self.activation_dtype()
    keys, values = self.key_heads * self.key_dim, self.num_heads * self.value_dim

    def tail(channels):
      return jnp.zeros((batch_size, self.conv_width - 1, channels), dtype)

    memory = jnp.zeros((batch_size, self.num_heads, self.key_dim, self.value_dim), accumulator(dtype))
    return MatrixState(memory, tail(keys), tail(self.writes * keys), tail(self.writes * values))

  def matrices(self, state: MatrixState) -> dict[str, jax.Array]:
    """S, as "memory"."""
    return {"memory": state.memory}

  @nn.compact
  def __call__(
    self, x: jax.Array, state: MatrixState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, MatrixState]:
    """x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    keys, values = self.key_heads * self.key_dim, self.num_heads * self.value_dim
    if self.feature_map not in FEATURES:
      raise ValueError(f"feature_map={self.feature_map!r}; want one of {list(FEATURES)}.")
    feature_map = FEATURES[self.feature_map]
    q, query_tail = self._stream("query", keys, x, state.query_tail, segment_ids, feature_map)
    k, key_tail = self._stream("key", self.writes * keys, x, state.key_tail, segment_ids, feature_map)
    v, value_tail = self._stream("value", self.writes * values, x, state.value_tail, segment_ids)
    out, memory = self.update(
      x,
      l2_normalise(self._split(q, self.key_heads, self.key_dim)),
      l2_normalise(self._split(k, self.key_heads, self.key_dim)),
      self._split(v, self.num_heads, self.value_dim),
      initial_state=state.memory,
      segment_ids=segment_ids,
      chunk_size=self.chunk_size,
      implementation=self.implementation,
    )
    y = self._read_out(x, out)
    return silence_padding(y, segment_ids), MatrixState(memory, query_tail, key_tail, value_tail)

  @property
  def types(self) -> dict[str, Any]:
    """What submodules are told about dtypes."""
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  def _stream(self, name, features, x, tail, segment_ids, activation=nn.silu):
    projected = dense(features, ("embed", "heads"), name=name, **self.types)(x)
    return ShortConv(self.conv_width, self.param_dtype, activation, name=f"{name}_conv")(projected, tail, segment_ids)

  def _split(self, x: jax.Array, heads: int, width: int) -> jax.Array:
    """[B, T, r * heads * width] -> [B, T, heads, width], or [B, T, r, heads, width] for r > 1."""
    many = x.shape[-1] // (heads * width)
    return x.reshape(*x.shape[:2], *([] if many == 1 else [many]), heads, width)

  def _read_out(self, x: jax.Array, out: jax.Array) -> jax.Array:
    if self.output_gate not in GATES:
      raise ValueError(f"output_gate={self.output_gate!r}; want one of {list(GATES)}.")
    activation = GATES[self.output_gate]
    out = RMSNorm(self.norm_epsilon, self.param_dtype, axis=None, name="norm")(out)
    if activation is not None:
      rank = self.output_gate_rank
      bias = None if rank is None else nn.initializers.zeros
      gate = LowRank(self.num_heads * self.value_dim, rank, bias, name="gate", **self.types)(x)
      out = out * activation(gate).reshape(out.shape)
    out = out.reshape(*out.shape[:2], -1)
    return dense(x.shape[-1], ("heads", "embed"), name="output", **self.types)(out)
