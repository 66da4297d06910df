"""Mamba, Mamba-2 and MemMamba, written from their papers in NumPy: token by token, with pools as lists.

Only the names of parameters come from the package. A mistake that operation, oracle and layers share is therefore found here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from in_numpy import sigmoid, silu
from memzoo.layers import Mamba, Mamba2, MemMamba
from memzoo.zoo.stack import Stack, scan_params, unroll_state
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64"), pytest.mark.xdist_group("mamba_on_paper")]

WIDTH, TOKENS, CHANNELS, STATES = 6, 13, 8, 3
FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
SIZES = {"channels": CHANNELS, "state_dim": STATES, "conv_width": 3, "chunk_size": 4} | FLOAT64
MAMBA2 = {"num_heads": 4, "head_dim": 2, "state_dim": STATES, "num_groups": 2, "conv_width": 3, "chunk_size": 4} | FLOAT64
NOTES = SIZES | {"slots": 3, "note_dim": 4, "read_heads": 2, "gate_rank": 5, "note_threshold": 0.45, "read_threshold": 0.5}


def softplus(x):
  return np.log1p(np.exp(x))


def rms_norm(x, scale=1.0, epsilon=1e-6):
  return scale * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)


def convolved(x, conv):
  """silu(sum_i w_i x_{t - i} + bias), the last row of the weight being w_0."""
  weight = conv["weight"]
  behind = np.concatenate([np.zeros((len(weight) - 1, x.shape[1])), x])
  return silu(sum(w * behind[i : i + len(x)] for i, w in enumerate(weight)) + conv["bias"])


def inputs(rows=1, seed=0):
  return np.random.default_rng(seed).normal(size=(rows, TOKENS, WIDTH))


def parameters(layer, x, std=0.5, seed=0):
  return filled(layer, jnp.asarray(x), std=std, seed=seed)


def mamba(p, u):
  """Mamba for u [T, D]; the parameters of a layer."""
  x, gate = convolved(u @ p["input"]["kernel"], p["conv"]), silu(u @ p["gate"]["kernel"])
  low, b, c = np.split(x @ p["select"]["kernel"], [len(p["step"]["kernel"]), len(p["step"]["kernel"]) + STATES], axis=1)
  step = softplus(low @ p["step"]["kernel"] + p["step"]["bias"])
  h, y = np.zeros((CHANNELS, STATES)), []
  for t in range(len(u)):
    for e, n in np.ndindex(*h.shape):
      h[e, n] = np.exp(-step[t, e] * np.exp(p["A_log"][n, e])) * h[e, n] + step[t, e] * b[t, n] * x[t, e]
    y.append(h @ c[t] + p["D"] * x[t])
  return (np.array(y) * gate) @ p["output"]["kernel"]


def mamba2(p, u):
  """Mamba-2 for u [T, D]: four heads in two groups."""
  heads, width, groups = MAMBA2["num_heads"], MAMBA2["head_dim"], MAMBA2["num_groups"]
  x, b, c = (convolved(u @ p[name]["kernel"], p[f"{name}_conv"]) for name in ("input", "write", "read"))
  step = softplus(u @ p["step"]["kernel"] + p["step"]["bias"])
  y = np.zeros((len(u), heads, width))
  for head in range(heads):
    own, group = slice(head * width, (head + 1) * width), head // (heads // groups)
    shared, s = slice(group * STATES, (group + 1) * STATES), np.zeros((width, STATES))
    for t in range(len(u)):
      s = np.exp(-step[t, head] * np.exp(p["A_log"][head])) * s + step[t, head] * np.outer(x[t, own], b[t, shared])
      y[t, head] = s @ c[t, shared] + p["D"][head] * x[t, own]
  gated = (y.reshape(len(u), -1) * silu(u @ p["gate"]["kernel"])).reshape(len(u), groups, -1)
  return (rms_norm(gated, epsilon=1e-5).reshape(len(u), -1) * p["norm"]["scale"]) @ p["output"]["kernel"]


class PoolLayer:
  """The memory of one MemMamba layer: a list of (position, score, note)."""

  def __init__(self, p, rule):
    self.p, self.rule, self.notes, self.last = p, rule, [], np.zeros(WIDTH)

  def read(self, name, u, notes):
    """F(attention of u [D] to notes), zero without notes."""
    p, heads, width = self.p, NOTES["read_heads"], NOTES["note_dim"] // NOTES["read_heads"]
    c = np.zeros(WIDTH)
    if notes:
      q, size = (u @ p[f"{name}_query"]["kernel"]).reshape(heads, width), WIDTH // heads
      for h in range(heads):
        key, value = p[f"{name}_key"][:, h * width : (h + 1) * width], p[f"{name}_value"][:, h * size : (h + 1) * size]
        logits = np.array([q[h] @ (note @ key) / width**0.5 + np.log(score) for _, score, note in notes])
        weights = np.exp(logits - logits.max())
        c[h * size : (h + 1) * size] = weights / weights.sum() @ np.array([note @ value for *_, note in notes])
    gate = p[f"{name}_gate"]
    return sigmoid(np.concatenate([u, c]) @ gate["down"]["kernel"] @ gate["up"]["kernel"]) * c

  def is_open(self):
    """Whether the next token reads this pool: by the token before it."""
    return sigmoid(self.last @ self.p["trigger"]["kernel"][:, 0] + self.p["trigger_bias"][0]) > NOTES["read_threshold"]

  def write(self, position, u):
    p, self.last = self.p, u
    score = sigmoid(np.maximum(u @ p["score_in"]["kernel"], 0) @ p["score_out"]["kernel"][:, 0])
    if score <= NOTES["note_threshold"]:
      return
    entry = position, score, rms_norm(u @ p["note"]["kernel"], p["note_norm"]["scale"])
    if len(self.notes) == NOTES["slots"]:
      dropped = self.notes[0] if self.rule == "fifo" else min(self.notes, key=lambda held: (held[1], -held[0]))
      if self.rule == "priority" and score <= dropped[1]:
        return
      self.notes = [held for held in self.notes if held is not dropped]
    self.notes.append(entry)


def mem_mamba(rule, layers, x, norms, final):
  """A stack of MemMamba layers, the last of which reads those below it, for one document x [T, D]; also the pools' sizes."""
  pools = [PoolLayer(p, rule) for p in layers]
  streams = [x]  # the residual stream before each layer
  everything = [[None] * len(x) for _ in layers]  # the pools before each token
  for l, (pool, p) in enumerate(zip(pools, layers, strict=True)):
    u = rms_norm(streams[l], norms[l])
    y = mamba(p["mamba"], u)
    for t in range(len(x)):
      everything[l][t] = list(pool.notes)
      if pool.is_open():
        y[t] += pool.read("token", u[t], pool.notes)
      if l == len(layers) - 1:
        y[t] += pool.read("layer", u[t], [note for lower in everything[:l] for note in lower[t]])
      pool.write(t, u[t])
    streams.append(streams[l] + y)
  return rms_norm(streams[-1], final), [len(pool.notes) for pool in pools]


@pytest.mark.parametrize(("layer", "on_paper"), [(Mamba(**SIZES), mamba), (Mamba2(**MAMBA2), mamba2)])
def test_the_layer_is_its_papers_equation(layer, on_paper):
  x = inputs(2)
  params = parameters(layer, x)
  y, _ = layer.apply(params, jnp.asarray(x))
  assert_close(y, np.stack([on_paper(jax.tree.map(np.asarray, params["params"]), row) for row in x]))


def stack(rule, depth=3, **fields):
  """MemMamba layers, each third of which reads the two below it."""
  lower, upper = MemMamba(**NOTES, rule=rule), MemMamba(**NOTES, rule=rule, reads_below=2)
  return Stack(mixers=((lower,), (lower,), (upper,)), depth=depth, **FLOAT64, **fields)


@pytest.mark.parametrize("rule", ["fifo", "priority"])
def test_a_stack_of_mem_mamba_is_the_papers_equations(rule):
  """Two documents in a row of text: each is a text of its own."""
  model, x = stack(rule), inputs()
  ids = np.repeat([[1, 2]], [8, 5], axis=1)
  params = parameters(model, x, std=1.0)
  y, state = model.apply(params, jnp.asarray(x), None, jnp.asarray(ids, jnp.int32))
  own = jax.tree.map(np.asarray, params["params"])
  layers = [own[f"blocks_{i}"]["mixer"] for i in range(3)]
  norms, final = [own[f"blocks_{i}"]["mixer_norm"]["scale"] for i in range(3)], own["final_norm"]["scale"]
  (first, filled_up), (second, counts) = (mem_mamba(rule, layers, part, norms, final) for part in (x[0, :8], x[0, 8:]))
  assert max(filled_up) == NOTES["slots"], "a pool is full, so that the rule matters"
  assert_close(y[0], np.concatenate([first, second]))
  assert [int(np.sum(block[0].pool.position >= 0)) for block in state] == counts


def test_with_closed_thresholds_it_is_mamba_bit_for_bit():
  x = jnp.asarray(inputs(2), jnp.float32)
  sizes = NOTES | {"dtype": jnp.float32, "param_dtype": jnp.float32}
  closed = MemMamba(**sizes | {"note_threshold": 1.0}, reads_below=2), MemMamba(**sizes | {"read_threshold": 1.0})
  for layer in closed:
    params = filled(layer, x, std=0.5)
    y, state = layer.apply(params, x)
    expected, scan = Mamba(**{name: sizes[name] for name in SIZES}).apply({"params": params["params"]["mamba"]}, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(state.scan.memory, scan.memory)


def test_at_its_initial_values_it_is_mamba_and_the_scorer_and_the_read_gate_learn():
  """With values that are no longer zero, as after one step, all parameters have gradients."""
  layer, x = MemMamba(**NOTES, reads_below=1), jnp.asarray(inputs(2))
  model = Stack(mixers=((layer,),), depth=2, **FLOAT64)
  params = filled(model, x, std=0.5)
  for block in ("blocks_0", "blocks_1"):
    mixer = params["params"][block]["mixer"]
    zeros = {name: jnp.zeros_like(mixer[name]) for name in ("token_value", "layer_value")}
    y, _ = layer.apply({"params": mixer | zeros}, x)
    expected, _ = Mamba(**SIZES).apply({"params": mixer["mamba"]}, x)
    np.testing.assert_array_equal(y, expected)
  gradients = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.apply(params, x)[0]))))(params)
  flat = jax.tree_util.tree_leaves_with_path(gradients["params"])
  still = {jax.tree_util.keystr(path) for path, g in flat if not np.any(np.asarray(g))}
  unread = {f"['blocks_0']['mixer']['layer_{name}']" for name in ("query']['kernel", "key", "value", "gate']['down']['kernel")}
  assert still == unread | {"['blocks_0']['mixer']['layer_gate']['up']['kernel']"}, "the first layer has none below it"


@pytest.mark.parametrize("t", [3, 8])
def test_a_token_changes_nothing_before_it_across_layers(t):
  model, x = stack("priority"), jnp.asarray(inputs(2))
  params = parameters(model, x, std=1.0)
  run = jax.jit(model.apply)
  before, after = run(params, x)[0], run(params, x.at[:, t].add(1.0))[0]
  assert_close(before[:, :t], after[:, :t])
  assert np.all(np.any(np.asarray(before != after)[:, t:], axis=(1, 2)))


def test_a_scanned_stack_reads_the_same_pools_and_continues_from_its_state():
  """Seven layers: two scanned repeats of three, and one that follows; a call, and a second one from its state."""
  x = jnp.asarray(inputs(2))
  unrolled = stack("fifo", depth=7)
  params = parameters(unrolled, x, std=0.7)
  scanned, stacked = scan_params(unrolled, params)
  whole, state = jax.jit(unrolled.apply)(params, x)
  first, between = jax.jit(scanned.apply)(stacked, x[:, :5])
  second, after = jax.jit(scanned.apply)(stacked, x[:, 5:], between)
  assert_close(jnp.concatenate([first, second], axis=1), whole)
  assert_close(unroll_state(scanned, after), state)
