"""Probes of a trained model: perplexity by position, needles by length and depth, speed by length, lifetime."""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from filled import filled
from memzoo.train.config import build
from memzoo.train.data import TextData
from memzoo.train.keys import new_key
from memzoo.train.probes import _doublings, _positions, draw, lifetime, needle, perplexity, probe, speed, table
from memzoo.train.tasks import Needle, Regression, TaskData, WordProblem
from tiny_run import Model, memory_model, write_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  """An untrained model and its parameters, and text in documents of 300 to 600 bytes."""
  folder = tmp_path_factory.mktemp("probes")
  data = TextData(write_text(folder / "text", documents=20), sequence_length=32, batch_size=4, validation_fraction=0.3)
  model = memory_model()
  return model, filled(model, data.one_token), data


def test_positions_count_from_the_start_of_each_document():
  np.testing.assert_array_equal(_positions(np.array([1, 1, 1, 2, 3, 3, 0, 0])), [0, 1, 2, 0, 0, 1, 0, 1])
  assert _doublings(64) == [0, 16, 32, 64]
  assert _doublings(100) == [0, 16, 32, 64, 100]


def test_perplexity_by_position_is_the_loss_sorted_by_position(subject):
  model, params, data = subject
  corpus = data.load()
  found = perplexity(model, params, corpus, factor=4, rows=100)
  tokens = sum(count for _, count in found.values)
  bits = sum(value * count for value, count in found.values if count) / tokens
  text, ends = corpus.validation.tokens.astype(np.int32), [0, *corpus.validation.document_ends]
  nats = []

  @jax.jit
  def losses(part):  # [1, 129]: one part from a fresh state; later parts do not affect it
    logits, _ = model.apply(params, part[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, part[:, 1:])[0]

  for start in range(0, (len(text) - 1) // 128 * 128, 128):
    window = text[start : start + 129]
    cuts = sorted({0, 129, *(end - start for end in ends if 0 < end - start < 129)})
    for low, high in pairwise(cuts):
      part = np.pad(window[low:high], (0, 129 - (high - low)))
      nats += list(losses(jnp.asarray(part[None]))[: high - low - 1])
  assert tokens == len(nats)
  assert bits == pytest.approx(float(np.mean(nats)) / math.log(2), rel=1e-4)


def test_needles_are_asked_for_at_every_length_and_depth(subject, tmp_path):
  _, _, data = subject
  model = Model()
  params = filled(model, data.one_token)
  found = needle(model, params, data, factor=32, examples=20)
  assert found.columns == ["128", "256", "512", "1,024"]
  values = np.array(found.values)
  assert values.shape == (10, 4)
  assert 0 <= np.nanmin(values) <= np.nanmax(values) < 0.5, "the model is untrained"
  draw(found, tmp_path / "needle.png")
  assert table(found).row_count == 10


def test_speed_reports_the_state_bytes_of_the_model(subject, tmp_path):
  model, params, data = subject
  found = speed(model, params, data, factor=2)
  assert found.rows == ["32", "64"]
  assert all(row[2] == model.state_bytes(1, 64) and min(row) > 0 for row in found.values)
  draw(found, tmp_path / "speed.png")
  found.save(tmp_path / "speed.json")
  assert (tmp_path / "speed.json").read_text().startswith("{")


def test_lifetime_on_text_is_the_loss_at_the_end_of_one_pass(subject, tmp_path):
  model, params, data = subject
  corpus = data.load()
  text = corpus.validation.tokens.astype(np.int32)
  found = lifetime(model, params, corpus, before=(0, 64), rows=3, piece=25)
  assert (found.rows, found.columns) == (["0", "64"], ["after text", "after random tokens"])
  one_pass = jax.jit(lambda tokens: model.apply(params, tokens)[0])
  ends = 64 + np.linspace(0, text.size - 64 - 257, 3).astype(int)
  for count, values in zip((0, 64), found.values, strict=True):
    windows = np.stack([text[end - count : end + 257] for end in ends])
    nats = optax.softmax_cross_entropy_with_integer_labels(one_pass(windows[:, :-1]), windows[:, 1:])[:, count:]
    assert values[0] == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-5)
  assert found.values[0][0] == found.values[0][1]
  assert found.values[1][0] != found.values[1][1]
  draw(found, tmp_path / "lifetime.png")


def test_lifetime_leaves_out_what_the_text_is_too_short_for(subject):
  _, _, data = subject
  model, corpus = Model(), data.load()
  size = corpus.validation.tokens.size
  found = lifetime(model, filled(model, data.one_token), corpus, before=(0, size), rows=2, piece=size)
  assert np.isnan(found.values).tolist() == [[False, False], [True, False]]


def test_lifetime_on_a_task_is_the_share_of_right_answers_after_random_tokens():
  data = TaskData(WordProblem(group="S3", tokens=8))
  model = memory_model().clone(vocab_size=data.vocab_size)
  params = filled(model, data.one_token, std=0.6)
  (fresh,), (worn,) = lifetime(model, params, data.load(), before=(0, 60), rows=4, piece=25).values
  examples = jax.jit(lambda key: data.task.batch(key, 2048))(new_key(2**31))
  random = np.random.default_rng(0).integers(0, data.vocab_size, (4, 60), np.int32)
  for prefix, share in ((random[:, :0], fresh), (random, worn)):
    logits, _ = model.apply(params, np.concatenate([np.repeat(prefix, 512, axis=0), examples.tokens], axis=1))
    right = np.asarray(logits[:, prefix.shape[1] :].argmax(axis=-1) == examples.targets)
    assert share == pytest.approx(np.average(right, weights=examples.weights), rel=1e-3)
  assert abs(fresh - worn) > 1e-3, "the prefix matters"


def test_lifetime_of_a_pass_key_has_text_before_it(subject):
  _, _, data = subject
  model = Model()
  corpus = TaskData(Needle(tokens=64, digits=3)).load()
  found = lifetime(model, filled(model, data.one_token), corpus, before=(0, 20), rows=2)
  assert found.columns == ["after text", "after random tokens"]
  assert found.values[0] == found.values[1], "this model has no memory"


def test_impossible_probes_are_refused(tmp_path):
  with pytest.raises(ValueError, match="--task is 'depth'; expected one of perplexity, needle, speed, lifetime"):
    probe("depth", tmp_path)
  with pytest.raises(ValueError, match=r"is no run: it has no config\.gin"):
    probe("needle", tmp_path)
  with pytest.raises(ValueError, match=r"Regression\(.*maps vectors to vectors; expected a run on tokens for --task lifetime"):
    lifetime(Model(), None, TaskData(Regression()).load())
  assert build("quickstart").data.tokenizer == "bytes"
