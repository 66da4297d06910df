"""Parameters as plain arrays."""

from typing import Any

import jax
from flax import linen as nn


def init(module: nn.Module, key: jax.Array, x: jax.Array | None = None) -> Any:
  """Initial parameters of a layer or a model, as plain arrays.

  `module.init(key, x)` puts each parameter into a box, `memzoo.layers.axes.Named`, with the names of its axes and whether
  weight decay applies to it. `flax.linen.unbox` opens the boxes, as this function does; `apply` takes either form.

  Args:
    module: a layer, or a model of `memzoo.zoo`.
    key: the random key.
    x: an input of any length; not needed for a model.

  Raises:
    ValueError: if `x` is missing for a layer.
  """
  if x is None:
    if not hasattr(module, "example"):
      raise ValueError(f"x is missing; expected an input of {type(module).__name__}, [batch, tokens, width].")
    x = module.example(1, 1)
    x = jax.numpy.zeros(x.shape, x.dtype)
  return nn.unbox(module.init(key, x))
