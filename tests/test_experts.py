"""The mixture of experts: by an oracle that takes each expert of each token by itself, and split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from memzoo.layers import MixtureOfExperts
from memzoo.layers.experts import reference_mixture
from memzoo.layers.laws import check_layer
from memzoo.train.sharding import MeshShape, parameter_shardings, split_operations
from tolerances import assert_close

SETTINGS = {"num_experts": 8, "experts_per_token": 3, "hidden": 12, "dtype": jnp.float64, "param_dtype": jnp.float64}
OF_STATELESS = {*range(1, 17)} - {12, 13, 16}
KINDS = {
  "softmax": {},
  "shared": {"shared_hidden": 16, "shared_gate": True, "normalised": False},
  "grouped": {"scores": "sigmoid", "choice_bias": True, "scale": 2.5, "expert_groups": 4, "groups_per_token": 2},
}


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def case(kind):
  layer = MixtureOfExperts(**SETTINGS, **KINDS[kind])
  x = jax.random.normal(jax.random.key(0), (4, 10, 16), jnp.float64)
  # Scores and biases that differ, so that every part of the choice counts.
  params = jax.tree.map(lambda p: 20 * p if p.ndim > 1 else p + jnp.linspace(-1, 1, p.size), layer.init(jax.random.key(1), x))
  return layer, params, x


def expected(layer, params, x):
  """By the equations, with loops over tokens and experts where there are groups."""
  p = nn.unbox(params)["params"]
  logits = x @ p["router"]["kernel"]
  scores = jax.nn.softmax(logits) if layer.scores == "softmax" else jax.nn.sigmoid(logits)
  bias = p["choice_bias"] if layer.choice_bias else jnp.zeros(8)
  choice = np.array(jax.lax.stop_gradient(scores + bias[None, None]))
  size = layer.num_experts // layer.expert_groups
  for row in choice.reshape(-1, layer.expert_groups, size):
    best = np.argsort([-np.sort(group)[-2:].sum() for group in row])[: layer.groups_per_token]
    row[[i for i in range(layer.expert_groups) if i not in best]] = -np.inf
  chosen = jnp.argsort(-choice, axis=-1)[..., : layer.experts_per_token]
  weights = jnp.take_along_axis(scores, chosen, axis=-1)
  if layer.normalised:
    weights /= weights.sum(axis=-1, keepdims=True)
  y = reference_mixture(x, chosen, layer.scale * weights, p["gate"], p["up"], p["down"])
  if layer.shared_hidden:
    gate, up, down = (p["shared"][name]["kernel"] for name in ("gate", "up", "down"))
    y += (jax.nn.silu(x @ gate) * (x @ up)) @ down * jax.nn.sigmoid(x @ p["shared_gate"]["kernel"])
  return y


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_oracle(kind):
  layer, params, x = case(kind)

  def loss(function):
    return jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(function(params, x))), (0, 1))

  found, wanted = loss(lambda *args: layer.apply(*args)[0])(params, x), loss(lambda *args: expected(layer, *args))(params, x)
  assert_close(found, wanted)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_experts_are_split_over_devices(data, fsdp, tensor):
  layer, params, x = case("grouped")
  mesh = MeshShape(data, fsdp, tensor).build()
  shardings = parameter_shardings(mesh, params)

  def run(params, x):
    with split_operations(mesh):
      return jnp.sum(jnp.sin(layer.apply(params, x)[0]))

  split = jax.device_put(nn.unbox(params), shardings), jax.device_put(x, jax.NamedSharding(mesh, P(("data", "fsdp"))))
  assert split[0]["params"]["gate"].sharding.shard_shape((8, 16, 12))[0] == 8 // tensor
  found = jax.jit(jax.value_and_grad(run, (0, 1)))(*split)
  wanted = jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(layer.apply(params, x)[0])), (0, 1))(nn.unbox(params), x)
  assert_close(found, wanted)


@pytest.mark.slow
def test_laws():
  with jax.enable_x64(False):
    layer = MixtureOfExperts(num_experts=4, experts_per_token=2, hidden=8, shared_hidden=8, choice_bias=True)
    check_layer(layer, laws=OF_STATELESS).raise_if_broken()


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"experts_per_token": 9}, r"experts_per_token=9; expected at most 8"),
    ({"expert_groups": 3}, r"expert_groups=3; expected a divisor of num_experts=8"),
    ({"expert_groups": 8}, r"expert_groups=8; expected groups of two of the 8 experts or more"),
    ({"groups_per_token": 2}, r"groups_per_token=2; expected at most expert_groups=1"),
    ({"expert_groups": 4, "groups_per_token": 1}, r"experts_per_token=3; expected at most 2"),
    ({"scores": "tanh"}, r"scores='tanh'; expected one of \['softmax', 'sigmoid'\]"),
  ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    MixtureOfExperts(**SETTINGS | fields).check_settings()
