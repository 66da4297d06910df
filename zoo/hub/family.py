"""What is known of a family of models: its settings as a gin configuration, and its tensors as parameters of ours."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .forms import LINEAR, MANY_LINEAR, SAME, Rule, beside, gathered, rule

Config = Mapping[str, Any]


class Unsupported(ValueError):
  """A model that cannot be expressed; the text says which of its settings is in the way."""


class Family(NamedTuple):
  """One architecture of a library.

  Attributes:
    name: what commands call it; `model_type` in its `config.json`.
    settings: from a `config.json`, as a dictionary, to the settings of our classes. `Unsupported` if there are none.
    rules: from the same to the rules of its tensors.
    ignored: beginnings of names of tensors that are not read, such as those of an image encoder.
    renamed: beginnings of names in some files, and what stands for them in the rules.
  """

  name: str
  settings: Callable[[Config], dict[str, dict[str, Any]]]
  rules: Callable[[Config], list[Rule]]
  ignored: tuple[str, ...] = ()
  renamed: tuple[tuple[str, str], ...] = ()


class Ref(str):
  """A reference in a gin configuration, such as "@SwiGLU"."""

  def __repr__(self) -> str:
    return str(self)


def as_gin(settings: Mapping[str, Mapping[str, Any]]) -> str:
  """Settings as gin text, a paragraph for each class."""
  lines = ([f"{name}.{field} = {value!r}\n" for field, value in fields.items()] for name, fields in settings.items())
  return "\n".join(map("".join, lines))


def pattern(blocks: Sequence[Any]) -> tuple[list[Any], list[Any]]:
  """The fewest blocks at the beginning, and the shortest pattern after them, of which all the others are repeats."""

  def repeats(first: int, size: int) -> bool:
    return all(blocks[i] == blocks[i - size] for i in range(first + size, len(blocks)))

  ends = ((end, first) for first in range(len(blocks)) for end in range(first + 1, len(blocks) + 1))
  end, first = min((end, first) for end, first in ends if repeats(first, end - first))
  return list(blocks[:first]), list(blocks[first:end])


def language_model(config: Config, blocks: Sequence[Sequence[str]], **others: Any) -> dict[str, Any]:
  """The settings of `LanguageModel` for blocks of sublayers, each the name of a reference."""
  dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
  first, mixers = ([[Ref(f"@{name}") for name in block] for block in part] for part in pattern(blocks))
  return {
    "vocab_size": config["vocab_size"],
    "width": config["hidden_size"],
    "depth": len(blocks),
    **({"first": first} if first else {}),
    "mixers": mixers,
    "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    "norm_epsilon": config["rms_norm_eps"],
    "dtype": dtype,
    "param_dtype": dtype,
    **others,
  }


def model_rules(config: Config) -> list[Rule]:
  """The rules of embedding, final norm and head."""
  rules = [
    rule("model.embed_tokens.weight", "embedding", SAME),
    rule("model.norm.weight", "final_norm/scale", SAME),
  ]
  return rules if config.get("tie_word_embeddings") else [*rules, rule("lm_head.weight", "head/kernel")]


def mlp_rules(theirs: str, ours: str) -> list[Rule]:
  """The rules of a gated MLP, which may have had several names."""

  def tensor(name: str) -> str:
    return "|".join(f"{mlp}.{name}_proj.weight" for mlp in theirs.split("|"))

  return [rule(tensor(name), f"{ours}/{name}/kernel") for name in ("gate", "up", "down")]


_MLP = "gate_proj", "up_proj", "down_proj"


def expert_rules(theirs: str, ours: str, count: int, hidden: int, names: Sequence[str] = _MLP) -> list[Rule]:
  """The rules of the maps of `count` experts, each a tensor, or all in two tensors."""
  gate, up, down = ([f"{theirs}.{i}.{name}.weight" for i in range(count)] for name in names)
  into, out_of = [f"{ours}/gate", f"{ours}/up"], f"{ours}/down"
  together = rule(f"{theirs}.gate_up_proj", into, beside(MANY_LINEAR, hidden, hidden))
  return [
    rule(gate + up, into, gathered(count), together),
    rule(down, out_of, gathered(count), rule(f"{theirs}.down_proj", out_of, MANY_LINEAR)),
  ]


def linear_rules(theirs: str, ours: str, **names: str) -> list[Rule]:
  """Rules of linear maps without a bias, their names to ours."""
  return [rule(f"{theirs}.{name}.weight", f"{ours}/{path}/kernel", LINEAR) for name, path in names.items()]


def same_rules(theirs: str, ours: str, names: Iterable[tuple[str, str]]) -> list[Rule]:
  """Rules of tensors that stay as they are."""
  return [rule(f"{theirs}.{name}", f"{ours}/{path}", SAME) for name, path in names]


def norm_rules(theirs: str, ours: str, mixer: str = "input_layernorm", mlp: str = "post_attention_layernorm") -> list[Rule]:
  """The rules of a block's two norms."""
  return same_rules(theirs, ours, [(f"{mixer}.weight", "mixer_norm/scale"), (f"{mlp}.weight", "mlp_norm/scale")])


def refuse(config: Config, **wanted: Any) -> None:
  """Raises `Unsupported` for the first setting that is there and is not as wanted."""
  for name, value in wanted.items():
    found = config.get(name, value)
    if found != value and not (value in (None, False) and not found):
      raise Unsupported(f"{name} is {found!r} in its config.json; memzoo has no model with anything but {value!r}.")


def rotary(config: Config, head_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """The settings of rotary positions: those of an attention layer, and those of `RopeScaling`."""
  rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
  kind = rope.get("rope_type") or rope.get("type") or "default"
  base = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
  share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
  layer = {"rope_base": float(base)}
  if share != 1.0:
    layer["rope_dim"] = int(head_dim * share)
  length = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
  match kind:
    case "default" | "mrope":  # of text alone, the second is the first
      return layer, {}
    case "linear":
      return layer, {"kind": "linear", "factor": float(rope["factor"])}
    case "llama3":
      ends = {"low": float(rope["low_freq_factor"]), "high": float(rope["high_freq_factor"])}
      return layer, {"kind": "llama3", "factor": float(rope["factor"]), "length": length, **ends}
    case "yarn" if not rope.get("mscale") and not rope.get("mscale_all_dim"):
      ends = {"low": float(rope.get("beta_slow") or 1), "high": float(rope.get("beta_fast") or 32)}
      options = {"magnitude": rope.get("attention_factor"), "whole_channels": rope.get("truncate", True)}
      return layer, {"kind": "yarn", "factor": float(rope["factor"]), "length": length, **ends, **options}
  raise Unsupported(f"rope_type is {kind!r} in its config.json; expected default, linear, llama3 or yarn.")
