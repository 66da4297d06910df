"""Mamba and Mamba-2: blocks of one layer, without an MLP."""

from typing import Any

from ..family import Config, Family, language_model, linear_rules, refuse, same_rules
from ..forms import CONVOLUTION, LINEAR, SAME, Rule, rule, stacked


def _with_defaults(config: Config, tied: bool) -> dict[str, Any]:
  """`config` with what files of earlier versions of transformers leave out."""
  return {"tie_word_embeddings": tied, "expand": 2, "time_step_limit": [0.0, "Infinity"]} | dict(config)


def _language_model(config: Config, layer: str) -> dict[str, Any]:
  refuse(config, use_bias=False, use_conv_bias=True, hidden_act="silu")
  names = {"rms_norm_eps": config["layer_norm_epsilon"]}
  return language_model(dict(config) | names, [(layer,)] * config["num_hidden_layers"])


def _layer(config: Config) -> dict[str, Any]:
  return {"state_dim": config["state_size"], "conv_width": config["conv_kernel"]}


def _mamba_settings(config: Config) -> dict[str, dict[str, Any]]:
  config = _with_defaults(config, tied=True)
  return {
    "LanguageModel": _language_model(config, "Mamba"),
    "Mamba": {"channels": _channels(config), "step_rank": _rank(config), **_layer(config)},
  }


def _channels(config: Config) -> int:
  return config.get("intermediate_size") or int(config["expand"] * config["hidden_size"])


def _rank(config: Config) -> int:
  rank = config.get("time_step_rank", "auto")
  return -(-config["hidden_size"] // 16) if rank == "auto" else rank


def _mamba2_settings(config: Config) -> dict[str, dict[str, Any]]:
  config = _with_defaults(config, tied=False)
  # transformers writes an infinite number as {"__float__": "Infinity"}.
  least, most = (float(x["__float__"] if isinstance(x, dict) else x) for x in config["time_step_limit"])
  refuse({"time_step_limit": (least, most)}, time_step_limit=(0.0, float("inf")))
  heads = {"num_heads": config["num_heads"], "head_dim": config["head_dim"], "num_groups": config["n_groups"]}
  return {
    "LanguageModel": _language_model(config, "Mamba2"),
    "Mamba2": {**heads, **_layer(config), "norm_epsilon": config["layer_norm_epsilon"]},
  }


def _common_rules(config: Config) -> list[Rule]:
  rules = [rule("backbone.embeddings.weight", "embedding", SAME), rule("backbone.norm_f.weight", "final_norm/scale", SAME)]
  rules += [] if config["tie_word_embeddings"] else [rule("lm_head.weight", "head/kernel")]
  for i in range(config["num_hidden_layers"]):
    theirs, ours = f"backbone.layers.{i}", f"blocks_{i}"
    rules += same_rules(theirs, ours, [("norm.weight", "mixer_norm/scale"), ("mixer.D", "mixer/D")])
    rules += linear_rules(f"{theirs}.mixer", f"{ours}/mixer", out_proj="output")
  return rules


def _mamba_rules(config: Config) -> list[Rule]:
  config = _with_defaults(config, tied=True)
  rules, channels = _common_rules(config), _channels(config)
  for i in range(config["num_hidden_layers"]):
    theirs, ours = f"backbone.layers.{i}.mixer", f"blocks_{i}/mixer"
    inputs = [f"{ours}/{name}/kernel" for name in ("input", "gate")]
    rules += [
      rule(f"{theirs}.in_proj.weight", inputs, stacked(LINEAR, channels, channels)),
      rule(f"{theirs}.conv1d.weight", f"{ours}/conv/weight", CONVOLUTION),
      rule(f"{theirs}.A_log", f"{ours}/A_log", LINEAR),
      *linear_rules(theirs, ours, x_proj="select", dt_proj="step"),
      *same_rules(theirs, ours, [("conv1d.bias", "conv/bias"), ("dt_proj.bias", "step/bias")]),
    ]
  return rules


def _mamba2_rules(config: Config) -> list[Rule]:
  config = _with_defaults(config, tied=False)
  rules, heads = _common_rules(config), config["num_heads"]
  own, shared = heads * config["head_dim"], config["n_groups"] * config["state_size"]
  streams = "input", "write", "read"
  for i in range(config["num_hidden_layers"]):
    theirs, ours = f"backbone.layers.{i}.mixer", f"blocks_{i}/mixer"
    projected = [f"{ours}/{name}/kernel" for name in ("gate", *streams, "step")]
    weights, biases = ([f"{ours}/{name}_conv/{part}" for name in streams] for part in ("weight", "bias"))
    rules += [
      rule(f"{theirs}.in_proj.weight", projected, stacked(LINEAR, own, own, shared, shared, heads)),
      rule(f"{theirs}.conv1d.weight", weights, stacked(CONVOLUTION, own, shared, shared)),
      rule(f"{theirs}.conv1d.bias", biases, stacked(SAME, own, shared, shared)),
      *same_rules(theirs, ours, [("A_log", "A_log"), ("dt_bias", "step/bias"), ("norm.weight", "norm/scale")]),
    ]
  return rules


MAMBA = Family("mamba", _mamba_settings, _mamba_rules)
MAMBA2 = Family("mamba2", _mamba2_settings, _mamba2_rules)
