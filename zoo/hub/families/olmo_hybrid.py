"""OLMo-Hybrid: Gated DeltaNet with a norm before every sublayer, and attention blocks with a norm after every sublayer."""

from typing import Any

from ..family import Config, Family, language_model, linear_rules, mlp_rules, model_rules, norm_rules, refuse, same_rules
from ..forms import CONVOLUTION, Rule, joined, rule
from .llama import attention, attention_rules
from .qwen import gated_delta_net, widths


def _settings(config: Config) -> dict[str, dict[str, Any]]:
  refuse(config, attention_bias=False, hidden_act="silu")
  names = {"linear_attention": ("GatedDeltaNet", "SwiGLU"), "full_attention": ("Attention", "after/SwiGLU")}
  layer = attention(config, qk_norm=True, joint_qk_norm=True, norm_after=True, norm_epsilon=config["rms_norm_eps"])
  if not config.get("rope_parameters") or config["rope_parameters"].get("rope_theta") is None:
    layer["Attention"]["rope_base"] = None
  return {
    "LanguageModel": language_model(config, [names[kind] for kind in config["layer_types"]]),
    "GatedDeltaNet": gated_delta_net(config) | {"negative_eigenvalues": bool(config["linear_allow_neg_eigval"])},
    **layer,
    "SwiGLU": {"hidden": config["intermediate_size"]},
    "after/SwiGLU": {"norm_after": True},
  }


def _rules(config: Config) -> list[Rule]:
  rules = model_rules(config)
  for i, kind in enumerate(config["layer_types"]):
    block, ours = f"model.layers.{i}", f"blocks_{i}/mixer"
    if kind == "linear_attention":
      theirs = f"{block}.linear_attn"
      names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "g_proj": "gate/full", "o_proj": "output"}
      names |= {"b_proj": "beta/logits", "a_proj": "decay/step/full"}
      own = [("A_log", "decay/A_log"), ("dt_bias", "decay/dt_bias"), ("o_norm.weight", "norm/scale")]
      rules += linear_rules(theirs, ours, **names) + same_rules(theirs, ours, own)
      paths = [f"{ours}/{name}_conv/weight" for name in ("query", "key", "value")]
      rules += [rule([f"{theirs}.{x}_conv1d.weight" for x in "qkv"], paths, joined(CONVOLUTION, *widths(config)))]
      norms = "attention_layer_norm", "feedforward_layer_norm"
    else:
      rules += attention_rules(f"{block}.self_attn", ours, qk_norm=True)
      # transformers saves the first by the other name, which the blocks before have.
      norms = f"post_attention_layernorm.weight|{block}.feedforward_layer_norm", "post_feedforward_layernorm"
    rules += norm_rules(block, f"blocks_{i}", *norms) + mlp_rules(f"{block}.mlp", f"blocks_{i}/mlp")
  return rules


OLMO_HYBRID = Family("olmo_hybrid", _settings, _rules)
