"""Mamba and Mamba-2: selective state-space models, whose step, write and read directions depend on the token.

    Mamba:     h_t = exp(Delta_t a) h_{t-1} + Delta_t x_t b_t^T                  y_t = c_t . h_t + D x_t
    Mamba-2:   S_t = exp(Delta_t a) S_{t-1} + b_t (Delta_t x_t)^T per head       y_t = S_t^T c_t + D x_t

Sources: Gu & Dao 2023 (arXiv:2312.00752); Dao & Gu 2024 (arXiv:2405.21060), and the code of both. Mamba has a step for every
channel and a decay for every channel and state; Mamba-2 has one of each per head, and is linear attention with a decay.

The papers leave open, or their code differs -> we do: the write is Delta b, as in the code; the text of the first has an
integral · parameters and their initial values as in the code, but for the division of the output projection by the root of the
depth, which a layer does not know · the input projection is several matrices, so that each can be split over devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels.delta_rule import linear_attention
from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.selective_scan import selective_scan
from ..pallas_kernels.states import exportable
from .axes import named
from .linear_attention import MatrixState
from .memory_layer import MemoryLayer, silence_padding
from .norms import RMSNorm, beside
from .projected_memory import Stream
from .projections import ShortConv, dense, for_tokens, gate_types, initial_log_rate, initial_step_bias

UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(-F^{-1/2}, F^{-1/2}) for F inputs


@exportable
class ScanState(NamedTuple):
  """State of `Mamba`.

  Attributes:
    memory: h, float32 [B, N, channels].
    tail: the last conv_width - 1 inputs of the short convolution, [B, conv_width - 1, channels].
  """

  memory: jax.Array
  tail: jax.Array


class _StateSpace(MemoryLayer, kw_only=True):
  """What both layers share. They describe the fields."""

  conv_width: int = 4
  chunk_size: int | None = None
  precision: str | None = None
  implementation: str = "auto"

  @property
  def types(self) -> dict[str, Any]:
    """The dtype arguments of submodules."""
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  def tail(self, batch_size: int, channels: int) -> jax.Array:
    """The inputs of a short convolution before the first token: zeros [B, conv_width - 1, channels]."""
    return jnp.zeros((batch_size, self.conv_width - 1, channels), self.activation_dtype())

  @nn.nowrap
  def project(self, name: str, features: int, axes: tuple[str | None, str | None] = ("embed", "heads")) -> nn.Dense:
    return dense(features, axes, kernel=UNIFORM, name=name, **self.types)

  @nn.nowrap
  def convolve(self, name: str) -> ShortConv:
    return ShortConv(self.conv_width, self.param_dtype, nn.silu, self.implementation, bias=True, name=name)

  @nn.nowrap
  def operation(self, x: jax.Array, state: Any, segment_ids: jax.Array | None) -> dict[str, Any]:
    """Options of the operation for the tokens of x [B, T, D]."""
    options = {"chunk_size": self.chunk_size, "implementation": for_tokens(self.implementation, x)}
    return options | {"initial_state": state.memory, "segment_ids": segment_ids}


class Mamba(_StateSpace, kw_only=True):
  """Mamba (Gu & Dao 2023, arXiv:2312.00752): a selective scan between a short convolution and a gate.

      x = silu(conv(W_x u))        z = W_z u        (d, b, c) = W x        Delta = softplus(W_d d + bias)
      h_t = exp(Delta_t a) h_{t-1} + Delta_t x_t b_t^T        y = W_o ((c . h + D x) * silu(z)),    a = -exp(A_log)

  Attributes:
    channels: inner width; twice the model's in the paper.
    state_dim: number of states of a channel, N.
    step_rank: width of d, from which the steps are made; `None` for a sixteenth of the model's width, rounded up.
    conv_width: number of tokens that the short convolution covers.
    chunk_size: option of the operation, which affects speed only; see `memzoo.pallas_kernels.selective_scan`.
    precision: of the steps: `None`, or "highest" to multiply bfloat16 activations as float32.
    implementation: of the operation and of the convolution: "auto", "pallas" (kernels, which the convolution and a call of one
      token do not have), "xla" or "recurrent" (the oracle: slow, but with derivatives of every mode and order).
  """

  channels: int
  state_dim: int = 16
  step_rank: int | None = None

  def initial_state(self, batch_size: int) -> ScanState:
    """A memory of zeros, and zeros as the earlier inputs of the convolution."""
    memory = jnp.zeros((batch_size, self.state_dim, self.channels), accumulator(self.activation_dtype()))
    return ScanState(memory, self.tail(batch_size, self.channels))

  def matrices(self, state: ScanState) -> dict[str, jax.Array]:
    """Returns h under the name "memory", as one head."""
    return {"memory": state.memory[:, None]}

  @nn.compact
  def __call__(
    self, x: jax.Array, state: ScanState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, ScanState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    state = self.begin(x, state, segment_ids)
    u = x.astype(self.activation_dtype(x))
    rank = self.step_rank or (u.shape[-1] + 15) // 16
    gate = nn.silu(self.project("gate", self.channels)(u))
    x, tail = self.convolve("conv")(self.project("input", self.channels)(u), state.tail, segment_ids)
    selected = self.project("select", rank + 2 * self.state_dim, ("heads", None))(x)
    low, b, c = jnp.split(selected, (rank, rank + self.state_dim), axis=-1)
    shape = self.state_dim, self.channels
    a_log = self.param("A_log", named(_log_of_counts, None, "heads", decays=False), shape, self.param_dtype)
    a = -jnp.exp(a_log.astype(accumulator(x)))
    out, memory = selective_scan(x, self._step(low), a, b, c, **self.operation(x, state, segment_ids))
    skip = self.param("D", named(nn.initializers.ones, "heads"), (self.channels,), self.param_dtype)
    y = self.project("output", u.shape[-1], ("heads", "embed"))((out + _scaled(x, skip)) * gate)
    return silence_padding(y, segment_ids), ScanState(memory, tail)

  def _step(self, low: jax.Array) -> jax.Array:
    """Delta [B, T, channels], in float32."""
    types = gate_types(low, self.param_dtype, self.precision)
    return nn.softplus(dense(self.channels, (None, "heads"), kernel=UNIFORM, bias=initial_step_bias, name="step", **types)(low))


class Mamba2(_StateSpace, kw_only=True):
  """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): linear attention with a decay per head, whose heads share keys and queries.

      c = silu(conv(W_c u))    b = silu(conv(W_b u))    x = silu(conv(W_x u))    z = W_z u    Delta = softplus(W_d u + bias)
      S_t = exp(-Delta_t exp(A_log)) S_{t-1} + b_t (Delta_t x_t)^T        y = W_o RMSNorm((S^T c + D x) * silu(z))

  Attributes:
    num_heads: number of heads, H; num_heads * head_dim is twice the model's width in the paper.
    head_dim: width of a head's x.
    state_dim: width of b and c, N.
    num_groups: number of different b and c, a divisor of `num_heads`; neighbouring heads share them. The norm is over the
      channels of a group.
    norm_epsilon: epsilon of the norm.
    conv_width: number of tokens that the short convolutions cover.
    chunk_size: option of the operation, which affects speed only; see `memzoo.pallas_kernels.delta_rule`.
    precision: of the operation and the steps: `None`, or "highest" to multiply bfloat16 activations as float32.
    implementation: of the operation and of the convolutions: "auto", "pallas" (kernels, which the convolutions and a call of
      one token do not have), "xla" or "recurrent" (the oracle: slow, but with derivatives of every mode and order).
  """

  num_heads: int
  head_dim: int = 64
  state_dim: int = 128
  num_groups: int = 1
  norm_epsilon: float = 1e-5

  def initial_state(self, batch_size: int) -> MatrixState:
    """A memory of zeros, and zeros as the earlier inputs of the convolutions."""
    shared, own = self.num_groups * self.state_dim, self.num_heads * self.head_dim
    memory = jnp.zeros((batch_size, self.num_heads, self.state_dim, self.head_dim), accumulator(self.activation_dtype()))
    return MatrixState(memory, *(self.tail(batch_size, channels) for channels in (shared, shared, own)))

  def matrices(self, state: MatrixState) -> dict[str, jax.Array]:
    """Returns S under the name "memory"."""
    return {"memory": state.memory}

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    if self.num_heads % self.num_groups:
      raise ValueError(f"num_groups={self.num_groups}; expected a divisor of num_heads={self.num_heads}.")

  @nn.compact
  def __call__(
    self, x: jax.Array, state: MatrixState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, MatrixState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    state = self.begin(x, state, segment_ids)
    u = x.astype(self.activation_dtype(x))
    shared, own = (self.num_groups, self.state_dim), (self.num_heads, self.head_dim)
    gate = nn.silu(self.project("gate", self.num_heads * self.head_dim)(u))
    c, read_tail = self._stream("read", shared)(u, state.query_tail, segment_ids)
    b, write_tail = self._stream("write", shared)(u, state.key_tail, segment_ids)
    x, input_tail = self._stream("input", own)(u, state.value_tail, segment_ids)
    step, log_decay = self._step(u)
    written = (step[..., None] * x.astype(step.dtype)).astype(x.dtype)
    options = self.operation(x, state, segment_ids) | {"precision": self.precision, "scale": 1.0}
    out, memory = linear_attention(c, b, written, log_decay, **options)
    skip = self.param("D", named(nn.initializers.ones, "heads"), (self.num_heads,), self.param_dtype)
    out = (out + _scaled(x, skip[:, None])).reshape(gate.shape)
    normed = RMSNorm(self.norm_epsilon, self.param_dtype, "heads", self.num_groups, name="norm")(out * gate)
    y = self.project("output", u.shape[-1], ("heads", "embed"))(normed)
    return silence_padding(y, segment_ids), MatrixState(memory, read_tail, write_tail, input_tail)

  @nn.nowrap
  def _stream(self, name: str, heads: tuple[int, int]) -> Stream:
    """Returns a function from (u [B, T, D], tail, segment_ids) to (silu(conv(W u)) [B, T, *heads], the next tail)."""
    project, convolve = self.project(name, heads[0] * heads[1]), self.convolve(f"{name}_conv")

    def stream(u, tail, segment_ids):
      x, tail = convolve(project(u), tail, segment_ids)
      return x.reshape(*x.shape[:2], *heads), tail

    return stream

  def _step(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Delta and the log-decay, [B, T, H] each, in float32."""
    types = gate_types(u, self.param_dtype, self.precision)
    project = dense(self.num_heads, ("embed", "heads"), kernel=UNIFORM, bias=initial_step_bias, name="step", **types)
    step = nn.softplus(project(u))
    a_log = self.param("A_log", named(initial_log_rate, "heads"), (self.num_heads,), self.param_dtype)
    return step, -step * beside(step, jnp.exp(a_log.astype(step.dtype)))


def _scaled(x: jax.Array, skip: jax.Array) -> jax.Array:
  """x times a parameter of its last axes, in the dtype of x."""
  return x * beside(x, skip)


def _log_of_counts(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
  """log n for the n-th state, n = 1..N, of every channel."""
  del key
  return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))[:, None], shape)
