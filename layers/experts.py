"""A mixture of experts: many small gated MLPs, of which each token takes a few.

    s = softmax(W_r x)  or  sigmoid(W_r x)           C = the `experts_per_token` experts with the largest s_e + b_e
    y = scale sum_{e in C} w_e MLP_e(x)  +  g MLP_shared(x)         w_e = s_e,  or  s_e / sum_{c in C} s_c

Sources: Shazeer et al. 2017, arXiv:1701.06538; shared experts, Dai et al. 2024, arXiv:2401.06066; the bias b, which only
chooses, Wang et al. 2024, arXiv:2408.15664. Tokens are sorted by expert (`memzoo.pallas_kernels.grouped`), so none is dropped.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.grouped import blocks_of, grouped_matmul
from ..pallas_kernels.numerics import accumulator, einsum
from ..pallas_kernels.partition import HEADS, ROWS, partitioned
from .axes import named
from .context import Context, ContextLayer
from .memory_layer import silence_padding
from .projections import INIT, dense, gate_types
from .routing import choose, publish_routing, publishes_routing
from .swiglu import SwiGLU, gated

SCORES = {"softmax": nn.softmax, "sigmoid": nn.sigmoid}


class MixtureOfExperts(ContextLayer, SwiGLU, kw_only=True):
  """A mixture of gated MLPs, token by token: a layer without memory, whose state is empty.

      y = scale sum_{e in C} w_e MLP_e(x) + g MLP_shared(x)

  The router is float32. `choice_bias` has no gradient.

  Attributes:
    num_experts: number of experts. Meshes split them over the axis that splits heads.
    experts_per_token: number of experts that each token takes.
    hidden: hidden width of an expert; `None` for `ratio` times the width of x.
    shared_hidden: hidden width of the expert that all tokens take; `None` for no such expert.
    shared_gate: whether g = sigmoid(w_g . x); otherwise g = 1.
    scores: "softmax" or "sigmoid".
    choice_bias: whether there is a bias b for choosing.
    normalised: whether the weights of a token's experts are divided by their sum.
    scale: a factor of their weights.
    expert_groups: number of groups of equal size. Experts are chosen from some of the groups only, those in which the sum of
      the two largest s_e + b_e is largest.
    groups_per_token: number of these groups.
    balance: coefficient of the loss that balances the experts in training, L of `routing.py`; 0 for none.
  """

  num_experts: int
  experts_per_token: int
  shared_hidden: int | None = None
  shared_gate: bool = False
  scores: str = "softmax"
  choice_bias: bool = False
  normalised: bool = True
  scale: float = 1.0
  expert_groups: int = 1
  groups_per_token: int = 1
  balance: float = 0.0

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    if self.scores not in SCORES:
      raise ValueError(f"scores={self.scores!r}; expected one of {list(SCORES)}.")
    if self.groups_per_token > self.expert_groups:
      raise ValueError(f"groups_per_token={self.groups_per_token}; expected at most expert_groups={self.expert_groups}.")
    if self.num_experts % self.expert_groups:
      raise ValueError(f"expert_groups={self.expert_groups}; expected a divisor of num_experts={self.num_experts}.")
    if self.expert_groups > 1 and self.num_experts < 2 * self.expert_groups:
      raise ValueError(f"expert_groups={self.expert_groups}; expected groups of two of the {self.num_experts} experts or more.")
    most = self.num_experts // self.expert_groups * self.groups_per_token
    if self.experts_per_token > most:
      raise ValueError(f"experts_per_token={self.experts_per_token}; expected at most {most}, those of a token's groups.")

  def publishes(self, x: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Its routing, if `balance` is not 0."""
    return publishes_routing(x.shape[0], self.num_experts, accumulator(x)) if self.balance else {}

  @nn.compact
  def in_stack(
    self, x: jax.Array, state: tuple[()] | None, segment_ids: jax.Array | None, context: Context
  ) -> tuple[jax.Array, tuple[()], Context]:
    """See `ContextLayer`."""
    self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    scores = self._scores(x)
    chosen, weights = self.route(scores)
    if self.balance:
      context = publish_routing(context, self.balance, chosen, scores, segment_ids)
    y = self._experts(x, chosen, weights, self.hidden_width(x.shape[-1])) + self._shared(x)
    return silence_padding(y, segment_ids), (), context

  def _experts(self, x: jax.Array, chosen: jax.Array, weights: jax.Array, hidden: int) -> jax.Array:
    """What the chosen experts add, [B, T, D]."""
    into, out_of = (self.num_experts, x.shape[-1], hidden), (self.num_experts, hidden, x.shape[-1])
    in_axes, out_axes = ("experts", "embed", None), ("experts", None, "embed")
    gate, up, down = (
      self.param(name, named(INIT, *axes), shape, self.param_dtype)
      for name, axes, shape in (("gate", in_axes, into), ("up", in_axes, into), ("down", out_axes, out_of))
    )
    mix = partitioned(_mix, (*[P(ROWS)] * 3, *[P(HEADS)] * 4), P(HEADS, ROWS))
    experts = jnp.arange(self.num_experts, dtype=jnp.int32)
    return mix(x, chosen, weights, experts, gate, up, down).sum(axis=0, dtype=x.dtype)

  def _scores(self, x: jax.Array) -> jax.Array:
    """The router's scores, [B, T, E]."""
    types = gate_types(x, self.param_dtype, None)
    return SCORES[self.scores](dense(self.num_experts, ("embed", None), name="router", **types)(x))

  def route(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chosen experts, int32 [B, T, C], and their weights."""
    bias, zeros = None, named(nn.initializers.zeros, None, decays=False)
    if self.choice_bias:
      bias = self.param("choice_bias", zeros, (self.num_experts,), self.param_dtype).astype(scores.dtype)
    chosen, weights = choose(scores, self.experts_per_token, bias, self.expert_groups, self.groups_per_token)
    if self.normalised:
      weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
    return chosen, self.scale * weights

  def _shared(self, x: jax.Array) -> jax.Array | float:
    """What the expert of all tokens adds."""
    if self.shared_hidden is None:
      return 0.0
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y, _ = SwiGLU(hidden=self.shared_hidden, name="shared", **types)(x)
    return y * nn.sigmoid(dense(1, ("embed", None), name="shared_gate", **types)(x)) if self.shared_gate else y


def _mix(x, chosen, weights, experts, gate, up, down) -> jax.Array:
  """What the experts of this device add, [1, B, T, D], for tokens x [B, T, D] and all their experts, `chosen` [B, T, C].

  Args:
    experts: the numbers of the experts of this device, [E], a range.
    gate, up, down: their weights, [E, D, F] twice and [E, F, D].
  """
  (here,) = experts.shape
  own = chosen.reshape(-1) - experts[0]
  blocks = blocks_of(jnp.where((own >= 0) & (own < here), own, here), here)
  rows = blocks.gather(x.reshape(-1, x.shape[-1]), copies=chosen.shape[-1])
  hidden = gated(grouped_matmul(rows, gate, blocks.group), grouped_matmul(rows, up, blocks.group))
  out = blocks.scatter(grouped_matmul(hidden, down, blocks.group)).reshape(*chosen.shape, -1)
  return einsum("btc,btcd->btd", weights, out).astype(x.dtype)[None]


def reference_mixture(x, chosen, weights, gate, up, down) -> jax.Array:
  """The oracle of the mixture, [B, T, D], for the arguments of `_mix`: every expert of every token by itself."""

  def one(x, expert):
    return (nn.silu(x @ gate[expert]) * (x @ up[expert])) @ down[expert]

  of_token = jax.vmap(one, (None, 0))
  out = jax.vmap(jax.vmap(of_token))(x, chosen)
  return jnp.einsum("btc,btcd->btd", weights, out)
