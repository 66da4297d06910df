"""Operative configurations: their format, fields of other versions, modules of the user's own; nothing is lost in them."""

import dataclasses
import json
import sys
import typing
from pathlib import Path

import pytest
from memzoo.train import cli, config, old_configs
from memzoo.train.compare import enter
from memzoo.train.config import build, build_text
from memzoo.train.files import read_record
from memzoo.train.run_folder import Result, check_same_run, finished_result, run_of, write_config
from memzoo.zoo.registry import LAYERS

LAYER = """
from dataclasses import dataclass
from memzoo.layers import GatedDeltaNet

@dataclass(frozen=True)
class Options:
  strength: float = 1.0

class {name}(GatedDeltaNet):
  extra: int = 1
  options: Options = Options()
"""
MINE = """
import {module}
LanguageModel.vocab_size = 256
LanguageModel.width = 32
LanguageModel.depth = 1
LanguageModel.mixers = [@{module}.Mine]
{module}.Mine.num_heads = 2
{module}.Mine.key_dim = 8
{module}.Mine.value_dim = 8
{module}.Mine.extra = 5
"""


@pytest.fixture
def my_module(tmp_path, monkeypatch):
  """The name of a module in `tmp_path`, which has a layer `Mine`; it is forgotten afterwards."""
  name = f"layers_of_{tmp_path.name}"
  (tmp_path / f"{name}.py").write_text(LAYER.format(name="Mine"))
  yield name
  sys.modules.pop(name, None)


@pytest.fixture
def run(tmp_path):
  """A folder with the operative text of a run, and a checkpoint."""
  folder = tmp_path / "my_run"
  (folder / "checkpoints" / "3").mkdir(parents=True)
  (folder / "config.gin").write_text(build("quickstart").text)
  return folder


def test_fields_of_another_version_are_ignored_and_kept_in_an_operative_text_alone(run):
  ours = build("quickstart").text
  newer = ours.replace("config_format = 2", "config_format = 9") + "\nTrainer.new = [1, @Attention]\nlocal/Newer.field = 'x'\n"
  experiment = build_text(newer, "quickstart")
  assert experiment.ignored == ("Trainer.new = [1, @Attention]", "local/Newer.field = 'x'")
  assert dataclasses.replace(experiment, ignored=(), text=ours) == build("quickstart")
  assert build_text(experiment.text, "quickstart") == experiment
  (run / "config.gin").write_text(newer)
  check_same_run(run, ours)
  for _ in range(2):
    write_config(run, ours)
    assert build(run).ignored == experiment.ignored
  with pytest.raises(ValueError, match=r"Trainer\.new.*no field 'new'"):
    build(run, ["Trainer.new=1"])
  with pytest.raises(ValueError, match="no field 'new'"):
    build_text(newer.partition("\n")[2], "by hand")
  with pytest.raises(ValueError, match=r"nothing is called 'Newer'.* A newer version of memzoo wrote this"):
    build_text(newer.replace("LanguageModel.mixers = [", "LanguageModel.mixers = [@local/Newer, "), "newer")


def test_an_operative_text_that_lacks_a_field_gets_its_default(run):
  ours = build("quickstart").text
  lacking = "".join(line for line in ours.splitlines(True) if not line.startswith(("Trainer.log_every", "Attention.sinks")))
  (run / "config.gin").write_text(lacking)
  check_same_run(run, ours)
  assert build(run).trainer.log_every == build("quickstart").trainer.log_every


def test_fields_added_to_a_format_have_their_earlier_values(monkeypatch):
  monkeypatch.setattr(old_configs, "FORMAT", 3)
  monkeypatch.setitem(old_configs._ADDED, config.Trainer, {"nonfinite_limit": (3, 77)})
  text = build("quickstart").text
  assert text.startswith("config_format = 3\n")
  limits = []
  for version in (2, 3):
    lacking = text.replace("config_format = 3", f"config_format = {version}").replace("Trainer.nonfinite_limit = 5\n", "")
    limits.append(build_text(lacking, "old").trainer.nonfinite_limit)
  assert limits == [77, 5]


def test_a_result_of_another_version_is_read(tmp_path):
  path = tmp_path / "result.json"
  path.write_text(json.dumps({"format": 9, "directory": "here", "step": 3, "unknown": 1}))
  assert finished_result(tmp_path, 3) == Result("here", 3)
  path.write_text(json.dumps({"format": 9, "directory": "here"}))
  with pytest.raises(ValueError, match=r"does not hold a Result \(.*'step'; a newer version of memzoo wrote it\); remove it"):
    read_record(Result, path, "remove it")


def test_a_module_is_found_beside_the_config_and_again_from_the_run(tmp_path, monkeypatch, my_module):
  (tmp_path / "mine.gin").write_text(MINE.format(module=my_module))
  (elsewhere := tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(elsewhere)
  experiment = build("../mine.gin")
  assert experiment.model.mixers[0].extra == 5
  assert f"import_folders = ['{tmp_path}']" in experiment.text
  write_config(elsewhere, experiment.text)
  sys.modules.pop(my_module)
  assert build(elsewhere).model.mixers[0].extra == 5
  assert str(tmp_path) not in sys.path
  sys.modules.pop(my_module)
  (tmp_path / f"{my_module}.py").rename(elsewhere / f"{my_module}.py")
  assert build(elsewhere).model.mixers[0].extra == 5, "beside the config of the run"
  sys.modules.pop(my_module)
  (elsewhere / f"{my_module}.py").unlink()
  with pytest.raises(ValueError, match=rf"cannot import {my_module}: No module named .* in .*{tmp_path}.* or on Python's path"):
    build(elsewhere)


def test_another_module_of_that_name_is_refused(tmp_path, my_module):
  for folder in ("a", "b"):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "mine.gin").write_text(MINE.format(module=my_module))
    (tmp_path / folder / f"{my_module}.py").write_text(LAYER.format(name="Mine"))
  build(tmp_path / "a" / "mine.gin")
  with pytest.raises(ValueError, match=rf"/a/{my_module}\.py has that name and is imported already; start another process"):
    build(tmp_path / "b" / "mine.gin")


def test_folders_of_modules_are_relative_to_their_file(tmp_path, my_module):
  (tmp_path / "configs").mkdir()
  path = tmp_path / "configs" / "mine.gin"
  path.write_text('import_folders = [".."]' + MINE.format(module=my_module))
  assert build(path).model.mixers[0].extra == 5
  path.write_text("import_folders = 3" + MINE.format(module=my_module))
  with pytest.raises(ValueError, match=r"mine\.gin:1: import_folders = 3: expected a list"):
    build(path)


def test_a_run_is_named_by_its_folder_or_its_config(run, monkeypatch, capsys):
  assert build(run) == build(run / "config.gin") == build_text((run / "config.gin").read_text(), "my_run")
  assert run_of(run) == run_of(run / "config.gin") == run
  assert run_of("quickstart") is None
  monkeypatch.setattr(cli, "start", lambda: None)
  monkeypatch.setattr(sys, "argv", ["memzoo", "describe", str(run)])
  with pytest.raises(SystemExit, match="0"):
    cli.main()
  assert "my_run" in capsys.readouterr().out
  with pytest.raises(ValueError, match=r"is no run: it has no config\.gin"):
    build(run / "checkpoints")


def test_training_a_run_continues_it_in_its_folder(run, monkeypatch):
  called = []
  monkeypatch.setattr(cli, "start", lambda: None)
  monkeypatch.setattr("memzoo.train.loop.train", lambda experiment, folder: called.append(folder) or Result("", 1))
  monkeypatch.chdir(run.parent)
  for name in ("my_run", "my_run/config.gin", "quickstart"):
    monkeypatch.setattr(sys, "argv", ["memzoo", "train", name])
    with pytest.raises(SystemExit, match="0"):
      cli.main()
  assert called == [Path("my_run"), Path("my_run"), Path("runs/quickstart")]


def test_a_layer_of_ones_own_is_compared_once(tmp_path, monkeypatch, my_module):
  monkeypatch.chdir(tmp_path)
  mine = f"{my_module}.Mine"
  sizes = [f"{mine}.{name}=8" for name in ("num_heads", "key_dim", "value_dim")]
  overrides = [*sizes, f"{mine}.extra=7", f"small/{mine}.extra=9", f"{my_module}.Options.strength=0.5"]
  entrants = enter("mqar", [mine, "DeltaNet", f"small/{mine}", mine], overrides)
  assert [entrant.name for entrant in entrants] == [mine, "DeltaNet", f"small/{mine}"]
  first, _, small = (entrant.experiment.model.mixers[-1] for entrant in entrants)
  assert (first.extra, small.extra, first.options.strength) == (7, 9, 0.5)
  with pytest.raises(ValueError, match=rf"layer '{my_module}.Other' is neither in `memzoo list` nor a class"):
    enter("mqar", [f"{my_module}.Other"])


def test_a_comparison_keeps_the_other_layers_of_its_config_as_they_are(tmp_path, my_module):
  path, mine = tmp_path / "task.gin", f"{my_module}.Mine"
  sizes = "".join(f"{mine}.{name} = 4\n" for name in ("num_heads", "key_dim", "value_dim"))
  path.write_text(
    f"import {my_module}\ninclude 'tasks/mqar.gin'\nLanguageModel.mixers = [@narrow/GatedConv, @{mine}, @LinearAttention]\n"
    f"narrow/GatedConv.conv_width = 2\n{sizes}"
  )
  (entrant,) = enter(str(path), ["DeltaNet"])
  first, second, _ = entrant.experiment.model.mixers
  assert (first.conv_width, type(second).__name__) == (2, "Mine")


VALUES = [0, 1, 2, 3, 8, 0.5, -0.0, 1e-7, 1e22, -1.5, True, False, None, [1, 2], ["a"], {}]
VALUES += ["", "full", "x'\"\\\n%é", "bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["Attention", "DeltaProduct", "GatedConv", "MemoryAsContext", "Moneta", "TTTMLP"])
def test_whatever_is_accepted_is_written_and_builds_an_equal_experiment(layer):
  """Every field of a layer, of its option groups and of the run, with values of many types."""
  sizes = dict.fromkeys(("head_dim", "key_dim", "value_dim", "channels", "segment"), 8) | {"num_heads": 2}
  cls = LAYERS[layer]
  usual = ["include 'parts/language_model.gin'", "LanguageModel.width=8", "LanguageModel.depth=1"]
  usual += [f"LanguageModel.mixers=[@{layer}]"]
  usual += [f"{layer}.{f.name}={sizes[f.name]}" for f in config._fields(cls) if config._is_required(f)]
  classes = [cls, *config._groups(cls).values(), config.LanguageModel, config.TextData, config.Optimizer, config.Trainer]
  fields = [(f"{config._name(c)}.{f.name}", c, f.name) for c in classes for f in config._fields(c)]
  accepted = 0
  for name, owner, field in fields if layer == "GatedConv" else [entry for entry in fields if entry[1] in classes[:-4]]:
    options = typing.get_args(typing.get_type_hints(owner)[field]) if owner in classes[1:-4] else ()
    for value in [*VALUES, *(option for option in options if isinstance(option, str))]:
      try:
        experiment = build_text("\n".join([*usual, f"{name}={value!r}"]), "any")
      except ValueError:
        continue
      accepted += 1
      again = build_text(experiment.text, experiment.name)
      assert again == experiment, (name, value)
      assert again.text == experiment.text, (name, value)
  assert accepted > len(classes)
