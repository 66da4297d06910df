"""Which parameters weight decay applies to: every parameter of every layer says so itself."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from memzoo.layers import MixtureOfExperts
from memzoo.layers.axes import Named
from memzoo.layers.titans import Loss, Network, TitansMemory
from memzoo.zoo.registry import LAYERS
from subjects import hybrid, layer

DECAY = {"kernel", "weight", "embedding", "persistent", "memory_0", "memory_1", "memory_gate", "memory_up", "memory_down"}
DECAY |= {"token_key", "token_value", "latent_key", "latent_value", "gate", "up", "down", "key", "value"}
STAY = {"scale", "bias", "A_log", "D", "dt_bias", "trigger_bias", "average", "memory_norm_scale", "ridge", "memory_norm_bias"}
STAY |= {"fast_memory_0", "fast_memory_1", "slow_memory_0", "slow_memory_1", "feature_0_scale", "choice_bias"}
STAY |= {"feedback", "read_correction_scale"}
MODULES = {name: layer(name, persistent_tokens=2) for name in LAYERS} | {
  "memory with all options": TitansMemory(
    num_heads=2, head_dim=4, network=Network(gated=True, norm=True), loss=Loss("huber"), persistent_tokens=2
  ),
  "mixture of experts": MixtureOfExperts(
    num_experts=2, experts_per_token=1, shared_hidden=4, shared_gate=True, choice_bias=True
  ),
  "model": hybrid(8),
  "scanned model": hybrid(8).clone(scan=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_matrices_decay_and_gates_norms_and_biases_do_not(name):
  module = MODULES[name]
  x = jnp.zeros((1, 3), jnp.int32) if "model" in name else jnp.zeros((1, 3, 8), jnp.float32)
  boxed = jax.eval_shape(module.init, jax.random.key(0), x)
  leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
  assert leaves
  for path, leaf in leaves:
    assert isinstance(leaf, Named), f"{jax.tree_util.keystr(path)} does not say whether it decays"
    last = path[-1].key
    assert leaf.decays == (last in DECAY), jax.tree_util.keystr(path)
    assert last in DECAY | STAY, jax.tree_util.keystr(path)
