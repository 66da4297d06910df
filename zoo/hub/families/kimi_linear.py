"""Kimi Linear: Kimi Delta Attention with, in every fourth block, latent attention without positions, and experts."""

from typing import Any

from ..family import (
  Config,
  Family,
  expert_rules,
  language_model,
  linear_rules,
  mlp_rules,
  model_rules,
  norm_rules,
  refuse,
  same_rules,
)
from ..forms import CONVOLUTION, LINEAR, SAME, Rule, grouped, joined, of_heads, of_shape, rule, stacked

# What the files of the first release call the settings of transformers.
_NAMES = {
  "num_local_experts": "num_experts",
  "num_experts_per_tok": "num_experts_per_token",
  "norm_topk_prob": "moe_renormalize",
  "n_group": "num_expert_group",
  "n_shared_experts": "num_shared_experts",
  "max_position_embeddings": "model_max_length",
}
_LINEAR_NAMES = {
  "linear_head_dim": "head_dim",
  "linear_num_heads": "num_heads",
  "linear_conv_kernel_dim": "short_conv_kernel_size",
}


def _named_alike(config: Config) -> dict[str, Any]:
  """`config` with the names of transformers, and with the kind of every block."""
  config, depth = dict(config), config["num_hidden_layers"]
  linear = config.get("linear_attn_config") or {}
  for names, found in ((_NAMES, config), (_LINEAR_NAMES, linear)):
    config |= {new: found[old] for new, old in names.items() if new not in config and old in found}
  full = {i - 1 for i in linear["full_attn_layers"]} if linear else set(range(4, depth, 4))
  dense = config.get("first_k_dense_replace", 1)
  usual = {
    "layer_types": ["full_attention" if i in full else "linear_attention" for i in range(depth)],
    "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(depth)],
  }
  return config | {name: config.get(name) or kinds for name, kinds in usual.items()}


def _settings(config: Config) -> dict[str, dict[str, Any]]:
  refuse(config, hidden_act="silu", q_lora_rank=None, attention_bias=False, mla_use_nope=True, moe_layer_freq=1)
  refuse(config, moe_router_activation_func="sigmoid")
  config = _named_alike(config)
  mixers = {"linear_attention": "KimiDeltaAttention", "full_attention": "LatentAttention"}
  mlps = {"dense": "SwiGLU", "sparse": "MixtureOfExperts"}
  kinds = zip(config["layer_types"], config["mlp_layer_types"], strict=True)
  width = config["linear_head_dim"]
  return {
    "LanguageModel": language_model(config, [(mixers[mixer], mlps[mlp]) for mixer, mlp in kinds]),
    "KimiDeltaAttention": {
      "num_heads": config["linear_num_heads"],
      "key_dim": width,
      "value_dim": width,
      "conv_width": config["linear_conv_kernel_dim"],
      "gate_bias": False,
      "decay_lower_bound": None,
      "norm_epsilon": config["rms_norm_eps"],
    },
    "LatentAttention": {
      "num_heads": config["num_attention_heads"],
      "head_dim": config["qk_nope_head_dim"],
      "shared_dim": config["qk_rope_head_dim"],
      "value_dim": config["v_head_dim"],
      "latent_dim": config["kv_lora_rank"],
      "max_length": config["max_position_embeddings"],
    },
    "SwiGLU": {"hidden": config["intermediate_size"]},
    "MixtureOfExperts": {
      "num_experts": config["num_local_experts"],
      "experts_per_token": config["num_experts_per_tok"],
      "hidden": config["moe_intermediate_size"],
      "shared_hidden": config["moe_intermediate_size"] * config["n_shared_experts"],
      "scores": "sigmoid",
      "choice_bias": True,
      "normalised": config["norm_topk_prob"],
      "scale": config["routed_scaling_factor"],
      "expert_groups": config["n_group"],
      "groups_per_token": config["topk_group"],
    },
  }


def _delta_rules(config: Config, theirs: str, ours: str) -> list[Rule]:
  heads, width = config["linear_num_heads"], config["linear_head_dim"]
  names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "b_proj": "beta/logits", "o_proj": "output"}
  names |= {"f_a_proj": "decay/step/down", "f_b_proj": "decay/step/up", "g_a_proj": "gate/down", "g_b_proj": "gate/up"}
  convolutions = [f"{ours}/{name}_conv/weight" for name in ("query", "key", "value")]
  return [
    *linear_rules(theirs, ours, **names),
    rule([f"{theirs}.{x}_conv1d.weight" for x in "qkv"], convolutions, joined(CONVOLUTION, *[heads * width] * 3)),
    rule(f"{theirs}.A_log", f"{ours}/decay/A_log", of_shape(1, 1, heads, 1)),
    *same_rules(theirs, ours, [("dt_bias", "decay/dt_bias"), ("o_norm.weight", "norm/scale")]),
  ]


def _latent_rules(config: Config, theirs: str, ours: str) -> list[Rule]:
  heads, own, shared = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
  latent, expanded = stacked(LINEAR, config["kv_lora_rank"], shared), grouped(of_heads(heads), heads, own, config["v_head_dim"])
  queries = [f"{ours}/query/kernel", f"{ours}/shared_query/kernel"]
  return [
    rule(f"{theirs}.q_proj.weight", queries, grouped(LINEAR, heads, own, shared)),
    rule(f"{theirs}.kv_a_proj_with_mqa.weight", [f"{ours}/latent/kernel", f"{ours}/shared_key/kernel"], latent),
    rule(f"{theirs}.kv_a_layernorm.weight", f"{ours}/latent_norm/scale", SAME),
    rule(f"{theirs}.kv_b_proj.weight", [f"{ours}/latent_key", f"{ours}/latent_value"], expanded),
    *linear_rules(theirs, ours, o_proj="output"),
  ]


def _mixture_rules(config: Config, theirs: str, ours: str) -> list[Rule]:
  count, hidden = config["num_local_experts"], config["moe_intermediate_size"]
  return [
    *linear_rules(theirs, ours, gate="router"),
    rule(f"{theirs}.gate.e_score_correction_bias", f"{ours}/choice_bias", SAME),
    *expert_rules(f"{theirs}.experts", ours, count, hidden, names=("w1", "w3", "w2")),
    *mlp_rules(f"{theirs}.shared_experts", f"{ours}/shared"),
  ]


def _rules(config: Config) -> list[Rule]:
  rules, config = model_rules(config), _named_alike(config)
  for i, (mixer, mlp) in enumerate(zip(config["layer_types"], config["mlp_layer_types"], strict=True)):
    theirs, ours = f"model.layers.{i}", f"blocks_{i}"
    mixer_rules = _delta_rules if mixer == "linear_attention" else _latent_rules
    rules += mixer_rules(config, f"{theirs}.self_attn", f"{ours}/mixer") + norm_rules(theirs, ours)
    experts = f"{theirs}.block_sparse_moe"
    if mlp == "dense":  # transformers saves it by the name of the others, too
      rules += mlp_rules(f"{theirs}.mlp|{experts}", f"{ours}/mlp")
    else:
      rules += _mixture_rules(config, experts, f"{ours}/mlp")
  return rules


KIMI_LINEAR = Family("kimi_linear", _settings, _rules)
