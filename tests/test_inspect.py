"""Inspection of memories: every number is checked in a case whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import linen as nn
from matplotlib.figure import Figure
from memzoo.layers import (
  Attention,
  DeltaNet,
  DeltaProduct,
  EraseThenDelta,
  GatedDeltaNet,
  LinearAttention,
  LocalLinearAttention,
)
from memzoo.layers.memory_layer import MemoryLayer
from memzoo.layers.rotary import rotate
from memzoo.pallas_kernels.delta_rule import gated_delta_rule
from memzoo.pallas_kernels.documents import documents
from memzoo.pallas_kernels.local_linear import squared_distance
from memzoo.train.tasks.recall import MultiQueryRecall, NoisyRecall
from memzoo.train.tasks.task import Example
from memzoo.zoo import inspect_figures as figures
from memzoo.zoo.inspect import (
  Curves,
  Recall,
  Retention,
  Writes,
  by_distance,
  by_lag,
  curves_over_time,
  distances,
  effective_rank,
  gates,
  linear_response,
  memories,
  over_time,
  read_back,
  recall,
  retention,
  writes,
)
from memzoo.zoo.language_model import LanguageModel
from memzoo.zoo.registry import LAYERS
from subjects import layer
from tolerances import assert_close

TOKENS = 12
SMALL = {"num_heads": 2, "key_dim": 4, "value_dim": 4}


@pytest.fixture(scope="module")
def hybrid():
  """A model whose second block has no matrices, its variables and tokens for it."""
  mixers = EraseThenDelta(**SMALL), Attention(num_heads=2, head_dim=4, window=5), GatedDeltaNet(**SMALL)
  model = LanguageModel(vocab_size=11, width=8, depth=3, mixers=mixers)
  tokens = jax.random.randint(jax.random.key(0), (2, TOKENS), 0, 11, jnp.int32)
  return model, filled(model, tokens), tokens


def one_key_a_token(kind: type[LinearAttention], tokens: int = 6, **fields):
  """A layer with variables for which token t of its input has unit key t, and the input: no two keys share a direction."""
  module = kind(num_heads=1, key_dim=tokens, value_dim=3, **fields)
  x = 20 * jnp.eye(tokens, dtype=jnp.float32)[None]
  params = filled(module, x, std=0.02)["params"]
  own_input = jnp.zeros((module.conv_width, tokens), jnp.float32).at[-1].set(1)
  params |= {"key": {"kernel": jnp.eye(tokens, dtype=jnp.float32)}, "key_conv": {"weight": own_input}}
  return module, {"params": params}, x


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_effective_rank_of_equal_singular_values_is_their_number(rank):
  left, right = (jnp.linalg.qr(jax.random.normal(jax.random.key(i), (n, n), jnp.float32))[0] for i, n in ((0, 5), (1, 7)))
  matrix = 3.0 * left[:, :rank] @ right[:rank]
  np.testing.assert_allclose(effective_rank(matrix[None]), [rank], rtol=1e-3)


def test_effective_rank_is_the_exponential_of_the_entropy_and_zero_for_nothing():
  ranks = effective_rank(jnp.stack([jnp.diag(jnp.array([3.0, 1.0], jnp.float32)), jnp.zeros((2, 2), jnp.float32)]))
  np.testing.assert_allclose(ranks, [4 / 3**0.75, 0], rtol=1e-5)


ONE_MATRIX = [n for n, kind in LAYERS.items() if issubclass(kind, LinearAttention) and n != "MixtureOfMemories"]


@pytest.mark.parametrize("name", ONE_MATRIX)
def test_every_linear_attention_names_its_matrix(name):
  module = layer(name)
  found = memories(module, module.initial_state(3))
  assert set(found) == {"memory"}
  assert found["memory"].shape == (3, module.num_heads, module.key_dim, module.value_dim)


def test_a_model_names_the_matrices_by_block():
  model = LanguageModel(
    vocab_size=11,
    width=8,
    depth=3,
    mixers=(EraseThenDelta(**SMALL), Attention(num_heads=2, head_dim=4), GatedDeltaNet(**SMALL)),
  )
  assert set(memories(model, model.initial_state(2))) == {"block 0/memory", "block 2/memory"}


class Sum(MemoryLayer):
  """The sum of the current document's inputs, which it names as its matrix."""

  def initial_state(self, batch_size):
    return (jnp.zeros((batch_size, 1, 1, 1), jnp.float32),)

  def matrices(self, state):
    return {"sum": state[0]}

  @nn.compact
  def __call__(self, x, state=None, segment_ids=None):
    (total,) = self.begin(x, state, segment_ids)
    if segment_ids is None:
      return x, (total + x.sum(axis=(1, 2)).reshape(-1, 1, 1, 1),)
    docs = documents(segment_ids)
    first = jnp.take_along_axis(docs.index, jnp.argmax(docs.is_token, axis=1)[:, None], axis=1)
    last = docs.index[:, -1:]
    of_last = jnp.sum(x[..., 0], axis=1, where=docs.is_token & (docs.index == last))
    continued = jnp.where((first == last)[..., None, None], total, 0)
    return x, (continued + of_last.reshape(-1, 1, 1, 1),)


@pytest.mark.parametrize("every", [1, 2, 4, 5, 30])
def test_a_custom_layer_is_inspected_in_pieces_of_any_size(every):
  times, seen = over_time(Sum(), {}, jnp.ones((1, 5, 1), jnp.float32), lambda matrices: matrices["sum"], every=every)
  assert times.tolist() == seen.ravel().tolist() == {1: [1, 2, 3, 4, 5], 2: [2, 4, 5], 4: [4, 5]}.get(every, [5])


IDS = jnp.array([[1, 1, 1, 2, 2, 0, 3, 3, 3, 3], [0, 0, 4, 4, 4, 0, 0, 5, 0, 0]], jnp.int32)


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7])
def test_documents_and_padding_may_lie_anywhere_between_pieces(every):
  x = jnp.arange(1, 11, dtype=jnp.float32)[None, :, None].repeat(2, axis=0)
  times, found = over_time(Sum(), {}, x, lambda matrices: matrices["sum"][:, 0, 0, 0], every=every, segment_ids=IDS)
  expected = [[1, 3, 6, 4, 9, 9, 7, 15, 24, 34], [0, 0, 3, 7, 12, 12, 12, 8, 8, 8]]
  np.testing.assert_array_equal(found.T, np.array(expected)[:, times - 1])


@pytest.mark.slow
def test_the_state_between_pieces_is_the_state_at_that_time(hybrid):
  model, params, tokens = hybrid
  found = curves_over_time(model, params, tokens, every=5)
  assert found.times.tolist() == [5, 10, 12]
  _, state = jax.jit(model.apply)(params, tokens)
  whole = memories(model, state)
  assert set(found.norm) == set(found.rank) == set(whole) == {"block 0/memory", "block 2/memory"}
  for name, matrix in whole.items():
    assert_close(found.norm[name][-1], jnp.linalg.norm(matrix, axis=(-2, -1)), jnp.float32)
    assert_close(found.rank[name][-1], effective_rank(matrix), jnp.float32)


@pytest.mark.slow
def test_a_layer_read_in_pieces_with_documents_between_them_equals_one_pass():
  module = GatedDeltaNet(**SMALL)
  x = jax.random.normal(jax.random.key(0), (2, 10, 8), jnp.float32)
  params = filled(module, x, std=0.3)
  times, found = over_time(module, params, x, lambda matrices: matrices["memory"], every=3, segment_ids=IDS)
  one_pass = jax.jit(lambda ids: module.apply(params, x, None, ids)[1].memory)
  for i, time in enumerate(times):
    assert_close(found[i], one_pass(jnp.where(jnp.arange(10)[None] < time, IDS, 0)), jnp.float32)
  seen = np.isfinite(retention(module, params, x, every=3, segment_ids=IDS)["memory"].cosine[-1, ..., 0, 0])
  assert seen.tolist() == [[False] * 6 + [True] * 4, [False] * 7 + [True] + [False] * 2]


@pytest.mark.slow
def test_gates_are_named_by_place_and_lie_in_their_ranges(hybrid):
  model, params, tokens = hybrid
  found = gates(model, params, tokens)
  blocks = {f"block 0/{name}" for name in ("beta", "gamma", "decay")} | {f"block 2/{name}" for name in ("beta", "decay")}
  assert set(found) == blocks
  assert {values.shape[:3] for values in found.values()} == {(2, TOKENS, 2)}
  for values in found.values():
    assert 0 < values.min() < values.max() <= 1
  assert found["block 0/decay"].shape[-1] == SMALL["key_dim"]
  remat = gates(model.clone(remat="full"), params, tokens)
  assert_close(remat, found, jnp.float32)


@pytest.mark.slow
def test_strengths_of_reflections_exceed_one():
  module = DeltaProduct(**SMALL, num_writes=3)
  x = jax.random.normal(jax.random.key(0), (1, 20, 8), jnp.float32)
  params = filled(module, x, std=0.6)
  beta = gates(module, params, x)["beta"]
  assert beta.shape == (1, 20, 6)
  assert 1.5 < beta.max() <= 2
  assert writes(module, params, x)["memory"].key.shape == (1, 20, 3, 2, 4)


@pytest.mark.slow
def test_captured_writes_are_what_the_memory_holds():
  """Linear attention's memory is the sum of its writes."""
  module = LinearAttention(num_heads=4, num_key_heads=2, key_dim=4, value_dim=3)
  x = jax.random.normal(jax.random.key(0), (2, 9, 8), jnp.float32)
  params = filled(module, x)
  _, state = jax.jit(module.apply)(params, x)
  key, value = writes(module, params, x)["memory"]
  assert_close(jnp.einsum("btrhk,btrhv->bhkv", key, value), state.memory, jnp.float32)


@pytest.mark.slow
def test_a_write_under_an_orthogonal_key_is_read_back_exactly():
  module, params, x = one_key_a_token(LinearAttention)
  found = retention(module, params, x)["memory"]
  written = np.arange(6)[None] < found.times[:, None]
  np.testing.assert_allclose(found.cosine[:, 0, :, 0, 0], np.where(written, 1.0, np.nan), rtol=1e-5)
  np.testing.assert_allclose(found.share[:, 0, :, 0, 0], np.where(written, 1.0, np.nan), rtol=1e-5)
  value = writes(module, params, x)["memory"].value[0, :, 0, 0]
  unit = value / jnp.linalg.norm(value, axis=1, keepdims=True)
  np.testing.assert_allclose(found.floor[-1, 0, :, 0, 0], unit @ unit.mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 4])
def test_retention_under_a_known_decay_is_the_product_of_the_decays(every):
  module, params, x = one_key_a_token(GatedDeltaNet)
  params["params"]["decay"]["dt_bias"] = jnp.full(1, -1.0, jnp.float32)
  found = retention(module, params, x, every=every)["memory"]
  beta, decay = (np.asarray(gates(module, params, x)[name])[0, :, 0] for name in ("beta", "decay"))
  assert decay.max() < 0.9, "otherwise the share would be one anyway"
  for i, time in enumerate(found.times):
    left = [beta[t] * np.prod(decay[t + 1 : time]) for t in range(time)]
    np.testing.assert_allclose(found.share[i, 0, :time, 0, 0], left, rtol=1e-5)
  np.testing.assert_allclose(found.cosine[-1], 1.0, rtol=1e-5)
  lags, cosine, share, floor = by_lag(found)
  assert share.shape == cosine.shape == floor.shape == (len(lags), 1)
  ages = (found.times[:, None] - 1 - np.arange(6)).ravel()
  of_age_zero = np.asarray(found.share).reshape(-1)[ages == 0]
  np.testing.assert_allclose(share[0, 0], of_age_zero.mean(), rtol=1e-6)


def test_reading_back_distinguishes_another_value_from_a_smaller_one():
  key, value = jnp.eye(2, dtype=jnp.float32), jnp.array([[3.0, 0.0], [0.0, 5.0]], jnp.float32)
  written = writes_of(key, value)
  halved = read_back(0.5 * (key.T @ value)[None, None], written)
  assert_close(halved, tuple(jnp.full((1, 2, 1, 1), share) for share in (1, 0.5, 0.5)), jnp.float32)
  swapped = read_back((key[::-1].T @ value)[None, None], written)
  assert_close(swapped, tuple(jnp.full((1, 2, 1, 1), share) for share in (0, 0, 0.5)), jnp.float32)


def writes_of(key, value):
  return Writes(key[None, :, None, None], value[None, :, None, None])


@pytest.mark.slow
def test_the_response_of_a_memory_that_only_decays_is_the_product_of_its_decays():
  log_decay = -jnp.linspace(0.05, 0.6, TOKENS, dtype=jnp.float32)[None, :, None]
  key = jnp.eye(TOKENS, dtype=jnp.float32)[None, :, None]
  one = jnp.ones((1, TOKENS, 1), jnp.float32)

  def memory(v):
    out, _ = gated_delta_rule(jnp.ones_like(key), key, v[:, :, None], 0.7 * one, log_decay, chunk_size=4)
    return out[:, :, 0]

  v = jax.random.normal(jax.random.key(0), (1, TOKENS, 3), jnp.float32)
  found = jax.jit(lambda v: linear_response(memory, v, 3))(v)
  expected = jnp.exp(jnp.cumsum(log_decay[:, 3:, 0], axis=1) - log_decay[:, 3:4, 0])
  assert_close(found, expected, jnp.float32, gradients=True)


@pytest.mark.slow
def test_distances_are_those_of_the_queries_and_keys_that_local_linear_attention_sees():
  module = LocalLinearAttention(num_heads=2, head_dim=4, window=5, ridge=0.1)
  model = LanguageModel(vocab_size=11, width=8, depth=1, mixers=(module,))
  tokens = jax.random.randint(jax.random.key(0), (2, TOKENS), 0, 11, jnp.int32)
  ids = jnp.asarray([[1] * 5 + [2] * 7, [0] * 3 + [4] * 9], jnp.int32)
  position = jnp.asarray([[*range(5), *range(7)], [0] * 3 + [*range(9)]], jnp.int32)
  params, seen = filled(model, tokens), []

  def keep(call, args, kwargs, context):
    seen.extend([args] if context.method_name == "attend" else [])
    return call(*args, **kwargs)

  with nn.intercept_methods(keep):
    model.apply(params, tokens, None, ids)
  (q, k, *_, ridge) = seen[0]
  q, k = (rotate(x, position, module.rope_base) for x in (q, k))
  found = distances(model, params, tokens, ids)
  assert list(found) == ["block 0/distance"]
  assert_close(found["block 0/distance"], squared_distance(q, k, ridge, segment_ids=ids, window=5))
  assert isinstance(figures.draw_gates(found), Figure)
  with pytest.raises(ValueError, match="has no local linear attention; expected a model with a layer such as LocalLinear"):
    distances(model.clone(mixers=(Attention(num_heads=2, head_dim=4),)), params, tokens)


@pytest.mark.slow
def test_the_response_of_a_layer_is_that_of_its_jacobian():
  module = DeltaNet(**SMALL)
  x = jax.random.normal(jax.random.key(0), (2, 7, 6), jnp.float32)
  params = filled(module, x, std=0.4)

  def outputs(x):
    return module.apply(params, x)[0]

  jacobian = jax.jit(jax.jacrev(lambda at: outputs(x.at[:, 2].set(at))))(x[:, 2])
  norms = jnp.sqrt(jnp.einsum("btebd->bt", jacobian**2))[:, 2:]
  assert_close(jax.jit(lambda x: linear_response(outputs, x, 2))(x), norms / norms[:, :1], jnp.float32, gradients=True)


class LooksBack(nn.Module):
  """Answers with the token that followed the same token last time, if that is at most `window` tokens ago."""

  vocab_size: int
  window: int

  def __call__(self, tokens, state=None, segment_ids=None):
    here = jnp.arange(tokens.shape[1])
    seen = (tokens[:, :, None] == tokens[:, None, :-1]) & (here[None, 1:] < here[:, None])[None]
    seen &= (here[:, None] - here[None, 1:] <= self.window)[None]
    last = jnp.where(seen, here[None, None, 1:], 0).max(axis=2)
    return jax.nn.one_hot(jnp.take_along_axis(tokens, last, axis=1), self.vocab_size), state


@pytest.mark.slow
@pytest.mark.parametrize("task", [MultiQueryRecall(64, 6, 64, power=1.0, filler=False), NoisyRecall(6, 3, 0.0, 64)])
def test_recall_by_distance_shows_how_far_a_model_looks_back(task):
  batch = jax.jit(lambda key: task.batch(key, 8))(jax.random.key(0))
  found = recall(LooksBack(task.vocab_size, 20), {}, batch)
  assert len(found.distance) == 8 * 6
  assert min(found.distance) <= 20 < max(found.distance)
  np.testing.assert_array_equal(found.right, found.distance <= 20)


def test_answers_are_grouped_by_distance():
  found = by_distance(Recall(np.array([9, 1, 2, 8, 2, 50]), np.array([0, 1, 1, 0, 0, 1], bool)), bins=2)
  assert found.count.tolist() == [3, 3]
  np.testing.assert_allclose(found.distance, [5 / 3, 67 / 3])
  np.testing.assert_allclose(found.share, [2 / 3, 1 / 3])
  assert by_distance(Recall(np.array([4, 4]), np.array([True, False])), bins=5).share.tolist() == [0.5]


X = jnp.ones((1, 3, 4), jnp.float32)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda m, p: curves_over_time(m, p, X), "its layers are Attention. Expected a model with a layer that names them"),
    (lambda m, p: retention(m, p, X), "no layers of the linear-attention family"),
    (lambda m, p: gates(m, p, X), "model, a Attention, has no gates"),
    (lambda m, p: curves_over_time(m, p, X, every=0), "every=0; expected at least 1"),
    (lambda m, p: linear_response(lambda x: x, X, 3), "position=3; expected 0 to 2"),
    (lambda m, p: by_distance(Recall(np.ones(1), np.ones(1)), 0), "bins=0"),
    (lambda m, p: recall(m, p, one_answer(X)), "example.tokens is float32"),
    (lambda m, p: recall(LooksBack(9, 2), {}, one_answer(jnp.array([[1, 2, 3]], jnp.int32))), "no query whose key"),
  ],
)
def test_mistakes_are_refused(call, words):
  module = Attention(num_heads=1, head_dim=4, max_length=4)
  params = filled(module, X)
  with pytest.raises(ValueError, match=words):
    call(module, params)


def one_answer(tokens):
  """A batch of one sequence of three tokens, the last of which asks for a value that was never written."""
  ones = jnp.ones((1, 3), jnp.int32)
  return Example(tokens, ones, jnp.array([[0, 0, 1]], jnp.float32), ones, ones)


@pytest.mark.slow
def test_figures_show_what_was_found(tmp_path):
  numbers = np.random.default_rng(0)
  places, times, steps = ("block 0/memory", "block 2/memory"), np.array([4, 8, 12]), np.arange(1, 13)
  curves = Curves(times, *({place: numbers.random((3, 2, 2)) for place in places} for _ in range(2)))
  captured = {f"{place}/{gate}": numbers.random((2, 12, 2)) for place in ("block 0", "block 2") for gate in ("beta", "decay")}
  written = np.where(np.arange(12) < steps[:, None], 1, np.nan)[:, None, :, None, None]
  kept = {place: Retention(steps, *(written * numbers.random((12, 2, 12, 1, 2)) for _ in range(3))) for place in places}
  drawn = {
    "curves": figures.draw_curves(curves),
    "gates": figures.draw_gates(captured),
    "retention": figures.draw_retention(kept, row=1, labels=list("abcdefghijkl")),
    "fading": figures.draw_fading(kept),
    "recall": figures.draw_recall(Recall(np.arange(1, 41), np.arange(40) < 20), chance=0.1),
  }
  for name, figure in drawn.items():
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / f"{name}.png")
    assert all(ax.get_title() for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>")
  assert [line.get_label() for line in drawn["curves"].axes[1].lines if line.get_label()[0] != "_"] == list(places)
  norm_line = drawn["curves"].axes[0].lines[-1].get_ydata()
  np.testing.assert_allclose(norm_line, curves.norm["block 2/memory"].mean(axis=(1, 2)), rtol=1e-6)
  assert {ax.get_title().partition(",")[0] for ax in drawn["gates"].axes if ax.get_visible()} == set(captured)
  shown = drawn["retention"].axes[1].collections[0].get_array()
  expected = kept["block 2/memory"].cosine[:, 1].mean(axis=(-2, -1)).T
  np.testing.assert_allclose(np.ma.filled(shown, np.nan), expected, rtol=1e-6)
  assert [label.get_text() for label in drawn["retention"].axes[0].get_yticklabels()] == list("abcdefghijkl")
  share = drawn["fading"].axes[1].lines[0].get_ydata()
  np.testing.assert_allclose(share, by_lag(kept["block 0/memory"])[2][:9].mean(axis=1), rtol=1e-6)
