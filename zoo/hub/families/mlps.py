"""The MLPs of Qwen's models: gated ones, and mixtures of experts in some or all blocks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..family import Config, expert_rules, linear_rules, mlp_rules
from ..forms import Rule


def mlp(config: Config, block: int) -> str:
  """The MLP of a block."""
  dense = block in (config.get("mlp_only_layers") or ()) or (block + 1) % config.get("decoder_sparse_step", 1)
  return "SwiGLU" if dense or not _count(config) else "MixtureOfExperts"


def _count(config: Config) -> int:
  return config.get("num_experts") or config.get("num_local_experts") or 0


def mlps(config: Config, blocks: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
  """The settings of the MLPs that `blocks` name."""
  used = {name for block in blocks for name in block}
  found = {"SwiGLU": {"hidden": config["intermediate_size"]}} if "SwiGLU" in used else {}
  if "MixtureOfExperts" in used:
    found["MixtureOfExperts"] = {
      "num_experts": _count(config),
      "experts_per_token": config["num_experts_per_tok"],
      "hidden": config["moe_intermediate_size"],
      "normalised": config.get("norm_topk_prob", config["model_type"] != "qwen3_moe"),
    }
    if shared := config.get("shared_expert_intermediate_size"):
      found["MixtureOfExperts"] |= {"shared_hidden": shared, "shared_gate": True}
  return found


def mixture_rules(config: Config, theirs: str, ours: str) -> list[Rule]:
  """The rules of a mixture of experts."""
  count, hidden = _count(config), config["moe_intermediate_size"]
  rules = linear_rules(theirs, ours, gate="router") + expert_rules(f"{theirs}.experts", ours, count, hidden)
  if config.get("shared_expert_intermediate_size"):
    rules += mlp_rules(f"{theirs}.shared_expert", f"{ours}/shared")
    rules += linear_rules(theirs, ours, shared_expert_gate="shared_gate")
  return rules


def any_mlp_rules(config: Config, block: int, theirs: str, ours: str) -> list[Rule]:
  """The rules of a block's MLP, whichever it is."""
  return (mlp_rules if mlp(config, block) == "SwiGLU" else partial(mixture_rules, config))(theirs, ours)
