"""The selective scan as in the paper, token by token. This is the oracle: every other form must equal it.

    h_t = exp(step_t a) h_{t-1} + step_t x_t b_t^T        (where a document starts: h_{t-1} = 0)
    y_t = c_t . h_t

Padding leaves `h` unchanged, and its outputs are zero.
"""

import jax
import jax.numpy as jnp

from ..documents import Documents


def recurrent(
  x: jax.Array, step: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array, docs: Documents | None
) -> tuple[jax.Array, jax.Array]:
  """Maps x, step [B, T, D], a [N, D], b, c [B, T, N] and the state [B, N, D] to y [B, T, D] and the final state.

  The state's dtype is that of the arithmetic and of y. `docs` is `None` for one document without padding.
  """
  dtype = state.dtype
  starts = None if docs is None else docs.starts
  is_token = None if docs is None else docs.is_token

  def one(entering, token):
    x, step, b, c, starts, is_token = token
    before = entering if starts is None else jnp.where(starts[:, None, None], 0, entering)
    decay = jnp.exp(step[:, None] * a.astype(dtype)[None])
    h = decay * before + b[..., None] * (step * x)[:, None]
    y = jnp.sum(c[..., None] * h, axis=1)
    if is_token is None:
      return h, y
    return jnp.where(is_token[:, None, None], h, entering), jnp.where(is_token[:, None], y, 0)

  floats = (z.astype(dtype) for z in (x, step, b, c))
  tokens = jax.tree.map(lambda z: jnp.swapaxes(z, 0, 1), (*floats, starts, is_token))
  state, y = jax.lax.scan(one, state, tokens)
  return jnp.swapaxes(y, 0, 1), state
