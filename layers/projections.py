"""Projections, short convolutions and gates, which the memory layers share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.numerics import FULL, Precision, accumulator, einsum, intermediate_precision
from ..pallas_kernels.partition import apart, free_axes
from ..pallas_kernels.short_conv import short_conv
from .axes import named
from .norms import beside

INIT = nn.initializers.normal(0.02)


def dense(
  features: int, axes: tuple[str | None, str | None], *, kernel: Callable = INIT, bias: Callable | None = None, **options: Any
) -> nn.Dense:
  """`nn.Dense` with logical axis names for sharding, and by default weights from normal(0, 0.02).

  Args:
    features: output width.
    axes: logical names of the kernel's (input, output) axes.
    kernel: initialiser of the weights.
    bias: initialiser of the bias; `None` for no bias.
    **options: `name`, `dtype`, `param_dtype`, `precision` of `nn.Dense`.
  """
  return nn.Dense(
    features,
    use_bias=bias is not None,
    kernel_init=named(kernel, *axes),
    bias_init=named(bias or nn.initializers.zeros, axes[1]),
    dot_general=_product,
    promote_dtype=_promoted,
    **options,
  )


def _promoted(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **options: Any) -> list[jax.Array | None]:
  """The arrays in one dtype, the bias not split over explicit mesh axes that split x."""
  x, kernel, bias = promote_dtype(x, kernel, bias, **options)
  return [x, kernel, bias if bias is None else apart(bias, jax.typeof(x).sharding.spec)]


def _product(
  x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Precision | None = None, **_: Any
) -> jax.Array:
  """x [..., D] times the kernel [D, F], in one pass where both are 16-bit, else at `precision`, by default in full.

  Over explicit mesh axes the kernel's D is laid out like that of x, and F is not split over axes that split x.
  """
  precision = jax.lax.Precision.DEFAULT if x.dtype.itemsize == 2 else precision or FULL
  product = partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, precision=precision)
  x_type, kernel_type = jax.typeof(x).sharding, jax.typeof(kernel).sharding
  *rows, inner = x_type.spec
  before, outer = kernel_type.spec
  free = free_axes(outer, x_type.spec)
  if inner is None and before is None and free == outer:
    return product(x, kernel)
  mesh = kernel_type.mesh if x_type.mesh.empty else x_type.mesh
  kernel = jax.sharding.reshard(kernel, NamedSharding(mesh, P(inner, free)))
  return product(x, kernel, out_sharding=NamedSharding(mesh, P(*rows, free)))


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """table [V, D] at tokens [B, T], also over explicit mesh axes, where each device looks its rows up in the whole table."""
  spec, place = jax.typeof(tokens).sharding.spec, jax.typeof(table).sharding
  if not any((*spec, *place.spec)):
    return jnp.take(table, tokens, axis=0)
  mesh = place.mesh if jax.typeof(tokens).sharding.mesh.empty else jax.typeof(tokens).sharding.mesh
  table = jax.sharding.reshard(table, NamedSharding(mesh, P(None, None)))
  return table.at[tokens].get(out_sharding=NamedSharding(mesh, P(*spec, None)))


def unembed(x: jax.Array, table: jax.Array) -> jax.Array:
  """x [B, T, D] times the transposed table [V, D], in `accumulator(x)`; over explicit mesh axes D is whole on each device."""
  place, (vocab, width) = jax.typeof(x).sharding, jax.typeof(table).sharding.spec
  *rows, inner = place.spec
  free = free_axes(vocab, rows)
  if (inner, width, free) != (None, None, vocab):
    mesh = jax.typeof(table).sharding.mesh if place.mesh.empty else place.mesh
    x = jax.sharding.reshard(x, NamedSharding(mesh, P(*rows, None)))
    table = jax.sharding.reshard(table, NamedSharding(mesh, P(free, None)))
  return einsum("btd,vd->btv", x, table)


class LowRank(nn.Module):
  """A linear map of low rank, x -> W2 W1 x.

  Attributes:
    features: output width.
    rank: output width of W1; `None` for a single full-rank map.
    bias: initialiser of the output's bias; `None` for no bias.
    precision: of products that are not 16-bit; `None` for full precision.
    axis: logical name of the output axis, for sharding.
  """

  features: int
  rank: int | None
  bias: Callable | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  precision: Precision | None = None
  axis: str = "heads"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}
    if self.rank is None:
      return dense(self.features, ("embed", self.axis), bias=self.bias, name="full", **types)(x)
    x = dense(self.rank, ("embed", None), name="down", **types)(x)
    return dense(self.features, (None, self.axis), bias=self.bias, name="up", **types)(x)


def without_kernels(implementation: str) -> str:
  """An `implementation` for what has no kernels, where "pallas" is asked for."""
  return "auto" if implementation == "pallas" else implementation


def for_tokens(implementation: str, x: jax.Array) -> str:
  """An `implementation` for x [B, T, ...]: a call of one token has no kernels."""
  return without_kernels(implementation) if x.shape[1] == 1 else implementation


class ShortConv(nn.Module):
  """A causal depthwise convolution (`memzoo.pallas_kernels.short_conv`) followed by an activation.

  Attributes:
    width: number of tokens that each output depends on, the current one included.
    activation: function applied to the output.
    implementation: of the operation; "pallas" is "auto", because it has no kernels.
    bias: whether a bias is added before the activation.
  """

  width: int = 4
  param_dtype: Any = jnp.float32
  activation: Callable[[jax.Array], jax.Array] = nn.silu
  implementation: str = "auto"
  bias: bool = False

  def __call__(self, x: jax.Array, tail: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Maps x [B, T, D] and the inputs before it, `tail` [B, width - 1, D], to the output and the next tail."""
    return self.convolve(*self.weights(x.shape[-1]), x, tail, segment_ids)

  @nn.compact
  def weights(self, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """The parameters: the weight [width, channels], and the bias [channels] or `None`."""
    weight, bound = conv_weight(self, self.width, channels), self.width**-0.5
    init = named(_uniform(-bound, bound), "heads")
    return weight, self.param("bias", init, (channels,), self.param_dtype) if self.bias else None

  @nn.nowrap
  def convolve(
    self, weight: jax.Array, bias: jax.Array | None, x: jax.Array, tail: jax.Array, segment_ids: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """`__call__` with the parameters as arguments."""
    options = {"segment_ids": segment_ids, "implementation": without_kernels(self.implementation)}
    y, tail = short_conv(x, weight, initial_state=tail, **options)
    return self.activation(y if bias is None else y + beside(y, bias)), tail


def gate_types(x: jax.Array, param_dtype: Any, precision: str | None) -> dict[str, Any]:
  """Options of `dense` for a gate, which is float32, from activations x: products at `intermediate_precision`."""
  return {"dtype": accumulator(x), "param_dtype": param_dtype, "precision": intermediate_precision(precision, x)}


class Strength(nn.Module):
  """A write or erase strength per head or per channel: maximum * sigmoid(W x + b), in float32.

  Attributes:
    num_heads: number of heads, H. The output is [B, T, H] or, with `channels`, [B, T, H, channels].
    maximum: upper bound of the gate. With 2, an update of the delta rule can be a reflection (negative eigenvalues).
    bias: initial b; `None` for no bias.
    precision: `None`, or "highest" for full precision whatever the dtype of x.
    channels: number of strengths per head; `None` for one strength per head.
  """

  num_heads: int
  maximum: float = 1.0
  bias: float | None = None
  param_dtype: Any = jnp.float32
  precision: str | None = None
  channels: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    bias = None if self.bias is None else nn.initializers.constant(self.bias)
    types = gate_types(x, self.param_dtype, self.precision)
    features = self.num_heads * (self.channels or 1)
    strength = self.maximum * nn.sigmoid(dense(features, ("embed", "heads"), bias=bias, name="logits", **types)(x))
    return strength if self.channels is None else strength.reshape(*x.shape[:2], self.num_heads, self.channels)


class LogShare(nn.Module):
  """The logarithm of the share that each head keeps: log sigmoid(W x + b) <= 0, in float32.

  Attributes:
    num_heads: number of heads.
    bias: initial b.
    precision: `None`, or "highest" for full precision whatever the dtype of x.
  """

  num_heads: int
  bias: float = 0.0
  param_dtype: Any = jnp.float32
  precision: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    types = gate_types(x, self.param_dtype, self.precision)
    bias = nn.initializers.constant(self.bias)
    return nn.log_sigmoid(dense(self.num_heads, ("embed", "heads"), bias=bias, name="logits", **types)(x))


class LogDecay(nn.Module):
  """A log-decay per head or per channel, at most 0, in float32 (float64 where the input is).

      s = exp(A_log) softplus(u + dt_bias),     g = -s       or, bounded below by l,       g = |l| expm1(-s / |l|)
      or, by a sigmoid,     g = l sigmoid(exp(A_log) (u + dt_bias))

  u is a linear map of x. The unbounded form is that of Mamba-2 and Gated DeltaNet. The bounded form (Erase-then-Delta
  Attention, arXiv:2606.26560) agrees with it for small s, and tends to it as l goes to minus infinity. The form by a sigmoid is
  that of later models with Kimi Delta Attention.

  Attributes:
    num_heads: number of heads, H. The output is [B, T, H] or, with `channels`, [B, T, H, channels].
    channels: number of decays per head; `None` for one decay per head.
    rank: rank of the map from x to u; `None` for full rank.
    lower_bound: l < 0; `None` for no bound.
    by_sigmoid: whether the bounded form is the one by a sigmoid.
    precision: `None`, or "highest" for full precision whatever the dtype of x.
  """

  num_heads: int
  channels: int | None = None
  rank: int | None = None
  lower_bound: float | None = None
  by_sigmoid: bool = False
  param_dtype: Any = jnp.float32
  precision: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.num_heads,) if self.channels is None else (self.num_heads, self.channels)
    features = self.num_heads * (self.channels or 1)
    types = gate_types(x, self.param_dtype, self.precision)
    wide = types["dtype"]
    u = LowRank(features, self.rank, name="step", **types)(x)
    a_log = self.param("A_log", named(initial_log_rate, "heads"), shape[:1], self.param_dtype)
    dt_bias = self.param("dt_bias", named(initial_step_bias, "heads"), (features,), self.param_dtype)

    a_log, dt_bias = (apart(a, jax.typeof(u).sharding.spec[:2]) for a in (a_log, dt_bias))
    logits = (u + dt_bias.astype(wide)[None, None]).reshape(*x.shape[:2], *shape)
    rate = jnp.exp(a_log.astype(wide)).reshape(1, 1, -1, *[1] * (len(shape) - 1))
    if self.by_sigmoid and self.lower_bound is not None:
      return self.lower_bound * nn.sigmoid(rate * logits)
    decay = rate * nn.softplus(logits)
    return -decay if self.lower_bound is None else -self.lower_bound * jnp.expm1(decay / self.lower_bound)


def conv_weight(module: nn.Module, width: int, channels: int) -> jax.Array:
  """The parameter "weight" [width, channels] of a short convolution of `module`, from Uniform(-width^{-1/2}, width^{-1/2})."""
  bound = width**-0.5
  return module.param("weight", named(_uniform(-bound, bound), None, "heads"), (width, channels), module.param_dtype)


def _uniform(low: float, high: float) -> Callable:
  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, low, high)

  return init


def initial_log_rate(key, shape, dtype=jnp.float32):
  """log A, with A from Uniform(1, 16)."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def initial_step_bias(key, shape, dtype=jnp.float32):
  """The inverse softplus of dt, with dt log-uniform in [0.001, 0.1]."""
  dt = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1)))
  return dt + jnp.log(-jnp.expm1(-dt))
