"""The rules of each memory task, checked on its examples: assignments, pairs, languages, noise, lists, dictionaries, facts."""

import collections
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from memzoo.train.tasks import TASKS, Example, Mixture
from memzoo.train.tasks.fuzzy_recall import FuzzyRecall
from memzoo.train.tasks.noised import Noised
from memzoo.train.tasks.recall import MultiQueryRecall, StaleFacts
from memzoo.train.tasks.state_tracking import WordProblem
from memzoo.train.tasks.variables import VariableTracking
from task_examples import examples, score

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("hops", "chains"), [(0, 3), (3, 1), (2, 4)])
def test_a_name_is_assigned_before_it_is_used_and_asked_for_once(hops, chains):
  task = VariableTracking(hops, chains, 30)
  orders = set()
  for example in examples(task, 50):
    names, equals, sources = example.tokens[: 3 * task._names].reshape(-1, 3).T
    asked = example.tokens[3 * task._names :]
    assert (equals == 30).all()
    assert len(set(names)) == task._names
    assert sorted(asked) == sorted(names)
    number, count = {}, {}
    for name, source in zip(names, sources, strict=True):
      number[name] = source if source >= 15 else number[source]
      count[name] = 0 if source >= 15 else count[source] + 1
    assert len(set(number.values())) == chains
    assert sorted(count.values()) == sorted(chains * list(range(hops + 1)))
    np.testing.assert_array_equal(example.targets[example.weights > 0], [number[name] for name in asked])
    np.testing.assert_array_equal(example.kind[example.weights > 0], [count[name] for name in asked])
    orders.add(tuple(count.values()))
  assert len(orders) > 10 if hops and chains > 1 else len(orders) == 1


def test_tests_of_variable_tracking_grow_in_hops_as_far_as_there_are_names():
  assert list(VariableTracking(2, 4, 64).tests()) == ["0", "1", "2", "3"]
  assert list(VariableTracking(2, 4, 24).tests()) == ["0", "1", "2"]


@pytest.mark.parametrize(("pairs", "longest", "vocabulary"), [(12, 3, 8), (7, 3, 40), (4, 1, 8), (6, 6, 4)])
def test_fuzzy_keys_differ_as_a_whole_and_every_token_of_every_value_is_asked_for(pairs, longest, vocabulary):
  task = FuzzyRecall(pairs, longest, vocabulary)
  lengths = sorted([i % longest + 1 for i in range(pairs)])
  orders = set()
  for example in examples(task, 30):
    runs = [tuple(run) for _, run in itertools.groupby(example.tokens.tolist(), lambda token: token >= vocabulary // 2)]
    keys, values = runs[::2], runs[1::2]
    written, asked = (dict(zip(keys[part], values[part], strict=True)) for part in (slice(pairs), slice(pairs, None)))
    assert len(written) == pairs
    assert written == asked
    assert sorted(map(len, written)) == sorted(map(len, written.values())) == lengths
    assert [token for value in asked.values() for token in value] == example.targets[example.weights > 0].tolist()
    places = [i for value in asked.values() for i in range(len(value))]
    assert places == example.kind[example.weights > 0].tolist()
    assert (example.tokens[1:][example.weights[:-1] > 0] == example.targets[:-1][example.weights[:-1] > 0]).all()
    orders.add((tuple(keys[:pairs]), tuple(keys[pairs:])))
  assert len(orders) == 30
  assert any(first != second for first, second in orders)


def test_fuzzy_keys_of_a_length_are_all_equally_likely():
  task = FuzzyRecall(4, 2, 6)  # two of three keys of one token, two of nine keys of two
  found = collections.Counter()
  for example in examples(task, 3000):
    runs = [tuple(run) for _, run in itertools.groupby(example.tokens.tolist(), lambda token: token >= 3)]
    found.update(runs[:8:2])
  assert sorted(found) == sorted([*itertools.product(range(3)), *itertools.product(range(3), range(3))])
  for word, count in found.items():
    share = {1: 2 / 3, 2: 2 / 9}[len(word)]
    assert abs(count / 3000 - share) < 4 * np.sqrt(share * (1 - share) / 3000)


def test_words_have_as_many_b_as_a_and_all_lengths_are_equally_likely():
  task, found = TASKS["anbn"](words=6, longest=5), []
  for example in examples(task, 500):
    words = "".join("ab;"[token] for token in example.tokens).split(";")
    assert words.pop() == ""
    lengths = [len(word) // 2 for word in words]
    assert words == [n * "a" + n * "b" for n in lengths]
    found.append(lengths)
    asked = example.weights > 0
    assert example.targets[asked].tolist() == [token for n in lengths for token in [1] * (n - 1) + [2]]
    assert example.kind[asked].tolist() == [kind for n in lengths for kind in [0] * (n - 1) + [1]]
  error = np.sqrt(0.2 * 0.8 / 500)
  for place in (0, 5):
    np.testing.assert_allclose(np.bincount(np.array(found)[:, place], minlength=6)[1:] / 500, 0.2, atol=4 * error)


def test_the_next_bracket_is_any_that_is_possible_and_the_answer_is_what_is_open():
  task, seen = TASKS["shuffle"](brackets=2, deepest=2, tokens=40), collections.defaultdict(collections.Counter)
  for example in examples(task, 300):
    open_brackets = []
    for token, answer in zip(example.tokens.tolist(), example.targets.tolist(), strict=True):
      seen[tuple(sorted(open_brackets))][token] += 1
      open_brackets.append(token) if token < 2 else open_brackets.remove(token - 2)
      assert answer == (0 in open_brackets) + 2 * (1 in open_brackets)
  assert len(seen) == 9
  for state, found in seen.items():
    possible = [*(kind for kind in range(2) if state.count(kind) < 2), *(kind + 2 for kind in range(2) if kind in state)]
    total, share = found.total(), 1 / len(possible)
    assert sorted(found) == sorted(possible)
    assert all(abs(found[token] / total - share) < 4 * np.sqrt(share * (1 - share) / total) for token in possible)


@pytest.mark.parametrize("task", [MultiQueryRecall(24, 4, 32).training(), WordProblem("S3", 9), StaleFacts(4, 2, 20)])
def test_noise_leaves_the_order_the_answers_and_the_documents_of_the_task(task):
  noised, same = Noised(task, 0.25, 5), Noised(task, 0.0, 5)
  assert noised.length == round(task.length / 0.75)
  first = task.vocab_size
  for example in examples(noised, 20):
    is_noise = example.tokens >= first
    assert np.count_nonzero(is_noise) == noised.length - task.length
    assert not example.weights[is_noise].any()
    assert (np.diff(example.segment_ids) >= 0).all()
    plain = Example(*(field[~is_noise] for field in example))
    assert score(task, plain, task.solve(plain)) == 1
  key = jax.random.key(3)  # the task's example depends on the first of the three keys only, not on the noise
  noisy, plain = jax.device_get((noised.example(key), same.example(key)))
  for with_noise, without in zip(noisy, plain, strict=True):
    np.testing.assert_array_equal(with_noise[noisy.tokens < first], without)


def test_noise_is_anywhere_and_any_of_its_tokens():
  task = Noised(WordProblem("parity", 6), 0.25, 4)
  tokens = np.stack([example.tokens for example in examples(task, 2000)])
  error = np.sqrt(0.25 * 0.75 / 2000)
  np.testing.assert_allclose((tokens >= 2).mean(axis=0), 0.25, atol=4 * error)
  np.testing.assert_allclose(np.bincount(tokens[tokens >= 2] - 2) / 4000, 0.25, atol=4 * error)


def test_noise_before_the_first_token_belongs_to_the_first_document_and_later_noise_to_the_one_before_it():
  task = Noised(Mixture((WordProblem("parity", 2),), (1,), row_length=8), 0.5)
  for example in examples(task, 50):
    real = np.flatnonzero(example.tokens < 2)
    before = [max(0, np.searchsorted(real, place, "right") - 1) for place in range(16)]
    np.testing.assert_array_equal(example.segment_ids, 1 + np.array(before) // 2)


def test_compression_asks_for_every_position_once_and_trains_on_all_lengths_that_it_tests():
  task = TASKS["compression"](tokens=8, vocabulary=5)
  for example in examples(task, 20):
    asked = example.tokens[8:] - 5
    assert sorted(asked) == list(range(8))
    np.testing.assert_array_equal(example.targets[8:], example.tokens[asked])
    np.testing.assert_array_equal(example.kind[8:], asked)
  assert [part.tokens for part in task.training().tasks] == [test.tokens for test in task.tests().values()] == [2, 4, 8]
  assert list(replace(task, tokens=6).tests()) == ["3", "6"]
  rows = examples(task.training(), 20)
  assert {row.segment_ids.max() for row in rows} == {1, 2, 4}


def test_a_memorised_dictionary_is_the_same_in_all_examples_and_has_each_value_once():
  found = {}
  for dictionary in (0, 1):
    task, pairs = TASKS["memorisation"](vocabulary=16, dictionary=dictionary), set()
    for example in [*examples(task, 20), *examples(task, 20, seed=9), *examples(task.tests()["128"], 2)]:
      assert (example.tokens[1::2] == 16).all()
      np.testing.assert_array_equal(example.weights, np.arange(len(example.tokens)) % 2)
      pairs |= set(zip(example.tokens[::2].tolist(), example.targets[1::2].tolist(), strict=True))
    assert sorted(key for key, _ in pairs) == list(range(8))
    assert sorted(value for _, value in pairs) == list(range(8, 16))
    found[dictionary] = pairs
  assert found[0] != found[1]
  # The dictionary of a seed never changes, or a trained model would be tested on another one.
  assert [value for _, value in sorted(found[0])] == [8, 9, 13, 14, 12, 11, 10, 15]


def in_words(task, tokens):
  """Tokens of `Facts` as pairs of a role and a number."""
  bounds = {"person": task.people, "place": task.places, "object": task.objects, "verb": 4}
  words = [(role, i) for role, count in bounds.items() for i in range(count)]
  return [words[token] for token in tokens]


def test_facts_are_possible_and_questions_are_about_what_was_in_them():
  task = TASKS["facts"](facts=60, questions=30, people=2, places=3, objects=2)
  asked = dict.fromkeys(range(3), 0)
  for example in examples(task, 20):
    words, place, holder = in_words(task, example.tokens), {}, {}
    for start in range(0, task.length, 8):
      for fact in (words[start : start + 3], words[start + 3 : start + 6]):
        who, (_, verb), what = fact
        assert who[0] == "person"
        assert what[0] == ("place", "object", "object")[verb]
        if verb == 0:
          assert place.get(who) != what
          place[who] = what
        elif verb == 1:
          assert what not in holder
          assert place.setdefault(what, place[who]) == place[who]
          holder[what] = who
        else:
          assert holder.pop(what) == who
          place[what] = place[who]
      where, what = words[start + 6 : start + 8]
      kind = 0 if what[0] == "person" else 1 if what in holder else 2
      assert where == ("verb", 3)
      assert example.kind[start + 7] == kind
      assert in_words(task, example.targets[[start + 7]]) == [place[holder.get(what, what)]]
      asked[kind] += 1
  assert min(asked.values()) > 0.2 * 600
