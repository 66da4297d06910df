"""Models of transformers, read and written. `pretrained/` has tiny ones of random weights, and transformers' logits in float64.

`compare_transformers.py` writes them, and compares more.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.train.pretrained import from_pretrained
from memzoo.train.sharding import MeshShape
from memzoo.zoo import hub
from memzoo.zoo.hub import family, forms
from memzoo.zoo.hub.tensors import INDEX, SINGLE, Tensors, save

MODELS = Path(__file__).parent / "pretrained"
NAMES = sorted(path.name for path in MODELS.iterdir())


def logits(read):
  tokens = jnp.arange(read.model.vocab_size, dtype=jnp.int32)[None]
  return jax.jit(read.model.apply)(read.params, tokens)[0][0]


def relative_error(x, y):
  return float(np.max(np.abs(np.asarray(x) - y)) / np.max(np.abs(y)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama_tied"])
def test_logits_are_those_of_transformers(name):
  assert relative_error(logits(from_pretrained(MODELS / name)), np.load(MODELS / name / "logits.npy")) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_was_read_and_written_is_equal_to_the_bit(name, tmp_path):
  read = from_pretrained(MODELS / name)
  hub.save_pretrained(tmp_path / "new", hub.read_config(MODELS / name), read.params)
  before, after = Tensors(MODELS / name), Tensors(tmp_path / "new")
  if name == "olmo_hybrid":  # transformers cuts the convolution's weights in three, wherever that is; and another name
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


def test_experts_are_refused_by_name():
  config = json.loads((MODELS / "qwen3_next" / "config.json").read_text()) | {"num_experts": 8}
  with pytest.raises(ValueError, match=r"num_experts is 8 in its config\.json; memzoo has no mixture of experts"):
    hub.model_config(config)


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
