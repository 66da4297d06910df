"""The pure step on one device and on four, the optimiser, and the mesh."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from memzoo.layers.axes import Named
from memzoo.train.evaluation import evaluate
from memzoo.train.optimizer import Optimizer, decay_mask
from memzoo.train.sharding import MeshShape, layout, parameter_shardings, put_batch
from memzoo.train.step import abstract_params, build_program, group_squares, parameter_groups, sum_scores
from memzoo.train.trainer import Trainer
from memzoo.zoo.language_model import LanguageModel
from subjects import layer
from tiny_run import Model, program_of, tiny_experiment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("training")]


def take_steps(experiment, count, spoil=()):
  """The state and the metrics after `count` steps. The weights of batches numbered in `spoil` are infinite."""
  program, batches = program_of(experiment), experiment.data.load().batches()
  state, history = program.create(), []
  for i in range(count):
    batch = next(batches)
    if i in spoil:
      batch["weights"] = batch["weights"] * np.float32(np.inf)
    state, metrics = program.train(state, put_batch(batch, program.batch_sharding))
    history.append(jax.device_get(metrics))
  return jax.device_get(state), history


# The step.


@pytest.mark.compat
def test_the_first_loss_is_that_of_guessing_and_training_lowers_it(tmp_path):
  _, history = take_steps(tiny_experiment(tmp_path, steps=20), 20)
  assert history[0].loss == pytest.approx(math.log(256), rel=0.01)
  assert history[-1].loss < history[0].loss - 0.5
  assert all(metrics.gradient_norm > 0 for metrics in history)


MESHES = {"tensor": MeshShape(1, 1, 4), "fsdp and tensor": MeshShape(1, 2, 2)}  # test_processes.py has the others


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
  """The state and the metrics of three steps on one device."""
  return take_steps(tiny_experiment(tmp_path_factory.mktemp("one")), 3)


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_over_four_devices_equals_unsharded(tmp_path, on_one_device, mesh):
  (one, history), experiment = on_one_device, tiny_experiment(tmp_path, mesh=MESHES[mesh])
  four, sharded_history = take_steps(experiment, 3)
  chex.assert_trees_all_close(sharded_history, history, rtol=1e-4)
  chex.assert_trees_all_close(four.params, one.params, rtol=1e-3, atol=1e-5)


def test_parameters_and_moments_are_split_as_the_rules_say(tmp_path):
  state = program_of(tiny_experiment(tmp_path, mesh=MeshShape(1, 2, 2))).create()
  moments = state.opt_state[1]
  for tree in (state.params, moments.mu, moments.nu):
    assert tuple(tree["params"]["embedding"].sharding.spec) == ("tensor", "fsdp")
    assert tuple(tree["params"]["blocks_0"]["kernel"].sharding.spec) == ("fsdp", "tensor")
  assert state.params["params"]["embedding"].addressable_shards[0].data.shape == (128, 8)


def test_the_layout_says_what_a_device_holds(tmp_path):
  experiment = tiny_experiment(tmp_path, mesh=MeshShape(data=1, fsdp=2, tensor=2))
  mesh = experiment.mesh.build()
  params = program_of(experiment).abstract_state.params
  whole = sum(leaf.size for leaf in jax.tree.leaves(params))
  said = layout(mesh, params)
  assert said.startswith("Mesh: fsdp 2 x tensor 2; each device holds ")
  own = int(said.split("holds ")[1].split(" ")[0].replace(",", ""))
  assert whole / 4 <= own < whole / 2
  assert f"of {whole:,} parameters" in said


def test_a_step_is_compiled_once(tmp_path):
  experiment = tiny_experiment(tmp_path)
  program, batches = program_of(experiment), experiment.data.load().batches()
  state = program.create()
  for _ in range(4):
    state, _ = program.train(state, put_batch(next(batches), program.batch_sharding))
  assert program.train._cache_size() == 1


def test_a_batch_accumulated_with_itself_makes_the_same_update_as_alone(tmp_path):
  batch = next(tiny_experiment(tmp_path).data.load().batches())

  def after(count, **settings):
    program = program_of(tiny_experiment(tmp_path, optimizer=Optimizer(warmup_steps=0, **settings)))
    state = program.create()
    for _ in range(count):
      state, _ = program.train(state, put_batch(batch, program.batch_sharding))
    return jax.device_get(state)

  chex.assert_trees_all_equal(after(1, accumulate_steps=2).params, after(0).params)
  chex.assert_trees_all_close(after(2, accumulate_steps=2).params, after(1).params, rtol=1e-4, atol=1e-6)


@pytest.mark.compat
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(tmp_path):
  experiment = tiny_experiment(tmp_path)
  before, _ = take_steps(experiment, 2)
  after, history = take_steps(experiment, 3, spoil=(2,))
  chex.assert_trees_all_equal((after.params, after.opt_state), (before.params, before.opt_state))
  assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (3, 1, 1)
  assert history[2].nonfinite_groups.all()
  recovered, history = take_steps(experiment, 4, spoil=(2,))
  assert (int(recovered.skipped), int(recovered.skipped_in_a_row)) == (1, 0)
  assert np.isfinite(history[3].loss)
  schedule = experiment.optimizer.schedule(experiment.trainer.steps)
  rates = [float(schedule(updates)) for updates in (0, 1, 2, 2)]
  assert [float(metrics.learning_rate) for metrics in history] == pytest.approx(rates, rel=1e-6)
  assert len(set(rates)) == 3


def test_a_batch_without_targets_has_a_loss_of_zero_and_is_not_skipped(tmp_path):
  experiment = tiny_experiment(tmp_path)
  program, batch = program_of(experiment), next(experiment.data.load().batches())
  batch["weights"] *= 0
  state, metrics = program.train(program.create(), put_batch(batch, program.batch_sharding))
  assert (float(metrics.loss), float(metrics.gradient_norm), int(state.skipped)) == (0, 0, 0)


def test_only_targets_of_non_zero_weight_are_counted_as_right():
  class Fixed:
    """A model whose variables are the logits."""

    @staticmethod
    def apply(logits, tokens, segment_ids, rngs):
      return logits, None

  logits = 20 * jax.nn.one_hot(jnp.array([[0, 1, 2, 3]]), 5, dtype=jnp.float32)
  targets, weights = jnp.array([[0, 1, 2, 4]]), jnp.array([[1.0, 0.0, 1.0, 1.0]], jnp.float32)
  batch = {"tokens": targets, "targets": targets, "segment_ids": targets, "weights": weights}
  nats, right, tokens = sum_scores(Fixed, logits, batch)
  assert (float(right), float(tokens)) == (2, 3)
  assert float(nats) == pytest.approx(20, abs=1e-3)


def test_the_loss_is_over_targets_of_non_zero_weight_alone(tmp_path):
  experiment = tiny_experiment(tmp_path)
  program, corpus = program_of(experiment), experiment.data.load()
  params, batch = program.create().params, next(corpus.batches())
  batch["weights"][1:] = 0
  other = batch | {"targets": np.where(batch["weights"] > 0, batch["targets"], 7)}
  assert program.evaluate(params, batch) == program.evaluate(params, other)
  assert program.evaluate(params, batch)[2] == batch["weights"][0].sum()


def test_an_untrained_model_needs_eight_bits_for_a_byte(tmp_path):
  experiment = tiny_experiment(tmp_path)
  program, corpus = program_of(experiment), experiment.data.load()
  evaluation = evaluate(program, program.create().params, corpus)
  assert evaluation.measured == pytest.approx(8, rel=0.01)
  assert 0 <= evaluation.accuracy < 0.1
  assert evaluation.tokens == corpus.validation.num_bytes - len(corpus.validation.document_ends)
  assert evaluation.baselines["zlib -9"] < evaluation.baselines["byte frequencies"] < 5


# The optimiser and the mesh.


def test_weight_decay_applies_to_parameters_that_say_so_and_to_matrices_that_say_nothing():
  matrix = jnp.zeros((2, 2), jnp.float32)
  params = {
    "embedding": Named(matrix, names=("vocab", "embed")),
    "mixer": {"kernel": matrix, "bias": matrix[0], "gain": Named(matrix, names=("heads", None), decays=False)},
  }
  assert decay_mask(params) == {"embedding": True, "mixer": {"kernel": True, "bias": False, "gain": False}}


@pytest.mark.slow
def test_a_step_without_gradients_shrinks_the_parameters_that_decay_and_no_others():
  model = LanguageModel(vocab_size=5, width=8, depth=1, mixers=(layer("TTTLinear"),))
  one_device = MeshShape(1).build(jax.devices()[:1])
  program = build_program(model, Optimizer(learning_rate=0.1, warmup_steps=0), one_device, steps=10, batch_size=1)
  before = program.create()
  params = jax.device_get(before.params)
  zeros = np.zeros((1, 4), np.int32)
  batch = {"tokens": zeros, "targets": zeros, "segment_ids": zeros, "weights": np.zeros((1, 4), np.float32)}
  after = jax.device_get(program.train(before, batch)[0].params)
  shrunk = jax.tree.map(lambda a, b: not np.array_equal(a, b) or not np.any(a), params, after)
  assert shrunk == jax.tree.map(lambda decays, a: bool(decays or not np.any(a)), decay_mask(abstract_params(model)), params)


def test_a_scanned_model_decays_and_is_grouped_as_an_unrolled_one():
  """The parameters of repeats are stacked over a leading axis, which does not turn a scale into a matrix."""
  block = {
    "mixer": {"kernel": (4, 4), "gate": (4,)},
    "mixer_norm": {"scale": (4,)},
    "mlp": {"in": {"kernel": (4, 8)}},
  }
  scanned = {
    "embedding": jnp.zeros((9, 4), jnp.float32),
    "periods": jax.tree.map(lambda shape: jnp.ones((3, *shape), jnp.float32), {"blocks_0": block}, is_leaf=_is_shape),
    "final_norm": {"scale": jnp.zeros(4, jnp.float32)},
  }
  mask = decay_mask({"params": scanned})["params"]
  assert mask["periods"]["blocks_0"] == jax.tree.map(lambda shape: len(shape) == 2, block, is_leaf=_is_shape)
  assert (mask["embedding"], mask["final_norm"]["scale"]) == (True, False)
  groups = parameter_groups({"params": scanned})
  assert groups == (
    "embedding",
    "final_norm",
    "periods/blocks_0/mixer",
    "periods/blocks_0/mixer_norm",
    "periods/blocks_0/mlp",
  )
  assert group_squares({"params": scanned}).tolist() == [0, 0, 3 * (16 + 4), 3 * 4, 3 * 32]


def _is_shape(leaf):
  return isinstance(leaf, tuple)


def test_the_axis_of_repeats_is_not_split():
  mesh = MeshShape(1, 2, 2).build()
  boxed = nn.LogicallyPartitioned(jnp.zeros((3, 4, 4), jnp.float32), ("layers", "embed", "mlp"))
  assert tuple(parameter_shardings(mesh, {"kernel": boxed})["kernel"].spec) == (None, "fsdp", "tensor")


def test_learning_rate_rises_to_the_peak_and_falls_to_the_final_fraction():
  schedule = Optimizer(learning_rate=2.0, warmup_steps=10, final_fraction=0.25).schedule(200)
  values = np.array([float(schedule(step)) for step in range(201)])
  assert values.argmax() == 10
  assert values[10] == 2.0
  assert 0 < values[0] < 0.5
  assert (np.diff(values[10:]) <= 0).all()
  assert values[200] == pytest.approx(0.5)


def test_accumulation_stretches_the_schedule_over_the_same_batches():
  schedule = Optimizer(learning_rate=2.0, warmup_steps=20, accumulate_steps=4).schedule(200)
  assert float(schedule(5)) == 2.0
  assert float(schedule(50)) == pytest.approx(0.2)


@pytest.mark.parametrize(
  "field", [{"learning_rate": -1.0}, {"b2": 1.0}, {"final_fraction": 2.0}, {"accumulate_steps": 0}]
)
def test_impossible_optimisers_are_named(field):
  with pytest.raises(ValueError, match=f"Optimizer.{next(iter(field))} is "):
    Optimizer(**field)


@pytest.mark.parametrize("field", [{"steps": 0}, {"checkpoint_every": -1}, {"sample_tokens": -1}, {"seed": -1}])
def test_impossible_trainers_are_named(field):
  with pytest.raises(ValueError, match=f"Trainer.{next(iter(field))} is "):
    Trainer(**field)


def test_an_axis_of_minus_one_takes_all_remaining_devices():
  assert dict(MeshShape().build().shape) == {"data": 4, "fsdp": 1, "tensor": 1}
  assert dict(MeshShape(tensor=2).build().shape) == {"data": 2, "fsdp": 1, "tensor": 2}
  assert MeshShape(data=1, fsdp=2).build().size == 2


def test_meshes_that_do_not_fit_are_errors(tmp_path):
  with pytest.raises(ValueError, match="needs 8 devices, but there are 4"):
    MeshShape(data=8).build()
  with pytest.raises(ValueError, match="needs a multiple of 3 devices, but there are 4"):
    MeshShape(tensor=3).build()
  with pytest.raises(ValueError, match="is not a mesh"):
    MeshShape(data=-1, fsdp=-1)
  with pytest.raises(ValueError, match=r"batch_size is 4, which does not divide over 3.*multiple of 3"):
    program_of(tiny_experiment(tmp_path, mesh=MeshShape(data=3)))
  with pytest.raises(ValueError, match=r"parameter params/blocks_0/kernel of shape \[15, 15\].*tensor=2"):
    program_of(tiny_experiment(tmp_path, model=Model(width=15), mesh=MeshShape(1, tensor=2)))
