"""Several batches make the update of one batch that holds them all."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from memzoo.train.accumulation import accumulate
from memzoo.train.keys import new_key
from memzoo.train.optimizer import Optimizer
from memzoo.train.step import TrainState, make_train_step
from tolerances import assert_close

pytestmark = pytest.mark.xdist_group("training")

SETTINGS = {"learning_rate": 0.1, "warmup_steps": 0, "clip_norm": 0.1}


class Linear:
  """A linear map of vectors, with the interface of a model."""

  @staticmethod
  def apply(params, tokens, segment_ids, rngs):
    return jnp.einsum("btd,de->bte", tokens, params["params"]["kernel"]) + params["params"]["bias"][None, None], None


def batches(count, weights=None, dtype=np.float64):
  """Random batches; their numbers of targets differ, and their weights may be fractions."""
  g = np.random.default_rng(count)
  weights = weights or [g.uniform(0.1, 3, (2, 4)) * (g.random((2, 4)) < share) for share in g.random(count)]
  return [
    {
      "tokens": g.normal(size=(2, 4, 3)).astype(dtype),
      "targets": g.normal(size=(2, 4, 2)).astype(dtype),
      "segment_ids": np.ones((2, 4), np.int32),
      "weights": np.asarray(w, dtype),
    }
    for w in weights
  ]


def joined(parts):
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def start(optimizer, steps, dtype=jnp.float64):
  """A fresh state, and the jitted step of a run."""
  transform, zero = optimizer.build(steps), jnp.zeros((), jnp.int32)
  params = {"params": {"kernel": jnp.arange(6, dtype=dtype).reshape(3, 2), "bias": jnp.zeros(2, dtype)}}
  state = TrainState(zero, zero, zero, jax.random.key_data(new_key(0)), params, transform.init(params))
  return state, jax.jit(make_train_step(Linear, transform, optimizer.schedule(steps), steps))


SLOW = [pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 4, 5, 6, 7, 8)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("k", [3, *SLOW])
def test_batches_of_any_weights_make_the_updates_of_one(k):
  parts, whole_optimizer, optimizer = batches(2 * k), Optimizer(**SETTINGS), Optimizer(**SETTINGS, accumulate_steps=k)
  if k > 1:
    parts[1]["weights"] *= 0
  (whole, whole_step), (state, step) = start(whole_optimizer, 2), start(optimizer, 2 * k)
  for update in range(2):
    own = parts[update * k : (update + 1) * k]
    whole, whole_metrics = whole_step(whole, joined(own))
    assert whole_metrics.gradient_norm > 0.1, "it is clipped"
    for batch in own:
      state, metrics = step(state, batch)
    inner = state.opt_state.inner if k > 1 else state.opt_state
    many, one = jax.tree.leaves((state.params, inner)), jax.tree.leaves((whole.params, whole.opt_state))
    for leaf, wanted in zip(many, one, strict=True):
      assert_close(leaf, wanted, "float64")
    assert float(metrics.update_loss) == pytest.approx(float(whole_metrics.loss), rel=1e-10)
    assert float(metrics.learning_rate) == float(whole_metrics.learning_rate)


@pytest.mark.usefixtures("float64")
def test_the_gradient_is_the_sum_over_batches_divided_by_the_sum_of_weights():
  one = accumulate(optax.identity(), 2)
  params = {"a": jnp.zeros(3, jnp.float64)}
  first, second = ({"a": jnp.asarray(values)} for values in ([1.0, 2.0, 3.0], [5.0, 0.0, -1.0]))
  updates, state = one.update(first, one.init(params), params, weight=16.0, loss=1.0)
  assert not np.any(updates["a"])
  updates, state = one.update(second, state, params, weight=1.0, loss=18.0)
  np.testing.assert_allclose(updates["a"], (16 * first["a"] + second["a"]) / 17, rtol=1e-15)
  assert float(state.loss) == pytest.approx(2.0, rel=1e-15)
  assert (int(state.batches), int(state.updates), float(state.weight)) == (0, 1, 0)


def run(k, steps, parts, state=None):
  """The states and metrics of a run on float32."""
  fresh, step = start(Optimizer(**SETTINGS, accumulate_steps=k), steps, jnp.float32)
  states, history = [state or fresh], []
  for batch in parts:
    state, metrics = step(states[-1], batch)
    states.append(jax.device_get(state))
    history.append(jax.device_get(metrics))
  return states, history


def moved(states) -> list[int]:
  """The steps after which the parameters differ from those before."""
  kernels = [np.asarray(state.params["params"]["kernel"]) for state in states]
  return [step for step, (old, new) in enumerate(pairwise(kernels), start=1) if np.any(old != new)]


def test_the_last_step_makes_an_update_of_the_batches_that_are_there():
  parts = batches(7, dtype=np.float32)
  states, history = run(8, 7, parts)
  assert moved(states) == [7]
  (_, whole), _ = run(1, 1, [joined(parts)])
  for one, other in zip(jax.tree.leaves(states[-1].params), jax.tree.leaves(whole.params), strict=True):
    assert_close(one, other, "float32")
  assert [bool(np.isfinite(metrics.update_loss)) for metrics in history] == [False] * 6 + [True]
  assert moved(run(3, 7, parts)[0]) == [3, 6, 7]


def test_the_schedule_reaches_its_end_with_the_last_update():
  for steps in (7, 8, 9):
    schedule = Optimizer(learning_rate=2.0, warmup_steps=0, final_fraction=0.25, accumulate_steps=3).schedule(steps)
    assert float(schedule(3)) == 0.5
    assert float(schedule(2)) > 0.5


def test_batches_that_are_not_finite_are_left_out_and_counted():
  parts = batches(6, dtype=np.float32)
  spoiled = [batch | {"weights": batch["weights"] * np.float32(np.nan)} for batch in parts]
  states, history = run(2, 6, [parts[0], spoiled[1], spoiled[2], parts[3], parts[4], parts[5]])
  assert moved(states) == [4, 6]
  assert [int(metrics.skipped_in_a_row) for metrics in history] == [0, 1, 2, 0, 0, 0]
  assert int(states[-1].skipped) == 2
  without, _ = run(2, 4, [parts[0], parts[3]])
  assert_close(states[4].params["params"]["kernel"], without[2].params["params"]["kernel"], "float32")
  assert float(history[3].update_loss) == pytest.approx(
    np.average([history[0].loss, history[3].loss], weights=[history[0].targets, history[3].targets]), rel=1e-6
  )


def test_a_last_batch_that_is_not_finite_completes_the_update_of_those_before_it():
  parts = batches(3, dtype=np.float32)
  parts[2]["weights"] *= np.float32(np.nan)
  states, _ = run(8, 3, parts)
  assert moved(states) == [3]
  assert (int(states[-1].skipped), int(states[-1].opt_state.updates)) == (1, 1)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((states[-1].params, states[-1].opt_state)))
  for batch in parts:
    batch["weights"] *= np.float32(np.nan)
  states, _ = run(8, 3, parts)
  assert moved(states) == []


def test_a_run_resumed_amid_an_accumulation_is_bitwise_the_same():
  parts = batches(8, dtype=np.float32)
  states, history = run(3, 8, parts)
  again, rest = run(3, 8, parts[4:], states[4])
  for one, other in zip(jax.tree.leaves((states[4:], history[4:])), jax.tree.leaves((again, rest)), strict=True):
    np.testing.assert_array_equal(one, other)


def test_sums_are_in_float32_for_narrow_parameters():
  transform = accumulate(optax.identity(), 256)
  params = {"a": jnp.zeros(1, jnp.bfloat16)}
  state = transform.init(params)
  update = jax.jit(transform.update)
  for number in range(1, 301):
    updates, state = update({"a": jnp.ones(1, jnp.bfloat16)}, state, params)
    assert (float(updates["a"][0]), updates["a"].dtype) == (number == 256, jnp.bfloat16)
  assert (float(state.gradients["a"][0]), state.gradients["a"].dtype) == (44.0, jnp.float32), "bfloat16 counts to 256"
