"""Erase-then-Delta Attention: each token erases along one key and then writes along another.

    S_t = (I - beta_t k_t k_t^T)(I - gamma_t e_t e_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T      o_t = S_t^T q_t K^{-1/2}

The order is part of the rule: decay, then erase, then write. Source: Li et al. 2026 (arXiv:2606.26560), eq. 8. Projections,
convolutions, norm and gate are those of `linear_attention.py`.

The paper leaves open -> we do: initial gamma -> sigmoid(-3), about 0.05, because a gate that starts at 0.5 erases a random
direction at every token · convolution and activation of e -> none · output gate -> sigmoid, full rank · initial A -> Uniform(1,
16).
"""

from typing import Any

import jax

from ..pallas_kernels import delta_rule
from .delta_net import DeltaNet
from .norms import l2_normalise
from .projections import LogDecay, LowRank, Strength


class EraseThenDelta(DeltaNet):
  """Erase-then-Delta Attention (Li et al. 2026, arXiv:2606.26560): erases along one key, then writes along another.

      S_t = (I - beta_t k_t k_t^T)(I - gamma_t e_t e_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T

  Attributes:
    output_gate: "sigmoid" by default.
    rank_per_head: rank of the maps from x to the decays, per value head, and to the erase keys, per key head.
    decay_lower_bound: lower bound of the log-decay; `None` for no bound.
    erase_bias: initial bias of the logit of gamma.

  The other attributes are those of `DeltaNet`.
  """

  output_gate: str = "sigmoid"
  rank_per_head: int = 16
  decay_lower_bound: float | None = -5.0
  erase_bias: float = -3.0

  def update(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    rank = self.rank_per_head
    log_decay = LogDecay(
      self.num_heads, self.key_dim, rank * self.num_heads, self.decay_lower_bound, name="decay", **self.gate_types
    )(x)
    e = LowRank(self.key_heads * self.key_dim, rank * self.key_heads, name="erase_key", **self.types)(x)
    gamma = Strength(self.num_heads, bias=self.erase_bias, name="gamma", **self.gate_types)(x)
    return delta_rule.erase_then_delta_rule(
      q,
      k,
      v,
      self.strength(x),
      l2_normalise(e.reshape(k.shape)),
      gamma,
      log_decay,
      decay_bound=self.decay_lower_bound,
      **options,
    )
