"""The oracle of the short convolution: token by token, with the last W - 1 inputs as the state."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ..documents import documents
from ..numerics import accumulator
from ..partition import HEADS, ROWS, partitioned

# The axes of x and the states, of the weight, and of integers per row.
TOKENS, _WEIGHT, OF_ROWS = P(ROWS, None, HEADS), P(None, HEADS), P(ROWS)
INPUTS = (TOKENS, _WEIGHT, TOKENS, OF_ROWS)


def recurrent(
  x: jax.Array, weight: jax.Array, initial_state: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Maps x [B, T, D], weight [W, D] and initial_state [B, W - 1, D] to y [B, T, D] and the final state."""
  return partitioned(_recurrent, INPUTS, TOKENS)(x, weight, initial_state, segment_ids)


def _recurrent(x, weight, initial_state, segment_ids):
  docs = None if segment_ids is None else documents(segment_ids)
  starts = None if docs is None else docs.starts
  is_token = None if docs is None else docs.is_token

  def step(state, token):
    x, starts, is_token = token
    before = state if starts is None else jnp.where(starts[:, None, None], 0, state)
    window = jnp.concatenate([before, x[:, None]], axis=1)
    wide = accumulator(x)
    y = jnp.sum(window.astype(wide) * weight[None].astype(wide), axis=1).astype(x.dtype)
    if is_token is None:
      return window[:, 1:], y
    return jnp.where(is_token[:, None, None], window[:, 1:], state), jnp.where(is_token[:, None], y, 0)

  tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (x, starts, is_token))
  state, y = jax.lax.scan(step, initial_state, tokens)
  return jnp.swapaxes(y, 0, 1), state
