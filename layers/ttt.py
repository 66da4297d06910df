"""TTT: layers whose hidden state is a linear map or an MLP, trained to reconstruct the tokens that it reads.

    l = 1/2 |k + LN(f(k)) - v|^2      W_i = W_0 - (1/i + lambda_i)+ sum_{j<=i} eta_j g_j      y_i = q_i + LN(f(q_i; W_i))

for the tokens i = 1..C of a chunk: the running average of the chunk's steps, with gradients at its initial weights W_0.
Source: Sun et al. 2024 (arXiv:2407.04620), in the form of the authors' code: queries and keys share one projection and have a
convolution each; rotary positions count within the chunk; a layer norm over all heads and a GELU gate follow.

The paper leaves open -> we do:

- negative factors 1/i + lambda_i -> zero, as in the authors' code
- lambda -> learned for each head and place in the chunk, from zero
- the start of chunks, convolutions and positions -> the start of each document
- the largest step, which the authors warm up -> constant; the gate of each token is learned
- forgetting -> none. Steps add up over a document: at initial parameters, after 50,000 random tokens, new ones change later
  outputs by a hundredth of what they do in a fresh document.

Differences from the authors' code: the convolutions have no bias, there is no convolution before the block, and calls may have
any length (theirs: whole chunks or a single token).
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels import test_time_memory as ttm
from ..pallas_kernels.documents import documents, positions, undivided
from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.states import exportable
from .axes import named
from .inner_learner import InnerLearner
from .memory_layer import silence_padding
from .norms import LayerNorm
from .projections import INIT, ShortConv, Strength, dense
from .rotary import check_rotated, rotate


@exportable
class TTTState(NamedTuple):
  """State of a TTT layer.

  Attributes:
    memory: the weights at the start of the chunk and the sum of steps since; see
      `memzoo.pallas_kernels.test_time_memory.State`.
    query_tail, key_tail: the last inputs of the short convolutions, [B, conv_width - 1, channels]. They are equal, because
      both convolutions have the same input.
  """

  memory: ttm.State
  query_tail: jax.Array
  key_tail: jax.Array


class TTTLinear(InnerLearner, kw_only=True):
  """TTT-Linear (Sun et al. 2024, arXiv:2407.04620): y = q + LN(q W + b), W and b trained on k + LN(k W + b) -> v.

      W_i = W_0 - (1/i + lambda_i)+ sum_{j<=i} eta_j grad 1/2 |k_j + LN(k_j W_0 + b_0) - v_j|^2      i = 1..C of a chunk

  Attributes:
    num_heads: number of heads, H, each with a memory of its own.
    head_dim: width of a head, d; even.
    chunk_size: tokens whose gradients are taken at the same weights, C; the paper's "mini-batch". It changes results, not only
      speed.
    max_step: the step size of a token is up to max_step / d.
    depth, expansion: number of matrices, and hidden width over d.
    conv_width: width of the short convolutions, in tokens.
    rope_base: base of the rotary frequencies.
    norm_epsilon: epsilon of the norm over all heads.

  The other attributes are those of `InnerLearner`.
  """

  fills_up: ClassVar[bool] = True

  num_heads: int
  head_dim: int
  chunk_size: int = 16
  max_step: float = 1.0
  depth: int = 1
  expansion: float = 4
  conv_width: int = 4
  rope_base: float = 10_000.0
  norm_epsilon: float = 1e-6

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    check_rotated(self.head_dim)

  @property
  def spec(self) -> ttm.Spec:
    """The arguments of the operation."""
    d = self.head_dim
    memory = ttm.Memory(d, d, depth=self.depth, expansion=self.expansion, norm=True, biases=True)
    return ttm.Spec(memory, ttm.Loss(scale=0.5), chunk_size=self.chunk_size, average=True)

  def initial_state(self, batch_size: int) -> TTTState:
    """The state before the first token."""
    dtype, shape = self.activation_dtype(), (batch_size, self.conv_width - 1, self.num_heads * self.head_dim)
    tails = (jnp.zeros(shape, dtype) for _ in range(2))
    return TTTState(ttm.start(self.spec, batch_size, self.num_heads, accumulator(dtype)), *tails)

  @nn.compact
  def __call__(
    self, x: jax.Array, state: TTTState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, TTTState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    channels = self.num_heads * self.head_dim

    def project(name: str) -> jax.Array:
      return dense(channels, ("embed", "heads"), name=name, **types)(x)

    def convolve(name: str, tail: jax.Array) -> tuple[jax.Array, jax.Array]:
      conv = ShortConv(self.conv_width, self.param_dtype, lambda y: y, self.implementation, name=f"{name}_conv")
      return conv(shared, tail, segment_ids)

    shared = project("query_key")
    q, query_tail = convolve("query", state.query_tail)
    k, key_tail = convolve("key", state.key_tail)
    q, k, v = (a.reshape(*x.shape[:2], self.num_heads, self.head_dim) for a in (q, k, project("value")))
    docs = undivided(*x.shape[:2]) if segment_ids is None else documents(segment_ids)
    place = positions(docs, state.memory.count) % self.chunk_size
    q, k = (rotate(a, place, self.rope_base) for a in (q, k))
    step = Strength(self.num_heads, self.max_step / self.head_dim, 0.0, self.param_dtype, self.precision, name="eta")(x)
    learned = self.learn(self.initial_weights(), q, k, v, ttm.Gates(step), None if fresh else state.memory, segment_ids)
    out = learned.y.reshape(*x.shape[:2], channels)
    out = LayerNorm(self.norm_epsilon, self.param_dtype, axis="heads", name="norm")(out) * nn.gelu(project("gate"))
    y = dense(x.shape[-1], ("heads", "embed"), name="output", **types)(out)
    return silence_padding(y, segment_ids), TTTState(learned.state, query_tail, key_tail)

  def initial_weights(self) -> ttm.InitialWeights:
    """The weights at the start of a document."""

    def param(name: str, init: Any, *shape: int, decays: bool = False) -> jax.Array:
      shape, axes = (self.num_heads, *shape), ("heads", *[None] * len(shape))
      return self.param(name, named(init, *axes, decays=decays), shape, self.param_dtype)

    weights = {name: param(f"memory_{name}", _start, *shape, decays=True) for name, shape in self.spec.memory.shapes().items()}
    norm = param("memory_norm_scale", nn.initializers.ones, self.head_dim), param("memory_norm_bias", _zeros, self.head_dim)
    return ttm.InitialWeights(weights, norm=norm, average=param("average", _zeros, self.chunk_size))


_zeros = nn.initializers.zeros


def _start(key, shape, dtype=jnp.float32):
  """Matrices from `INIT`; biases, the last rows, are zero."""
  return INIT(key, shape, dtype).at[..., -1, :].set(0)


class TTTMLP(TTTLinear, kw_only=True):
  """TTT-MLP (Sun et al. 2024, arXiv:2407.04620): y = q + LN(MLP(q)), the MLP trained on k + LN(MLP(k)) -> v.

  The authors warm `max_step` up, starting at a tenth of it; here it is constant.

  The attributes are those of `TTTLinear`.
  """

  depth: int = 2
  max_step: float = 0.1
