"""Titans, its three wirings and TTT, written from the papers in NumPy: token by token, every gradient by hand.

Only the names of parameters come from the package. A mistake that operation, oracle and layers share is therefore found here.
"""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from in_numpy import sigmoid, silu, unit
from memzoo.layers import TTTMLP, TitansMemory
from memzoo.layers.titans import Gating, Network, Update
from memzoo.layers.titans_wirings import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("float64")

HEADS, WIDTH, CHUNK, SEGMENT, WINDOW, MODEL, TOKENS = 2, 4, 3, 5, 4, 6, 13
SIZES = {"num_heads": HEADS, "head_dim": WIDTH, "chunk_size": CHUNK, "param_dtype": "float64"}
TITANS = SIZES | {
  "network": Network(expansion=2), "update": Update(clip=None), "gates": Gating(max_step=0.3), "conv_width": 3,
  "persistent_tokens": 2,
}  # fmt: skip
PRINTED = Gating(max_step=0.3, decay_to="zero")


def gelu(x):
  return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu_slope(x):
  tanh = np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))
  return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * (2 / np.pi) ** 0.5 * (1 + 3 * 0.044715 * x**2)


def rms_norm(x, scale, epsilon=1e-6):
  return scale * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)


def layer_norm(x, scale, bias):
  return scale * (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6) + bias


def convolved(x, weight):
  """y_t = sum_i w_i x_{t - i}, the last row of `weight` being w_0."""
  behind = np.concatenate([np.zeros((len(weight) - 1, x.shape[1])), x])
  return sum(w * behind[i : i + len(x)] for i, w in enumerate(weight))


def heads(x):
  return x.reshape(len(x), HEADS, WIDTH)


def softmax_over(pairs, query):
  """Softmax attention of a query [d] over pairs of a key and a value."""
  logits = np.array([query @ key for key, _ in pairs]) / WIDTH**0.5
  weights = np.exp(logits - logits.max())
  return weights / weights.sum() @ np.array([value for _, value in pairs])


def rotated(x, position):
  """Rotates each pair (x_i, x_{i + d/2}), as a complex number, by its frequency times `position`."""
  turned = (x[: WIDTH // 2] + 1j * x[WIDTH // 2 :]) * np.exp(1j * position * 1e4 ** (-np.arange(WIDTH // 2) / (WIDTH // 2)))
  return np.concatenate([turned.real, turned.imag])


class Network:
  """gelu(k W_0) W_1 of one head, trained with momentum and decay; gradients at the weights that a chunk began with.

  It decays towards the weights that the document began with, or to zero.
  """

  def __init__(self, first, last, to_zero):
    self.weights, self.momentum, self.to_zero = [first, last], [0 * first, 0 * last], to_zero
    self.begin_document()

  def begin_document(self):
    self.start = [0 * w for w in self.weights] if self.to_zero else self.weights
    self.begin_chunk()

  def begin_chunk(self):
    self.anchor, self.count = self.weights, 0

  def write(self, k, v, theta, keep, eta):
    hidden = k @ self.anchor[0]
    psi = 2 * (gelu(hidden) @ self.anchor[1] - v)
    gradients = np.outer(k, (self.anchor[1] @ psi) * gelu_slope(hidden)), np.outer(gelu(hidden), psi)
    self.momentum = [eta * s - theta * g for s, g in zip(self.momentum, gradients, strict=True)]
    self.weights = [o + keep * (w - o) + s for o, w, s in zip(self.start, self.weights, self.momentum, strict=True)]
    self.count += 1
    if self.count == CHUNK:
      self.begin_chunk()

  def read(self, q):
    return gelu(q @ self.weights[0]) @ self.weights[1]


class Memory:
  """All heads of a `TitansMemory`, with projections, gates and output."""

  def __init__(self, p, to_zero=False):
    self.p = p
    self.networks = [Network(p["memory_0"][h], p["memory_1"][h], to_zero) for h in range(HEADS)]

  def streams(self, x):
    def stream(name):
      return heads(silu(convolved(x @ self.p[name]["kernel"], self.p[f"{name}_conv"]["weight"])))

    return unit(stream("query")), unit(stream("key")), stream("value")

  def gate(self, name, x):
    return sigmoid(x @ self.p[name]["logits"]["kernel"] + self.p[name]["logits"]["bias"])

  def read(self, q):
    """What the heads retrieve for q [H, d]."""
    return np.array([network.read(q[h]) for h, network in enumerate(self.networks)])

  def learn(self, x, begin=0):
    """Writes the tokens of x [T, D] from `begin` on; returns the read after each write, [T - begin, H, d]."""
    q, k, v = self.streams(x)
    theta, keep, eta = (self.gate(name, x) for name in ("theta", "keep", "eta"))
    retrieved = []
    for t in range(begin, len(x)):
      for h, network in enumerate(self.networks):
        network.write(k[t, h], v[t, h], 0.3 * theta[t, h], keep[t, h], eta[t, h])
      retrieved.append(self.read(q[t]))
    return np.array(retrieved)

  def read_in(self, persistent):
    """Writes the persistent tokens, with which every document begins, in a chunk of their own."""
    self.learn(persistent)
    for network in self.networks:
      network.begin_document()

  def out(self, x, retrieved):
    retrieved = rms_norm(retrieved, self.p["norm"]["scale"], 1e-5).reshape(len(x), -1)
    return retrieved * sigmoid(x @ self.p["gate"]["full"]["kernel"]) @ self.p["output"]["kernel"]


def titans(p, x, to_zero=False):
  memory = Memory(p, to_zero)
  memory.read_in(p["persistent"])
  return memory.out(x, memory.learn(x))


def product(p, y, m):
  return silu(rms_norm(y, p["attention_gate"]["scale"])) * silu(rms_norm(m, p["memory_gate"]["scale"]))


def window(p, x, persistent):
  """Attention over the persistent tokens, at position 0, and the last few tokens."""
  q, k, v = (heads(x @ p[name]["kernel"]) for name in ("query", "key", "value"))
  first_k, first_v = (heads(persistent @ p[name]["kernel"]) for name in ("key", "value"))
  out = np.zeros_like(v)
  for t in range(len(x)):
    for h in range(HEADS):
      ahead = [(first_k[n, h], first_v[n, h]) for n in range(len(persistent))]
      near = [(rotated(k[s, h], s), v[s, h]) for s in range(max(0, t - WINDOW + 1), t + 1)]
      out[t, h] = softmax_over(ahead + near, rotated(q[t, h], t))
  return out.reshape(len(x), -1) @ p["output"]["kernel"]


def gate(p, x):
  return product(p, window(p["attention"], x, p["persistent"]), titans(p, x))


def layer(p, x):
  """h = x + memory(norm(x)), y = h + attention(norm(h))."""
  h = x + titans(p, rms_norm(x, p["memory_norm"]["scale"]))
  return h + window(p["attention"], rms_norm(h, p["attention_norm"]["scale"]), p["persistent"])


def context(p, x):
  """Segment by segment. Convolutions reach back into earlier segments, so y and the queries are kept for all of x."""
  memory, y, retrieved, out = Memory(p), np.zeros((0, MODEL)), np.zeros((0, HEADS, WIDTH)), np.zeros((0, MODEL))
  queries = memory.streams(x)[0]
  for begin in range(0, len(x), SEGMENT):
    s = x[begin : begin + SEGMENT]
    # What the memory retrieves for the queries of this segment, in its state after the previous segment.
    h = np.array([memory.read(q) for q in queries[begin : begin + SEGMENT]])
    h = rms_norm(h, p["context_norm"]["scale"], 1e-5).reshape(len(s), -1) @ p["context"]["kernel"]
    # Attention over [P; h; S]: token t sees neither later tokens nor what is retrieved for them.
    q = heads(s @ p["attention_query"]["kernel"])
    keys, values = ([heads(a @ p[f"attention_{name}"]["kernel"]) for a in (p["persistent"], h, s)] for name in ("key", "value"))
    attended = np.zeros_like(q)
    for t in range(len(s)):
      for i in range(HEADS):
        pairs = [(keys[0][n, i], values[0][n, i]) for n in range(len(p["persistent"]))]
        pairs += [(rotated(keys[part][r, i], r), values[part][r, i]) for part in (1, 2) for r in range(t + 1)]
        attended[t, i] = softmax_over(pairs, rotated(q[t, i], t))
    y = np.concatenate([y, s + attended.reshape(len(s), -1) @ p["attention_output"]["kernel"]])
    # The memory is trained on y and read after each token; the two are multiplied.
    retrieved = np.concatenate([retrieved, memory.learn(y, begin)])
    out = np.concatenate([out, product(p, y, memory.out(y, retrieved))[begin:]])
  return out


def ttt(p, x):
  """y_i = q_i + LN(f(q_i; W_0 - (1/i + lambda_i)+ sum_{j <= i} eta_j g_j)), the gradients by hand."""
  shared = x @ p["query_key"]["kernel"]
  q, k = (heads(convolved(shared, p[f"{name}_conv"]["weight"])) for name in ("query", "key"))
  v = heads(x @ p["value"]["kernel"])
  eta = 0.1 / WIDTH * sigmoid(x @ p["eta"]["logits"]["kernel"] + p["eta"]["logits"]["bias"])
  out = np.zeros_like(v)
  for h in range(HEADS):
    scale, bias, average = p["memory_norm_scale"][h], p["memory_norm_bias"][h], p["average"][h]
    weights = [p["memory_0"][h], p["memory_1"][h]]
    for t in range(len(x)):
      i = t % CHUNK
      if i == 0:
        anchor, steps = weights, [0 * w for w in weights]
      key, query = rotated(k[t, h], i), rotated(q[t, h], i)
      hidden = np.append(key, 1) @ anchor[0]
      z = np.append(gelu(hidden), 1) @ anchor[1]
      root = np.sqrt(z.var() + 1e-6)
      normed = (z - z.mean()) / root
      g = scale * (key + scale * normed + bias - v[t, h])
      last = (g - g.mean() - normed * (g * normed).mean()) / root
      first = (anchor[1][:-1] @ last) * gelu_slope(hidden)
      gradients = np.outer(np.append(key, 1), first), np.outer(np.append(gelu(hidden), 1), last)
      steps = [s + eta[t, h] * g for s, g in zip(steps, gradients, strict=True)]
      weights = [w - max(0, 1 / (i + 1) + average[i]) * s for w, s in zip(anchor, steps, strict=True)]
      z = np.append(gelu(np.append(query, 1) @ weights[0]), 1) @ weights[1]
      out[t, h] = query + layer_norm(z, scale, bias)
  out = layer_norm(out.reshape(len(x), -1), p["norm"]["scale"], p["norm"]["bias"])
  return out * gelu(x @ p["gate"]["kernel"]) @ p["output"]["kernel"]


ON_PAPER = {
  "TitansMemory": (TitansMemory(**TITANS), titans),
  "TitansMemory as printed": (TitansMemory(**TITANS | {"gates": PRINTED}), functools.partial(titans, to_zero=True)),
  "MemoryAsGate": (MemoryAsGate(**TITANS, window=WINDOW), gate),
  "MemoryAsLayer": (MemoryAsLayer(**TITANS, window=WINDOW), layer),
  "MemoryAsContext": (MemoryAsContext(**TITANS, segment=SEGMENT), context),
  "TTTMLP": (TTTMLP(**SIZES, expansion=2, conv_width=3), ttt),
}


@pytest.mark.parametrize("name", ON_PAPER)
def test_the_layer_equals_the_paper_in_numpy(name):
  module, on_paper = ON_PAPER[name]
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, TOKENS, MODEL))
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
  params = jax.tree.map(lambda a: rng.normal(size=a.shape) * 0.4, shapes)
  for norm in ("norm", "memory_norm", "attention_norm", "attention_gate", "memory_gate", "context_norm"):
    if norm in params:
      params[norm]["scale"] += 1
  y, _ = jax.jit(module.apply)({"params": params}, x)
  assert_close(y[0], on_paper(params, x[0]))
