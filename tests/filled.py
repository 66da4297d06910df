"""Variables of a module with values from NumPy: nothing is compiled to make them."""

from typing import Any

import jax
import numpy as np
from flax import linen as nn

# Vectors keep the values that make a layer work: unit scales of norms, slow decays, half-open gates.
_VECTORS = {"scale": 1.0, "dt_bias": -4.5, "A_log": 0.5, "bias": 0.0}


def filled(module: nn.Module, *inputs: Any, std: float = 0.15, seed: int = 0) -> Any:
  """The tree of `module.init(key, *inputs)`, unboxed; its matrices are normal with standard deviation `std`."""
  numbers = np.random.default_rng(seed)

  def fill(path, leaf):
    name = path[-1].key
    if leaf.ndim == 1 and name in _VECTORS:
      return jax.numpy.asarray(_VECTORS[name] + 0.1 * numbers.standard_normal(leaf.shape), leaf.dtype)
    return jax.numpy.asarray(std * numbers.standard_normal(leaf.shape), leaf.dtype)

  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
  return jax.tree_util.tree_map_with_path(fill, shapes)
