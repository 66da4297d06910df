"""The ranges of the numeric fields of layers, models and their options: one table, by the name of the field."""

import dataclasses
import math
import numbers
from typing import Any, NamedTuple


class Range(NamedTuple):
  """Numbers that a field may hold: finite ones from `least` on, or above it if it is `excluded`, and below `below`."""

  integer: bool
  least: float = -math.inf
  excluded: bool = False
  below: float = math.inf

  def refuses(self, value: Any) -> str | None:
    """What would do instead of `value`; `None` if it will do."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if self.integer else numbers.Real):
      return "an integer" if self.integer else "a number"
    if not math.isfinite(value):
      return "a finite number"
    if value < self.least or (self.excluded and value == self.least):
      return f"more than {self.least:g}" if self.excluded else f"at least {self.least:g}"
    return None if value < self.below else f"less than {self.below:g}"


_COUNT, _POSITIVE = Range(True, 1), Range(False, 0, excluded=True)
RANGES: dict[str, Range] = {
  **dict.fromkeys(("num_heads", "num_key_heads", "head_dim", "key_dim", "value_dim", "channels", "hidden"), _COUNT),
  **dict.fromkeys(("num_experts", "experts_per_token", "shared_hidden", "expert_groups", "groups_per_token"), _COUNT),
  **dict.fromkeys(("num_memories", "memories_per_token"), _COUNT),
  **dict.fromkeys(("width", "depth", "vocab_size", "input_dim", "output_dim", "rope_dim", "length"), _COUNT),
  **dict.fromkeys(("latent_dim", "shared_dim", "feature_dim"), _COUNT),
  **dict.fromkeys(("conv_width", "chunk_size", "segment", "window", "max_length", "max_documents", "num_writes"), _COUNT),
  **dict.fromkeys(("gate_rank", "decay_rank", "step_rank", "rank_per_head", "blocks", "num_groups", "state_dim"), _COUNT),
  **dict.fromkeys(("slots", "note_dim", "read_heads", "cycles", "inner_cycles", "slow_ratio", "predicted_from"), _COUNT),
  **dict.fromkeys(("persistent_tokens", "iterations", "reads_below", "eidetic_slots"), Range(True, 0)),
  **dict.fromkeys(("ratio", "expansion", "clip", "norm_epsilon", "ridge", "min_ridge", "scale"), _POSITIVE),
  **dict.fromkeys(("factor", "low", "high", "magnitude"), _POSITIVE),
  **dict.fromkeys(("mlp_ratio", "max_step", "balance"), Range(False, 0)),
  "rope_base": Range(False, 1),
  "decay_lower_bound": Range(False, below=0),
  **dict.fromkeys(("note_threshold", "read_threshold"), Range(False)),
  **dict.fromkeys(("erase_bias", "step_bias", "forget_bias", "momentum_bias", "read_correction"), Range(False)),
}


def check_ranges(settings: Any) -> None:
  """Checks the fields of a layer, a model or a group of options, as far as `RANGES` has them; `None` always passes.

  Raises:
    ValueError: for the first field whose value is no number of its range.
  """
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name, None)
    if value is not None and field.name in RANGES and (wanted := RANGES[field.name].refuses(value)):
      raise ValueError(f"{type(settings).__name__}.{field.name}={value!r}; expected {wanted}.")
