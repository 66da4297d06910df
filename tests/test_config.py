"""Configurations: what they make, what they refuse and how they say so, and that they leave nothing behind."""

import dataclasses
import re
import threading
import typing

import gin
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from memzoo.train.config import build, build_text, shipped
from memzoo.train.values import Mismatch, convert, did_you_mean, in_words

SMALL = """
width = 32
LanguageModel.vocab_size = 256
LanguageModel.width = %width
LanguageModel.depth = 3
LanguageModel.mixers = [@EraseThenDelta, @local/Attention, @Attention()]
EraseThenDelta:
  num_heads = 2
  key_dim = 16
  value_dim = 16
Attention.num_heads = 2
Attention.head_dim = 16
local/Attention.window = 8
TextData.sources = ["a.txt", "b.txt"]
"""


@pytest.fixture
def small(tmp_path):
  path = tmp_path / "small.gin"
  path.write_text(SMALL)
  return path


@pytest.mark.compat
def test_builds_what_the_file_says(small):
  experiment = build(small)
  kinds = [type(mixer).__name__ for mixer in experiment.model.mixers]
  assert experiment.name == "small"
  assert (experiment.model.width, experiment.model.depth) == (32, 3)
  assert kinds == ["EraseThenDelta", "Attention", "Attention"]
  assert experiment.model.mixers[0].key_dim == 16
  assert experiment.data.sources == ("a.txt", "b.txt")


def test_a_scoped_reference_sees_its_scope_and_what_is_unscoped(small):
  _, local, everywhere = build(small).model.mixers
  assert (local.window, local.num_heads) == (8, 2)
  assert everywhere.window != 8


def test_overrides_win(small):
  experiment = build(small, ["LanguageModel.depth=7", "width=64", "local/Attention.window=4", "Trainer.steps = 3"])
  assert experiment.model.depth == 7
  assert experiment.model.width == 64
  assert experiment.model.mixers[1].window == 4
  assert experiment.trainer.steps == 3


def test_an_override_needs_no_quotes_around_a_string(small):
  assert build(small, ["TextData.sources=/some/folder/*.txt"]).data.sources == "/some/folder/*.txt"


def test_dtypes_are_names(small):
  model = build(small, ["EraseThenDelta.dtype=bfloat16", "LanguageModel.param_dtype='float32'"]).model
  assert model.mixers[0].dtype is jnp.bfloat16
  assert model.param_dtype is jnp.float32


@pytest.mark.compat
def test_the_operative_text_builds_the_same_experiment(small):
  experiment = build(small, ["EraseThenDelta.dtype=bfloat16", "LanguageModel.depth=5", "Optimizer.clip_norm=2"])
  again = build_text(experiment.text, experiment.name)
  assert again == experiment
  assert "Optimizer.weight_decay = " in experiment.text, "defaults are written down too"


@settings(max_examples=20, deadline=None)
@given(
  depth=st.integers(1, 50),
  rate=st.floats(0, 10, allow_nan=False),
  sources=st.one_of(st.text(max_size=20), st.lists(st.text(max_size=8), min_size=1, max_size=3)),
  tied=st.booleans(),
)
def test_any_values_survive_the_operative_text(depth, rate, sources, tied):
  text = (
    SMALL
    + f"""
LanguageModel.depth = {depth}
LanguageModel.tie_embeddings = {tied}
Optimizer.learning_rate = {rate!r}
TextData.sources = {sources!r}
"""
  )
  experiment = build_text(text, "any")
  assert experiment.data.sources == (sources if isinstance(sources, str) else tuple(sources))
  assert build_text(experiment.text, "any") == experiment


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("EraseThenDelta.head=4", "EraseThenDelta has no field 'head': did you mean 'num_heads'? Its fields: num_heads, "),
    ("EraseThenDleta.num_heads=4", "nothing called 'EraseThenDleta': did you mean 'EraseThenDelta'?"),
    ("LanguageModel.depth=four", "LanguageModel.depth = 'four': want an integer."),
    ("LanguageModel.depth=2.5", "LanguageModel.depth = 2.5: want an integer."),
    ("LanguageModel.depth=True", "LanguageModel.depth = True: want an integer."),
    ("LanguageModel.tie_embeddings=1", "want True or False"),
    ("LanguageModel.mixers=@Attention", "want a list, each item a layer, such as @Attention."),
    ("LanguageModel.mixers=[@Trainer]", "want a layer, such as @Attention."),
    ("LanguageModel.mixers=[@Atention]", "nothing called 'Atention': did you mean 'Attention'?"),
    ("Attention.dtype=int32", "want the name of a floating type: float16, bfloat16, float32, float64"),
    ("Attention.window=[1,", "want an integer or None"),
    ("Attention.window=%wdth", "%wdth is not set: did you mean 'width'?"),
    ("TextData.sources=3", "want a string or a list, each item a string"),
    ("GatedDeltaNet.num_heads=2", "it changes nothing, for this experiment is made of LanguageModel, EraseThenDelta"),
    ("locl/Attention.window=3", "it changes nothing"),
    ("depth=3", "want Configurable.field=value"),
    ("LanguageModel.depth", "want Configurable.field=value"),
    ("LanguageModel.depth=", "want Configurable.field=value"),
  ],
)
def test_an_impossible_override_is_refused_with_what_would_do(small, override, words):
  with pytest.raises(ValueError, match="override") as error:
    build(small, [override])
  assert words in str(error.value)
  assert override in str(error.value)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("LanguageModel.vocab_size = 256\n\nLanguageModel.witdh = 3", "bad:3: LanguageModel has no field 'witdh'"),
    ("Attention.window = 'wide'\n" + SMALL, "bad:1: Attention.window = 'wide': want an integer"),
    ("GatedDeltaNet.num_heads = 'x'\n" + SMALL, "bad:1: GatedDeltaNet.num_heads = 'x': want an integer"),
    ("locl/Attention.window = 3\n" + SMALL, "bad:1: it changes nothing"),
    ("LanguageModel.vocab_size = 256", "LanguageModel.width has no default and is not set. Set it"),
    (SMALL.replace("num_heads = 2", "", 1), "EraseThenDelta.num_heads has no default"),
    ("LanguageModel.width == 3", "bad:1: "),
    ("LanguageModel.width = (\n", "in multi-line statement."),
    ("LanguageModel.width = four", "bad:1: "),
    ("@@", "bad:1: "),
    ("include 'nowhere.gin'", "bad:1: cannot include 'nowhere.gin'"),
    ("import nowhere_at_all", "bad:1: cannot import nowhere_at_all"),
    ("Nonsense:\n  x = 1", "bad:1: there is nothing called 'Nonsense'"),
  ],
)
def test_a_wrong_file_is_refused_with_the_place(text, words):
  with pytest.raises(ValueError, match="bad") as error:
    build_text(text, "bad")
  assert words in str(error.value)


def test_an_unknown_name_or_path_is_refused():
  with pytest.raises(ValueError, match="no config 'quikstart': did you mean 'quickstart'"):
    build("quikstart")
  with pytest.raises(FileNotFoundError, match=r"/nowhere/x\.gin"):
    build("/nowhere/x.gin")


def test_includes_are_found_beside_the_file_and_among_the_shipped(tmp_path):
  (tmp_path / "parts").mkdir()
  (tmp_path / "parts" / "mine.gin").write_text("include 'deeper.gin'\nTrainer.steps = 4\n")
  (tmp_path / "parts" / "deeper.gin").write_text("Trainer.steps = 3\nTrainer.seed = 3\n")
  (tmp_path / "top.gin").write_text("include 'quickstart.gin'\ninclude 'parts/mine.gin'\nLanguageModel.depth = 2\n")
  experiment = build(tmp_path / "top.gin")
  assert (experiment.trainer.steps, experiment.trainer.seed, experiment.model.depth) == (4, 3, 2)
  assert experiment.model.vocab_size == 256


def test_files_that_include_each_other_are_refused(tmp_path):
  (tmp_path / "a.gin").write_text("include 'b.gin'\n")
  (tmp_path / "b.gin").write_text("include 'a.gin'\n")
  with pytest.raises(ValueError, match=r"b\.gin includes .*a\.gin, which includes it in turn"):
    build(tmp_path / "a.gin")


def test_a_layer_of_ones_own_is_an_import_away(tmp_path, monkeypatch):
  (tmp_path / "my_layers.py").write_text(
    "from memzoo.layers import GatedDeltaNet\nclass Mine(GatedDeltaNet):\n  extra: int = 1\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  text = "import my_layers\n" + SMALL + "LanguageModel.mixers = [@my_layers.Mine]\n"
  text = "\n".join(line for line in text.splitlines() if not line.startswith("local/"))
  text += "\nmy_layers.Mine.num_heads = 2\nmy_layers.Mine.key_dim = 8\nmy_layers.Mine.value_dim = 8\nmy_layers.Mine.extra = 5"
  experiment = build_text(text, "mine")
  assert experiment.model.mixers[0].extra == 5
  assert build_text(experiment.text, "mine") == experiment


@pytest.mark.compat
def test_nothing_is_left_behind_even_by_an_error(small):
  before = gin.config_str()
  build(small)
  with pytest.raises(ValueError, match="no field"):
    build(small, ["Attention.nonsense=1"])
  assert gin.config_str() == before
  assert build(small, ["LanguageModel.depth=2"]).model.depth == 2
  assert build(small).model.depth == 3


def test_experiments_can_be_built_in_several_threads(small):
  found = {}

  def work(depth: int):
    found[depth] = build(small, [f"LanguageModel.depth={depth}"]).model.depth

  threads = [threading.Thread(target=work, args=(depth,)) for depth in range(1, 6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {depth: depth for depth in range(1, 6)}


def count_parameters(experiment) -> int:
  shapes = jax.eval_shape(experiment.model.init, jax.random.key(0), experiment.data.one_token)
  return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes)))


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_config_builds_and_has_the_size_of_its_name(name):
  experiment = build(name)
  assert build_text(experiment.text, experiment.name) == experiment
  assert dataclasses.is_dataclass(experiment.trainer)
  experiment.data.check_model(experiment.model)
  sizes = {"models": name.rpartition("_")[2].removesuffix("m"), "tasks": "0.04", "quickstart": "1.5"}
  size = float(sizes[re.match(r"[a-z]+", name)[0]])
  assert count_parameters(experiment) == pytest.approx(size * 1e6, rel=0.15 if name.startswith("models/") else 0.4)


def test_every_layer_has_a_small_and_a_middling_model():
  from memzoo.zoo.registry import LAYERS

  models = [name for name in shipped() if name.startswith("models/")]
  sizes = {(type(build(name).model.mixers[0]).__name__, name.rpartition("_")[2]) for name in models}
  alone = LAYERS.keys() - {"GatedConv"}  # sees a few tokens: no language model by itself
  assert {(layer, size) for layer in alone for size in ("10m", "130m")} <= sizes


@pytest.mark.parametrize(
  ("value", "annotation", "expected"),
  [
    (3, int, 3),
    (3, float, 3.0),
    (None, int | None, None),
    ([1, 2], tuple[int, ...], (1, 2)),
    ([1, "a"], tuple[int, str], (1, "a")),
    ((1,), list[int], [1]),
    ({"a": 1}, dict[str, float], {"a": 1.0}),
    ("a", typing.Literal["a", "b"], "a"),
    ([1], str | tuple[int, ...], (1,)),
    ([None], typing.Any, [None]),
  ],
)
def test_values_become_what_the_type_has(value, annotation, expected):
  converted = convert(value, annotation)
  assert converted == expected
  assert type(converted) is type(expected)


@pytest.mark.parametrize(
  ("value", "annotation"),
  [
    (True, int),
    (1, bool),
    ("1", int),
    (1.0, int),
    (True, float),
    ([1, 2, 3], tuple[int, int]),
    ("ab", tuple[str, ...]),
    ("c", typing.Literal["a", "b"]),
    (None, int),
    ([1], dict[str, int]),
  ],
)
def test_values_of_another_type_are_refused(value, annotation):
  with pytest.raises(Mismatch, match="want"):
    convert(value, annotation)


def test_types_are_named_in_words():
  assert in_words(int | None) == "an integer or None"
  assert in_words(tuple[float, ...]) == "a list, each item a number"
  assert in_words(typing.Literal["a", "b"]) == "one of 'a', 'b'"


def test_suggestions_come_from_spelling_or_from_a_part_of_the_name():
  fields = ["num_heads", "key_dim", "erase_bias"]
  assert did_you_mean("num_head", fields) == ": did you mean 'num_heads'?"
  assert did_you_mean("erase", fields) == ": did you mean 'erase_bias'?"
  assert did_you_mean("zzz", fields) == "."
