"""The passes of matrix products in bfloat16 models, read from programs that are compiled for a TPU without one."""

import jax
import jax.numpy as jnp
import pytest
from machine import needs_libtpu
from memzoo.layers.titans import Network
from memzoo.pallas_kernels import tpu_cost
from memzoo.pallas_kernels.triangular import SCOPE
from memzoo.zoo.language_model import LanguageModel
from subjects import layer

WITH_AN_INVERSE = "EraseThenDelta"
MIXERS = WITH_AN_INVERSE, "TTTLinear"


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_a_bfloat16_model_multiplies_nothing_in_six_passes_but_triangular_inverses(name):
  options = {"chunk_size": 64} if name == WITH_AN_INVERSE else {}
  fields = {"key_dim": 32, "value_dim": 32, "head_dim": 32, "network": Network(depth=1)}
  mixer = layer(name, dtype="bfloat16", **fields, **options)
  model = LanguageModel(vocab_size=32, width=64, depth=1, mixers=(mixer,), dtype="bfloat16")
  tokens = jax.ShapeDtypeStruct((2, 96), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)

  def loss(params, tokens):
    logits, _ = model.apply(params, tokens)
    return jnp.sum(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))

  cost = tpu_cost.measure(jax.grad(loss), params, tokens)
  assert any(product.passes == 1 for product in cost.products)
  in_six = [product for product in cost.products if product.passes == 6]
  assert bool(in_six) == (name == WITH_AN_INVERSE)
  assert not [product for product in in_six if SCOPE not in product.op_name.split("/")]
