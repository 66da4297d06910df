"""The gated MLP of a transformer block: W_down (silu(W_gate x) * W_up x) (Shazeer 2020, arXiv:2002.05202)."""

import jax
from flax import linen as nn

from ..pallas_kernels.derivatives import gradients_together
from .memory_layer import MemoryLayer, silence_padding
from .projections import dense


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up, with a backward pass that keeps gate and up, and writes both gradients to memory once.

  Each gradient enters two matrix products. Without the barrier, XLA on a CPU recomputes the gradient, exponentials
  included, inside the transposed copy that one of the products reads.
  """
  gate, up = gradients_together(gate, up)
  return jax.checkpoint(lambda gate, up: nn.silu(gate) * up, prevent_cse=False)(gate, up)


class SwiGLU(MemoryLayer, kw_only=True):
  """W_down (silu(W_gate x) * W_up x), token by token: a layer without memory, whose state is empty.

  Attributes:
    ratio: hidden width divided by the width of x; the hidden width is rounded up to a multiple of 32.
    hidden: the hidden width itself, in place of `ratio`; `None` for that.
    norm_after: whether a stack normalises what comes out, x + norm(mlp(x)), and not what goes in.
  """

  ratio: float = 8 / 3
  hidden: int | None = None
  norm_after: bool = False

  def hidden_width(self, width: int) -> int:
    """The hidden width for inputs of this width."""
    return self.hidden or -(-int(width * self.ratio) // 32) * 32

  def initial_state(self, batch_size: int) -> tuple[()]:
    """No state."""
    del batch_size
    return ()

  @nn.compact
  def __call__(
    self, x: jax.Array, state: tuple[()] | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[()]]:
    """Maps x [B, T, D] to (y [B, T, D], ()); see `MemoryLayer`."""
    self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    return silence_padding(self.mlp(x, self.hidden_width(x.shape[-1])), segment_ids), ()

  def mlp(self, x: jax.Array, hidden: int) -> jax.Array:
    """The map of each token of x [B, T, D], by way of `hidden` channels. Subclasses override this."""
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    gate = dense(hidden, ("embed", "mlp"), name="gate", **types)(x)
    up = dense(hidden, ("embed", "mlp"), name="up", **types)(x)
    return dense(x.shape[-1], ("mlp", "embed"), name="down", **types)(gated(gate, up))
