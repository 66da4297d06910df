"""Llama and Qwen3: softmax attention with rotary positions, and a gated MLP or a mixture of experts."""

from functools import partial
from typing import Any

from ..family import (
  Config,
  Family,
  language_model,
  linear_rules,
  model_rules,
  norm_rules,
  refuse,
  rotary,
  same_rules,
)
from ..forms import Rule
from .mlps import any_mlp_rules, mlp, mlps


def attention(config: Config, **others: Any) -> dict[str, dict[str, Any]]:
  """The settings of `Attention`, and of its `RopeScaling`."""
  head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
  rope, scaling = rotary(config, head_dim)
  layer = {
    "num_heads": config["num_attention_heads"],
    "num_key_heads": config.get("num_key_value_heads"),
    "head_dim": head_dim,
    "max_length": config["max_position_embeddings"],
    **rope,
    **others,
  }
  return {"Attention": layer, **({"RopeScaling": scaling} if scaling else {})}


def attention_rules(theirs: str, ours: str, qk_norm: bool) -> list[Rule]:
  """The rules of an attention layer."""
  names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
  norms = [("q_norm.weight", "query_norm/scale"), ("k_norm.weight", "key_norm/scale")]
  return linear_rules(theirs, ours, **names) + (same_rules(theirs, ours, norms) if qk_norm else [])


def _settings(qk_norm: bool, config: Config) -> dict[str, dict[str, Any]]:
  refuse(config, attention_bias=False, mlp_bias=False, hidden_act="silu", use_sliding_window=False)
  norm = {"qk_norm": True, "norm_epsilon": config["rms_norm_eps"]} if qk_norm else {}
  blocks = [("Attention", mlp(config, i)) for i in range(config["num_hidden_layers"])]
  return {
    "LanguageModel": language_model(config, blocks),
    **attention(config, **norm),
    **mlps(config, blocks),
  }


def _rules(qk_norm: bool, config: Config) -> list[Rule]:
  rules = model_rules(config)
  for i in range(config["num_hidden_layers"]):
    theirs, ours = f"model.layers.{i}", f"blocks_{i}"
    rules += attention_rules(f"{theirs}.self_attn", f"{ours}/mixer", qk_norm)
    rules += any_mlp_rules(config, i, f"{theirs}.mlp", f"{ours}/mlp") + norm_rules(theirs, ours)
  return rules


LLAMA = Family("llama", partial(_settings, False), partial(_rules, False))
QWEN3 = Family("qwen3", partial(_settings, True), partial(_rules, True))
QWEN3_MOE = Family("qwen3_moe", *QWEN3[1:])
