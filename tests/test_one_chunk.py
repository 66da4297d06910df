"""A single chunk of many rows: XLA compiles it together with the layer around it, and on a CPU made errors there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.layers import LinearAttention, Mamba2
from tolerances import assert_close

LAYERS = {
  "Mamba2": Mamba2(num_heads=4, head_dim=16),
  "LinearAttention": LinearAttention(num_heads=4, key_dim=16, value_dim=16),
}


@pytest.mark.compat
@pytest.mark.parametrize("name", LAYERS)
def test_many_rows_of_one_chunk_are_those_of_the_recurrence(name):
  layer = LAYERS[name]
  x = jax.random.normal(jax.random.key(0), (64, 64, 64), jnp.float32)
  params = jax.jit(layer.init)(jax.random.key(1), x[:1])

  def results(layer):
    def loss(params, x):
      y, _ = layer.apply(params, x)
      return (y * y).sum(), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

  found, expected = results(layer), results(layer.clone(implementation="recurrent"))
  assert np.isfinite(found[0][1]).all()
  assert_close(found, expected, jnp.float32, gradients=True)
  assert_close(jax.jit(lambda params, x: layer.apply(params, x)[0])(params, x), expected[0][1], jnp.float32)
