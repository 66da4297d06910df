"""The memory tasks: the solver is always right, guesses are right as often as stated, and runs on tasks resume."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.train.config import build
from memzoo.train.evaluation import evaluate_run
from memzoo.train.experiment_report import render
from memzoo.train.loop import train
from memzoo.train.report import read_rows
from memzoo.train.tasks import TASKS, Mixture, TaskData
from memzoo.train.tasks.copying import SelectiveCopying
from memzoo.train.tasks.recall import MultiQueryRecall, NoisyRecall, StaleFacts
from memzoo.train.tasks.regression import Regression
from memzoo.train.tasks.sets import SetDisjointness
from memzoo.train.tasks.state_tracking import GROUPS, Swaps, WordProblem, multiplication, permutations
from memzoo.zoo.describe import describe
from task_examples import examples, program, score

pytestmark = pytest.mark.slow

SMALL = {
  "mqar": {"vocabulary": 64},
  "noised_mqar": {"task": MultiQueryRecall(48, 6, 64)},
  "needle": {"needles": 3, "text_bytes": 20_000},
  "stale_facts": {"facts": 5, "superseded": 2},
}
VARIANTS = [
  *((name, SMALL.get(name, {})) for name in TASKS),
  ("mqar", {"tokens": 128, "pairs": 16, "vocabulary": 128, "power": 1.0, "filler": False}),
  *(("word_problem", {"group": group, "tokens": 30}) for group in GROUPS if group != "S3"),
  ("regression", {"tokens": 48, "piece": 48, "key_dim": 4, "value_dim": 3}),
  ("regression", {"tokens": 48, "piece": 24, "key_dim": 4, "value_dim": 3, "centre": 1.0}),
  ("regression", {"tokens": 48, "piece": 24, "key_dim": 4, "value_dim": 3, "cosine": 0.8}),
  ("set_disjointness", {"first": 7, "second": 3, "vocabulary": 13}),
  ("variable_tracking", {"hops": 3, "chains": 5, "vocabulary": 40}),
  ("variable_tracking", {"hops": 0, "chains": 1, "vocabulary": 6}),
  ("fuzzy_recall", {"pairs": 12, "longest": 3, "vocabulary": 8}),
  ("fuzzy_recall", {"pairs": 5, "longest": 2, "vocabulary": 50}),
  *(("anbn", {"words": 4, "longest": longest}) for longest in (2, 3, 4)),
  ("shuffle", {"brackets": 2, "deepest": 1, "tokens": 5}),
  ("shuffle", {"brackets": 4, "deepest": 2, "tokens": 20}),
  ("noised_mqar", {"task": SelectiveCopying(10, 4, 8), "share": 0.5, "noise_vocabulary": 3}),
  ("noised_mqar", {"task": MultiQueryRecall(64, 6, 32).training(), "share": 0.1}),
  ("noised_mqar", {"task": StaleFacts(4, 2, 20), "share": 0.0}),
  ("compression", {"tokens": 6, "positions": 9, "vocabulary": 3}),
  ("memorisation", {"tokens": 20, "vocabulary": 6, "dictionary": 3}),
  ("facts", {"facts": 12, "questions": 4, "people": 1, "places": 3, "objects": 4}),
  ("facts", {"facts": 4, "questions": 4, "people": 2, "places": 2, "objects": 0}),
]
IDS = [f"{name}{i}" for i, (name, _) in enumerate(VARIANTS)]


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=IDS)
def test_the_solver_is_right_and_a_guess_as_often_as_stated(name, fields):
  task = TASKS[name](**fields)
  chance, scores = np.random.default_rng(0), []
  for i, example in enumerate(examples(task, 400)):
    scores.append(score(task, example, task.guess(example, chance)))
    if i >= 20:
      continue
    answers = task.solve(example)
    assert len(answers) == task.length
    if task.continuous:
      known = example.weights * (example.kind >= task.key_dim - 1)
      np.testing.assert_allclose(answers[known > 0], example.targets[known > 0], atol=1e-4)
    else:
      assert score(task, example, answers) == 1
  error = np.std(scores) / np.sqrt(len(scores))
  assert abs(np.mean(scores) - task.chance) < 4 * error + 1e-3, f"{np.mean(scores):.4f}, stated {task.chance:.4f}"


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=IDS)
def test_examples_depend_only_on_their_key_and_have_one_shape(name, fields):
  task, make = TASKS[name](**fields), program(TASKS[name](**fields), 400)
  key = jax.random.key(7)
  one = jax.device_get(make(key))
  again = jax.jit(lambda key: task.batch(key, 400))(jax.device_put(key, jax.devices()[-1]))  # traced anew, on another device
  jax.tree.map(np.testing.assert_array_equal, one, again)
  assert not np.array_equal(one.tokens, make(jax.random.key(8)).tokens)
  assert one.targets.shape[:2] == one.weights.shape == one.segment_ids.shape == one.kind.shape == (400, task.length)
  assert one.weights.dtype == np.float32
  assert set(np.unique(one.weights)) <= {0.0, 1.0}
  assert one.weights.any(axis=1).all()
  assert 0 <= one.kind.min() <= one.kind.max() < len(task.kinds)
  if task.continuous:
    assert one.tokens.dtype == one.targets.dtype == np.float32
    assert (one.tokens.shape[2], one.targets.shape[2]) == (task.input_dim, task.output_dim)
  else:
    assert one.tokens.dtype == one.targets.dtype == np.int32
    assert min(one.tokens.min(), one.targets.min()) >= 0
    assert max(one.tokens.max(), one.targets.max()) < task.vocab_size


@pytest.mark.parametrize("name", TASKS)
def test_training_and_tests_are_solvable_and_use_the_same_tokens(name):
  task = TASKS[name](**SMALL.get(name, {}))
  tests = list(task.tests().values())
  for test in [task.training(), *tests]:
    if test.continuous:
      assert (test.input_dim, test.output_dim) == (task.input_dim, task.output_dim)
    assert test.vocab_size == task.vocab_size if not test.continuous else test.length == task.length
  for test in [] if task.continuous else [task.training(), tests[-1]]:
    for example in examples(test, 2):
      assert score(test, example, test.solve(example)) == 1


# The rules of each task.


@pytest.mark.parametrize(
  ("pairs", "spare", "power", "filler"), [(1, 0, 1.0, False), (12, 20, 0.01, True), (7, 3, 0.5, False), (5, 0, 0.01, True)]
)
def test_mqar_asks_for_every_key_once_at_an_even_place(pairs, spare, power, filler):
  task = MultiQueryRecall(4 * pairs + 2 * spare, pairs, 2 * (pairs + 30), power, filler)
  for example in examples(task, 20):
    keys, values = example.tokens[: 2 * pairs].reshape(-1, 2).T
    asked = np.flatnonzero(example.weights)
    assert len(set(keys)) == len(set(values)) == pairs
    assert 0 < keys.min() <= keys.max() < task.vocabulary // 2 <= values.min()
    assert sorted(example.tokens[asked]) == sorted(keys)
    assert (asked % 2 == 0).all()
    assert asked.min() >= 2 * pairs
    assert filler or np.count_nonzero(example.tokens) == 3 * pairs
    assert score(task, example, task.solve(example)) == 1


def test_mqar_asks_as_soon_as_its_authors_do():
  """The gap of the first key, which is drawn first, has the stated distribution."""
  task = MultiQueryRecall(64, 4, 64)
  first = [np.flatnonzero((example.tokens == example.tokens[0]) & (example.weights > 0))[0] for example in examples(task, 2000)]
  slots = (np.array(first) - 8) // 2
  law = np.arange(1, 29) ** (task.power - 1)
  np.testing.assert_allclose(np.bincount(slots, minlength=28)[:4] / 2000, (law / law.sum())[:4], atol=0.04)


def test_mqar_trains_on_its_authors_mix_up_to_its_own_size():
  mix = MultiQueryRecall(256, 64).training()
  assert [(task.tokens, task.pairs) for task in mix.tasks] == [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
  assert mix.counts == (100, 20, 20, 20, 20)
  assert list(MultiQueryRecall(1024, 256).tests()) == ["4", "8", "16", "32", "64", "128", "256"]
  assert list(MultiQueryRecall(128, 20).tests()) == ["4", "8", "16", "20"]


def test_a_mixture_packs_whole_examples_in_the_stated_proportions():
  short, long = MultiQueryRecall(16, 2, 64), MultiQueryRecall(64, 4, 64)
  mix = Mixture((short, long), (8, 1))
  rows = examples(mix, 600)
  share = np.mean([row.kind[0] == 0 for row in rows])
  assert share == pytest.approx(8 * 16 / (8 * 16 + 64), abs=0.06)
  for row in rows[:10]:
    assert row.segment_ids[-1] == (4 if row.kind[0] == 0 else 1)
    assert score(mix, row, mix.solve(row)) == 1


@pytest.mark.parametrize(("pairs", "writes", "outliers"), [(1, 3, 0.49), (8, 6, 0.3), (3, 4, 0.49), (5, 5, 0.0)])
def test_most_noisy_writes_of_a_key_have_the_right_value(pairs, writes, outliers):
  task = NoisyRecall(pairs, writes, outliers, 40)
  for example in examples(task, 20):
    keys, values = example.tokens[: 2 * pairs * writes].reshape(-1, 2).T
    for key, answer in zip(example.tokens[-pairs:], example.targets[-pairs:], strict=True):
      assert 2 * np.count_nonzero(values[keys == key] == answer) > writes
    assert score(task, example, task.solve(example)) == 1


def test_the_share_of_wrong_writes_is_as_stated():
  task = NoisyRecall(8, 5, 0.1)
  wrong = []
  for example in examples(task, 200):
    answers = dict(zip(example.tokens[-8:], example.targets[-8:], strict=True))
    wrong += [answers[key] != value for key, value in example.tokens[:80].reshape(-1, 2)]
  assert np.mean(wrong) == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(("facts", "superseded"), [(1, 1), (10, 4), (6, 0), (5, 5)])
def test_a_fact_is_written_before_it_is_superseded_and_gone_after(facts, superseded):
  task = StaleFacts(facts, superseded, 40)
  for example in examples(task, 20):
    seen, gone = set(), set()
    for old, key, _ in example.tokens[: 3 * task._keys].reshape(-1, 3):
      assert key not in seen
      seen.add(key)
      if old != task.vocabulary:
        assert old in seen - gone
        gone.add(old)
    assert len(gone) == superseded
    asked = example.tokens[3 * task._keys :]
    assert set(asked) == seen
    kinds = dict(zip(asked, example.kind[3 * task._keys :], strict=True))
    assert {key for key, kind in kinds.items() if kind == 1} == gone
    assert score(task, example, task.solve(example)) == 1


def test_multiplication_tables_are_those_of_groups():
  orders = {group: len(permutations(group)) for group in GROUPS}
  assert orders == {"parity": 2, "S3": 6, "S4": 24, "A5": 60, "S5": 120}
  for group, order in orders.items():
    table = multiplication(group)
    assert (table[0] == np.arange(order)).all()
    assert (np.sort(table, axis=1) == np.arange(order)).all()
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 50))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
  assert (multiplication("parity") == [[0, 1], [1, 0]]).all()


def test_parity_and_swaps_have_known_answers():
  (example,) = examples(WordProblem("parity", 40), 1)
  np.testing.assert_array_equal(example.targets, np.cumsum(example.tokens) % 2)
  (example,) = examples(Swaps(3, 1), 1)
  first, second, asked = example.tokens % 3
  assert example.targets[2] == {first: second, second: first}.get(asked, asked)


def test_sets_have_one_element_in_common_wherever_it_lies():
  places = []
  for example in examples(SetDisjointness(4, 8, 100), 200):
    first, second = example.tokens[1:5].tolist(), example.tokens[6:14].tolist()
    assert len(set(first)) == 4
    assert len(set(second)) == 8
    assert set(first) & set(second) == {example.targets[-1]}
    assert tuple(example.tokens[[0, 5, 14]]) == (1, 2, 3)
    places.append((first.index(example.targets[-1]), second.index(example.targets[-1])))
  assert len(set(places)) > 25


def test_needles_lie_at_the_requested_depth():
  for low, high in ((0.0, 0.0), (0.45, 0.55), (1.0, 1.0)):
    task = TASKS["needle"](tokens=1000, needles=2, shallowest=low, deepest=high, text_bytes=20_000)
    for example in examples(task, 5):
      text = bytes(example.tokens.astype(np.uint8))
      question = text[text.rindex(b"\nThe") : -5]
      assert text.index(question) / 1000 == pytest.approx((low + high) / 2, abs=0.1)
      assert text.count(b"\nThe pass key of") == 3
      asked = np.flatnonzero(example.weights)
      assert text[asked[0] + 1 : asked[-1] + 2] == text[-5:]


def test_regression_is_learned_anew_in_every_piece():
  task = Regression(tokens=64, piece=32, key_dim=4, value_dim=2)
  errors = np.stack([
    np.square(task.solve(example) - example.targets).mean(axis=1).reshape(2, 32)[:, :-1] for example in examples(task, 50)
  ]).mean(axis=0)
  assert (errors[:, 0] > 0.5).all()
  assert (errors[:, 3:] < 1e-6).all()


def test_keys_of_a_piece_lie_around_a_centre_of_their_own():
  cosines = {}
  for centre in (0.0, 2.0):
    task = Regression(tokens=64, piece=32, key_dim=16, value_dim=2, centre=centre)
    keys = np.stack([example.tokens[:, :16] for example in examples(task, 20)])
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, rtol=1e-5)
    products = keys @ keys.swapaxes(1, 2)
    cosines[centre] = products[:, :16, 16:32].mean(), products[:, :32, 32:].mean()  # within a piece, between pieces
  assert np.abs(cosines[0.0]).max() < 0.05
  assert abs(cosines[2.0][0] - 0.8) < 0.05  # centre^2 / (centre^2 + 1)
  assert abs(cosines[2.0][1]) < 0.2


def test_a_cosine_is_that_of_any_two_keys_and_keeps_their_length():
  for cosine in (0.3, 0.9):
    task = Regression(tokens=16, piece=8, key_dim=4, value_dim=2, cosine=cosine)
    keys = np.stack([example.tokens[:, :4] for example in examples(task, 2000)])
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, rtol=1e-5)
    products = keys @ keys.swapaxes(1, 2)
    for first, second in ((0, 1), (3, 7), (2, 9)):  # of one piece, of two
      found = products[:, first, second]
      assert abs(found.mean() - cosine) < 4 * found.std() / np.sqrt(len(found))
      assert found.std() == pytest.approx((1 - cosine) / np.sqrt(3), rel=0.1)  # z . z' in the three dimensions beside u
    mean = keys.mean(axis=(0, 1))
    assert np.linalg.norm(mean) < 0.1  # u is another one in every example


def test_runs_on_regression_from_before_there_was_a_cosine_continue():
  """A run goes on only if its task's text is the same."""
  assert str(Regression()) == "Regression(tokens=128, piece=64, key_dim=16, value_dim=16, noise=0.0, centre=0.0)"
  assert str(Regression(cosine=0.5)).endswith(", centre=0.0, cosine=0.5)")
  assert TaskData(Regression()).load().fingerprint != TaskData(Regression(cosine=0.5)).load().fingerprint


@pytest.mark.parametrize("centre", [0.0, 0.7])
def test_without_a_cosine_the_keys_of_regression_are_as_they_were(centre):
  task = Regression(tokens=48, piece=24, key_dim=5, value_dim=3, centre=centre)
  for seed in range(3):
    for_keys = jax.random.split(key := jax.random.key(seed), 3)[0]
    keys = jax.random.normal(for_keys, (2, 24, 5))
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    if centre:
      centres = jax.random.normal(jax.random.fold_in(for_keys, 1), (2, 1, 5))
      keys = keys + centre * centres / jnp.linalg.norm(centres, axis=-1, keepdims=True)
      keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    np.testing.assert_array_equal(task.example(key).tokens[:, :5], keys.reshape(48, 5))


IMPOSSIBLE = [
  ("overwriting", {"pairs": 0}),
  ("overwriting", {"vocabulary": 40}),
  ("mqar", {"tokens": 63}),
  ("mqar", {"tokens": 64, "pairs": 17}),
  ("mqar", {"pairs": 0}),
  ("mqar", {"vocabulary": 16}),
  ("noisy_recall", {"writes": 2}),
  ("noisy_recall", {"outliers": 0.5}),
  ("stale_facts", {"superseded": 9}),
  ("stale_facts", {"vocabulary": 10}),
  ("needle", {"tokens": 40}),
  ("needle", {"shallowest": 0.5, "deepest": 0.4}),
  ("selective_copying", {"data": 200}),
  ("induction", {"tokens": 2}),
  ("word_problem", {"group": "S6"}),
  ("word_problem", {"tokens": 0}),
  ("swaps", {"places": 1}),
  ("set_disjointness", {"vocabulary": 20}),
  ("regression", {"piece": 60}),
  ("regression", {"cosine": 1.0}),
  ("regression", {"cosine": -0.1}),
  ("regression", {"centre": 1.0, "cosine": 0.5}),
  ("regression", {"cosine": 0.5, "key_dim": 1}),
  ("variable_tracking", {"hops": -1}),
  ("variable_tracking", {"chains": 0}),
  ("variable_tracking", {"vocabulary": 22}),
  ("fuzzy_recall", {"longest": 0}),
  ("fuzzy_recall", {"pairs": 2}),
  ("fuzzy_recall", {"vocabulary": 2}),
  ("fuzzy_recall", {"pairs": 12, "vocabulary": 6}),
  ("fuzzy_recall", {"longest": 6, "vocabulary": 128}),
  ("anbn", {"words": 3}),
  ("anbn", {"longest": 1}),
  ("shuffle", {"brackets": 0}),
  ("shuffle", {"deepest": 0}),
  ("shuffle", {"tokens": 0}),
  ("shuffle", {"brackets": 5, "deepest": 6}),
  ("noised_mqar", {"task": Regression()}),
  ("noised_mqar", {"share": 1.0}),
  ("noised_mqar", {"share": -0.1}),
  ("noised_mqar", {"noise_vocabulary": 0}),
  ("compression", {"tokens": 0}),
  ("compression", {"positions": 15}),
  ("compression", {"vocabulary": 1}),
  ("memorisation", {"tokens": 7}),
  ("memorisation", {"vocabulary": 2}),
  ("memorisation", {"dictionary": -1}),
  ("facts", {"questions": 5}),
  ("facts", {"questions": 0}),
  ("facts", {"places": 1}),
  ("facts", {"people": 0}),
  ("facts", {"objects": -1}),
]


@pytest.mark.parametrize(("name", "fields"), IMPOSSIBLE)
def test_impossible_tasks_are_refused_with_what_is_expected(name, fields):
  with pytest.raises(ValueError, match=r"is impossible; expected .*\.$") as error:
    TASKS[name](**fields)
  assert f"{next(reversed(fields))}=" in str(error.value)


def test_a_text_too_short_for_its_needles_is_refused(tmp_path):
  (tmp_path / "a.txt").write_text("memory")
  with pytest.raises(ValueError, match=r"impossible; expected sources of at least \d+ bytes of text; they hold 6\."):
    TASKS["needle"](sources=str(tmp_path / "a.txt")).example(jax.random.key(0))


def test_impossible_mixtures_are_refused():
  for tasks, counts in itertools.product([(), (WordProblem("S3", 3), WordProblem("S3", 4))], [(), (1,), (1, 1)]):
    with pytest.raises(ValueError, match="is impossible; expected"):
      Mixture(tasks, counts)


# A task as the data of a run.


@pytest.mark.parametrize("name", ["mqar", "regression"])
def test_a_run_on_a_task_resumes_bitwise_and_reports_answers(name, tmp_path, capsys):
  settings = ["Trainer.checkpoint_every=2", "Trainer.evaluate_every=3", "Trainer.log_every=1", "TaskData.validation_batches=2"]
  model = "VectorModel" if name == "regression" else "LanguageModel"
  settings += ["TaskData.batch_size=4", "Trainer.steps=6", f"{model}.mixers=[@GatedConv]", f"{model}.width=16"]
  experiment = build(f"tasks/{name}", settings)
  whole = train(experiment, tmp_path / "whole")
  printed = capsys.readouterr().out
  assert str(experiment.data.task) in printed
  assert "without memory" in printed
  for step in ("6", "4"):
    assert (tmp_path / "whole" / "checkpoints" / step).exists()
  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
  (tmp_path / "cut" / "result.json").unlink()
  again = train(build(f"tasks/{name}", settings), tmp_path / "cut", progress=False)
  assert [dict(row) for row in read_rows(tmp_path / "cut" / "metrics.jsonl")] == read_rows(tmp_path / "whole" / "metrics.jsonl")
  assert again.validation_loss == whole.validation_loss
  rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
  measure = "squared_error" if name == "regression" else "bits_per_answer"
  assert all(measure in row for row in rows)
  assert "validation_accuracy" in rows[2]
  evaluation, step = evaluate_run(tmp_path / "whole")
  assert (step, evaluation.measure) == (6, measure)
  assert evaluation.loss == pytest.approx(whole.validation_loss, rel=1e-5)


def test_batches_of_a_task_are_divided_and_never_repeat():
  data = TaskData(WordProblem("S3", 5), batch_size=4)
  whole, first, second = data.load().batches(), data.load().batches(0, 2), data.load().batches(1, 2)
  seen = set()
  for _ in range(5):
    batch, parts = next(whole), (next(first), next(second))
    np.testing.assert_array_equal(batch["tokens"][0::2], parts[0]["tokens"])
    np.testing.assert_array_equal(batch["targets"][1::2], parts[1]["targets"])
    seen |= {row.tobytes() for row in batch["tokens"]}
  validation = {row.tobytes() for batch in data.load().validation_batches(2) for row in batch["tokens"]}
  assert len(seen) > 15
  assert len(validation) > 5
  moved = data.load().batches()
  moved.set_state({"next": 4})
  np.testing.assert_array_equal(next(moved)["tokens"], batch["tokens"])
  assert data.load().fingerprint != TaskData(WordProblem("S3", 6), batch_size=4).load().fingerprint


def test_models_that_do_not_fit_a_task_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"vocab_size is 5; expected at least 6"):
    train(build("tasks/word_problem", ["LanguageModel.vocab_size=5"]), tmp_path / "run")
  with pytest.raises(ValueError, match=r"expected a VectorModel of input_dim=24 and output_dim=8"):
    train(build("tasks/regression", ["VectorModel.output_dim=5"]), tmp_path / "run")
  with pytest.raises(ValueError, match="is not made of text"):
    build("tasks/mqar").data.encode("def ")
  for field in ({"batch_size": 0}, {"validation_batches": 0}, {"seed": -1}):
    with pytest.raises(ValueError, match=f"TaskData.{next(iter(field))} is "):
      TaskData(WordProblem(), **field)


@pytest.mark.parametrize("name", ["mqar", "regression"])
def test_tasks_can_be_described(name):
  experiment = build(f"tasks/{name}")
  description = describe(experiment.model, experiment.data.sequence_length)
  assert description.parameters > 1000
  assert description.flops > 0
  assert str(experiment.data.task).partition("(")[0] in repr(render(experiment, description)[1].columns[1]._cells)
