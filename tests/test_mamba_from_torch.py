"""Mamba and Mamba-2 against numbers of PyTorch: outputs and input gradients of the mixers of transformers, in float64.

`compare_torch_mamba.py --write` made them; it also compares more configurations, and the gradients by the weights.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.layers import Mamba, Mamba2
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64"), pytest.mark.xdist_group("mamba-from-torch")]

LAYERS = {"mamba": Mamba, "mamba2": Mamba2}


def saved(name):
  """Settings of the layer, its parameters, and the arrays of one call."""
  settings, params, arrays = {}, {}, {}
  with np.load(Path(__file__).with_name("mamba_from_torch.npz")) as file:
    for key in file.files:
      layer, kind, *path = key.split("/")
      if layer != name:
        continue
      if kind == "settings":
        settings[path[0]] = int(file[key])
      elif kind == "params":
        *modules, leaf = path
        inner = params
        for module in modules:
          inner = inner.setdefault(module, {})
        inner[leaf] = jnp.asarray(file[key], jnp.float64)
      else:
        arrays[kind] = jnp.asarray(file[key], jnp.float64)
  return settings, params, arrays


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_input_gradients_are_those_of_torch(name):
  settings, params, arrays = saved(name)
  layer = LAYERS[name](**settings, param_dtype=jnp.float64)

  @jax.jit
  def values_and_gradient(params, x, output_gradient):
    y, pull_back = jax.vjp(lambda x: layer.apply({"params": params}, x)[0], x)
    return y, pull_back(output_gradient)[0]

  y, gradient = values_and_gradient(params, arrays["input"], arrays["output_gradient"])
  assert_close(y, arrays["output"])
  assert_close(gradient, arrays["input_gradient"], gradients=True)
