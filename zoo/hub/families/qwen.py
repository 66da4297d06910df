"""Qwen3-Next and Qwen3.5, with experts and without: Gated DeltaNet with, in every fourth block, attention with a gate.

Their tensors differ in how the projections of Gated DeltaNet are joined: in Qwen3-Next rows of a key head stand together.
"""

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
  same_rules,
)
from ..forms import CONVOLUTION, LINEAR, Rule, grouped, rule, stacked
from .llama import attention
from .mlps import any_mlp_rules, mlp, mlps

_PROJECTED = "query/kernel", "key/kernel", "value/kernel"


def _kinds(config: Config) -> list[str]:
  """The layer type of every block."""
  every = config.get("full_attention_interval", 4)
  usual = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(config["num_hidden_layers"])]
  return config.get("layer_types") or usual


def _settings(config: Config) -> dict[str, dict[str, Any]]:
  refuse(config, attention_bias=False, hidden_act="silu")
  config = {"partial_rotary_factor": 0.25} | dict(config)
  names = {"linear_attention": "GatedDeltaNet", "full_attention": "Attention"}
  blocks = [(names[kind], mlp(config, i)) for i, kind in enumerate(_kinds(config))]
  epsilon = config["rms_norm_eps"]
  return {
    "LanguageModel": language_model(config, blocks, zero_centred_norms=True),
    "GatedDeltaNet": gated_delta_net(config) | {"norm_epsilon": epsilon},
    **attention(config, output_gate="sigmoid", qk_norm=True, zero_centred_norms=True, norm_epsilon=epsilon),
    **mlps(config, blocks),
  }


def gated_delta_net(config: Config) -> dict[str, Any]:
  """The settings of `GatedDeltaNet`."""
  return {
    "num_heads": config["linear_num_value_heads"],
    "num_key_heads": config["linear_num_key_heads"],
    "key_dim": config["linear_key_head_dim"],
    "value_dim": config["linear_value_head_dim"],
    "conv_width": config["linear_conv_kernel_dim"],
  }


def widths(config: Config) -> tuple[int, int, int]:
  """Channels of queries, keys and values of Gated DeltaNet."""
  keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
  return keys, keys, config["linear_num_value_heads"] * config["linear_value_head_dim"]


def convolution_rule(theirs: str, ours: str, config: Config) -> Rule:
  """The rule of the convolution of queries, keys and values."""
  paths = [f"{ours}/{name}_conv/weight" for name in ("query", "key", "value")]
  return rule(f"{theirs}.conv1d.weight", paths, stacked(CONVOLUTION, *widths(config)))


def _of_key_heads(config: Config, theirs: str, ours: str) -> list[Rule]:
  heads, groups = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]
  key, value = config["linear_key_head_dim"], groups * config["linear_value_head_dim"]
  projected = [f"{ours}/{name}" for name in (*_PROJECTED, "gate/full/kernel")]
  gates = [f"{ours}/beta/logits/kernel", f"{ours}/decay/step/full/kernel"]
  return [
    rule(f"{theirs}.in_proj_qkvz.weight", projected, grouped(LINEAR, heads, key, key, value, value)),
    rule(f"{theirs}.in_proj_ba.weight", gates, grouped(LINEAR, heads, groups, groups)),
  ]


def _apart(config: Config, theirs: str, ours: str) -> list[Rule]:
  names = {"in_proj_z": "gate/full", "in_proj_b": "beta/logits", "in_proj_a": "decay/step/full"}
  joined = stacked(LINEAR, *widths(config))
  projected = [f"{ours}/{name}" for name in _PROJECTED]
  return [rule(f"{theirs}.in_proj_qkv.weight", projected, joined), *linear_rules(theirs, ours, **names)]


def _rules(projections: Any, config: Config) -> list[Rule]:
  head_dim, rules = config.get("head_dim", 256), model_rules(config)
  for i, kind in enumerate(_kinds(config)):
    block, ours = f"model.layers.{i}", f"blocks_{i}/mixer"
    if kind == "linear_attention":
      theirs = f"{block}.linear_attn"
      rules += projections(config, theirs, ours)
      rules += [convolution_rule(theirs, ours, config), *linear_rules(theirs, ours, out_proj="output")]
      own = [("A_log", "decay/A_log"), ("dt_bias", "decay/dt_bias"), ("norm.weight", "norm/scale")]
    else:
      theirs = f"{block}.self_attn"
      of_heads = grouped(LINEAR, config["num_attention_heads"], head_dim, head_dim)
      rules += [rule(f"{theirs}.q_proj.weight", [f"{ours}/query/kernel", f"{ours}/gate/kernel"], of_heads)]
      rules += linear_rules(theirs, ours, k_proj="key", v_proj="value", o_proj="output")
      own = [("q_norm.weight", "query_norm/scale"), ("k_norm.weight", "key_norm/scale")]
    rules += same_rules(theirs, ours, own) + norm_rules(block, f"blocks_{i}")
    rules += any_mlp_rules(config, i, f"{block}.mlp", f"blocks_{i}/mlp")
  return rules


QWEN3_NEXT = Family("qwen3_next", _settings, partial(_rules, _of_key_heads), ("mtp.",))
# In files with an encoder of images, names of the language model begin with another word.
_OF_TEXT = {"ignored": ("mtp.", "model.visual."), "renamed": (("model.language_model.", "model."),)}
QWEN3_5 = Family("qwen3_5_text", _settings, partial(_rules, _apart), **_OF_TEXT)
QWEN3_5_MOE = Family("qwen3_5_moe_text", _settings, partial(_rules, _apart), **_OF_TEXT)
