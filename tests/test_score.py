"""Log-likelihoods of continuations, by one call for each row without pieces, batches or padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from memzoo.layers import Attention, EraseThenDelta
from memzoo.zoo import score as module
from memzoo.zoo.generate import generate_until
from memzoo.zoo.language_model import LanguageModel
from memzoo.zoo.score import score

pytestmark = pytest.mark.xdist_group("score")


@pytest.fixture(scope="module")
def model():
  """A model whose next token is not the same always, and its parameters."""
  mixers = EraseThenDelta(num_heads=2, key_dim=4, value_dim=4, chunk_size=4), Attention(num_heads=2, head_dim=4, window=5)
  model = LanguageModel(vocab_size=13, width=8, depth=2, mixers=mixers, mlp_ratio=1)
  return model, filled(model, jnp.zeros((1, 2), jnp.int32), std=0.5)


LONGEST = 24
run = jax.jit(lambda model, params, tokens: jax.nn.log_softmax(model.apply(params, tokens)[0][0], axis=-1), static_argnums=0)


def log_probabilities(model, params, row):
  """By one call, whose later tokens are arbitrary."""
  return np.asarray(run(model, params, jnp.zeros((1, LONGEST), jnp.int32).at[0, : len(row)].set(jnp.asarray(row))))[: len(row)]


def expected(model, params, context, continuation):
  row = [*context, *continuation]
  log_p = log_probabilities(model, params, row)
  places = range(len(context) - 1, len(row) - 1)
  return sum(float(log_p[t, row[t + 1]]) for t in places), all(log_p[t].argmax() == row[t + 1] for t in places)


def test_scores_are_those_of_each_row_alone_whatever_its_length(model, monkeypatch):
  monkeypatch.setattr(module, "_SHORTEST", 4)
  monkeypatch.setattr(module, "_PIECE", 8)
  rng = np.random.default_rng(0)
  lengths = [(1, 1), (3, 2), (9, 4), (1, 21), (20, 1), (5, 0), (12, 12)]
  rows = [tuple(rng.integers(0, 13, n).tolist() for n in pair) for pair in lengths]
  likeliest = int(log_probabilities(*model, rows[0][0])[-1].argmax())
  rows.append((rows[0][0], [likeliest]))
  done = []
  found = score(*model, rows, batch_size=3, advance=done.append)
  assert done == [3, 3, 2]
  for row, (total, is_greedy) in zip(rows, found, strict=True):
    wanted, wanted_greedy = expected(*model, *row)
    assert total == pytest.approx(wanted, abs=1e-5)
    assert is_greedy == wanted_greedy
  assert found[-1].is_greedy
  assert found[5] == (0.0, True)


@pytest.mark.parametrize(
  ("rows", "words"),
  [
    ([([1], [2]), ([], [1])], r"rows\[1\] has an empty context; expected at least one token"),
    ([([1], [13])], r"rows\[0\] has tokens from 1 to 13; expected 0 to 12"),
  ],
)
def test_rows_that_cannot_be_scored_are_refused(model, rows, words):
  with pytest.raises(ValueError, match=words):
    score(*model, rows)


def test_a_continuation_ends_before_the_first_of_the_texts_that_end_it(model):
  def decode(tokens):
    return "".join(chr(ord("a") + token) for token in tokens)

  prompts = [[1, 2, 3], [4], [7, 7]]
  free = generate_until(*model, prompts, decode, (), max_new_tokens=12, temperature=0)
  assert [len(text) for text in free] == [12, 12, 12]
  until = free[0][3:5], free[1][-1]
  ended = generate_until(*model, prompts, decode, until, max_new_tokens=12, temperature=0)
  for text, whole in zip(ended, free, strict=True):
    assert text == whole[: min(whole.find(end) if end in whole else 12 for end in until)]
  assert len(ended[0]) <= 3
  stop = ord(free[2][2]) - ord("a")
  (text,) = generate_until(*model, prompts[2:], decode, ("never",), max_new_tokens=12, temperature=0, stop_token=stop)
  assert text == free[2][: free[2].find(free[2][2])]
