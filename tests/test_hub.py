"""Models of other libraries, read and written. `pretrained/` has tiny ones of random weights, and the libraries' own logits.

`compare_transformers.py` and `compare_flash_linear.py` write them, and compare more.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.train.pretrained import from_pretrained
from memzoo.train.sharding import MeshShape
from memzoo.zoo import hub
from memzoo.zoo.hub import family, forms
from memzoo.zoo.hub.families import kimi_linear
from memzoo.zoo.hub.tensors import INDEX, SINGLE, Tensors, save
from memzoo.zoo.stack import unroll_params

MODELS = Path(__file__).parent / "pretrained"
NAMES = sorted(path.name for path in MODELS.iterdir())


def logits(read):
  tokens = jnp.arange(read.model.vocab_size, dtype=jnp.int32)[None]
  return jax.jit(read.model.apply)(read.params, tokens)[0][0]


def relative_error(x, y):
  return float(np.max(np.abs(np.asarray(x) - y)) / np.max(np.abs(y)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama_tied"])
def test_logits_are_those_of_the_library(name):
  assert relative_error(logits(from_pretrained(MODELS / name)), np.load(MODELS / name / "logits.npy")) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_was_read_and_written_is_equal_to_the_bit(name, tmp_path):
  read = from_pretrained(MODELS / name)
  hub.save_pretrained(tmp_path / "new", hub.read_config(MODELS / name), read.params)
  before, after = Tensors(MODELS / name), Tensors(tmp_path / "new")
  if name in ("olmo_hybrid", "kimi_linear"):  # transformers has other names, and cuts a convolution's weights in three anywhere
    before, after = (sorted(np.concatenate([x[name].ravel() for name in sorted(x)])) for x in (before, after))
    np.testing.assert_array_equal(before, after)
    return
  assert set(before) == set(after)
  for key in before:
    np.testing.assert_array_equal(before[key], after[key])
  assert jax.tree.all(jax.tree.map(np.array_equal, from_pretrained(tmp_path / "new").params, read.params))


def test_several_files_are_read_like_one(tmp_path):
  tensors = Tensors(MODELS / "qwen3")
  save(tmp_path, tensors.items(), shard_bytes=5000)
  assert len(list(tmp_path.glob("*.safetensors"))) > 3
  shutil.copy(MODELS / "qwen3" / "config.json", tmp_path)
  read, expected = from_pretrained(tmp_path), from_pretrained(MODELS / "qwen3")
  assert jax.tree.all(jax.tree.map(np.array_equal, read.params, expected.params))
  index = json.loads((tmp_path / INDEX).read_text())
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())


def test_parameters_are_split_over_a_mesh_and_have_the_dtype_that_is_asked_for():
  mesh = MeshShape(data=1, fsdp=2, tensor=2).build()
  read = from_pretrained(MODELS / "llama", "LanguageModel.param_dtype = 'bfloat16'", mesh=mesh)
  kernel = read.params["params"]["blocks_0"]["mlp"]["up"]["kernel"]
  assert kernel.dtype == jnp.bfloat16
  assert kernel.sharding.shard_shape(kernel.shape) == (kernel.shape[0] // 2, kernel.shape[1] // 2)


@pytest.mark.parametrize("split", [False, True])
def test_a_scanned_model_has_the_parameters_of_the_unrolled_one(split):
  mesh = MeshShape(data=1, fsdp=2, tensor=2).build() if split else None
  read, expected = from_pretrained(MODELS / "llama", "LanguageModel.scan=True", mesh=mesh), from_pretrained(MODELS / "llama")
  assert read.model.scan
  model, params = unroll_params(read.model, read.params)
  assert model == expected.model
  assert jax.tree.all(jax.tree.map(np.array_equal, params, expected.params))
  kernel = read.params["params"]["periods"]["blocks_0"]["mlp"]["up"]["kernel"]
  layers, width, hidden = kernel.shape
  assert kernel.sharding.shard_shape(kernel.shape) == (layers, width // 2, hidden // 2) if split else kernel.shape


def test_a_repository_is_downloaded_if_huggingface_hub_is_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match=r"a/model is no folder here; expected one, or .* after `pip install memzoo\[hub\]`"):
    from_pretrained("a/model")
  asked = []

  def snapshot_download(name, allow_patterns):
    asked.append((name, allow_patterns))
    if name != "a/model":
      raise OSError("404 Client Error.\nMore about it.")
    return str(MODELS / "llama")

  monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
  assert from_pretrained("a/model").model == from_pretrained(MODELS / "llama").model
  assert asked[0][0] == "a/model"
  assert {"config.json", "*.safetensors", "*model.safetensors.index.json", "tokenizer.json", "tokenizer.model"} < {*asked[0][1]}
  with pytest.raises(ValueError, match=r"^b/model is no folder here, and cannot be downloaded: 404 Client Error\.$"):
    from_pretrained("b/model")


def damaged(tmp_path, change):
  """A copy of a model after `change(tensors, config)`."""
  tensors, config = dict(Tensors(MODELS / "llama")), json.loads((MODELS / "llama" / "config.json").read_text())
  change(tensors, config)
  save(tmp_path, tensors.items())
  (tmp_path / "config.json").write_text(json.dumps(config))
  return tmp_path


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda tensors, config: tensors.pop(UP), f"The model lacks these tensors: {UP}."),
    (lambda tensors, config: tensors.update(more=np.zeros(3)), "The model has no place for these tensors: more."),
    (
      lambda tensors, config: tensors.update({UP: np.zeros((3, 16), np.float32)}),
      rf"{UP} gives blocks_1/mlp/up/kernel the shape \[16, 3\]; expected \[16, 24\], by config.json.",
    ),
    (lambda tensors, config: config.update(model_type="gpt2"), "has a model of type 'gpt2'; expected one of llama, qwen3"),
    (lambda tensors, config: config.pop("hidden_size"), "lacks 'hidden_size'; expected all settings of a llama model"),
    (lambda tensors, config: config.update(attention_bias=True), "attention_bias is True in its config.json"),
    (
      lambda tensors, config: config.update(rope_parameters={"rope_type": "longrope"}),
      "rope_type is 'longrope' in its config.json; expected default, linear, llama3 or yarn",
    ),
  ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, words, tmp_path):
  with pytest.raises(ValueError, match=words) as error:
    from_pretrained(damaged(tmp_path, change))
  assert "\n" not in str(error.value)


def test_damaged_and_missing_files_are_refused_in_one_line(tmp_path):
  with pytest.raises(ValueError, match=r"has no config\.json"):
    from_pretrained(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json cannot be read"):
    from_pretrained(tmp_path)
  shutil.copy(MODELS / "llama" / "config.json", tmp_path)
  with pytest.raises(ValueError, match=f"has no {SINGLE} and no {INDEX}"):
    from_pretrained(tmp_path)
  whole = (MODELS / "llama" / SINGLE).read_bytes()
  for part in (whole[:3], whole[:100], whole[:-4]):
    (tmp_path / SINGLE).write_bytes(part)
    with pytest.raises(ValueError, match=f"{SINGLE} cannot be read: .*. Expected a complete safetensors file."):
      from_pretrained(tmp_path)


def test_the_language_model_in_a_model_of_images_is_read(tmp_path):
  tensors, config = Tensors(MODELS / "qwen3_5"), json.loads((MODELS / "qwen3_5" / "config.json").read_text())
  theirs = {name.replace("model.", "model.language_model.", 1): x for name, x in tensors.items()}
  save(tmp_path, iter([*theirs.items(), ("model.visual.merger.weight", np.zeros(3, np.float32))]))
  outer = {"model_type": "qwen3_5", "text_config": config, "vision_config": {}, "tie_word_embeddings": False}
  (tmp_path / "config.json").write_text(json.dumps(outer))
  read, expected = from_pretrained(tmp_path), from_pretrained(MODELS / "qwen3_5")
  assert jax.tree.all(jax.tree.map(np.array_equal, read.params, expected.params))
  hub.save_pretrained(tmp_path / "text", hub.read_config(tmp_path), read.params)
  assert set(Tensors(tmp_path / "text")) == set(tensors)
  assert hub.read_config(tmp_path / "text")["model_type"] == "qwen3_5_text"


def test_experts_are_read_from_one_tensor_like_from_many(tmp_path):
  folder = MODELS / "qwen3_next_experts"
  tensors = dict(Tensors(folder))
  for mlp in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
    count = sum(name.startswith(f"{mlp}.experts.") for name in tensors) // 3
    names = ([f"{mlp}.experts.{i}.{name}_proj.weight" for i in range(count)] for name in ("gate", "up", "down"))
    gate, up, down = ([tensors.pop(name) for name in each] for each in names)
    tensors[f"{mlp}.experts.gate_up_proj"] = np.concatenate([np.stack(gate), np.stack(up)], axis=1)
    tensors[f"{mlp}.experts.down_proj"] = np.stack(down)
  save(tmp_path, iter(tensors.items()))
  shutil.copy(folder / "config.json", tmp_path)
  assert jax.tree.all(jax.tree.map(np.array_equal, from_pretrained(tmp_path).params, from_pretrained(folder).params))


def test_settings_of_kimi_linear_are_read_by_the_names_of_its_first_files():
  config = hub.read_config(MODELS / "kimi_linear")
  first = dict(config)
  kinds = enumerate(first.pop("layer_types"), 1)
  linear = {theirs: first.pop(name) for name, theirs in kimi_linear._LINEAR_NAMES.items()}
  first["linear_attn_config"] = linear | {"full_attn_layers": [i for i, kind in kinds if kind == "full_attention"]}
  first["first_k_dense_replace"] = first.pop("mlp_layer_types").count("dense")
  assert hub.model_config(first) == hub.model_config(config)
  names = {theirs: name for name, theirs in kimi_linear._NAMES.items()}
  assert hub.model_config({names.get(name, name): value for name, value in config.items()}) == hub.model_config(config)
  with pytest.raises(ValueError, match=r"q_lora_rank is 8 in its config\.json; memzoo has no model with anything but None"):
    hub.model_config(config | {"q_lora_rank": 8})


def test_forms_are_inverted_by_their_inverse():
  rows = np.arange(24 * 3).reshape(24, 3)
  for form in (
    forms.stacked(forms.LINEAR, 8, 8, 8),
    forms.grouped(forms.LINEAR, 4, 1, 2, 3),
    forms.joined(forms.SAME, 4, 20),
  ):
    np.testing.assert_array_equal(np.concatenate(form.theirs(form.ours([rows]))), rows)
  queries, gates = forms.grouped(forms.SAME, 2, 5, 7).ours([rows])
  np.testing.assert_array_equal(queries, rows[[*range(5), *range(12, 17)]])
  np.testing.assert_array_equal(gates, rows[[*range(5, 12), *range(17, 24)]])


def test_a_pattern_is_as_short_as_it_can_be():
  assert family.pattern(["a", "a", "b"] * 3 + ["a"]) == ([], ["a", "a", "b"])
  assert family.pattern(["a", "b", "b"]) == (["a"], ["b"])
  assert family.pattern(["x", "a", "b", "a", "b", "a"]) == (["x"], ["a", "b"])
  assert family.pattern(["a", "b", "a", "c"]) == ([], ["a", "b", "a", "c"])
