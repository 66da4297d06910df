"""Base class of memory layers with heads: projections and convolutions before the memory, a norm and a gate after it.

    q, k, v = activation(conv(W x))                      y = W_o (RMSNorm(o) * gate(W_g x))
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .memory_layer import MemoryLayer
from .norms import RMSNorm
from .projections import LowRank, ShortConv, dense

GATES = {"none": None, "silu": nn.silu, "sigmoid": nn.sigmoid}
# Where the bias of a gate starts. Weights start near zero, so this is a gate that lets everything pass, with one sign.
_GATE_BIAS = {"silu": 1.0, "sigmoid": 0.0}

Stream = Callable[[jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


class ProjectedMemory(MemoryLayer, kw_only=True):
  """A memory layer with short convolutions before the memory and a norm and a gate after it.

  Attributes:
    num_heads: number of heads, H. Each head has its own memory.
    conv_width: number of tokens that the short convolutions cover.
    conv_bias: whether they have biases.
    output_gate: activation of W_g x, which multiplies the normalised output: "none" (no gate), "silu" or "sigmoid".
    gate_rank: rank of W_g; `None` for full rank.
    gate_bias: whether W_g x has a bias; `None` for one where the rank is low. Without one a "silu" gate starts near zero, with
      a sign that differs from token to token, and small models learn to recall several times more slowly.
    norm_epsilon: epsilon of the output norm over each head's channels.
    implementation: of the memory's operation and of the convolutions: "auto", "pallas" (kernels, where the operation has some;
      the convolutions and a call of one token have none), "xla" or "recurrent" (the oracle: slow, but with derivatives of every
      mode and order).
  """

  num_heads: int
  conv_width: int = 4
  conv_bias: bool = False
  output_gate: str = "none"
  gate_rank: int | None = None
  gate_bias: bool | None = None
  norm_epsilon: float = 1e-5
  implementation: str = "auto"

  @property
  def output_gate_rank(self) -> int | None:
    return self.gate_rank

  @property
  def types(self) -> dict[str, Any]:
    """The dtype arguments of submodules."""
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    if self.output_gate not in GATES:
      raise ValueError(f"output_gate={self.output_gate!r}; expected one of {list(GATES)}.")

  def tail(self, batch_size: int, channels: int) -> jax.Array:
    """The inputs of a short convolution before the first token: zeros [B, conv_width - 1, channels]."""
    return jnp.zeros((batch_size, self.conv_width - 1, channels), self.activation_dtype())

  def stream(self, name: str, features: int, activation: Callable[[jax.Array], jax.Array] = nn.silu) -> Stream:
    """Returns a function from (x [B, T, D], tail, segment_ids) to (activation(conv(W x)) [B, T, features], the next tail)."""
    project, convolve = dense(features, ("embed", "heads"), name=name, **self.types), self.convolution(name, activation)
    return lambda x, tail, segment_ids: convolve(project(x), tail, segment_ids)

  def convolution(self, name: str, activation: Callable[[jax.Array], jax.Array] = nn.silu) -> ShortConv:
    """The short convolution of the stream `name`."""
    options = {"bias": self.conv_bias, "name": f"{name}_conv"}
    return ShortConv(self.conv_width, self.param_dtype, activation, self.implementation, **options)

  def read_out(self, x: jax.Array, out: jax.Array) -> jax.Array:
    """Maps the memory's output, [B, T, H, V], to y [B, T, D]; the gate is computed from x."""
    activation = GATES[self.output_gate]
    features = out.shape[2] * out.shape[3]
    out = RMSNorm(self.norm_epsilon, self.param_dtype, axis=None, name="norm")(out)
    if activation is not None:
      rank = self.output_gate_rank
      has_bias = rank is not None if self.gate_bias is None else self.gate_bias
      bias = nn.initializers.constant(_GATE_BIAS[self.output_gate]) if has_bias else None
      gate = LowRank(features, rank, bias, name="gate", **self.types)(x)
      out = out * activation(gate).reshape(out.shape)
    out = out.reshape(*out.shape[:2], -1)
    return dense(x.shape[-1], ("heads", "embed"), name="output", **self.types)(out)
