"""The mixture of memories: in NumPy from its paper, against memories that skip the tokens of others, and by its identities."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from in_numpy import sigmoid, silu, unit
from memzoo.layers import GatedDeltaNet, MixtureOfMemories
from memzoo.layers.norms import l2_normalise
from memzoo.pallas_kernels.delta_rule import gated_delta_rule
from memzoo.pallas_kernels.documents import documents
from memzoo.pallas_kernels.measure import count_flops
from memzoo.pallas_kernels.short_conv import short_conv
from memzoo.zoo.inspect import memories, routing
from memzoo.zoo.inspect_figures import draw_routing
from tolerances import assert_close

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.xdist_group("mixture-of-memories")]

SIZES = {"num_heads": 4, "num_key_heads": 2, "key_dim": 3, "value_dim": 2, "conv_width": 3, "chunk_size": 4}
SIZES |= {"dtype": jnp.float64, "param_dtype": jnp.float64}
HEADS, KEY_HEADS, KEY_DIM, VALUE_DIM, WIDTH = 4, 2, 3, 2, 6
IDS = np.array([[0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 0, 3, 3, 3, 3], [4] * 9 + [5] + [0] * 6], np.int32)


def case(rows=2, tokens=16, seed=0, **fields):
  """A layer, parameters, an input, and the state after another input."""
  layer, rng = MixtureOfMemories(**SIZES | fields), np.random.default_rng(seed)
  x = rng.normal(size=(rows, tokens, WIDTH))
  shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))
  params = jax.tree.map(lambda p: 0.7 * rng.normal(size=p.shape), shapes)
  state = jax.tree.map(lambda s: 0.5 * rng.normal(size=s.shape), jax.eval_shape(lambda: layer.initial_state(rows)))
  return layer, params, x, state


# In NumPy, token by token.


class OneMemory:
  """A memory with convolutions over the tokens that it gets; `maps` is the number of its set of maps."""

  def __init__(self, p, maps, memory, tails):
    self.p, self.maps, self.memory, self.tails = p, maps, memory.copy(), [tail.copy() for tail in tails]

  def forget(self):
    for array in (self.memory, *self.tails):
      array[:] = 0

  def write_and_read(self, x):
    p, m, streams = self.p, self.maps, []
    for i, inputs in enumerate((x @ p["query"]["kernel"], x @ p["key"][m], x @ p["value"][m])):
      window = np.concatenate([self.tails[i], inputs[None]])
      name = ("query", "key", "value")[i]
      streams.append(silu((p[f"{name}_conv"]["weight"] * window).sum(axis=0)))
      self.tails[i] = window[1:]
    q, k, v = streams
    q, k = (np.repeat(unit(y.reshape(KEY_HEADS, KEY_DIM)), HEADS // KEY_HEADS, axis=0) for y in (q, k))
    beta = sigmoid(x @ p["beta"]["logits"]["kernel"]).reshape(HEADS, -1)[:, m]
    steps = (x @ p["decay"]["step"]["full"]["kernel"] + p["decay"]["dt_bias"]).reshape(HEADS, -1)[:, m]
    alpha = np.exp(-np.exp(p["decay"]["A_log"]) * np.log1p(np.exp(steps)))
    read = np.zeros((HEADS, VALUE_DIM))
    for h, v_h in enumerate(v.reshape(HEADS, VALUE_DIM)):
      held = alpha[h] * self.memory[h]
      self.memory[h] = held + beta[h] * np.outer(k[h], v_h - held.T @ k[h])
      read[h] = self.memory[h].T @ q[h] / np.sqrt(KEY_DIM)
    return read


def on_paper(layer, params, x, state, ids):
  """y of each row, and its memories."""
  p, y, after = params["params"], np.zeros_like(x), []
  many = layer.num_memories + layer.shared_memory
  for row in range(len(x)):
    leaves = [np.asarray(leaf[row]) for leaf in state]
    sets = range(many) if layer.separate_maps else [0] * many
    memories = [OneMemory(p, sets[m], leaves[0][m], [tail[m] for tail in leaves[1:]]) for m in range(many)]
    document = 0
    for t, u in enumerate(x[row]):
      if ids[row, t] == 0:
        continue
      if document not in (0, ids[row, t]):
        for memory in memories:
          memory.forget()
      document = ids[row, t]
      logits = u @ p["router"]["kernel"]
      scores = np.exp(logits) / np.exp(logits).sum()
      chosen = sorted(range(layer.num_memories), key=lambda m, s=scores: -s[m])[: layer.memories_per_token]
      total = sum(scores[m] for m in chosen)
      out = sum(scores[m] / total * memories[m].write_and_read(u) for m in chosen)
      if layer.shared_memory:
        out = out + memories[-1].write_and_read(u)
      out = out / np.sqrt(np.mean(out * out, axis=-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
      y[row, t] = (out.reshape(-1) * silu(u @ p["gate"]["full"]["kernel"])) @ p["output"]["kernel"]
    after.append(memories)
  return y, after


@pytest.mark.parametrize("fields", [{}, {"separate_maps": False, "shared_memory": False, "memories_per_token": 1}])
def test_the_layer_is_its_papers_equation(fields):
  layer, params, x, state = case(**fields)
  y, after = jax.jit(layer.apply)(params, x, state, IDS)
  expected, memories = on_paper(layer, params, x, state, IDS)
  assert_close(y, expected)
  for row, own in enumerate(memories):
    assert_close(after.memory[row], np.stack([memory.memory for memory in own]))
    assert_close(after.key_tail[row], np.stack([memory.tails[1] for memory in own]))


# Each memory by itself, over all tokens, of which those of other memories are padding.


def every_memory_alone(layer, params, x, state, ids):
  """The layer as in `apply`, at a multiple of its cost; no token is moved."""
  p, docs = params["params"], documents(ids)
  scores = jax.nn.softmax(x @ p["router"]["kernel"])
  best, chosen = jax.lax.top_k(scores, layer.memories_per_token)
  out, after = 0, []
  for m in range(layer.all_memories):
    here = chosen == m if m < layer.num_memories else jnp.ones_like(chosen[..., :1], bool)
    share = jnp.where(here, best, 0).sum(axis=-1) / best.sum(axis=-1) if m < layer.num_memories else jnp.ones(ids.shape)
    own = jnp.where(here.any(axis=-1) & docs.is_token, docs.index + 1, 0)
    # The first token of each call continues the state, unless its document is not the first of the row.
    first = jnp.take_along_axis(own, jnp.argmax(own > 0, axis=1)[:, None], axis=1)[:, 0]
    begun = [jnp.where((first <= 1).reshape(-1, *[1] * (leaf.ndim - 2)), leaf[:, m], 0) for leaf in state]
    maps = m if layer.separate_maps else 0
    inputs, streams, tails = (x @ p["query"]["kernel"], x @ p["key"][maps], x @ p["value"][maps]), [], []
    for name, each, tail in zip(("query", "key", "value"), inputs, begun[1:], strict=True):
      y, tail = short_conv(each, p[f"{name}_conv"]["weight"], initial_state=tail, segment_ids=own)
      streams.append(jax.nn.silu(y))
      tails.append(tail)
    q, k = (l2_normalise(y.reshape(*ids.shape, KEY_HEADS, KEY_DIM)) for y in streams[:2])
    beta = jax.nn.sigmoid(x @ p["beta"]["logits"]["kernel"]).reshape(*ids.shape, HEADS, -1)[..., maps]
    steps = (x @ p["decay"]["step"]["full"]["kernel"] + p["decay"]["dt_bias"]).reshape(*ids.shape, HEADS, -1)[..., maps]
    decay = -jnp.exp(p["decay"]["A_log"]) * jax.nn.softplus(steps)
    v = streams[2].reshape(*ids.shape, HEADS, VALUE_DIM)
    options = {"initial_state": begun[0], "segment_ids": own, "implementation": "recurrent"}
    read, memory = gated_delta_rule(q, k, v, beta, decay, **options)
    out += share[..., None, None] * read
    gone = jnp.maximum(own.max(axis=1), 1) != docs.index[:, -1] + 1
    after.append([jnp.where(gone.reshape(-1, *[1] * (s.ndim - 1)), 0, s) for s in (memory, *tails)])
  out = out * jax.lax.rsqrt(jnp.mean(out * out, axis=-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
  y = (out.reshape(*ids.shape, -1) * jax.nn.silu(x @ p["gate"]["full"]["kernel"])) @ p["output"]["kernel"]
  return jnp.where(docs.is_token[..., None], y, 0), type(state)(*(jnp.stack(each, axis=1) for each in zip(*after, strict=True)))


@pytest.mark.parametrize("fields", [{}, {"num_memories": 5, "memories_per_token": 3, "shared_memory": False}])
def test_values_and_gradients_are_those_of_every_memory_alone(fields):
  layer, params, x, state = case(rows=3, tokens=45, **fields)
  ids = np.ones((3, 45), np.int32)
  ids[0, 1:] = 2  # memories without the first token begin with this document
  ids[1] = np.repeat([3, 0, 3, 7, 8], [5, 9, 2, 28, 1])
  ids[2, 20:] = 0

  def results(function):
    def loss(params, x, state):
      y, after = function(params, x, state, ids)
      return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((y, after))), (y, after)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, x, state)

  with jax.numpy_rank_promotion("allow"):
    expected = results(lambda *args: every_memory_alone(layer, *args))
  assert_close(results(layer.apply), expected)


# Identities.


def as_mixture(layer, params):
  """The parameters of a mixture of memories that are all equal to one `GatedDeltaNet`, whose parameters are given."""
  p, many = dict(params["params"]), layer.map_sets
  for name in ("key", "value"):
    p[name] = np.stack([p[name]["kernel"]] * many)
  p["beta"] = {"logits": {"kernel": np.repeat(p["beta"]["logits"]["kernel"], many, axis=1)}}
  step = np.repeat(p["decay"]["step"]["full"]["kernel"], many, axis=1)
  p["decay"] = p["decay"] | {"dt_bias": np.repeat(p["decay"]["dt_bias"], many), "step": {"full": {"kernel": step}}}
  return {"params": p | {"router": {"kernel": np.zeros((WIDTH, layer.num_memories))}}}


@pytest.mark.parametrize("many", [1, 3])
def test_memories_that_all_tokens_use_and_that_are_equal_are_one_gated_delta_net(many):
  layer = MixtureOfMemories(**SIZES, num_memories=many, memories_per_token=many, shared_memory=False)
  one, rng = GatedDeltaNet(**SIZES), np.random.default_rng(0)
  x = rng.normal(size=(2, 16, WIDTH))
  shapes = nn.meta.unbox(jax.eval_shape(one.init, jax.random.key(0), x))
  params = jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)
  y, state = jax.jit(one.apply)(params, x, None, IDS)
  found, after = jax.jit(layer.apply)(as_mixture(layer, params), x, None, IDS)
  assert_close(found, y)
  assert_close(after.memory, jnp.stack([state.memory] * many, axis=1))


def test_names_of_memories_do_not_matter():
  layer, params, x, state = case(shared_memory=False)
  order = np.array([2, 0, 3, 1])

  def by_set(leaf):
    return leaf.reshape(*leaf.shape[:-1], HEADS, 4)[..., order].reshape(leaf.shape)

  p = dict(params["params"])
  p |= {"router": {"kernel": p["router"]["kernel"][:, order]}, "key": p["key"][order], "value": p["value"][order]}
  p["beta"] = jax.tree.map(by_set, p["beta"])
  p["decay"] = p["decay"] | {"dt_bias": by_set(p["decay"]["dt_bias"]), "step": jax.tree.map(by_set, p["decay"]["step"])}
  run = jax.jit(layer.apply)
  y, after = run(params, x, state, IDS)
  found, renamed = run({"params": p}, x, jax.tree.map(lambda leaf: leaf[:, order], state), IDS)
  assert_close(found, y)
  assert_close(renamed, jax.tree.map(lambda leaf: leaf[:, order], after))


def test_a_memory_that_no_token_is_sent_to_does_not_change():
  layer, params, x, state = case()
  x = np.abs(x)
  kernel = params["params"]["router"]["kernel"]
  kernel[:] = np.abs(kernel)
  kernel[:, 1] -= 9
  _, after = jax.jit(layer.apply)(params, x, state, np.ones((2, 16), np.int32))
  for before, found in zip(state, after, strict=True):
    assert np.array_equal(before[:, 1], found[:, 1])
    assert not np.array_equal(before[:, 0], found[:, 0])


def test_a_constant_added_to_all_logits_changes_nothing():
  layer, params, x, state = case()
  run = jax.jit(layer.apply)
  y, _ = run(params, x, state)
  params["params"]["router"]["kernel"] = params["params"]["router"]["kernel"] + np.linspace(-2, 2, WIDTH)[:, None]
  assert_close(run(params, x, state)[0], y)


def test_a_token_costs_the_memories_that_it_is_sent_to():
  """One token's products with memories do not depend on how many memories there are."""

  def flops(many):
    layer, params, x, state = case(rows=1, tokens=1, num_memories=many, key_dim=32, value_dim=32)
    return count_flops(layer.apply, params, x, state)

  assert flops(16) < 1.2 * flops(4)


def test_inspection_names_every_memory_and_finds_the_shares_of_tokens():
  layer, params, x, state = case(num_memories=3)
  assert set(found := memories(layer, state)) == {"memory_0", "memory_1", "memory_2", "shared"}
  assert np.array_equal(found["memory_1"], state.memory[:, 1])
  shares = routing(layer, params, x, IDS)["routing"]
  chosen = np.argsort(-(x @ params["params"]["router"]["kernel"]), axis=-1)[..., :2]
  expected = [np.bincount(chosen[row][IDS[row] != 0].ravel(), minlength=3) / np.sum(IDS[row] != 0) for row in range(2)]
  assert_close(shares, np.stack(expected))
  heights = [bar.get_height() for bar in draw_routing({"routing": shares}).axes[0].patches]
  assert_close(np.array(heights), np.mean(expected, axis=0))


def test_settings_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="memories_per_token=5; expected at most num_memories=4"):
    MixtureOfMemories(**SIZES, memories_per_token=5).check_settings()


@pytest.mark.slow
def test_values_memories_and_gradients_are_those_of_flash_linear_attention():
  """`compare_flash_linear_mixture.py --write` made the numbers; it also compares the gradients by the weights."""
  with np.load(Path(__file__).with_name("mixture_from_flash_linear.npz")) as file:
    saved = {name: jnp.asarray(file[name]) for name in file.files}
  params = {name.removeprefix("params/"): x for name, x in saved.items() if name.startswith("params/")}
  params = {"params": unflatten_dict(params, sep="/")}
  module = MixtureOfMemories(num_heads=2, key_dim=4, value_dim=8, chunk_size=4, output_gate="silu", param_dtype=jnp.float64)

  @jax.jit
  def run(x, weight):
    y, pull_back, state = jax.vjp(lambda x: module.apply(params, x), x, has_aux=True)
    return y, state.memory, pull_back(weight)[0]

  y, memory, gradient = run(saved["input"], saved["weight"])
  assert_close(y, saved["output"])
  assert_close(memory, saved["memory"])
  assert_close(gradient, saved["input_gradient"], gradients=True)
