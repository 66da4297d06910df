"""Language models of transformers read by memzoo, compared, written, and read by transformers again.

    python tests/compare_transformers.py              # all families; exit status 1 if a bound is passed
    python tests/compare_transformers.py qwen3_next   # some of them, by name
    python tests/compare_transformers.py --write tests/pretrained    # the models and logits of test_hub.py

It needs `torch`, `transformers` and `safetensors`, which memzoo itself does not need. For every family a tiny model with random
weights is saved by transformers and read by memzoo. Columns of the table, the largest differences of logits, relative to the
largest logit:
  float32, float64   of a whole sequence. transformers casts some things to float32 whatever its dtype is; during its calls in
                     float64, `Tensor.float`, `torch.float` and `torch.float32` stand for float64.
  decoded            of 20 tokens, one at a time after a prefix, in float32.
  packed             of two documents in one row, each against transformers' logits of it alone, in float32.
  round trip         tensors that differ in a bit after memzoo has written the model and transformers has read and saved it.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import transformers.utils.logging
from memzoo.train.pretrained import from_pretrained
from memzoo.zoo import hub
from memzoo.zoo.hub.tensors import Tensors

TOKENS, DECODED, FIRST = 48, 20, 21
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
BOUNDS = {"float32": 1e-5, "float64": 1e-10, "decoded": 1e-5, "packed": 1e-5, "round trip": 0}
COMMON = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "max_position_embeddings": 128,
  "initializer_range": 0.1,
  "pad_token_id": None,
  "bos_token_id": None,
  "eos_token_id": None,
}
LINEAR = {
  "linear_num_key_heads": 2,
  "linear_num_value_heads": 4,
  "linear_key_head_dim": 8,
  "linear_value_head_dim": 16,
  "linear_conv_kernel_dim": 4,
}
HYBRID = COMMON | LINEAR | {"layer_types": ["linear_attention", "full_attention"] * 2}
EXPERTS = {
  "num_experts": 6,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 24,
}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 40}
KIMI = COMMON | {
  "linear_num_heads": 4,
  "linear_head_dim": 8,
  "num_local_experts": 8,
  "num_experts_per_tok": 2,
  "n_group": 2,
  "topk_group": 1,
  "moe_intermediate_size": 24,
  "kv_lora_rank": 12,
  "qk_nope_head_dim": 8,
  "qk_rope_head_dim": 4,
  "v_head_dim": 10,
  "num_key_value_heads": 4,
  "layer_types": ["linear_attention", "full_attention"] * 2,
}
SCAN = {name: COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id", "bos_token_id")}
SCAN |= {"eos_token_id": None, "state_size": 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
  "llama": ("Llama", COMMON | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
  "llama, tied": ("Llama", COMMON | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
  "qwen3": ("Qwen3", COMMON | {"rope_parameters": YARN}),
  "qwen3_next": ("Qwen3Next", HYBRID | {"num_experts": 0}),
  "qwen3_5": ("Qwen3_5", HYBRID),
  "qwen3_next, experts": ("Qwen3Next", HYBRID | SHARED | {"mlp_only_layers": [1]}),
  "qwen3_5, experts": ("Qwen3_5Moe", HYBRID | SHARED),
  "qwen3_moe": ("Qwen3Moe", COMMON | EXPERTS),
  "kimi_linear": ("KimiLinear", KIMI),
  "mamba": ("Mamba", SCAN),
  "mamba2": ("Mamba2", SCAN | {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16}),
  "olmo_hybrid": ("OlmoHybrid", HYBRID | {"linear_allow_neg_eigval": True}),
}


# Settings of the models of test_hub.py, as small as they can be.
SMALL = {
  "vocab_size": 32,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 8,
  "num_experts": 4,
  "num_local_experts": 4,
  "moe_intermediate_size": 6,
  "shared_expert_intermediate_size": 10,
  "linear_num_key_heads": 1,
  "linear_num_value_heads": 2,
  "linear_num_heads": 2,
  "linear_head_dim": 4,
  "linear_key_head_dim": 4,
  "linear_value_head_dim": 8,
  "layer_types": ["linear_attention", "full_attention"],
}


def make(case: str, small: bool = False) -> torch.nn.Module:
  """A model of transformers whose every parameter is random."""
  name, settings = CASES[case]
  if small:
    settings = settings | {key: value for key, value in SMALL.items() if key in settings}
  if name == "OlmoHybrid":
    settings = settings | {"linear_num_key_heads": settings["linear_num_value_heads"]}
  if name == "KimiLinear":
    settings = settings | {"num_key_value_heads": settings["num_attention_heads"]}
  if name == "Mamba2":
    settings = settings | {"head_dim": settings["hidden_size"] // 2}
  config = getattr(transformers, f"{name}TextConfig" if name.startswith("Qwen3_5") else f"{name}Config")(**settings)
  torch.manual_seed(0)
  return perturbed(getattr(transformers, f"{name}ForCausalLM")._from_config(config, **EAGER))


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
  """The model with no parameter at zero or one."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.05 * torch.randn_like(parameter)
  return model.eval()


def theirs(model: torch.nn.Module, tokens: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
  """Logits of a whole sequence."""
  with torch.no_grad():
    if dtype == torch.float32:
      return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    with (
      mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
      mock.patch.object(torch, "float32", torch.float64),
      mock.patch.object(torch, "float", torch.float64),
    ):
      model = type(model)._from_config(model.config, **EAGER).eval().double()
      model.load_state_dict(theirs.state)
      return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


def difference(x: jax.Array, y: np.ndarray) -> float:
  return float(np.max(np.abs(np.asarray(x) - y)) / np.max(np.abs(y)))


def compare(model: torch.nn.Module, folder: Path, wide: bool = True) -> dict[str, float]:
  """The columns of the table; without that in float64 if not `wide`."""
  model.save_pretrained(folder / "theirs")
  theirs.state = {name: x.double() for name, x in model.state_dict().items()}
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, COMMON["vocab_size"], (2, TOKENS))
  expected, row = theirs(model, tokens), jnp.asarray(tokens, jnp.int32)
  read = from_pretrained(folder / "theirs")
  logits, _ = read.model.apply(read.params, row)
  found = {"float32": difference(logits, expected)}
  if wide:
    with jax.enable_x64(True):
      again = from_pretrained(folder / "theirs", "LanguageModel.dtype = 'float64'", "LanguageModel.param_dtype = 'float64'")
      found["float64"] = difference(again.model.apply(again.params, row)[0], theirs(model, tokens, torch.float64))
  _, state = read.model.apply(read.params, row[:, : TOKENS - DECODED])
  steps = []
  for i in range(TOKENS - DECODED, TOKENS):
    logits, state = read.model.apply(read.params, row[:, i : i + 1], state)
    steps.append(logits)
  found["decoded"] = difference(jnp.concatenate(steps, axis=1), expected[:, -DECODED:])
  ids = jnp.where(jnp.arange(TOKENS) < FIRST, 1, 2)[None].repeat(2, axis=0)
  packed, _ = read.model.apply(read.params, row, segment_ids=ids)
  apart = np.concatenate([theirs(model, tokens[:, :FIRST]), theirs(model, tokens[:, FIRST:])], axis=1)
  found["packed"] = difference(packed, apart)
  hub.save_pretrained(folder / "ours", hub.read_config(folder / "theirs"), read.params)
  again = type(model).from_pretrained(folder / "ours")
  again.save_pretrained(folder / "again")
  before, after = Tensors(folder / "theirs"), Tensors(folder / "again")
  differ = [name for name in before if name not in after or not np.array_equal(before[name], after[name])]
  found["round trip"] = len(differ) + len(set(after) - set(before))
  return found


def write(model: torch.nn.Module, folder: Path, wide: bool = True) -> None:
  """Saves a small model, and its logits for tokens 0, 1, 2 and so on, computed in float64 if `wide`."""
  model.save_pretrained(folder)
  theirs.state = {name: x.double() for name, x in model.state_dict().items()}
  logits = theirs(model, np.arange(model.config.vocab_size)[None], torch.float64 if wide else torch.float32)
  np.save(folder / "logits.npy", logits[0].astype(np.float32))
  (folder / "generation_config.json").unlink(missing_ok=True)


def main(text: str, known: Iterable[str], make: Callable[..., torch.nn.Module], wide: bool = True) -> int:
  """Runs the command line.

  Args:
    text: the help.
    known: names of cases.
    make: from the name of a case to its model.
    wide: whether there are logits in float64.
  """
  parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of: {'; '.join(known)} (default: all)")
  parser.add_argument("--write", type=Path, metavar="FOLDER", help="save small models and logits there, and compare nothing")
  arguments = parser.parse_args()
  cases, good = arguments.cases or list(known), True
  transformers.utils.logging.disable_progress_bar()
  if arguments.write:
    for case in cases:
      write(make(case, small=True), arguments.write / case.replace(", ", "_"), wide)
    return 0
  print(f"{'':24}" + "".join(f"{name:>12}" for name in BOUNDS))
  for case in cases:
    with tempfile.TemporaryDirectory() as folder:
      found = compare(make(case), Path(folder), wide)
    good &= all(x <= BOUNDS[column] for column, x in found.items())
    print(f"{case:24}" + "".join(f"{found[c]:>12.1e}" if c in found else f"{'':12}" for c in BOUNDS), flush=True)
  return 0 if good else 1


if __name__ == "__main__":
  sys.exit(main(__doc__, CASES, make))
