"""The loss that balances routing: its value and gradient, and its way from the layers to the step of training."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from memzoo.layers import GatedConv, MixtureOfExperts, MixtureOfMemories, SwiGLU
from memzoo.layers.context import Context, ContextLayer
from memzoo.layers.routing import balance_loss, choose, publish_routing, publishes_routing
from memzoo.train.compare import Budget
from memzoo.train.keys import new_key
from memzoo.train.sharding import MeshShape
from memzoo.train.step import create_state, make_train_step
from memzoo.train.tasks.routing import LAYER, draw, shares_in_training
from memzoo.zoo.language_model import LanguageModel
from memzoo.zoo.stack import unroll_params
from test_step import take_steps
from tiny_run import tiny_experiment
from tolerances import assert_close

pytestmark = pytest.mark.xdist_group("mixture-of-memories")

MEMORIES = {"num_heads": 2, "key_dim": 4, "value_dim": 4, "num_memories": 5, "balance": 0.5}
IDS = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [0, 3, 3, 3, 3, 3, 3, 3]], np.int32)


class Router(ContextLayer):
  """Publishes the routing of its input, taken as scores."""

  count: int = 2
  balance: float = 0.5

  def publishes(self, x):
    return publishes_routing(x.shape[0], x.shape[2], x.dtype)


def published(scores, ids=None, count=2, layers=1):
  """The notes of layers that all route by the same scores [B, T, M]."""
  context = Context.start((Router(),) * layers, scores)
  for _ in range(layers):
    context = publish_routing(context, 0.5, choose(scores, count)[0], scores, ids)
  return context.notes


def in_numpy(scores, ids, count=2):
  """L of scores [B, T, M] of positive numbers."""
  scores = scores[ids != 0]
  chosen = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
  shares = np.bincount(chosen.ravel(), minlength=scores.shape[1]) / len(scores)
  return scores.shape[1] * np.sum(shares * (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=0))


@pytest.fixture(name="scores")
def _scores():
  return np.random.default_rng(0).uniform(0.1, 1, (2, 8, 5)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 3])
def test_uniform_routing_has_a_loss_of_the_choices_per_token(count):
  tokens, parts = 12, 4
  scores = np.ones((1, tokens, parts), np.float32)
  scores += 1e-6 * (np.arange(parts) == np.arange(tokens)[:, None] % parts) + 5e-7 * (
    (np.arange(parts) - np.arange(tokens)[:, None]) % parts < count
  )
  loss, weighted = balance_loss(published(scores, count=count))
  assert float(loss) == pytest.approx(count, rel=1e-5)
  assert float(weighted) == pytest.approx(0.5 * count, rel=1e-5)


def test_the_loss_is_that_of_real_tokens(scores):
  assert float(balance_loss(published(scores, IDS))[0]) == pytest.approx(in_numpy(scores, IDS), rel=1e-5)
  padding = jnp.where((IDS != 0)[..., None], scores, 1e3 * scores[..., ::-1])
  assert_close(balance_loss(published(padding, IDS)), balance_loss(published(scores, IDS)))


def test_equal_layers_have_the_loss_of_one(scores):
  assert_close(balance_loss(published(scores, IDS, layers=3)), balance_loss(published(scores, IDS)))


def test_only_probabilities_have_a_gradient(scores):
  scores /= scores.sum(axis=-1, keepdims=True)
  gradient = jax.grad(lambda s: balance_loss(published(s))[0])(scores)
  chosen = np.argsort(-scores, axis=-1)[..., :2]
  shares = np.bincount(chosen.ravel(), minlength=5) / 16
  by_probability = 5 * shares / 16
  expected = by_probability - (scores * by_probability).sum(axis=-1, keepdims=True)
  assert_close(gradient, expected, jnp.float32, gradients=True)


def test_layers_without_a_coefficient_publish_nothing():
  assert balance_loss({}) is None
  off = LanguageModel(vocab_size=11, width=8, depth=1, mixers=((MixtureOfExperts(num_experts=4, experts_per_token=2),),))
  assert off.init_with_output(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="with_notes")[0][2] == {}


# Through a model.


EXPERTS = MixtureOfExperts(num_experts=4, experts_per_token=1, hidden=8, balance=0.25)


def model(**settings):
  mixers = (MixtureOfMemories(**MEMORIES), EXPERTS), (GatedConv(channels=8), SwiGLU(hidden=8))
  return LanguageModel(**{"vocab_size": 256, "width": 16, "depth": 4, "mixers": mixers} | settings)


def batch(rows=2):
  rng = np.random.default_rng(1)
  ids = np.tile(IDS, (rows // 2, 1))
  tokens = rng.integers(0, 256, ids.shape).astype(np.int32)
  return {"tokens": tokens, "targets": tokens, "segment_ids": ids, "weights": (ids != 0).astype(np.float32)}


@pytest.mark.slow
def test_a_model_hands_out_what_its_layers_publish():
  one, given = model(scan=True, remat="full"), batch()
  args = given["tokens"], None, given["segment_ids"]
  params = jax.jit(one.init)(jax.random.key(3), given["tokens"])
  logits, _, notes = jax.jit(lambda params: one.apply(params, *args, method="with_notes"))(params)
  plain, unrolled = unroll_params(one.clone(remat="none"), params)
  (same, _), captured = jax.jit(lambda params: plain.apply(params, *args, capture_intermediates=_is_router))(unrolled)
  assert_close(logits, same, jnp.float32)
  by_hand = []
  for name, count in (("mixer", 2), ("mlp", 1)):
    logits = [captured["intermediates"][f"blocks_{i}"][name]["router"]["__call__"][0] for i in (0, 2)]
    by_hand.append(in_numpy(np.asarray(jax.nn.softmax(jnp.concatenate(logits))), np.tile(IDS, (2, 1)), count))
  loss, weighted = balance_loss(notes)
  assert float(loss) == pytest.approx(np.mean(by_hand), rel=1e-5)
  assert float(weighted) == pytest.approx(np.dot(by_hand, (0.5, 0.25)), rel=1e-5)


def _is_router(module, _):
  return module.name == "router"


@pytest.mark.slow
def test_the_step_minimises_both_losses_and_reports_them_apart():
  one, given, transform = model(depth=1, mixers=((GatedConv(channels=8), EXPERTS),)), batch(), optax.sgd(1e3)
  state = jax.jit(lambda: create_state(one, transform, new_key(0)))()
  after, metrics = jax.jit(make_train_step(one, transform, optax.constant_schedule(1.0)))(state, given)

  def losses(params):
    logits, _, notes = one.apply(params, given["tokens"], None, given["segment_ids"], method="with_notes")
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, given["targets"]) * given["weights"]
    return nats.sum() / given["weights"].sum(), *balance_loss(notes)

  loss, balance, _ = jax.jit(losses)(state.params)
  assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-6)
  assert float(metrics.balance) == pytest.approx(float(balance), rel=1e-6)
  gradient = jax.jit(jax.grad(lambda params: losses(params)[0] + losses(params)[2]))(state.params)
  moved = jax.tree.map(lambda before, after: (before - after) / 1e3, state.params, after.params)
  assert_close(moved, gradient, jnp.float32, gradients=True)
  assert np.abs(gradient["params"]["blocks_0"]["mlp"]["router"]["kernel"]).max() > 1e-3  # one choice: no other gradient


@pytest.mark.slow
def test_four_devices_balance_as_one(tmp_path):
  one, history = take_steps(tiny_experiment(tmp_path / "one", model=model(depth=1)), 2)
  four, sharded = take_steps(tiny_experiment(tmp_path / "four", model=model(depth=1), mesh=MeshShape(1, 2, 2)), 2)
  chex.assert_trees_all_close(sharded, history, rtol=1e-4)
  chex.assert_trees_all_close(four.params, one.params, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_shares_of_memories_are_measured_while_a_model_is_trained():
  budget = Budget(learning_rates=(3e-3,), seeds=2, steps=4, batch_size=2, test_examples=4)
  shares, scores = shares_in_training(LAYER, budget, every=2)
  assert shares.shape == (2, 2, 4)
  assert_close(shares.sum(axis=-1), np.full((2, 2), 2.0), jnp.float32)
  assert np.abs(shares[1] - shares[0]).max() > 0
  axes = draw({"balance 0.01": (shares, scores)}, every=2).axes
  np.testing.assert_allclose(axes[1].lines[2].get_ydata(), shares[:, 1, 2])
