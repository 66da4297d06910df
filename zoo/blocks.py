"""Residual blocks around a memory layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..layers.norms import RMSNorm
from ..layers.projections import dense


class SwiGLU(nn.Module):
  """W_down (silu(W_gate x) * W_up x) (Shazeer 2020, arXiv:2002.05202).

  Attributes:
    hidden: width in between.
  """

  hidden: int
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    gate = dense(self.hidden, ("embed", "mlp"), name="gate", **types)(x)
    up = dense(self.hidden, ("embed", "mlp"), name="up", **types)(x)
    return dense(x.shape[-1], ("mlp", "embed"), name="down", **types)(nn.silu(gate) * up)


class Block(nn.Module):
  """x += mixer(norm(x)); x += SwiGLU(norm(x)).

  Attributes:
    mixer: the memory layer.
    hidden: of the SwiGLU; 0 leaves it out.
    norm_epsilon: of both norms.
  """

  mixer: nn.Module
  hidden: int
  norm_epsilon: float = 1e-6
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, state: Any = None, segment_ids: jax.Array | None = None) -> tuple[jax.Array, Any]:
    def norm(name):
      return RMSNorm(self.norm_epsilon, self.param_dtype, name=name)

    y, state = self.mixer(norm("mixer_norm")(x), state, segment_ids)
    x = x + y
    if self.hidden:
      x = x + SwiGLU(self.hidden, self.dtype, self.param_dtype, name="mlp")(norm("mlp_norm")(x))
    return x, state
