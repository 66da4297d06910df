"""Comparisons of memories: who enters, what is trained, that nothing is done twice, and what is shown."""

import json

import jax
import numpy as np
import pytest
from memzoo.train import cli
from memzoo.train import compare as module
from memzoo.train.compare import Budget, compare, enter
from memzoo.train.compare_report import Board, draw, markdown
from memzoo.train.config import build
from memzoo.train.tasks import TASKS

SMALL = ["MultiQueryRecall.tokens=64", "MultiQueryRecall.pairs=8", "MultiQueryRecall.vocabulary=32", "LanguageModel.width=16"]
SMALL += ["GatedConv.channels=8", "size=4", "heads=1"]
BUDGET = Budget(learning_rates=(1e-2, 3e-2), seeds=2, steps=6, batch_size=4, evaluate_every=3, test_examples=8)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_config_whose_layer_a_comparison_replaces(task):
  assert type(build(f"tasks/{task}").data.task) is TASKS[task]
  (entrant,) = enter(task, ["KimiDeltaAttention"])
  assert [type(mixer).__name__ for mixer in entrant.experiment.model.mixers] == ["GatedConv", "KimiDeltaAttention"]
  assert entrant.parameters == module._count(entrant.experiment)
  assert entrant.state_bytes == entrant.experiment.model.state_bytes(1, entrant.task.length)


def test_overrides_of_a_layer_count_for_it_alone_and_scopes_for_theirs():
  overrides = [*SMALL, "DeltaNet.key_dim=6", "wide/DeltaNet.value_dim=8", "LanguageModel.depth=4"]
  plain, wide, other = enter("mqar", ["DeltaNet", "wide/DeltaNet", "LinearAttention"], overrides)
  mixers = [entrant.experiment.model.mixers[-1] for entrant in (plain, wide, other)]
  assert [(mixer.key_dim, mixer.value_dim) for mixer in mixers] == [(6, 4), (6, 8), (4, 4)]
  assert all(entrant.experiment.model.depth == 4 for entrant in (plain, wide, other))


def test_a_pattern_of_mixers_that_is_set_holds_but_for_its_last_place():
  (entrant,) = enter("mqar", ["DeltaNet"], [*SMALL, "LanguageModel.mixers=[@Attention, @GatedConv, @LinearAttention]"])
  assert [type(mixer).__name__ for mixer in entrant.experiment.model.mixers] == ["Attention", "GatedConv", "DeltaNet"]


@pytest.mark.slow
def test_entrants_of_equal_state_and_of_equal_parameters():
  sizes = [2**12, 2**14, 2**16]
  for layer in ("DeltaNet", "EraseThenDelta", "Attention"):
    entrants = enter("mqar", [layer], state_bytes=sizes)
    assert [entrant.state_bytes for entrant in entrants] == pytest.approx(sizes, rel=0.15), layer
  counts = [entrant.parameters for entrant in enter("mqar", ["DeltaNet", "KimiDeltaAttention", "Attention"], parameters=60_000)]
  assert counts == pytest.approx([60_000] * 3, rel=0.08)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("mqarr", ["DeltaNet"]), "there is no config 'mqarr'"),
    (("quickstart", ["DeltaNet"]), "quickstart has no task"),
    (("mqar", ["DeltaNett"]), "did you mean 'DeltaNet'"),
    (("mqar", []), "Want some of"),
    (("mqar", ["DeltaNet"], ["MultiQueryRecall.pairs=99"]), "at least 396 tokens"),
    (("mqar", ["DeltaNet"], ["MultiQueryRecall.tokens=0"]), "want at least 64 tokens"),
    (("mqar", ["DeltaNet"], ["MultiQueryRecall.vocabulary=8"]), "an even vocabulary of at least 34"),
    (("mqar", ["DeltaNet"], ["LinearAttention.key_dim=8"]), "it changes nothing"),
  ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_compiled(arguments, words, monkeypatch):
  monkeypatch.setattr(jax, "jit", None)
  with pytest.raises(ValueError, match=words):
    enter(*arguments)


def test_impossible_budgets_are_named():
  for field in ({"steps": 0}, {"learning_rates": ()}, {"learning_rates": (-1.0,)}, {"seeds": 0}):
    with pytest.raises(ValueError, match=f"{next(iter(field))} is "):
      Budget(**field)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """A small comparison and where it lies."""
  folder = tmp_path_factory.mktemp("comparison")
  entrants = enter("mqar", ["DeltaNet", "LinearAttention"], SMALL, state_bytes=[300, 600])
  return entrants, folder, compare(entrants, BUDGET, folder)


@pytest.mark.slow
def test_a_comparison_has_a_score_of_every_seed_on_every_test(done):
  entrants, _, comparison = done
  assert [trial.name for trial in comparison.trials] == [entrant.name for entrant in entrants]
  for trial in comparison.trials:
    assert trial.steps == 6
    assert list(trial.scores) == list(entrants[0].task.tests())
    assert all(len(seeds) == 2 and 0 <= min(seeds) <= max(seeds) <= 1 for seeds in trial.scores.values())
    assert [look[0] for look in trial.training["0.01"]] == [3, 6]
    assert trial.learning_rate in BUDGET.learning_rates


@pytest.mark.slow
def test_a_comparison_that_was_interrupted_goes_on_with_what_is_left(done, monkeypatch, tmp_path):
  entrants, folder, comparison = done
  monkeypatch.setattr(module, "run_trial", None)  # what is done is not done again
  assert compare(entrants, BUDGET, folder) == comparison
  runs = []

  def interrupted(entrant, budget, say):
    if len(runs) == 2:
      raise KeyboardInterrupt
    runs.append(entrant.title)
    return next(trial for trial in comparison.trials if (trial.name, trial.state_bytes) == (entrant.name, entrant.state_bytes))

  monkeypatch.setattr(module, "run_trial", interrupted)
  with pytest.raises(KeyboardInterrupt):
    compare(entrants, BUDGET, tmp_path)
  again = []
  monkeypatch.setattr(module, "run_trial", lambda entrant, *_: again.append(entrant.title) or comparison.trials[0])
  compare(entrants, BUDGET, tmp_path)
  assert runs + again == [entrant.title for entrant in entrants]


@pytest.mark.slow
def test_trials_are_reproducible_and_another_budget_is_another_trial(done):
  entrants, _, comparison = done
  again = module.run_trial(entrants[0], BUDGET)
  assert (again.scores, again.training) == (comparison.trials[0].scores, comparison.trials[0].training)
  other = Budget(**{**vars(BUDGET), "steps": 7})
  assert module._file_name(entrants[0], BUDGET) != module._file_name(entrants[0], other)


@pytest.mark.slow
def test_a_lane_is_what_it_would_be_alone(done):
  """Learning rates and seeds that are trained together do not see each other."""
  entrants, _, comparison = done
  alone = module.run_trial(entrants[0], Budget(**{**vars(BUDGET), "learning_rates": (3e-2,), "seeds": 1}))
  losses = [look[1][0] for look in comparison.trials[0].training["0.03"]]
  np.testing.assert_allclose([look[1][0] for look in alone.training["0.03"]], losses, rtol=1e-4)


@pytest.mark.slow
def test_a_memory_learns_a_small_task_and_stops_there(tmp_path):
  budget = Budget(learning_rates=(1e-2,), seeds=1, steps=400, batch_size=32, evaluate_every=50, stop_at=0.95)
  overrides = ["WordProblem.group='parity'", "WordProblem.tokens=4", "LanguageModel.width=32", "size=8", "heads=1"]
  comparison = compare(enter("word_problem", ["DeltaNet"], overrides), budget, tmp_path)
  (trial,) = comparison.trials
  assert trial.scores["4"][0] > 0.95
  assert trial.steps < 400
  assert list(trial.kinds["4"]) == ["to 1", "to 2", "to 3", "to 4"]


@pytest.mark.slow
def test_continuous_tasks_are_scored_by_their_error(tmp_path):
  overrides = [f"Regression.{name}" for name in ("tokens=8", "piece=4", "key_dim=2", "value_dim=2")] + ["VectorModel.width=8"]
  budget = Budget(learning_rates=(1e-3,), seeds=1, steps=2, batch_size=2, evaluate_every=2, test_examples=4)
  comparison = compare(enter("regression", ["DeltaNet"], [*overrides, "size=4", "heads=1"]), budget, tmp_path)
  assert comparison.continuous
  assert comparison.trials[0].scores["4"][0] == pytest.approx(comparison.chance["4"], rel=0.9)
  assert {path.name for path in draw(comparison, tmp_path)} == {"scores.png", "kinds.png"}


@pytest.mark.slow
def test_tables_and_pictures_say_it_all(done, tmp_path):
  entrants, _, comparison = done
  table = markdown(comparison)
  assert table.count("\n| DeltaNet |") == 2
  assert "| without memory |" in table
  assert "± " in table
  assert {path.name for path in draw(comparison, tmp_path)} == {"scores.png", "frontier.png"}
  assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("scores.png", "frontier.png"))
  board = Board(entrants)
  board(entrants[0], {"step": 3, "loss": 1.0, "score": 0.5})
  board(entrants[1], {"trial": comparison.trials[1]})
  assert board.__rich__().row_count == len(entrants)
  comparison.save(tmp_path / "results.json")
  assert json.loads((tmp_path / "results.json").read_text())["trials"][0]["name"] == "DeltaNet"


@pytest.mark.slow
def test_the_command_writes_what_it_says(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(cli, "_start", lambda cache=True: None)
  settings = [f"--set={text}" for text in SMALL]
  command = ["memzoo", "compare", "mqar", "--layers", "DeltaNet", *settings]
  command += ["--steps", "2", "--seeds", "1", "--learning-rates", "0.01"]
  monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "c")])
  with pytest.raises(SystemExit, match="0"):
    cli.main()
  out = capsys.readouterr().out
  assert "done, 2 steps" in out
  for name in ("table.md", "results.json"):
    assert (tmp_path / "c" / name).exists()
    assert name in out
  monkeypatch.setattr("sys.argv", [*command[:4], "DeltaNet", "--learning-rates", "fast"])
  with pytest.raises(SystemExit, match="2"):
    cli.main()
  assert "--learning-rates is 'fast'; want numbers" in capsys.readouterr().err
