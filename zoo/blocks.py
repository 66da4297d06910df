"""Residual blocks around a memory layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..layers.norms import RMSNorm
from ..layers.projections import dense


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up, whose gradient is held in memory for the two products that each half of it goes into.

  Left to itself, XLA on a CPU computes it again, exponentials and all, inside the transposed copy that one of them reads.
  """
  return nn.silu(gate) * up


def _gated_forward(gate, up):
  return gated(gate, up), (gate, up)


def _gated_backward(residuals, d_out):
  d_gate, d_up = jax.vjp(lambda gate, up: nn.silu(gate) * up, *residuals)[1](d_out)
  return jax.lax.optimization_barrier((d_gate, d_up))


gated.defvjp(_gated_forward, _gated_backward)


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
    return dense(x.shape[-1], ("mlp", "embed"), name="down", **types)(gated(gate, up))


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
