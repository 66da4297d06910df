"""A gated short convolution, which mixes the last few tokens. Below a memory layer it lets keys and values combine neighbours.

    y_t = W_o ( conv(W_v x)_t * W_g x_t )          conv: each channel over its own last `conv_width` tokens

Source: BaseConv (Arora et al. 2023, arXiv:2312.04927, section 4), which has neither W_v nor W_o.

The paper leaves open -> we do: width of the convolution -> the field `channels`, so that the state has a known size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels.short_conv import short_conv
from ..pallas_kernels.states import exportable
from .memory_layer import MemoryLayer, silence_padding
from .projections import conv_weight, dense


@exportable
class ConvState(NamedTuple):
  """State of `GatedConv`.

  Attributes:
    tail: the last conv_width - 1 inputs of the convolution, [B, conv_width - 1, channels], in the dtype of the activations.
  """

  tail: jax.Array


class GatedConv(MemoryLayer):
  """Gated short convolution (Arora et al. 2023, arXiv:2312.04927) over the last `conv_width` tokens.

      y_t = W_o (conv(W_v x)_t * W_g x_t)

  Attributes:
    channels: number of channels that are convolved.
    conv_width: number of tokens that each output depends on, the current one included.
    implementation: of the convolution: "auto", "xla" or "recurrent" (the oracle: slow, but with derivatives of every mode).
  """

  channels: int
  conv_width: int = 4
  implementation: str = "auto"

  def initial_state(self, batch_size: int) -> ConvState:
    """Zeros as the earlier inputs."""
    return ConvState(jnp.zeros((batch_size, self.conv_width - 1, self.channels), self.activation_dtype()))

  @nn.compact
  def __call__(
    self, x: jax.Array, state: ConvState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, ConvState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    value = dense(self.channels, ("embed", "heads"), name="value", **types)(x)
    gate = dense(self.channels, ("embed", "heads"), name="gate", **types)(x)
    weight = conv_weight(self, self.conv_width, self.channels)
    options = {"segment_ids": segment_ids, "implementation": self.implementation}
    mixed, tail = short_conv(value, weight, initial_state=state.tail, **options)
    y = dense(x.shape[-1], ("heads", "embed"), name="output", **types)(mixed * gate)
    return silence_padding(y, segment_ids), ConvState(tail)
