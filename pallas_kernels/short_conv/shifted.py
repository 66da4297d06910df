"""The short convolution as a weighted sum of W shifted copies of its input.

Padding is moved to the end first, so that the columns before a token hold the tokens before it. A shifted copy is masked where
it holds tokens of another document.
"""

import jax
import jax.numpy as jnp

from ..documents import Documents
from ..numerics import accumulator, matmul


def shifted(
  x: jax.Array, weight: jax.Array, initial_state: jax.Array, docs: Documents | None
) -> tuple[jax.Array, jax.Array]:
  """The same function as `recurrent`: same arguments, same results."""
  if docs is None:
    inputs = jnp.concatenate([initial_state, x], axis=1)
    return _convolve(inputs, weight, None).astype(x.dtype), inputs[:, x.shape[1] :]

  tokens_first = jnp.argsort(~docs.is_token, axis=1, stable=True)
  inputs = jnp.concatenate([initial_state, _take(x, tokens_first)], axis=1)
  before = jnp.zeros(initial_state.shape[:2], docs.index.dtype)
  index = jnp.concatenate([before, _take(docs.index, tokens_first)], axis=1)
  y = _take(_convolve(inputs, weight, index), jnp.argsort(tokens_first, axis=1))
  y = jnp.where(docs.is_token[..., None], y, 0).astype(x.dtype)

  count = jnp.sum(docs.is_token, axis=1, dtype=jnp.int32)
  last = count[:, None] + jnp.arange(initial_state.shape[1], dtype=jnp.int32)[None]
  in_last_document = _take(index, last) == docs.index[:, -1:]
  return y, jnp.where(in_last_document[..., None], _take(inputs, last), 0)


def _convolve(inputs: jax.Array, weight: jax.Array, index: jax.Array | None) -> jax.Array:
  """Computes y [B, T, D] from `inputs` [B, W - 1 + T, D]; in y_t, tokens with another `index` than t count as zeros."""
  width = weight.shape[0]
  tokens = inputs.shape[1] - width + 1
  wide = accumulator(inputs)
  inputs, weight = inputs.astype(wide), weight.astype(wide)
  y = _by_channel(inputs[:, width - 1 :], weight[-1])
  for j in range(width - 1):
    tap = inputs[:, j : j + tokens]
    if index is not None:
      same = index[:, j : j + tokens] == index[:, width - 1 :]
      tap = jnp.where(same[..., None], tap, 0)
    y = y + _by_channel(tap, weight[j])
  return y


@jax.custom_vjp
def _by_channel(x: jax.Array, weight: jax.Array) -> jax.Array:
  """x [B, T, D] times weight [D]. The gradient by the weight is a matrix product with ones.

  JAX's own gradient would be a sum over tokens, for which XLA on a CPU takes many times as long.
  """
  return x * weight[None, None]


def _by_channel_forward(x, weight):
  return _by_channel(x, weight), (x, weight)


def _by_channel_backward(residuals, dy):
  x, weight = residuals
  ones = jnp.ones((1, x.shape[0] * x.shape[1]), dy.dtype)
  return _by_channel(dy, weight), matmul(ones, (x * dy).reshape(ones.shape[1], -1))[0]


_by_channel.defvjp(_by_channel_forward, _by_channel_backward)


def _take(x: jax.Array, columns: jax.Array) -> jax.Array:
  """Gathers, row by row, `columns` [B, M] from x [B, T] or [B, T, D]."""
  return jnp.take_along_axis(x, columns if x.ndim == 2 else columns[..., None], axis=1)
