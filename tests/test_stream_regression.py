"""The experiment of regression at test time: its methods by NumPy, and what its table and picture hold."""

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from memzoo.train.keys import new_key
from memzoo.train.tasks import Regression
from memzoo.train.tasks import stream_regression as experiment

TASK = Regression(tokens=48, piece=24, key_dim=4, value_dim=3, centre=1.0)


def predicted(keys, values, query, scale, ridge, slope):
  """The weighted linear model of the values at `query`, or their weighted mean."""
  weights = np.exp(scale * keys @ query)
  weights /= weights.sum()
  mean, centred = weights @ keys, keys - weights @ keys
  covariance = (weights[:, None] * centred).T @ centred + ridge * np.eye(keys.shape[1])
  shift = np.linalg.solve(covariance, query - mean) if slope else np.zeros(keys.shape[1])
  return weights @ values + (weights * (centred @ shift)) @ values


@pytest.mark.parametrize(("method", "scale", "ridge"), [(0, 6.0, 1.0), (1, 0.0, 0.1), (2, 6.0, 0.1)])
def test_each_method_is_what_it_is_called(method, scale, ridge):
  method = experiment.METHODS[method]
  found = experiment.errors(TASK, method, 3, scale, ridge, rows=2)
  examples, squares = jax.device_get(jax.jit(lambda key: TASK.batch(key, 2))(new_key(3))), []
  for tokens, targets in zip(examples.tokens, examples.targets, strict=True):
    keys, values, queries = np.split(tokens.astype(np.float64), [4, 7], axis=-1)
    answers = [predicted(keys[: t + 1], values[: t + 1], queries[t], scale, ridge, method.slope) for t in range(48)]
    squares.append(np.mean((np.array(answers) - targets) ** 2, axis=-1))
  np.testing.assert_allclose(found, np.mean(squares, axis=0).reshape(2, 24)[:, :-1], rtol=2e-3, atol=1e-4)


def test_the_tables_and_the_picture_hold_all_methods():
  rng = np.random.default_rng(0)
  names = [method.name for method in experiment.METHODS]
  found = {piece: {name: rng.uniform(0.1, 1, (3, 48 // piece, piece - 1)) for name in names} for piece in (24, 48)}
  lines = experiment.table(found).splitlines()
  assert len(lines) == 2 + 2 * 3
  assert lines[2].startswith(f"| 24 | {names[0]} | {found[24][names[0]][:, :1, :3].mean():.3f} |")
  assert {line.count("|") for line in lines} == {7}
  ratio = found[24][names[0]].mean(axis=(1, 2)) / found[24][names[2]].mean(axis=(1, 2))
  assert experiment.ratios({4: found[24]}).splitlines()[2].startswith(f"| 4 | {ratio.mean():.1f} ± {np.ptp(ratio) / 2:.1f} |")
  assert isinstance(experiment.draw(found), Figure)


def test_settings_are_chosen_on_other_streams(monkeypatch):
  asked = []

  def errors(task, method, seed, scale, ridge, rows):
    asked.append(seed)
    return np.array([abs(scale - 8) + abs(ridge - 0.1)])

  monkeypatch.setattr(experiment, "errors", errors)
  assert experiment.tuned(TASK, experiment.METHODS[2]) == (8.0, 0.1)
  assert not set(asked) & set(range(experiment.SEEDS))
