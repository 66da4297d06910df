"""Probes of a trained language model: perplexity by position, needles by length and depth, speed by length."""

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
from memzoo.train.probes import _doublings, _positions, draw, needle, perplexity, probe, speed, table
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


def test_impossible_probes_are_refused(tmp_path):
  with pytest.raises(ValueError, match="--task is 'depth'; expected one of perplexity, needle, speed"):
    probe("depth", tmp_path)
  with pytest.raises(ValueError, match=r"is no run: it has no config\.gin"):
    probe("needle", tmp_path)
  assert build("quickstart").data.tokenizer == "bytes"
