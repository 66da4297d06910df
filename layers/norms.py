"""Normalisations. They compute in float32 (float64 where the input is) and return the dtype of the input."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.partition import apart
from .axes import named


def l2_normalise(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """x / sqrt(sum_i x_i^2 + epsilon) over the last axis. For x = 0 the result and its gradient are finite."""
  wide = x.astype(accumulator(x))
  return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class RMSNorm(nn.Module):
  """scale * x / sqrt(mean_i x_i^2 + epsilon) over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

  Attributes:
    epsilon: added inside the root.
    param_dtype: dtype of `scale`, which is initialised to one.
    axis: logical name of the normalised axis, for sharding.
    groups: number of equal parts of the axis, each of which has a mean of its own.
    zero_centred: whether the factor is 1 + scale, and `scale` is initialised to zero.
  """

  epsilon: float = 1e-6
  param_dtype: Any = jnp.float32
  axis: str | None = "norm"
  groups: int = 1
  zero_centred: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    initial = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
    scale = self.param("scale", named(initial, self.axis), x.shape[-1:], self.param_dtype)
    wide = x.astype(accumulator(x))
    factor = beside(wide, scale) + 1 if self.zero_centred else beside(wide, scale)
    parts = wide if self.groups == 1 else wide.reshape(*x.shape[:-1], self.groups, -1)
    normed = parts * jax.lax.rsqrt(jnp.mean(parts * parts, axis=-1, keepdims=True) + self.epsilon)
    return (normed.reshape(wide.shape) * factor).astype(x.dtype)


class LayerNorm(nn.Module):
  """scale * (x - mean x) / sqrt(var x + epsilon) + bias over the last axis (Ba et al. 2016, arXiv:1607.06450).

  Attributes:
    epsilon: added inside the root.
    param_dtype: dtype of `scale`, which is initialised to one, and `bias`, to zero.
    axis: logical name of the normalised axis, for sharding.
  """

  epsilon: float = 1e-6
  param_dtype: Any = jnp.float32
  axis: str | None = "norm"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", named(nn.initializers.ones, self.axis), x.shape[-1:], self.param_dtype)
    bias = self.param("bias", named(nn.initializers.zeros, self.axis), x.shape[-1:], self.param_dtype)
    wide = x.astype(accumulator(x))
    scale, bias = (beside(wide, a) for a in (scale, bias))
    return (jax.nn.standardize(wide, epsilon=self.epsilon) * scale + bias).astype(x.dtype)


def beside(x: jax.Array, param: jax.Array) -> jax.Array:
  """A parameter of the last axes of x, in the dtype of x and with its number of axes."""
  before = x.ndim - param.ndim
  param = apart(param, jax.typeof(x).sharding.spec[:before])
  return jnp.expand_dims(param.astype(x.dtype), range(before))
