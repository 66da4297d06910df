"""Layers of the delta family against their papers in NumPy: projections, convolutions, gates, rule, norm and output gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import by_hand
from flax import linen as nn
from in_numpy import sigmoid, silu, unit
from memzoo.layers import (
  Comba,
  DeltaProduct,
  EraseThenDelta,
  GatedDeltaNet,
  GatedDeltaNet2,
  KimiDeltaAttention,
  LinearAttention,
)
from memzoo.layers.projections import LogDecay
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64"), pytest.mark.xdist_group("delta-identities")]

SIZES = {"num_heads": 4, "num_key_heads": 2, "key_dim": 3, "value_dim": 2, "conv_width": 3, "param_dtype": jnp.float64}
HEADS, KEY_HEADS, KEY_DIM, VALUE_DIM = 4, 2, 3, 2


def elu_plus_1(x):
  return np.where(x > 0, x, np.exp(x) - 1) + 1


def linear(p, x):
  """A map of full or low rank."""
  for name in ("full", "down", "up", "logits"):
    x = x @ p[name]["kernel"] + p[name].get("bias", 0) if name in p else x
  return x


def stream(p, name, x, activation=silu):
  x, weight = x @ p[name]["kernel"], p[f"{name}_conv"]["weight"]
  before = np.concatenate([np.zeros((len(x), 2, x.shape[-1])), x], axis=1)
  return activation(sum(weight[j] * before[:, j : j + x.shape[1]] for j in range(3)))


def log_decay(p, x, channels=None, bound=None, count=HEADS):
  steps = np.log1p(np.exp(linear(p["step"], x) + p["dt_bias"])).reshape(*x.shape[:2], count, *([channels] if channels else []))
  decay = np.exp(p["A_log"]).reshape(-1, *[1] * (steps.ndim - 3)) * steps
  return -decay if bound is None else -abs(bound) * (1 - np.exp(-decay / abs(bound)))


def heads(x, count, width, writes=1):
  return x.reshape(*x.shape[:2], *([] if writes == 1 else [writes]), count, width)


def read_out(p, x, out, gate=None):
  out = out / np.sqrt(np.mean(out * out, axis=-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
  out = out.reshape(*x.shape[:2], -1)
  return (out if gate is None else out * gate(linear(p["gate"], x))) @ p["output"]["kernel"]


def linear_attention(p, x):
  q, k = (unit(heads(stream(p, name, x, elu_plus_1), KEY_HEADS, KEY_DIM)) for name in ("query", "key"))
  return read_out(p, x, by_hand(q, k, heads(stream(p, "value", x), HEADS, VALUE_DIM))[0])


def kimi_delta_attention(p, x):
  q, k = (unit(heads(stream(p, name, x), KEY_HEADS, KEY_DIM)) for name in ("query", "key"))
  beta, decay = 2 * sigmoid(linear(p["beta"], x)), log_decay(p["decay"], x, KEY_DIM, -5)
  out, _ = by_hand(q, k, heads(stream(p, "value", x), HEADS, VALUE_DIM), beta, log_decay=decay)
  return read_out(p, x, out, sigmoid)


def delta_product(p, x):
  q, k = unit(heads(stream(p, "query", x), KEY_HEADS, KEY_DIM)), unit(heads(stream(p, "key", x), KEY_HEADS, KEY_DIM, 2))
  beta = 2 * sigmoid(linear(p["beta"], x)).reshape(*x.shape[:2], 2, HEADS)
  out, _ = by_hand(q, k, heads(stream(p, "value", x), HEADS, VALUE_DIM, 2), beta, log_decay=log_decay(p["decay"], x))
  return read_out(p, x, out, silu)


def erase_then_delta(p, x):
  q, k = (unit(heads(stream(p, name, x), KEY_HEADS, KEY_DIM)) for name in ("query", "key"))
  erase_key, gamma = unit(heads(linear(p["erase_key"], x), KEY_HEADS, KEY_DIM)), sigmoid(linear(p["gamma"], x))
  beta, decay = sigmoid(linear(p["beta"], x)), log_decay(p["decay"], x, KEY_DIM, -5)
  out, _ = by_hand(q, k, heads(stream(p, "value", x), HEADS, VALUE_DIM), beta, erase_key, gamma, decay)
  return read_out(p, x, out, sigmoid)


def gated_delta_net_2(p, x):
  q, k = (unit(heads(stream(p, name, x), KEY_HEADS, KEY_DIM)) for name in ("query", "key"))
  erase = 2 * sigmoid(heads(linear(p["erase_gate"], x), KEY_HEADS, KEY_DIM))
  write = sigmoid(heads(linear(p["write_gate"], x), HEADS, VALUE_DIM))
  decay = np.repeat(log_decay(p["decay"], x, KEY_DIM, count=KEY_HEADS), HEADS // KEY_HEADS, axis=2)
  v = heads(stream(p, "value", x), HEADS, VALUE_DIM)
  out, _ = by_hand(q, k, v, log_decay=decay, erase_gate=erase, write_gate=write)
  return read_out(p, x, out, sigmoid)


def comba(p, x):
  q, k = (unit(heads(stream(p, name, x), KEY_HEADS, KEY_DIM)) for name in ("query", "key"))
  feedback = sigmoid(p["feedback"])[:, None] * k
  q = q - p["read_correction_scale"][:, None] * feedback
  beta, v = sigmoid(linear(p["beta"], x)), heads(stream(p, "value", x), HEADS, VALUE_DIM)
  out, _ = by_hand(q, k, v, beta, log_decay=log_decay(p["decay"], x), feedback_key=feedback)
  return read_out(p, x, out, sigmoid)


@pytest.mark.parametrize(
  ("layer", "equation"),
  [
    (LinearAttention(**SIZES, feature_map="elu"), linear_attention),
    (KimiDeltaAttention(**SIZES, negative_eigenvalues=True), kimi_delta_attention),
    (DeltaProduct(**SIZES), delta_product),
    (EraseThenDelta(**SIZES, rank_per_head=2), erase_then_delta),
    (GatedDeltaNet2(**SIZES, negative_eigenvalues=True), gated_delta_net_2),
    (Comba(**SIZES), comba),
  ],
  ids=["linear_attention", "kimi_delta_attention", "delta_product", "erase_then_delta", "gated_delta_net_2", "comba"],
)
def test_the_layer_is_its_papers_equation(layer, equation):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 6, 7))
  shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))
  params = jax.tree.map(lambda p: 0.7 * rng.normal(size=p.shape), shapes)
  y, _ = jax.jit(layer.apply)(params, x)
  assert_close(y, equation(params["params"], x))


def test_a_decay_by_a_sigmoid_has_its_bound_and_its_equation():
  module, x = LogDecay(2, 3, None, -5.0, by_sigmoid=True, param_dtype=jnp.float64), jnp.linspace(-3, 3, 20).reshape(1, 5, 4)
  params = nn.unbox(module.init(jax.random.key(0), x))
  p = jax.tree.map(np.asarray, params["params"])
  u = np.asarray(x) @ p["step"]["full"]["kernel"] + p["dt_bias"]
  expected = -5 / (1 + np.exp(-np.exp(p["A_log"])[:, None] * u.reshape(1, 5, 2, 3)))
  assert_close(module.apply(params, x), expected)


def test_maps_of_full_rank_and_biases_are_parameters():
  sizes = {"num_heads": 2, "key_dim": 4, "value_dim": 4, "param_dtype": jnp.float64}

  def init(**options):
    return jax.eval_shape(KimiDeltaAttention(**sizes, **options).init, jax.random.key(0), jnp.zeros((1, 3, 8)))

  params = nn.unbox(init(full_rank=True, conv_bias=True, gate_bias=True))["params"]
  assert params["decay"]["step"]["full"]["kernel"].shape == params["gate"]["full"]["kernel"].shape == (8, 8)
  assert params["gate"]["full"]["bias"].shape == params["key_conv"]["bias"].shape == (8,)
  assert "bias" not in init(gate_bias=False)["params"]["gate"]["up"]


@pytest.mark.parametrize(("activation", "start"), [("silu", 1.0), ("sigmoid", 0.0)])
def test_a_gate_with_a_bias_starts_open(activation, start):
  layer = GatedDeltaNet(num_heads=1, key_dim=4, value_dim=4, output_gate=activation, gate_bias=True)
  gate = nn.unbox(layer.init(jax.random.key(0), jnp.ones((1, 2, 8), jnp.float32)))["params"]["gate"]["full"]
  assert gate["bias"].tolist() == [start] * 4
