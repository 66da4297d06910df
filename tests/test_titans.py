"""Titans and the Miras layers: initial values, single writes, persistent tokens, and what `memzoo.zoo.inspect` shows."""

import dataclasses

import jax
import jax.numpy as jnp
import memzoo
import numpy as np
import pytest
from filled import filled
from flax import linen as nn
from memzoo.layers import Memora, Moneta, TitansMemory, TTTLinear, Yaad
from memzoo.layers.titans import Gating, Loss, Network, Update
from memzoo.layers.titans_wirings import MemoryAsContext, MemoryAsGate
from memzoo.pallas_kernels import test_time_memory as ttm
from memzoo.zoo.inspect import gates, inner_losses, inner_weights
from memzoo.zoo.language_model import LanguageModel
from tolerances import assert_close

SIZES = {"num_heads": 2, "head_dim": 8, "chunk_size": 4}


def inputs(module, tokens):
  if isinstance(module, LanguageModel):
    return jnp.asarray(np.random.default_rng(0).integers(0, module.vocab_size, (2, tokens)), jnp.int32)
  return jax.random.normal(jax.random.key(0), (2, tokens, 16))


def initialised(module, tokens=12):
  """A module, its parameters as initialised, and an input."""
  x = inputs(module, tokens)
  return module, jax.jit(module.init)(jax.random.key(1), x), x


def built(module, tokens=12):
  """A module, parameters from NumPy (none of them zero), and an input."""
  x = inputs(module, tokens)
  return module, filled(module, x, std=0.5), x


def test_the_last_matrix_and_the_fresh_state_are_zero():
  module, params, _x = initialised(TitansMemory(**SIZES))
  own = params["params"]
  assert not np.any(own["memory_1"].value)
  assert 0.8 < np.std(own["memory_0"].value) < 1.2
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(module.apply(params, 2, method="initial_state")))


NETWORKS = [
  (Network(depth=1), Loss()), (Network(depth=1), Loss(scale=0.5)), (Network(), Loss()), (Network(depth=3, expansion=1), Loss()),
  (Network(depth=4), Loss()), (Network(gated=True), Loss()),
]  # fmt: skip


@pytest.mark.parametrize(("network", "loss"), NETWORKS, ids=str)
@pytest.mark.slow
def test_one_write_at_the_largest_step_brings_the_error_to_about_zero(network, loss):
  still = {"gates": Gating(momentum=False, forget=False, step_bias=20.0), "update": Update(clip=None)}
  module = TitansMemory(num_heads=8, head_dim=64, chunk_size=1, network=network, loss=loss, **still)
  module, params, x = initialised(module, tokens=1)
  (found,) = inner_losses(module, params, x).values()
  assert np.median(found.after / found.before) < (1e-6 if network.depth == 1 else 0.2)


def operands(module, params, x):
  """The arguments of the operation within a layer: initial weights, q, k, v and gates."""

  def find(params, x):
    found = []

    def intercept(call, args, options, context):
      found.extend(args[:5] if context.method_name == "learn" else [])
      return call(*args, **options)

    with nn.intercept_methods(intercept):
      module.apply(params, x)
    return tuple(found)

  return jax.jit(find)(params, x)


@pytest.mark.parametrize("layer", [TitansMemory, Yaad, Moneta, Memora])
@pytest.mark.slow
def test_at_the_largest_step_a_fresh_memory_stores_pairs(layer):
  """Initial weights and the largest step fit each other: each key retrieves a value nearest to its own."""
  gates = dataclasses.replace(layer.gates, step_bias=20.0)
  module, params, x = initialised(layer(num_heads=2, head_dim=64, gates=gates), tokens=1)
  initial, *_, gates = operands(module, params, x)
  pairs, passes = 16, 16
  key, value = np.random.default_rng(0).normal(size=(2, 1, pairs, 2, 64)).astype(np.float32)
  key = key / np.linalg.norm(key, axis=-1, keepdims=True)
  k, v = (np.tile(a, (1, passes, 1, 1)) for a in (key, value))
  keeping = gates._replace(log_keep=jnp.zeros_like(gates.log_keep))
  gates = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], k.shape[:3]), keeping)

  @jax.jit
  def write_and_read(initial, k, v, gates, key):
    state = ttm.run(module.spec, initial, k, k, v, gates).state
    return ttm.read(module.spec, initial, state.weights, key)

  retrieved = write_and_read(initial, k, v, gates, key)
  distance = np.linalg.norm(np.asarray(retrieved)[:, :, None] - value[:, None], axis=-1)
  assert np.mean(distance.argmin(axis=2) == np.arange(pairs)[None, :, None]) > 0.9


def test_no_error_of_a_fresh_memory_is_an_outlier():
  module, params, x = initialised(Yaad(num_heads=2, head_dim=64), tokens=40)
  initial, _, k, v, gates = operands(module, params, x)
  error = jnp.linalg.norm(ttm.read(module.spec, initial, ttm.start(module.spec, 2, 2).weights, k) - v, axis=-1)
  assert np.all(error < gates.threshold)


@pytest.mark.slow
def test_the_persistent_tokens_are_written_before_every_document():
  module, params, x = built(TitansMemory(**SIZES, persistent_tokens=3))
  ids = jnp.repeat(jnp.array([1, 2], jnp.int32), 6)[None].repeat(2, 0)
  y, _ = jax.jit(module.apply)(params, x, None, ids)
  alone, _ = jax.jit(module.apply)(params, x[:, 6:])
  assert_close(y[:, 6:], alone, jnp.float32)
  other = {"params": params["params"] | {"persistent": -params["params"]["persistent"]}}
  assert not np.allclose(jax.jit(module.apply)(other, x[:, 6:])[0], alone)


@pytest.mark.parametrize(
  "module", [TTTLinear(**SIZES), MemoryAsContext(**SIZES, segment=4)], ids=lambda m: type(m).__name__
)
@pytest.mark.slow
def test_a_row_of_whole_chunks_is_the_same_with_ids_and_in_pieces(module):
  module, params, x = built(module)
  run = jax.jit(module.apply)
  y, state = run(params, x)
  assert_close(run(params, x, None, jnp.ones((2, 12), jnp.int32)), (y, state), jnp.float32)
  first, state_between = run(params, x[:, :6], jax.tree.map(jnp.zeros_like, state))
  second, state_after = run(params, x[:, 6:], state_between)
  assert_close((jnp.concatenate([first, second], axis=1), state_after), (y, state), jnp.float32)


@pytest.mark.usefixtures("float64")
def test_a_context_of_float64_has_a_memory_of_float64():
  module = MemoryAsContext(**SIZES, segment=4)
  x, ids = jax.ShapeDtypeStruct((1, 6, 16), jnp.float64), jax.ShapeDtypeStruct((1, 6), jnp.int32)

  def run(x, ids):
    return module.apply(module.init(jax.random.key(1), x), x, None, ids)

  with jax.numpy_dtype_promotion("standard"):  # parameters stay float32
    y, state = jax.eval_shape(run, x, ids)
  assert {leaf.dtype.name for leaf in jax.tree.leaves((y, state))} == {"float64", "int32"}


@pytest.mark.slow
def test_only_a_row_with_too_many_documents_is_nan():
  for module in (TitansMemory(**SIZES, max_documents=2), MemoryAsContext(**SIZES, segment=4, max_documents=2)):
    module, params, x = built(module)
    ids = jnp.asarray(np.stack([np.arange(1, 13), np.ones(12)]), jnp.int32)
    y, _ = jax.jit(module.apply)(params, x, None, ids)
    assert np.all(np.isnan(y[0]))
    assert np.all(np.isfinite(y[1]))


@pytest.mark.slow
def test_attention_of_gate_and_context_reaches_its_window_and_its_segment():
  """With steps of length zero the memory stores nothing, so a token changes later outputs through attention alone."""
  still = {"gates": Gating(momentum=False, forget=False, max_step=0.0), "conv_width": 1, "persistent_tokens": 0}
  gate, context = MemoryAsGate(**SIZES, **still, window=3), MemoryAsContext(**SIZES, **still, segment=4)
  for module, changed in ((gate, [5, 6, 7]), (context, [5, 6, 7])):
    module, params, x = built(module)
    run = jax.jit(module.apply)
    change = run(params, x.at[:, 5].add(1.0))[0] - run(params, x)[0]
    assert np.flatnonzero(np.abs(change).max(axis=(0, 2)) > 1e-6).tolist() == changed


@pytest.mark.slow
def test_inner_losses_weights_and_gates_have_the_expected_shapes_and_signs():
  module, params, x = initialised(TitansMemory(**SIZES))
  ids = jnp.asarray(np.arange(12)[None] < np.array([[12], [7]]), jnp.int32)
  (found,) = inner_losses(module, params, x, ids).values()
  assert found.before.shape == found.after.shape == (2, 12, 2)
  assert not np.any(found.before[1, 7:])
  assert not np.any(found.after[1, 7:])
  assert float(found.after.sum()) < float(found.before.sum())
  times, moved = inner_weights(module, params, x, every=4)
  assert times.tolist() == [4, 8, 12]
  assert np.all(np.diff(moved["memory 1"], axis=0) > 0)
  assert {"theta", "keep", "eta"} <= {name.rpartition("/")[2] for name in gates(module, params, x)}
  (unread,) = inner_losses(*built(Memora(**SIZES))).values()
  assert np.all(np.isnan(unread.after))


@pytest.mark.slow
def test_what_inspect_finds_in_segments_is_returned_by_token():
  memory = MemoryAsContext(**SIZES, segment=4)
  module, params, tokens = built(LanguageModel(vocab_size=11, width=16, depth=1, mixers=(memory,), remat="full"))
  ids = jnp.repeat(jnp.array([1, 2], jnp.int32), jnp.array([5, 7]))[None].repeat(2, 0)
  for look, places in ((inner_losses, {"block 0"}), (gates, {"block 0/theta", "block 0/keep", "block 0/eta"})):
    packed, alone = look(module, params, tokens, ids), look(module, params, tokens[:, 5:])
    assert set(packed) == places
    assert_close(jax.tree.map(lambda a: a[:, 5:], packed), alone, jnp.float32)
    assert all(np.any(leaf[:, -1]) for leaf in jax.tree.leaves(alone))


def test_mistakes_are_named():
  x = jnp.zeros((1, 3, 16))
  for module, message in (
    (TTTLinear(num_heads=2, head_dim=5), "head_dim=5 is odd"),
    (MemoryAsContext(**SIZES, segment=0), "segment=0; expected at least 1"),
    (TitansMemory(**SIZES, update=Update(anchor="token", clip=None)), "anchor='token' is for linear memories"),
    (TitansMemory(**SIZES, output_gate="relu"), "output_gate='relu'; expected one of"),
  ):
    with pytest.raises(ValueError, match=message):
      module.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match=r"Network\.depth=0; expected at least 1"):
    Network(depth=0)


@pytest.mark.slow
def test_a_memory_that_decays_to_zero_does_not_stay_alive():
  """As Titans is printed. The default, which decays to the start of the document, obeys the law; see `test_laws.py`."""
  report = memzoo.check_layer(TitansMemory(**SIZES, gates=Gating(decay_to="zero")), width=8, laws=[16])
  assert [violation.law for violation in report.violations] == [16]
  assert report.violations[0].error == 0
