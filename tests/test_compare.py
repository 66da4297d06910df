"""Comparisons of memories: the entrants, their training, the reuse of finished trials, and the tables and pictures."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from memzoo.train import cli
from memzoo.train import compare as module
from memzoo.train import trial as trial_module
from memzoo.train.compare import Budget, compare, enter
from memzoo.train.compare_report import Board, draw, markdown
from memzoo.train.config import build
from memzoo.train.files import write_record
from memzoo.train.tasks import TASKS

SMALL = ["MultiQueryRecall.tokens=64", "MultiQueryRecall.pairs=8", "MultiQueryRecall.vocabulary=32", "LanguageModel.width=16"]
SMALL += ["size=4", "heads=1"]
ONE_BLOCK = ["LanguageModel.mixers=[@DeltaNet]", "LanguageModel.depth=1"]
PARITY = ["WordProblem.group='parity'", "WordProblem.tokens=4", "LanguageModel.width=16", "size=4", "heads=1", *ONE_BLOCK]
BUDGET = Budget(learning_rates=(1e-2, 3e-2), seeds=2, steps=6, batch_size=4, evaluate_every=3, test_examples=8)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_config_whose_memory_a_comparison_replaces(task):
  assert type(build(f"tasks/{task}").data.task) is TASKS[task]
  (entrant,) = enter(task, ["KimiDeltaAttention"])
  assert [type(mixer).__name__ for mixer in entrant.experiment.model.mixers] == ["GatedConv", "KimiDeltaAttention"]
  assert entrant.parameters == module._count(entrant.experiment)
  assert entrant.state_bytes == entrant.experiment.model.state_bytes(1, entrant.task.length)


def test_overrides_of_a_layer_or_scope_apply_to_it_alone():
  overrides = [*SMALL, "DeltaNet.key_dim=6", "wide/DeltaNet.value_dim=8", "LanguageModel.depth=4"]
  plain, wide, other = enter("mqar", ["DeltaNet", "wide/DeltaNet", "LinearAttention"], overrides)
  mixers = [entrant.experiment.model.mixers[-1] for entrant in (plain, wide, other)]
  assert [(mixer.key_dim, mixer.value_dim) for mixer in mixers] == [(6, 4), (6, 8), (4, 4)]
  assert all(entrant.experiment.model.depth == 4 for entrant in (plain, wide, other))


def test_a_comparison_replaces_only_the_last_mixer():
  (entrant,) = enter("mqar", ["DeltaNet"], [*SMALL, "LanguageModel.mixers=[@Attention, @GatedConv, @LinearAttention]"])
  assert [type(mixer).__name__ for mixer in entrant.experiment.model.mixers] == ["Attention", "GatedConv", "DeltaNet"]
  blocks = "LanguageModel.mixers=[@GatedConv, [@LinearAttention, @SwiGLU]]"
  (entrant,) = enter("mqar", ["DeltaNet"], [*SMALL, blocks], state_bytes=[2**12])
  assert [type(layer).__name__ for layer in entrant.experiment.model.mixers[1]] == ["DeltaNet", "SwiGLU"]


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
    (("mqar", []), "expected some of"),
    (("mqar", ["DeltaNet"], ["MultiQueryRecall.pairs=99"]), "at least 396 tokens"),
    (("mqar", ["DeltaNet"], ["MultiQueryRecall.tokens=0"]), "expected at least 64 tokens"),
    (("mqar", ["DeltaNet"], ["MultiQueryRecall.vocabulary=8"]), "an even vocabulary of at least 34"),
    (("mqar", ["DeltaNet"], ["LinearAttention.key_dim=8"]), "it changes nothing"),
  ],
)
def test_impossible_comparisons_are_refused_before_anything_is_compiled(arguments, words, monkeypatch):
  monkeypatch.setattr(jax, "jit", None)
  with pytest.raises(ValueError, match=words):
    enter(*arguments)


def test_impossible_budgets_are_refused():
  for field in ({"steps": 0}, {"learning_rates": ()}, {"learning_rates": (-1.0,)}, {"seeds": 0}, {"warmup_steps": (1,)}):
    with pytest.raises(ValueError, match=f"{next(iter(field))} is "):
      Budget(**field)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """The entrants of a small comparison, its folder and its result."""
  folder = tmp_path_factory.mktemp("comparison")
  sizes = ("GatedConv.channels=4", "GatedConv.channels=8")  # a layer that compiles fast
  entrants = [entrant for size in sizes for entrant in enter("word_problem", ["GatedConv"], [*PARITY, size])]
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
def test_an_interrupted_comparison_continues_with_the_remaining_trials(done, monkeypatch, tmp_path):
  entrants, folder, comparison = done
  monkeypatch.setattr(module, "run_trial", None)  # a finished trial is not run again
  assert compare(entrants, BUDGET, folder) == comparison
  runs = []

  def interrupted(entrant, budget, path, report):
    if len(runs) == 1:
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
def test_trials_are_reproducible_and_named_by_their_budget(done):
  entrants, _, comparison = done
  again = trial_module.run_trial(entrants[0], BUDGET)
  assert (again.scores, again.training) == (comparison.trials[0].scores, comparison.trials[0].training)
  other = replace(BUDGET, steps=7)
  assert module.trial_path(entrants[0], BUDGET, "") != module.trial_path(entrants[0], other, "")


CONSTANT = ["Optimizer.final_fraction=1.0", "GatedConv.channels=4"]
LONG = replace(BUDGET, steps=90, warmup_steps=(2, 5), halve_every=30, evaluate_every=15)


def outcome(trial):
  """What does not depend on time."""
  return {name: value for name, value in vars(trial).items() if name not in ("seconds", "tokens_per_second", "made")}


@pytest.mark.slow
def test_a_stopped_trial_continues_as_if_it_had_not_been_stopped(monkeypatch, tmp_path):
  """Stopped before and after the worse learning rate was dropped. With a constant rate a larger budget continues it too."""
  (entrant,) = enter("word_problem", ["GatedConv"], [*PARITY, *CONSTANT])
  expected = trial_module.run_trial(entrant, LONG)
  dropped, kept = sorted(expected.training.values(), key=len)
  assert [len(dropped), len(kept)] == [2, 6]
  assert np.mean(kept[1][2]) > np.mean(dropped[1][2])
  path = tmp_path / "trial.npz"

  def stop(progress):
    if progress["step"] in stops:
      stops.remove(progress["step"])
      raise KeyboardInterrupt

  stops = [30, 60]
  monkeypatch.setattr(trial_module, "_SAVE_EVERY", -1.0)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      trial_module.run_trial(entrant, LONG, path, stop)
  first = trial_module.run_trial(entrant, replace(LONG, steps=75), path)
  assert first.steps == 75
  write_record(tmp_path / "trial.json", first)
  assert trial_module.finished_trial(LONG, tmp_path / "trial.json") is None
  assert trial_module.finished_trial(replace(LONG, steps=75), tmp_path / "trial.json") == first
  assert outcome(trial_module.run_trial(entrant, LONG, path)) == outcome(expected)
  assert module.trial_path(entrant, LONG, "") == module.trial_path(entrant, replace(LONG, steps=75), "")
  path.write_bytes(b"PK")
  with pytest.raises(ValueError, match=r"trial\.npz is damaged"):
    trial_module.run_trial(entrant, LONG, path)


@pytest.mark.slow
def test_every_learning_rate_has_its_own_warm_up(done):
  """The rate of each run is that of `Optimizer.schedule`; a run equals the one that is trained alone with these settings."""
  (entrant,) = enter("word_problem", ["GatedConv"], [*PARITY, *CONSTANT])
  losses = trial_module.run_trial(entrant, replace(LONG, steps=60, halve_every=0)).training
  (alone,) = enter("word_problem", ["GatedConv"], [*PARITY, *CONSTANT, "Optimizer.warmup_steps=5"])
  budget = replace(LONG, learning_rates=(3e-2,), warmup_steps=(), steps=60)
  expected = trial_module.run_trial(alone, budget).training["0.03"]
  np.testing.assert_allclose([row[1] for row in losses["0.03"]], [row[1] for row in expected], rtol=1e-4)


@pytest.mark.slow
def test_a_run_trained_with_others_equals_the_run_alone(done):
  """Learning rates and seeds that are trained together do not affect each other."""
  entrants, _, comparison = done
  alone = trial_module.run_trial(entrants[0], Budget(**{**vars(BUDGET), "learning_rates": (3e-2,), "seeds": 1}))
  losses = [look[1][0] for look in comparison.trials[0].training["0.03"]]
  np.testing.assert_allclose([look[1][0] for look in alone.training["0.03"]], losses, rtol=1e-4)


@pytest.mark.slow
def test_training_goes_on_with_another_task(done):
  """The same task again changes nothing; a longer one is then trained on from the same parameters and step."""
  entrants, _, comparison = done
  runs = module.VmappedRuns(entrants[0], BUDGET)
  runs.train(3)
  runs.train_on(entrants[0].task.training(), BUDGET.batch_size)
  step, loss = runs.train(6)
  assert step == 6
  np.testing.assert_array_equal(loss[0], comparison.trials[0].training["0.01"][1][1])
  runs.train_on(replace(entrants[0].task, tokens=2 * entrants[0].task.tokens), 4)
  assert np.isfinite(runs.train(7)[1]).all()


@pytest.mark.slow
def test_training_ends_once_a_memory_has_learned_the_task(tmp_path):
  budget = Budget(learning_rates=(1e-2,), seeds=1, steps=400, batch_size=32, evaluate_every=50, stop_at=0.95)
  overrides = ["WordProblem.group='parity'", "WordProblem.tokens=4", "LanguageModel.width=32", "size=8", "heads=1"]
  comparison = compare(enter("word_problem", ["DeltaNet"], overrides), budget, tmp_path)
  (trial,) = comparison.trials
  assert trial.scores["4"][0] > 0.95
  assert trial.steps < 400
  assert list(trial.kinds["4"]) == ["to 1", "to 2", "to 3", "to 4"]


@pytest.mark.slow
def test_continuous_tasks_are_scored_by_their_error(tmp_path):
  overrides = [f"Regression.{name}" for name in ("tokens=8", "piece=4", "key_dim=2", "value_dim=2")]
  overrides += ["VectorModel.width=8", "VectorModel.mixers=[@DeltaNet]", "VectorModel.depth=1"]
  budget = Budget(learning_rates=(1e-3,), seeds=1, steps=2, batch_size=2, evaluate_every=2, test_examples=4)
  comparison = compare(enter("regression", ["LinearAttention"], [*overrides, "size=4", "heads=1"]), budget, tmp_path)
  assert comparison.continuous
  assert comparison.trials[0].scores["4"][0] == pytest.approx(comparison.chance["4"], rel=0.9)
  assert {path.name for path in draw(comparison, tmp_path)} == {"training.png", "scores.png", "kinds.png"}


@pytest.mark.slow
def test_tables_and_pictures_show_all_trials(done, tmp_path):
  entrants, _, comparison = done
  table = markdown(comparison)
  assert table.count("\n| GatedConv |") == 2
  assert "| without memory |" in table
  assert "± " in table
  assert {path.name for path in draw(comparison, tmp_path)} == {"training.png", "scores.png", "frontier.png", "kinds.png"}
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
  board = Board(entrants)
  board(entrants[0], {"step": 3, "loss": 1.0, "score": 0.5})
  board(entrants[1], {"trial": comparison.trials[1]})
  assert board.__rich__().row_count == len(entrants)
  comparison.save(tmp_path / "results.json")
  assert json.loads((tmp_path / "results.json").read_text())["trials"][0]["name"] == "GatedConv"


@pytest.mark.slow
def test_the_command_writes_the_files_that_it_names(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr("memzoo.train.cli_layers.start", lambda cache=True: None)
  settings = [f"--set={text}" for text in [*SMALL, *ONE_BLOCK]]
  command = ["memzoo", "compare", "mqar", "--layers", "LinearAttention", *settings]
  command += ["--steps", "2", "--seeds", "1", "--learning-rates", "0.01"]
  monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "c")])
  with pytest.raises(SystemExit, match="0"):
    cli.main()
  out = capsys.readouterr().out
  assert "done, 2 steps" in out
  for name in ("table.md", "results.json"):
    assert (tmp_path / "c" / name).exists()
    assert name in out
  monkeypatch.setattr("sys.argv", [*command[:4], "LinearAttention", "--learning-rates", "fast"])
  with pytest.raises(SystemExit, match="2"):
    cli.main()
  assert "--learning-rates is 'fast'; expected numbers" in capsys.readouterr().err
