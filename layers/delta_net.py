"""The delta rule as layers: DeltaNet, Gated DeltaNet, Kimi Delta Attention, DeltaProduct, Gated DeltaNet-2 and Comba.

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t K^{-1/2}

A write first subtracts what a read by its key returns. DeltaNet has alpha = 1, Gated DeltaNet one alpha per head, Kimi Delta
Attention one alpha per channel; DeltaProduct makes several such writes per token. In Gated DeltaNet-2 and Comba, what is
subtracted is read along another vector than the key. Projections, convolutions, norm and gate are those of
`linear_attention.py`.

The papers leave open, or their code disagrees -> we do: initial A ~ Uniform(1, 16) in all layers, because Uniform(0, 16) can
give log 0 · no bias on beta · the read is scaled by K^{-1/2}, as in all released code · Kimi's log-decay has a lower bound, in
the form of Erase-then-Delta Attention, which keeps the meaning of A · Gated DeltaNet-2's decays and erase gates belong to key
heads, as in its code, and its output gate is a sigmoid · Comba's p is a part of the normalised key, and q - D p is not
normalised again: the released layer normalises p, which cancels the factor.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels import delta_rule
from ..pallas_kernels.delta_rule.call import TOKENS
from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.partition import partitioned
from .axes import named
from .linear_attention import LinearAttention
from .norms import beside
from .projections import LogDecay, Strength


class DeltaNet(LinearAttention):
  """DeltaNet (Yang et al. 2024, arXiv:2406.06484): a write replaces the value stored under its key instead of adding to it.

      S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T

  Attributes:
    negative_eigenvalues: whether beta lies in (0, 2) instead of (0, 1), so that a write can be a reflection (Grazzi et al.
      2024, arXiv:2411.12537). State tracking, such as parity, needs it.

  The other attributes are those of `LinearAttention`.
  """

  negative_eigenvalues: bool = False

  def update(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    return delta_rule.delta_rule(q, k, v, self.strength(x), **options)

  def strength(self, x: jax.Array, writes: int = 1) -> jax.Array:
    """The write strengths beta, [B, T, writes * H]."""
    maximum = 2.0 if self.negative_eigenvalues else 1.0
    return Strength(writes * self.num_heads, maximum, name="beta", **self.gate_types)(x)


class GatedDeltaNet(DeltaNet):
  """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): the delta rule with a learned decay per head.

      S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T

  Attributes:
    output_gate: "silu" by default, as in the paper.

  The other attributes are those of `DeltaNet`.
  """

  output_gate: str = "silu"

  def update(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    log_decay = LogDecay(self.num_heads, name="decay", **self.gate_types)(x)
    return delta_rule.gated_delta_rule(q, k, v, self.strength(x), log_decay, **options)


class KimiDeltaAttention(DeltaNet):
  """Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692): a decay for every key channel.

      S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T

  Attributes:
    output_gate, gate_rank: "sigmoid" by default, with rank `key_dim` if `gate_rank` is `None`, as in the paper.
    decay_rank: rank of the map from x to the decays; `None` for `key_dim`.
    full_rank: whether the maps to the decays and to the gate have full rank, whatever the two ranks are.
    decay_lower_bound: lower bound of the log-decay; `None` for no bound.
    decay_by_sigmoid: whether the bounded log-decay is that of later models; see `LogDecay`.

  The other attributes are those of `DeltaNet`.
  """

  output_gate: str = "sigmoid"
  decay_rank: int | None = None
  full_rank: bool = False
  decay_lower_bound: float | None = -5.0
  decay_by_sigmoid: bool = False

  @property
  def output_gate_rank(self) -> int | None:
    return None if self.full_rank else self.gate_rank or self.key_dim

  def update(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    gates = self.strength(x), self.log_decay(x, self.num_heads)
    return delta_rule.kimi_delta_rule(q, k, v, *gates, decay_bound=self.decay_lower_bound, **options)

  def log_decay(self, x: jax.Array, heads: int) -> jax.Array:
    """The log-decays of so many heads, [B, T, heads, K]."""
    rank, bound = None if self.full_rank else self.decay_rank or self.key_dim, self.decay_lower_bound
    return LogDecay(heads, self.key_dim, rank, bound, self.decay_by_sigmoid, name="decay", **self.gate_types)(x)


class DeltaProduct(DeltaNet):
  """DeltaProduct (Siems et al. 2025, arXiv:2502.10297): several delta-rule writes per token, whose product can be a rotation.

      S_t = alpha_t S_{t-1};   for j = 1..n:   S_t <- (I - beta_j k_j k_j^T) S_t + beta_j k_j v_j^T

  Attributes:
    num_writes: number of writes per token, each with its own key, value and strength.
    forget_gate: whether each head decays before the first write ("gated" DeltaProduct).
    negative_eigenvalues: `True` by default, as in the paper. Without it no number of writes can track a group.
    output_gate: "silu" by default, as in the paper.

  The other attributes are those of `DeltaNet`.
  """

  num_writes: int = 2
  forget_gate: bool = True
  negative_eigenvalues: bool = True
  output_gate: str = "silu"

  @property
  def writes(self) -> int:
    return self.num_writes

  def update(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    beta = self.strength(x, self.num_writes).reshape(*x.shape[:2], self.num_writes, self.num_heads)
    log_decay = LogDecay(self.num_heads, name="decay", **self.gate_types)(x) if self.forget_gate else None
    many = (*x.shape[:2], self.num_writes)
    k, v = k.reshape(*many, *k.shape[-2:]), v.reshape(*many, *v.shape[-2:])
    return delta_rule.delta_product(q, k, v, beta, log_decay, **options)


class GatedDeltaNet2(KimiDeltaAttention):
  """Gated DeltaNet-2 (2026, arXiv:2605.22791): each key channel has a strength of erasing, each value channel one of writing.

      S_t = (I - k_t (b_t * k_t)^T) Diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T        b = sigmoid(W_b x), w = sigmoid(W_w x)

  With b = w = beta it is Kimi Delta Attention.

  Attributes:
    negative_eigenvalues: whether b lies in (0, 2) instead of (0, 1).
    decay_lower_bound: lower bound of the log-decay; `None` by default, as in the paper.

  The other attributes are those of `KimiDeltaAttention`.
  """

  decay_lower_bound: float | None = None

  def update(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    maximum = 2.0 if self.negative_eigenvalues else 1.0
    erase = Strength(self.key_heads, maximum, channels=self.key_dim, name="erase_gate", **self.gate_types)(x)
    write = Strength(self.num_heads, channels=self.value_dim, name="write_gate", **self.gate_types)(x)
    log_decay = _for_value_heads(self.log_decay(x, self.key_heads), self.num_heads)
    return delta_rule.gated_delta_rule_2(q, k, v, erase, write, log_decay, decay_bound=self.decay_lower_bound, **options)


class Comba(GatedDeltaNet):
  """Comba (Hu et al. 2025, arXiv:2506.02475): a gated delta rule whose feedback and read are corrected by learned factors.

      S_t = (alpha_t - beta_t k_t p_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T (q_t - D p_t) K^{-1/2}
      p_t = sigmoid(c) k_t

  The feedback p^T S reads the state before its decay. c and D are numbers per key head.

  Attributes:
    output_gate: "sigmoid" by default, as in the paper's code.
    read_correction: initial D. The authors recommend 1 for large models and 0.02 for small ones.

  The other attributes are those of `GatedDeltaNet`.
  """

  output_gate: str = "sigmoid"
  read_correction: float = 1.0

  def update(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    log_decay = LogDecay(self.num_heads, name="decay", **self.gate_types)(x)
    feedback, correction = (
      self.param(name, named(nn.initializers.constant(value), "heads"), (self.key_heads,), self.param_dtype)
      for name, value in (("feedback", 1.0), ("read_correction_scale", self.read_correction))
    )
    wide = k.astype(accumulator(k))
    p = wide * beside(wide, nn.sigmoid(feedback.astype(wide.dtype))[:, None])
    q = (q.astype(p.dtype) - p * beside(p, correction[:, None])).astype(q.dtype)
    return delta_rule.comba_rule(q, k, v, self.strength(x), p.astype(k.dtype), log_decay, **options)


def _for_value_heads(x: jax.Array, heads: int) -> jax.Array:
  """x [B, T, Hk, ...] with each key head repeated for the value heads that share it."""
  groups = heads // x.shape[2]
  return x if groups == 1 else partitioned(partial(jnp.repeat, repeats=groups, axis=2), (TOKENS,), TOKENS)(x)
