"""Models of flash-linear-attention: one memory in every block, or softmax attention in some."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..family import Config, Family, language_model, linear_rules, mlp_rules, refuse, same_rules
from ..forms import CONVOLUTION, SAME, Rule, rule

_ACTIVATIONS = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


class _Memory(NamedTuple):
  """A layer of theirs.

  Attributes:
    name: the class of ours.
    defaults: settings that files may leave out.
    settings: the fields of the class, without those that all share.
    rules: of the tensors of a layer, without those that all have.
  """

  name: str
  defaults: dict[str, Any]
  settings: Callable[[Config], dict[str, Any]]
  rules: Callable[[Config, str, str], list[Rule]]


def _common(config: Config) -> dict[str, Any]:
  """What files leave out, and the width of the MLP."""
  usual = {"conv_size": 4, "use_short_conv": True, "allow_neg_eigval": False, "norm_eps": 1e-6, "hidden_ratio": 4}
  usual |= {"max_position_embeddings": 2048, "attn": None, "intermediate_size": None, "tie_word_embeddings": False}
  config = usual | dict(config)
  if config["intermediate_size"] is None:
    config["intermediate_size"] = -(-int(config["hidden_size"] * (config["hidden_ratio"] or 4) * 2 / 3) // 256) * 256
  return config | {"rms_norm_eps": config["norm_eps"]}


def _settings(memory: _Memory, config: Config) -> dict[str, dict[str, Any]]:
  config = _common(memory.defaults | dict(config))
  refuse(config, use_short_conv=True, hidden_act="swish", attnres_block_size=None)
  blocks = [("Attention" if i in _attention(config) else memory.name, "SwiGLU") for i in range(config["num_hidden_layers"])]
  layer = {
    "num_heads": config.get("num_v_heads") or config["num_heads"],
    "conv_width": config["conv_size"],
    "negative_eigenvalues": bool(config["allow_neg_eigval"]),
    "norm_epsilon": config["norm_eps"],
  }
  settings = {"LanguageModel": language_model(config, blocks), memory.name: layer | memory.settings(config)}
  if attention := config["attn"]:
    refuse(attention, qkv_bias=False)
    heads = attention["num_heads"]
    settings["Attention"] = {
      "num_heads": heads,
      "num_key_heads": attention.get("num_kv_heads"),
      "head_dim": config["hidden_size"] // heads,
      "window": attention.get("window_size"),
      "max_length": config["max_position_embeddings"],
      "rope_base": float(attention.get("rope_theta") or 10_000.0),
    }
  return settings | {"SwiGLU": {"hidden": config["intermediate_size"]}}


def _attention(config: Config) -> Sequence[int]:
  """The blocks with softmax attention."""
  return (config.get("attn") or {}).get("layers") or ()


def _rules(memory: _Memory, config: Config) -> list[Rule]:
  config = _common(memory.defaults | dict(config))
  rules = [rule("model.embeddings.weight", "embedding", SAME), rule("model.norm.weight", "final_norm/scale", SAME)]
  rules += [] if config["tie_word_embeddings"] else [rule("lm_head.weight", "head/kernel")]
  for i in range(config["num_hidden_layers"]):
    block, ours = f"model.layers.{i}", f"blocks_{i}"
    rules += same_rules(block, ours, [("attn_norm.weight", "mixer_norm/scale"), ("mlp_norm.weight", "mlp_norm/scale")])
    rules += mlp_rules(f"{block}.mlp", f"{ours}/mlp")
    theirs, ours = f"{block}.attn", f"{ours}/mixer"
    rules += linear_rules(theirs, ours, q_proj="query", k_proj="key", v_proj="value", o_proj="output")
    if i not in _attention(config):
      names = [("q", "query"), ("k", "key"), ("v", "value")]
      rules += [rule(f"{theirs}.{x}_conv1d.weight", f"{ours}/{name}_conv/weight", CONVOLUTION) for x, name in names]
      rules += [*linear_rules(theirs, ours, b_proj="beta/logits"), rule(f"{theirs}.o_norm.weight", f"{ours}/norm/scale", SAME)]
      rules += memory.rules(config, theirs, ours)
  return rules


def _sizes(config: Config) -> dict[str, Any]:
  """Of layers whose head's width is a setting."""
  return {"key_dim": config["head_dim"], "value_dim": int(config["head_dim"] * config["expand_v"])}


def _key_heads(config: Config) -> dict[str, Any]:
  return {"num_key_heads": config["num_heads"]}


def _decay_rules(theirs: str, ours: str) -> list[Rule]:
  return linear_rules(theirs, ours, a_proj="decay/step/full") + _rates(theirs, ours)


def _rates(theirs: str, ours: str) -> list[Rule]:
  return same_rules(theirs, ours, [("A_log", "decay/A_log"), ("dt_bias", "decay/dt_bias")])


def _gate_rules(theirs: str, ours: str, gated: bool) -> list[Rule]:
  return linear_rules(theirs, ours, g_proj="gate/full") if gated else []


def _delta_net_settings(config: Config) -> dict[str, Any]:
  refuse(config, use_beta=True, qk_norm="l2", qk_activation="silu")
  keys, values = (round(config["hidden_size"] * config[name]) // config["num_heads"] for name in ("expand_k", "expand_v"))
  return {"key_dim": keys, "value_dim": values, "output_gate": "silu" if config["use_gate"] else "none"}


_DELTA_NET = _Memory(
  "DeltaNet",
  {"expand_k": 1.0, "expand_v": 1.0, "use_gate": False},
  _delta_net_settings,
  lambda config, theirs, ours: _gate_rules(theirs, ours, config["use_gate"]),
)


def _gated_delta_net_settings(config: Config) -> dict[str, Any]:
  gate = _ACTIVATIONS[config.get("output_gate_activation", "swish")] if config["use_gate"] else "none"
  return _sizes(config) | _key_heads(config) | {"output_gate": gate}


_GATED_DELTA_NET = _Memory(
  "GatedDeltaNet",
  {"expand_v": 2.0, "use_gate": True},
  _gated_delta_net_settings,
  lambda config, theirs, ours: _decay_rules(theirs, ours) + _gate_rules(theirs, ours, config["use_gate"]),
)


def _kimi_settings(config: Config) -> dict[str, Any]:
  width = int(config["head_dim"] * config["expand_v"])
  bounded = config["lower_bound"] is not None
  ranks = {"decay_rank": width, "gate_rank": width, "gate_bias": True}
  return _sizes(config) | _key_heads(config) | ranks | {"decay_lower_bound": config["lower_bound"], "decay_by_sigmoid": bounded}


def _kimi_rules(config: Config, theirs: str, ours: str) -> list[Rule]:
  maps = {"f_proj.0": "decay/step/down", "f_proj.1": "decay/step/up", "g_proj.0": "gate/down", "g_proj.1": "gate/up"}
  return [
    *linear_rules(theirs, ours, **maps),
    *_rates(theirs, ours),
    *same_rules(theirs, ours, [("g_proj.1.bias", "gate/up/bias")]),
  ]


_KIMI = _Memory("KimiDeltaAttention", {"expand_v": 1.0, "lower_bound": None}, _kimi_settings, _kimi_rules)


def _delta_product_settings(config: Config) -> dict[str, Any]:
  gate = {"output_gate": "silu" if config["use_output_gate"] else "none"}
  return _sizes(config) | gate | {"num_writes": config["num_householder"], "forget_gate": bool(config["use_forget_gate"])}


def _delta_product_rules(config: Config, theirs: str, ours: str) -> list[Rule]:
  decay = _decay_rules(theirs, ours) if config["use_forget_gate"] else []
  return decay + _gate_rules(theirs, ours, config["use_output_gate"])


_DELTA_PRODUCT = _Memory(
  "DeltaProduct",
  {"expand_v": 2.0, "use_output_gate": True, "use_forget_gate": False, "num_householder": 1},
  _delta_product_settings,
  _delta_product_rules,
)
_MEMORIES = {"delta_net": _DELTA_NET, "gated_deltanet": _GATED_DELTA_NET, "kda": _KIMI, "gated_deltaproduct": _DELTA_PRODUCT}
FLASH_LINEAR = [Family(name, partial(_settings, layer), partial(_rules, layer)) for name, layer in _MEMORIES.items()]
