"""Suites: which cells are made and in which order, what a table says of them, and the command."""

import math
from dataclasses import replace

import pytest
from memzoo.train import cli, suite_report
from memzoo.train import suite as module
from memzoo.train.compare import Budget, enter
from memzoo.train.files import write_record
from memzoo.train.suite import Cell, Challenge, Suite
from memzoo.train.suites import SUITES

PARITY = ("WordProblem.group='parity'", "WordProblem.tokens=4", "LanguageModel.width=16", "size=4", "heads=1")
PARITY += ("LanguageModel.mixers=[@DeltaNet]", "LanguageModel.depth=1", "Optimizer.final_fraction=1.0")
BUDGET = Budget(learning_rates=(1e-2, 3e-2), seeds=2, steps=4, batch_size=4, evaluate_every=2, test_examples=8)
TINY = Suite(
  challenges=(
    Challenge("flips", "parity", "word_problem", "GatedConv", tests={"flips": "", "4x": "16"}),
    Challenge("long flips", "parity of more", "word_problem", "GatedConv", ("WordProblem.tokens=6",)),
  ),
  layers=("LinearAttention", "GatedConv"),
  settings=PARITY,
  budget=BUDGET,
)
CELL = Cell("0", 200, 9.0, 0.01, 1000, 512, 1e4, [0.97, 0.99], {"4": [0.9, 1.0], "16": [0.5, 0.7]}, [[100, 0.5], [200, 0.98]],
            {"machine": "2 cores", "commit": "abc", "date": "2026-01-01"})  # fmt: skip


@pytest.mark.parametrize("name", SUITES)
def test_every_challenge_of_a_suite_can_be_entered(name):
  suite = SUITES[name]
  assert len({challenge.name for challenge in suite.challenges}) == len(suite.challenges)
  for challenge in suite.challenges:
    entrant = suite.enter(challenge, challenge.reference)
    assert {test for test in challenge.columns.values() if test} <= entrant.task.tests().keys()
    assert challenge.reference in suite.layers


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_every_layer_of_a_suite_can_be_entered(name):
  suite = SUITES[name]
  for challenge in (suite.challenges[0], suite.challenges[-1]):
    for layer in suite.layers:
      assert suite.selected([layer], None).enter(challenge, layer).state_bytes > 0


@pytest.fixture
def calls(monkeypatch):
  """The challenge and layer of each trial, none of which is trained."""
  made = []

  def trial(entrant, budget, state, report):
    made.append((str(entrant.task.length), entrant.name, budget.steps))
    assert state.parent.is_dir()
    return made_up

  curve = [[2, [1, 1], [0.4, 0.4]], [4, [1, 1], [0.5, 0.6]]]
  made_up = module.Trial("", 512, 1000, 4, 1.0, 0.01, {"4": [0.5, 0.6]}, {}, {"0.01": curve}, made=CELL.made)
  monkeypatch.setattr(module, "run_trial", trial)
  return made


def test_references_come_first_and_what_is_done_is_not_done_again(calls, tmp_path):
  module.run(TINY, tmp_path)
  assert [call[1] for call in calls] == ["GatedConv"] * 2 + ["LinearAttention"] * 2
  assert [call[0] for call in calls] == ["4", "6"] * 2
  assert module.read(tmp_path, "long flips", "LinearAttention").training == [0.5, 0.6]
  calls.clear()
  module.run(TINY, tmp_path)
  assert calls == []
  module.run(replace(TINY, budget=replace(BUDGET, steps=8)), tmp_path)  # none of them has learned its task
  assert len(calls) == 4
  calls.clear()
  module.run(replace(TINY, settings=(*PARITY, "LinearAttention.feature_map=elu")), tmp_path)
  assert [call[1] for call in calls] == ["LinearAttention"] * 2


def test_a_cell_that_another_process_makes_is_left_to_it(calls, monkeypatch, tmp_path):
  def taken(directory, say):
    raise ValueError(f"{directory} is in use")

  monkeypatch.setattr(module, "Lock", taken)
  module.run(TINY, tmp_path)
  assert calls == []


@pytest.mark.slow
def test_a_layer_has_as_many_parameters_as_the_reference(tmp_path):
  small = TINY.selected(["LinearAttention"], ["flips"])
  module.run(small, tmp_path)
  (reference,) = enter("word_problem", ["GatedConv"], PARITY)
  cell = module.read(tmp_path, "flips", "LinearAttention")
  (own,) = enter("word_problem", ["LinearAttention"], PARITY)
  assert abs(cell.parameters - reference.parameters) < abs(own.parameters - reference.parameters)
  assert cell.steps == 4
  assert set(cell.scores) == {"4", "8", "16"}
  assert cell.curve[-1][0] == 4


def filled(folder, **cells):
  """The folder, with these cells of the challenge "flips"; "long flips" was not run."""
  for layer, cell in cells.items():
    path = module._path(folder, "flips", layer)
    path.parent.mkdir(exist_ok=True)
    write_record(path, cell)
  return folder


def test_a_table_says_nothing_of_what_was_not_learned(tmp_path):
  slow = replace(CELL, steps=4000, training=[0.97, 0.3], tokens_per_second=5e3)
  table = suite_report.markdown(suite_report.Results(TINY, filled(tmp_path, GatedConv=CELL, LinearAttention=slow)))
  assert "| GatedConv | 512 bytes |  | 0.98 | 0.60 |  |" in table
  assert "| LinearAttention | 512 bytes |  | not in 4,000 | not in 4,000 |  |" in table
  assert "long flips (not solved)" in table
  assert "flips (not solved)" not in table.replace("long flips (not solved)", "")
  assert not suite_report.Results(TINY, filled(tmp_path, GatedConv=slow)).counts(TINY.challenges[0])


def test_speed_is_relative_to_attention_on_the_same_machine(tmp_path):
  suite, other = replace(TINY, layers=("Attention", "A")), replace(CELL, tokens_per_second=5e3)
  assert suite_report.Results(suite, filled(tmp_path, Attention=CELL, A=other)).speed("A") == 0.5
  filled(tmp_path, A=replace(other, made=CELL.made | {"machine": "a GPU"}))
  assert math.isnan(suite_report.Results(suite, tmp_path).speed("A"))


def test_pictures_are_drawn_from_what_is_there(tmp_path):
  filled(tmp_path, GatedConv=CELL)
  paths = suite_report.write(TINY, tmp_path)
  assert [path.name for path in paths] == ["table.md", "suite.png", "curves.png"]
  assert all(path.stat().st_size > 100 for path in paths)
  with pytest.raises(ValueError, match="holds no results"):
    suite_report.write(TINY, tmp_path / "nothing")


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--suite", "memori"], "--suite is 'memori': did you mean 'memory'"),
    (["--suite", "memory", "--tasks", "recal"], "--tasks names 'recal'; expected some of"),
    (["mqar", "--suite", "memory"], "TASK is 'mqar'; expected --suite NAME without it"),
    (["--suite", "memory", "--learning-rates", "1"], "--learning-rates is '1'"),
    (["--tasks", "recall"], "--suite is None"),
    (["mqar"], "--layers is missing"),
    (["--layers", "DeltaNet"], "TASK is missing"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, words, monkeypatch, capsys):
  monkeypatch.setattr("memzoo.train.cli_layers.start", lambda cache=True: None)
  monkeypatch.setattr("sys.argv", ["memzoo", "compare", *arguments])
  with pytest.raises(SystemExit, match="2"):
    cli.main()
  assert words in " ".join(capsys.readouterr().err.split())


def test_the_command_makes_cells_and_then_tables(monkeypatch, capsys, calls, tmp_path):
  monkeypatch.setattr("memzoo.train.cli_layers.start", lambda cache=True: None)
  monkeypatch.setitem(SUITES, "tiny", TINY)
  command = ["memzoo", "compare", "--suite", "tiny", "--layers", "LinearAttention", "--tasks", "flips", "--out", str(tmp_path)]
  monkeypatch.setattr("sys.argv", [*command, "--steps", "6"])
  with pytest.raises(SystemExit, match="0"):
    cli.main()
  assert calls == [("4", "GatedConv", 6), ("4", "LinearAttention", 6)]
  assert "flips: LinearAttention has not learned it in 4 steps" in capsys.readouterr().out
  calls.clear()
  monkeypatch.setattr("sys.argv", [*command, "--table"])
  with pytest.raises(SystemExit, match="0"):
    cli.main()
  assert calls == []
  assert "table.md" in capsys.readouterr().out
