"""The hierarchical memory in NumPy, token by token with every inner gradient by hand, and identities that it must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from flax import linen as nn
from in_numpy import sigmoid, silu, unit
from memzoo.layers import Attention, HierarchicalMemory, SwiGLU
from memzoo.layers.hierarchical_memory import largest_step
from memzoo.layers.titans import Gating
from memzoo.pallas_kernels import test_time_memory as ttm
from memzoo.zoo import inspect
from memzoo.zoo.language_model import LanguageModel
from memzoo.zoo.stack import Stack
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64"), pytest.mark.xdist_group("hierarchical_memory")]

HEADS, SIZE, WIDTH, CHUNK, RATIO, TOKENS = 2, 4, 6, 3, 2, 23
FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
SIZES = {"num_heads": HEADS, "head_dim": SIZE, "width": WIDTH, "chunk_size": CHUNK, "slow_ratio": RATIO}
LAYER = HierarchicalMemory(**SIZES, **FLOAT64, clip=None, gates=Gating(max_step=0.3))


def inputs(rows=1, tokens=TOKENS, seed=0):
  return np.random.default_rng(seed).normal(size=(rows, tokens, WIDTH))


def parameters(layer, x, std=0.5):
  return filled(layer, jnp.asarray(x), std=std)


def rms(x):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


class PaperLevel:
  """One memory of one row: weights, momentum and the weights that its open chunk began with, by head."""

  def __init__(self, p, level, chunk, max_step):
    self.p, self.chunk, self.max_step, self.count = p[level], chunk, max_step, 0
    self.start = [[p[f"{level}_memory_{name}"][h] for name in "01"] for h in range(HEADS)]
    self.weights, self.anchor = ([list(own) for own in self.start] for _ in range(2))
    self.momentum = [[np.zeros_like(w) for w in own] for own in self.start]
    self.losses = []  # of all writes, by head

  def project(self, name, a):
    return (a @ self.p[name]["kernel"]).reshape(HEADS, SIZE)

  def read(self, a):
    q = unit(silu(self.project("query", a)))
    out = [silu(q[h] @ w1) @ w2 for h, (w1, w2) in enumerate(self.anchor)]
    return np.concatenate(out) @ self.p["output"]["kernel"]

  def gate(self, name, x):
    logits = self.p[name]["logits"]
    return sigmoid(x @ logits["kernel"] + logits["bias"])

  def write(self, x):
    k, v = unit(silu(self.project("key", x))), self.project("value", x)
    theta, keep, eta = self.max_step * self.gate("theta", x), self.gate("keep", x), 0.9 * self.gate("eta", x)
    self.losses.append([0.5 * np.sum((silu(k[h] @ w1) @ w2 - v[h]) ** 2) for h, (w1, w2) in enumerate(self.anchor)])
    for h, (w1, w2) in enumerate(self.anchor):
      u = k[h] @ w1
      slope = sigmoid(u) * (1 + u * (1 - sigmoid(u)))
      error = silu(u) @ w2 - v[h]
      gradients = np.outer(k[h], (w2 @ error) * slope), np.outer(silu(u), error)
      for i in range(2):
        self.momentum[h][i] = eta[h] * self.momentum[h][i] - theta[h] * gradients[i]
        self.weights[h][i] = self.start[h][i] + keep[h] * (self.weights[h][i] - self.start[h][i]) + self.momentum[h][i]
    self.count = (self.count + 1) % self.chunk
    if self.count == 0:
      self.anchor = [list(own) for own in self.weights]


def on_paper(layer, p, x):
  """The layer for one document x [T, D]: m by token, and what is fed."""
  slow_chunk = RATIO if layer.pairs == "pooled" else RATIO * CHUNK
  fast, slow = (PaperLevel(p, level, c, layer.gates.max_step) for level, c in (("fast", CHUNK), ("slow", slow_chunk)))
  latents, chunk = {"fast": [], "mixed": [], "slow": []}, []
  for row in x:
    z_fast = z_slow = np.zeros(WIDTH)
    for _ in range(layer.cycles):
      for _ in range(layer.inner_cycles):
        z_fast = rms(z_fast + fast.read(row + z_fast + z_slow))
      z_slow = rms(z_slow + slow.read((row if layer.pairs == "raw" else z_fast) + z_slow))
    share = sigmoid(np.concatenate([row, z_fast, z_slow]) @ p["mix"]["kernel"])
    for name, z in zip(latents, (z_fast, share * z_slow + (1 - share) * z_fast, z_slow), strict=True):
      latents[name].append(z)
    fast.write(row)
    chunk.append(z_fast)
    if layer.pairs != "pooled":
      slow.write(row if layer.pairs == "raw" else z_fast)
    elif len(chunk) == CHUNK:
      slow.write(rms(np.mean(chunk, axis=0)))
      chunk = []
  losses = {"fast losses": fast.losses, "slow losses": slow.losses}
  return {name: np.array(z) for name, z in (latents | losses).items()}


def fed(p, index, z):
  normed = rms(z) * p[f"feature_{index}_norm"]["scale"]
  return normed @ p[f"feature_{index}"]["kernel"] * p[f"feature_{index}_scale"]


@pytest.mark.parametrize(
  "fields", [{}, {"cycles": 2, "inner_cycles": 2}, {"pairs": "token", "features": ("slow",)}, {"pairs": "raw", "cycles": 2}]
)
def test_the_layer_is_that_on_paper(fields):
  layer, x = LAYER.clone(**fields), inputs(rows=2)
  params = parameters(layer, x)
  p = jax.tree.map(np.asarray, params["params"])
  want = np.stack([fed(p, 0, on_paper(layer, p, row)[layer.features[0]]) for row in x])
  assert_close(layer.apply(params, jnp.asarray(x))[0], want)


def test_inspect_shows_gates_and_errors_of_both_memories_by_token():
  x = inputs()
  params = parameters(LAYER, x)
  p = jax.tree.map(np.asarray, params["params"])
  paper, found = on_paper(LAYER, p, x[0]), inspect.inner_losses(LAYER, params, jnp.asarray(x))
  assert_close(found["fast"].before[0], paper["fast losses"])
  chunks = TOKENS // CHUNK
  of_chunks = np.asarray(found["slow"].before)[0, : chunks * CHUNK].reshape(chunks, CHUNK, HEADS)
  assert_close(of_chunks, np.repeat(paper["slow losses"][:, None], CHUNK, axis=1))  # the tokens of a chunk make one write
  assert float(jnp.mean(found["fast"].after)) < float(jnp.mean(found["fast"].before))
  theta = inspect.gates(LAYER, params, jnp.asarray(x))["fast/theta"]
  assert_close(theta[0], np.array([PaperLevel(p, "fast", CHUNK, 0.3).gate("theta", row) * 0.3 for row in x[0]]))
  matrices = inspect.memories(LAYER, LAYER.apply(params, jnp.asarray(x))[1])
  assert sorted(matrices) == ["fast 0", "fast 1", "slow 0", "slow 1"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_features_are_fed_to_the_blocks_above_in_order(depth):
  """Blocks without effect above the layer: the stream is x plus all that is fed so far."""
  layer, x = LAYER.clone(features=("fast", "mixed", "slow")), inputs()
  idle = SwiGLU(ratio=1.0, **FLOAT64)
  stack = Stack(mixers=((layer,), (idle,), (idle,)), depth=depth, **FLOAT64)
  params = parameters(stack, x)
  own = params["params"]
  own = own | {name: jax.tree.map(jnp.zeros_like, own[name]) for name in ("blocks_1", "blocks_2") if name in own}
  p = jax.tree.map(np.asarray, own["blocks_0"])
  latents = on_paper(layer, p["mixer"], rms(x[0]) * p["mixer_norm"]["scale"])
  stream = x[0] + sum(fed(p["mixer"], i, latents[name]) for i, name in enumerate(layer.features[:depth]))
  want = rms(stream) * np.asarray(own["final_norm"]["scale"])
  assert_close(stack.apply({"params": own}, jnp.asarray(x))[0][0], want)


def decoder(*memory, **fields):
  attention = Attention(num_heads=2, head_dim=4, max_length=16)
  mixers = ((*memory, attention, SwiGLU(ratio=1.0)), attention, attention)
  return LanguageModel(vocab_size=11, width=WIDTH, depth=3, mlp_ratio=1.0, mixers=mixers, **fields)


def test_a_decoder_begins_as_the_transformer_bit_for_bit():
  memory = HierarchicalMemory(num_heads=2, head_dim=4, chunk_size=3, features=("fast", "mixed", "slow"))
  with_memory, without = decoder(memory), decoder()
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 17)), jnp.int32)
  params = jax.jit(with_memory.init)(jax.random.key(0), tokens)
  own = dict(params["params"])
  first = dict(own["blocks_0"])
  renamed = {name: first[name] for name in first if name.startswith("mlp")} | {
    name.replace("mixer_1", "mixer"): first[name] for name in first if name.startswith("mixer_1")
  }
  plain = {"params": own | {"blocks_0": renamed}}
  np.testing.assert_array_equal(jax.jit(with_memory.apply)(params, tokens)[0], jax.jit(without.apply)(plain, tokens)[0])
  gradient = nn.unbox(jax.jit(jax.grad(lambda p: jnp.sum(with_memory.apply(p, tokens)[0] ** 2)))(params))["params"]
  assert np.any(gradient["blocks_0"]["mixer"]["feature_0_scale"])


def latents_of(layer, params, x):
  """The latent states by feature, from layers that feed each of them with gamma 1 and W the identity."""
  found = {}
  for name in ("fast", "mixed", "slow"):
    own = params["params"] | {
      "feature_0_scale": jnp.ones(WIDTH), "feature_0": {"kernel": jnp.eye(WIDTH)}, "feature_0_norm": {"scale": jnp.ones(WIDTH)}
    }  # fmt: skip
    found[name] = layer.clone(features=(name,)).apply({"params": own}, jnp.asarray(x))[0]
  return found


def test_with_equal_chunks_and_weights_on_raw_tokens_both_memories_are_one():
  """Then m does not depend on a, and is what a single memory reads."""
  layer, x = LAYER.clone(pairs="raw", slow_ratio=1), inputs()
  params = parameters(layer, x)
  own = params["params"]
  params = {"params": own | {name.replace("fast", "slow"): own[name] for name in own if name.startswith("fast")}}
  found = latents_of(layer, params, x)
  assert_close(found["slow"], found["fast"])
  assert_close(found["mixed"], found["fast"])


def test_without_steps_and_decay_the_layer_is_a_map_of_single_tokens():
  layer, x = LAYER.clone(gates=Gating(max_step=0.0, forget=False), cycles=2), inputs()
  params = parameters(layer, x)
  whole = layer.apply(params, jnp.asarray(x))[0]
  alone = [layer.apply(params, jnp.asarray(x[:, t : t + 1]))[0] for t in range(0, TOKENS, 5)]
  assert_close(whole[:, ::5], jnp.concatenate(alone, axis=1))


def test_the_gist_memory_never_moves_with_chunks_longer_than_the_text():
  layer, x = LAYER.clone(slow_ratio=100), inputs()
  params = parameters(layer, x)
  frozen = jax.tree.map(lambda leaf: leaf, params["params"])
  frozen["slow"]["theta"] = {"logits": {"kernel": jnp.zeros((WIDTH, HEADS)), "bias": jnp.full(HEADS, -jnp.inf)}}
  assert_close(layer.apply(params, jnp.asarray(x))[0], layer.apply({"params": frozen}, jnp.asarray(x))[0])


def test_tokens_of_the_open_chunk_change_no_read_of_it():
  """Only z of the changed token itself differs within its chunk, here the third one; the next chunk sees it."""
  layer, x = LAYER.clone(cycles=2), inputs()
  params, other = parameters(layer, x), x.copy()
  other[0, 2 * CHUNK] += 1
  changed = np.any(np.asarray(layer.apply(params, jnp.asarray(x))[0] != layer.apply(params, jnp.asarray(other))[0]), axis=-1)[0]
  assert changed.tolist() == [t == 2 * CHUNK or t >= 3 * CHUNK for t in range(TOKENS)]


def test_a_linear_memory_with_chunks_of_one_token_is_the_delta_rule():
  """The closed form of a chunk: W_t = W_{t-1} - theta k (k W - v) with C = 1, and all gradients at the start with more."""
  numbers = np.random.default_rng(0)
  k, v, theta = unit(numbers.normal(size=(7, SIZE))), numbers.normal(size=(7, SIZE)), numbers.uniform(0.1, 0.5, 7)
  for chunk in (1, 7):
    spec = ttm.Spec(ttm.Memory(SIZE, SIZE, depth=1, residual=False), ttm.Loss(scale=0.5), chunk_size=chunk, read="chunk_start")
    initial = ttm.InitialWeights({"0": jnp.zeros((1, SIZE, SIZE))})
    state, w, anchor = ttm.start(spec, 1, 1, jnp.float64), np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    for t in range(7):
      operands = (jnp.asarray(a[None, t : t + 1, None]) for a in (k, v, theta))
      key, value, step = operands
      state = ttm.write(spec, initial, key, value, ttm.Gates(step), state, jnp.ones((1, 1), bool))
      w = w - theta[t] * np.outer(k[t], k[t] @ anchor - v[t])
      anchor = w if chunk == 1 else anchor
    assert_close(state.weights["0"][0, 0], w)


@pytest.mark.parametrize(("scale", "grows"), [(0.9, False), (1.6, True)])
def test_equal_keys_are_stable_up_to_the_largest_step_and_not_much_beyond(scale, grows):
  """The bound 2 > theta C |h|^2 / (1 - eta), of steps that are all as long as possible, with momentum 0.9 and no clip.

  W_1 is held where |h|^2 is f / 4d, as for the initial weights, so the bound is tight for the last matrix.
  """
  memory = ttm.Memory(SIZE, SIZE, expansion=2, activation="silu", residual=False)
  spec = ttm.Spec(memory, ttm.Loss(scale=0.5), chunk_size=64, momentum=True, read="chunk_start")
  hidden = memory.hidden
  # silu(u) = u / 2 for the pair u, -u summed; units +-1 apart by sign give |silu(u)|^2 close to u^2 / 4 each.
  w_1 = np.zeros((SIZE, hidden))
  w_1[0] = np.where(np.arange(hidden) % 2, 1, -1) * SIZE**-0.5
  initial = ttm.InitialWeights({"0": jnp.asarray(w_1)[None], "1": jnp.zeros((1, hidden, SIZE))})
  u = w_1[0]
  measured = np.sum(silu(u) ** 2) / (hidden / (4 * SIZE))  # of the bound's |h|^2
  key = np.zeros((1, 64, 1, SIZE))
  key[..., 0] = 1
  value = np.full((1, 64, 1, SIZE), 1e-3)
  step = np.full((1, 64, 1), scale * largest_step(spec) / measured)
  gates = ttm.Gates(jnp.asarray(step), None, jnp.full((1, 64, 1), np.log(0.9)))
  state, errors = ttm.start(spec, 1, 1, jnp.float64), []
  for _ in range(40):
    state = ttm.write(spec, initial, jnp.asarray(key), jnp.asarray(value), gates, state, jnp.ones((1, 64), bool))
    read = ttm.read(spec, initial, ttm.chunk_start(state), jnp.asarray(key[:, :1]))
    errors.append(float(jnp.abs(read - value[:, :1]).max()))
  assert (max(errors) > 2e-3) == grows, errors  # later the first matrix grows too, which may end it


def test_hostile_inputs_stay_finite():
  """Equal and opposite tokens, large and zero ones, at the default steps, for hundreds of chunks."""
  layer = HierarchicalMemory(**SIZES, cycles=2)
  row = np.random.default_rng(0).normal(size=WIDTH)
  rows = np.stack([np.tile(row, (600, 1)), np.tile(row, (600, 1)) * (-1) ** np.arange(600)[:, None], np.zeros((600, WIDTH))])
  x = jnp.asarray(np.concatenate([rows, 1e3 * rows[:1]]), jnp.float32)
  params = filled(layer, x, std=1.0)
  loss, gradient = jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(layer.apply(p, x)[0] ** 2), argnums=(0, 1)))(params, x)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, gradient)))


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"pairs": "all"}, "pairs='all'"),
    ({"mix": "none"}, "mix='none'"),
    ({"features": ()}, r"features=\(\)"),
    ({"features": ("gist",)}, "expected one or more of"),
    ({"cycles": 0}, "cycles=0"),
    ({"width": None}, "width=None; expected the width of x"),
    ({"width": 5}, "width=5; expected the width of x, 6"),
  ],
)
def test_mistakes_are_named(fields, words):
  with pytest.raises(ValueError, match=words):
    LAYER.clone(**fields).init(jax.random.key(0), jnp.zeros((1, 2, WIDTH)))


def test_writes_of_one_chunk_are_checked():
  spec = LAYER.spec("fast")
  initial = ttm.InitialWeights({name: jnp.zeros((HEADS, *shape)) for name, shape in spec.memory.shapes().items()})
  k, gate = jnp.zeros((1, CHUNK + 1, HEADS, SIZE)), jnp.zeros((1, CHUNK + 1, HEADS))
  state, mask = ttm.start(spec, 1, HEADS, jnp.float64), jnp.ones((1, CHUNK + 1), bool)
  arguments = spec, initial, k, k, ttm.Gates(gate, gate, gate), state
  assert np.isnan(ttm.write(*arguments, mask).weights["0"]).all()  # more tokens than a chunk has
  with pytest.raises(ValueError, match="is_token is int32"):
    ttm.write(*arguments, mask.astype(jnp.int32))
  with pytest.raises(ValueError, match="k has shape"):
    ttm.write(*arguments[:2], k[..., :2], *arguments[3:], mask)
