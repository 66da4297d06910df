"""Configurations: what they build, which errors they raise, and that they leave no global state behind."""

import dataclasses
import math
import re
import tempfile
import threading
import typing
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from memzoo.layers import MemoryAsGate, Moneta, TitansMemory, Yaad
from memzoo.layers.ranges import RANGES
from memzoo.layers.titans import Gating, Loss, Network, Retention, Update
from memzoo.train import config
from memzoo.train.config import build, build_text, shipped
from memzoo.train.run_folder import check_same_run
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


def test_a_scoped_reference_uses_bindings_of_its_scope_and_unscoped_ones(small):
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
    ("EraseThenDleta.num_heads=4", "nothing is called 'EraseThenDleta': did you mean 'EraseThenDelta'?"),
    ("LanguageModel.depth=four", "LanguageModel.depth = 'four': expected an integer."),
    ("LanguageModel.depth=2.5", "LanguageModel.depth = 2.5: expected an integer."),
    ("LanguageModel.depth=True", "LanguageModel.depth = True: expected an integer."),
    ("LanguageModel.tie_embeddings=1", "expected True or False"),
    ("LanguageModel.mixers=@Attention", "expected a list, each item a layer, such as @Attention"),
    ("LanguageModel.mixers=[@Trainer]", "expected a layer, such as @Attention"),
    ("LanguageModel.mixers=[@Atention]", "nothing is called 'Atention': did you mean 'Attention'?"),
    ("Attention.dtype=int32", "expected the name of a floating type: float16, bfloat16, float32, float64"),
    ("Attention.window=[1,", "expected an integer or None"),
    ("Attention.window=%wdth", "%wdth is not set: did you mean 'width'?"),
    ("TextData.sources=3", "expected a string or a list, each item a string"),
    ("GatedDeltaNet.num_heads=2", "it changes nothing: this experiment is made of LanguageModel, EraseThenDelta"),
    ("locl/Attention.window=3", "it changes nothing"),
    ("depth=3", "expected Configurable.field=value"),
    ("LanguageModel.depth", "expected Configurable.field=value"),
    ("LanguageModel.depth=", "expected Configurable.field=value"),
  ],
)
def test_an_impossible_override_is_refused_with_what_is_expected(small, override, words):
  with pytest.raises(ValueError, match="override") as error:
    build(small, [override])
  assert words in str(error.value)
  assert override in str(error.value)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("LanguageModel.vocab_size = 256\n\nLanguageModel.witdh = 3", "bad:3: LanguageModel has no field 'witdh'"),
    ("Attention.window = 'wide'\n" + SMALL, "bad:1: Attention.window = 'wide': expected an integer"),
    ("GatedDeltaNet.num_heads = 'x'\n" + SMALL, "bad:1: GatedDeltaNet.num_heads = 'x': expected an integer"),
    ("locl/Attention.window = 3\n" + SMALL, "bad:1: it changes nothing"),
    ("LanguageModel.vocab_size = 256", "LanguageModel.mixers has no default and is not set. Set it"),
    (SMALL.replace("num_heads = 2", "", 1), "EraseThenDelta.num_heads has no default"),
    ("LanguageModel.width == 3", "bad:1: "),
    ("LanguageModel.width = (\n", "in multi-line statement."),
    ("LanguageModel.width = four", "bad:1: "),
    ("@@", "bad:1: "),
    ("x = %y\ny = %x\nTrainer.steps = %x\n" + SMALL, "bad:3: the value of %x contains itself: x -> y -> x"),
    (SMALL + "\nLanguageModel.mixers = [@LanguageModel]", "LanguageModel contains itself: LanguageModel -> LanguageModel"),
    ("include 'nowhere.gin'", "bad:1: cannot include 'nowhere.gin'"),
    ("import nowhere_at_all", "bad:1: cannot import nowhere_at_all"),
    ("Nonsense:\n  x = 1", "bad:1: nothing is called 'Nonsense'"),
  ],
)
def test_a_wrong_file_is_refused_with_the_place(text, words):
  with pytest.raises(ValueError, match="bad") as error:
    build_text(text, "bad")
  assert words in str(error.value)


@pytest.mark.parametrize(
  ("layer", "words"),
  [
    ("Attention.head_dim = 5", "head_dim=5 is odd"),
    ("Attention.num_key_heads = 3", "num_heads=2 is not a multiple of num_key_heads=3"),
    ("LocalLinearAttention.min_ridge = 2", "ridge=1.0; expected more than min_ridge=2"),
    ("LocalLinearAttention.blocks = 3", "blocks=3; expected a divisor of head_dim=4"),
    ("DeltaNet.feature_map = 'none'", "feature_map='none'; expected one of"),
    ("DeltaNet.output_gate = 'relu'", "output_gate='relu'; expected one of"),
    ("TTTLinear.head_dim = 5", "head_dim=5 is odd"),
    ("MemoryAsGate.head_dim = 5", "head_dim=5 is odd"),
    ("TitansMemory.update = @Update()\nUpdate.anchor = 'token'\nUpdate.clip = None", "anchor='token' is for linear memories"),
  ],
)
def test_fields_that_do_not_fit_together_are_refused_before_anything_is_traced(layer, words):
  name = layer.partition(".")[0]
  sizes = ("key_dim", "value_dim") if name == "DeltaNet" else ("head_dim",)
  fields = {"num_heads": 2} | dict.fromkeys(sizes, 4)
  lines = [f"{name}.{field} = {size}" for field, size in fields.items() if f"{name}.{field}" not in layer]
  model = ["LanguageModel.vocab_size = 256", "LanguageModel.width = 8", "LanguageModel.depth = 1"]
  text = "\n".join([*model, f"LanguageModel.mixers = [@{name}]", *lines, layer])
  with pytest.raises(ValueError, match="bad") as error:
    build_text(text, "bad")
  assert words in str(error.value)


NUMBERS = [
  pytest.param(cls, f.name, id=f"{name}.{f.name}")
  for name, cls in config._configurables().items()
  for f in config._fields(cls)
  if config._types(cls)[f.name] in (int, float, int | None, float | None)
]


@pytest.mark.parametrize(("cls", "field"), NUMBERS)
def test_every_number_has_a_range(cls, field):
  """Layers and models have theirs in `RANGES`; the others check theirs when they are made."""
  if issubclass(cls, nn.Module):
    assert field in RANGES
    return
  outside = math.nan if config._types(cls)[field] in (float, float | None) else -(10**6)
  required = {f.name: 1 for f in config._fields(cls) if config._is_required(f)}
  with pytest.raises(ValueError, match=rf"\b{field}\b"):
    cls(**required | {field: outside})


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("LanguageModel.width=0", "LanguageModel.width=0; expected at least 1"),
    ("LanguageModel.width=-8", "LanguageModel.width=-8; expected at least 1"),
    ("LanguageModel.depth=0", "LanguageModel.depth=0; expected at least 1"),
    ("LanguageModel.mlp_ratio=-1", "LanguageModel.mlp_ratio=-1.0; expected at least 0"),
    ("LanguageModel.norm_epsilon=-1", "LanguageModel.norm_epsilon=-1.0; expected more than 0"),
    ("LanguageModel.norm_epsilon=1e999", "LanguageModel.norm_epsilon=inf; expected a finite number"),
    ("LanguageModel.mixers=[]", "mixers is empty"),
    ("Optimizer.clip_norm=1e999", "Optimizer.clip_norm is inf; expected a finite number"),
    ("EraseThenDelta.num_heads=0", "EraseThenDelta.num_heads=0; expected at least 1"),
    ("EraseThenDelta.num_heads=2.0", "EraseThenDelta.num_heads = 2.0: expected an integer"),
    ("EraseThenDelta.num_heads='2'", "EraseThenDelta.num_heads = '2': expected an integer"),
  ],
)
def test_a_size_out_of_range_is_refused_before_anything_is_compiled(override, words):
  with pytest.raises(ValueError, match="override") as error:
    build("quickstart", [override])
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


def test_a_custom_layer_can_be_imported(tmp_path, monkeypatch):
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
def test_no_global_state_is_left_even_by_an_error(small):
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


TITANS = """
LanguageModel.vocab_size = 256
LanguageModel.width = 32
LanguageModel.depth = 3
LanguageModel.mixers = [@TitansMemory, @Moneta, @plain/Yaad]
TitansMemory.num_heads = 2
TitansMemory.head_dim = 16
Moneta.num_heads = 2
Moneta.head_dim = 16
Yaad.num_heads = 2
Yaad.head_dim = 16
plain/Network.residual = False
"""


def build_with(text: str, override: str):
  """The experiment of a file with this text, and an override."""
  with tempfile.TemporaryDirectory() as folder:
    (path := Path(folder) / "file.gin").write_text(text)
    return build(path, [override])


def rebuilt(experiment):
  """Returns the experiment, after checking that its operative text builds an equal one."""
  assert build_text(experiment.text, experiment.name) == experiment
  return experiment


def test_bindings_of_an_option_group_replace_fields_of_the_layers_own_default():
  sizes = {"num_heads": 2, "head_dim": 16, "parent": None}
  titans, moneta, yaad = rebuilt(build_text(TITANS + "Loss.scale = 0.5", "titans")).model.mixers
  assert titans == TitansMemory(**sizes, loss=Loss(scale=0.5))
  assert moneta == Moneta(**sizes, loss=Loss("power", 0.5))
  assert yaad == Yaad(**sizes, loss=Loss("mixture", 0.5), network=Network(residual=False, norm=True))


def test_a_reference_to_an_option_group_builds_it_from_its_own_defaults():
  text = TITANS + "Moneta.loss = @own/Loss\nown/Loss.scale = 2\nYaad.loss = @Loss\nLoss.power = 4"
  titans, moneta, yaad = rebuilt(build_text(text, "titans")).model.mixers
  assert titans.loss == yaad.loss == Loss(power=4.0)
  assert moneta.loss == Loss(scale=2.0, power=4.0)


def test_an_operative_text_has_short_names_for_option_groups_and_can_be_overridden(tmp_path):
  text = TITANS.replace("plain/", "").replace("[@TitansMemory, @Moneta, @Yaad]", "[@TitansMemory]")
  experiment = build_text(text, "titans")
  assert "TitansMemory.loss = @Loss\n" in experiment.text
  (tmp_path / "config.gin").write_text(experiment.text)
  assert build(tmp_path / "config.gin", ["Loss.kind=huber"]).model.mixers[0].loss == Loss("huber")


def test_option_groups_of_a_custom_layer(tmp_path, monkeypatch):
  (tmp_path / "own_layers.py").write_text(
    "from dataclasses import dataclass\nfrom memzoo.layers import DeltaNet\n"
    "@dataclass(frozen=True)\nclass Options:\n  rank: int = 1\n"
    "class Own(DeltaNet):\n  options: Options = Options(2)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  text = TITANS.replace("[@TitansMemory, @Moneta, @plain/Yaad]", "[@own_layers.Own]").replace("plain/", "")
  text = "import own_layers\n" + text + "own_layers.Own:\n  num_heads = 2\n  key_dim = 8\n  value_dim = 8\n"
  assert rebuilt(build_text(text, "own")).model.mixers[0].options.rank == 2
  assert rebuilt(build_text(text + "own_layers.Options.rank = 5\n", "own")).model.mixers[0].options.rank == 5


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("Loss.kind=cubic", "Loss.kind = 'cubic': expected one of 'squared', 'dot'"),
    ("Loss.knd=huber", "Loss has no field 'knd': did you mean 'kind'?"),
    ("Gating.max_step=-1", "Gating.max_step=-1.0; expected at least 0"),
    ("TitansMemory.loss=3", "TitansMemory.loss = 3: expected a Loss."),
    ("other/Loss.scale=2", "it changes nothing"),
    ("TitansMemory.loss_scale=0.5", "TitansMemory.loss_scale is Loss.scale now (in Python loss=Loss(scale=...))."),
    ("Moneta.retention=norm", "Moneta.retention is Retention.kind now"),
    ("VectorModel.vocab_size=3", "VectorModel.vocab_size does not exist any more; leave it out."),
  ],
)
def test_a_wrong_option_is_refused_with_what_is_expected(override, words):
  with pytest.raises(ValueError, match="override") as error:
    build_with(TITANS, override)
  assert words in str(error.value)


# The operative text of a run of version 0.1.0, nearly every field of the layer with a value other than its default.
OLD = """
LanguageModel.vocab_size = 256
LanguageModel.width = 32
LanguageModel.depth = 3
LanguageModel.mixers = [@small/MemoryAsGate]

small/MemoryAsGate.num_heads = 2
small/MemoryAsGate.head_dim = 16
small/MemoryAsGate.depth = 3
small/MemoryAsGate.expansion = 2
small/MemoryAsGate.gated = True
small/MemoryAsGate.residual = True
small/MemoryAsGate.memory_norm = True
small/MemoryAsGate.memory_norm_epsilon = 0.02
small/MemoryAsGate.loss = 'power'
small/MemoryAsGate.loss_scale = 0.5
small/MemoryAsGate.power = 2.5
small/MemoryAsGate.retention = 'norm'
small/MemoryAsGate.retention_norm = 2.5
small/MemoryAsGate.momentum = False
small/MemoryAsGate.forget = False
small/MemoryAsGate.chunk_size = 8
small/MemoryAsGate.anchor = 'chunk'
small/MemoryAsGate.order = 'gradient_first'
small/MemoryAsGate.read = 'before'
small/MemoryAsGate.clip = None
small/MemoryAsGate.max_step = 0.25
small/MemoryAsGate.step_bias = -1.0
small/MemoryAsGate.forget_bias = -2.0
small/MemoryAsGate.momentum_bias = 1.0
small/MemoryAsGate.window = 8
"""


def test_the_operative_text_of_an_earlier_version_builds_the_same_layer():
  (layer,) = rebuilt(build_text(OLD, "old")).model.mixers
  assert layer == MemoryAsGate(
    num_heads=2,
    head_dim=16,
    chunk_size=8,
    window=8,
    network=Network(3, 2.0, True, True, True, 0.02),
    loss=Loss("power", 0.5, 2.5),
    retention=Retention("norm", 2.5),
    update=Update(read="before", clip=None),
    gates=Gating(False, False, 0.25, -1.0, -2.0, 1.0, "zero"),
    parent=None,
  )
  linear = {"depth": "1", "gated": "False", "memory_norm": "False", "loss": "'squared'", "retention": "'none'"}
  linear |= {"anchor": "'token'", "order": "'decay_first'"}
  text = OLD
  for field, value in linear.items():
    text = re.sub(rf"Gate\.{field} = .*", f"Gate.{field} = {value}", text)
  assert build_text(text, "old").model.mixers[0].update == Update("token", "decay_first", "before", None)
  assert build_with(OLD, "Loss.scale=3").model.mixers[0].loss == Loss("power", 3.0, 2.5), "overrides win"


def test_an_operative_text_without_a_field_that_was_added_later_means_what_it_meant():
  text = build("models/titans_memory_10m").text
  (line,) = [line for line in text.splitlines() if line.endswith(".decay_to = 'start'")]
  header, _, text = text.replace(line, "").partition("\n")
  for old in (text, f"config_format = 1\n{text}"):
    (layer,) = rebuilt(build_text(old, "old")).model.mixers
    assert layer.gates.decay_to == "zero"
  (layer,) = rebuilt(build_text(f"{header}\n{text}", "new")).model.mixers
  assert layer.gates.decay_to == "start"
  assert build("models/titans_memory_10m", ["Gating.momentum=False"]).model.mixers[0].gates.decay_to == "start"


def test_the_operative_text_of_an_earlier_vector_model_loses_the_fields_of_its_tokens():
  text = "".join(f"VectorModel.{line}\n" for line in ("width = 8", "depth = 1", "input_dim = 3", "output_dim = 2"))
  text += "VectorModel.mixers = [@GatedConv]\nGatedConv.channels = 8\nTaskData.task = @Regression\n"
  old = "VectorModel.vocab_size = 0\nVectorModel.tie_embeddings = True\n"
  assert rebuilt(build_text(text + old, "any")) == build_text(text, "any")


def test_a_run_of_an_earlier_memory_as_layer_is_refused():
  with pytest.raises(ValueError, match=r"^old:9: MemoryAsLayer has another norm now.* Train it anew"):
    build_text(OLD.replace("MemoryAsGate", "MemoryAsLayer").replace("small/", ""), "old")


def test_a_run_of_an_earlier_version_continues_if_its_updated_text_is_the_same(tmp_path):
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  (tmp_path / "config.gin").write_text(OLD)
  today = build_text(OLD, "old").text
  check_same_run(tmp_path, today)
  for now, there, here in (("/Loss.scale", 0.5, 1.5), ("LanguageModel.mlp_ratio", 8 / 3, 2.0)):
    other = today.replace(f"{now} = {there}", f"{now} = {here}").replace(f"{now[1:]} = {there}", f"{now[1:]} = {here}")
    with pytest.raises(ValueError, match=rf"{now.strip('/')} = {there} there, {here} here\. Expected"):
      check_same_run(tmp_path, other)


def count_parameters(experiment) -> int:
  model = experiment.model.clone(scan=True)  # the same parameters, and each layer is traced once
  shapes = jax.eval_shape(model.init, jax.random.key(0), experiment.data.one_token)
  return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes)))


CONFIGS = [pytest.param(name, marks=pytest.mark.slow) if name.endswith(("_130m", "_400m")) else name for name in shipped()]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_builds_and_has_the_size_of_its_name(name):
  experiment = build(name)
  assert build_text(experiment.text, experiment.name) == experiment
  assert dataclasses.is_dataclass(experiment.trainer)
  experiment.data.check_model(experiment.model)
  sizes = {"models": name.rpartition("_")[2].removesuffix("m"), "tasks": "0.036", "quickstart": "1.5"}
  size = float(sizes[re.match(r"[a-z]+", name)[0]])
  assert count_parameters(experiment) == pytest.approx(size * 1e6, rel=0.15 if name.startswith("models/") else 0.4)


def test_every_layer_has_a_small_and_a_middling_model():
  from memzoo.zoo.registry import LAYERS

  def first(name):
    model = build(name).model
    mixers = (type(model.mixer(i)).__name__ for i in range(model.depth))
    return next(mixer for mixer in mixers if mixer != "GatedConv")

  models = [name for name in shipped() if name.startswith("models/")]
  sizes = {(first(name), name.rpartition("_")[2]) for name in models}
  alone = LAYERS.keys() - {"GatedConv"}  # sees only a few tokens: not a language model alone
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
def test_values_are_converted_to_the_type_of_the_field(value, annotation, expected):
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
  with pytest.raises(Mismatch, match="expected"):
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
