"""The delta rule as in the papers, token by token. This is the oracle: every other form must equal it.

    S <- Diag(exp g_t) S                                            (where a document starts: S <- 0)
    for m = 1..r:   u = z_{t,m} - S^T a_{t,m};   S <- S + k_{t,m} u^T
    o_t = S^T q_t

`S` [K, V] has key rows and value columns. Padding leaves `S` unchanged, and its reads are zero.
"""

import jax
import jax.numpy as jnp

from ..documents import Documents
from ..numerics import einsum


def recurrent(
  q: jax.Array,
  k: jax.Array,
  a: jax.Array | None,
  z: jax.Array,
  log_decay: jax.Array | None,
  initial_state: jax.Array,
  docs: Documents | None,
) -> tuple[jax.Array, jax.Array]:
  """Runs the recurrence.

  Args:
    q: read vectors [B, T, H, K], already scaled.
    k: write vectors [B, T, H, r, K].
    a: erase covectors [B, T, H, r, K]; with `None` nothing is erased.
    z: values to write [B, T, H, r, V].
    log_decay: `None`, [B, T, H] or [B, T, H, K]; applied once per token, before the first update.
    initial_state: [B, H, K, V]; its dtype is that of the arithmetic.
    docs: document boundaries and padding; `None` for one document without padding.

  Returns:
    Reads [B, T, H, V] in the state's dtype, and the final state [B, H, K, V].
  """
  dtype = initial_state.dtype
  starts = None if docs is None else jnp.diff(docs.index, axis=1, prepend=0) > 0
  is_token = None if docs is None else docs.is_token

  def step(entering, token):
    q, k, a, z, log_decay, starts, is_token = token
    state = entering if starts is None else jnp.where(starts[:, None, None, None], 0, entering)
    if log_decay is not None:
      decay = jnp.exp(log_decay.astype(dtype))
      state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    for m in range(k.shape[2]):
      u = z[:, :, m].astype(dtype)
      if a is not None:
        u = u - einsum("bhkv,bhk->bhv", state, a[:, :, m].astype(dtype))
      state = state + k[:, :, m].astype(dtype)[..., None] * u[..., None, :]
    read = einsum("bhkv,bhk->bhv", state, q.astype(dtype))
    if is_token is not None:
      state = jnp.where(is_token[:, None, None, None], state, entering)
      read = jnp.where(is_token[:, None, None], read, 0)
    return state, read

  tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, a, z, log_decay, starts, is_token))
  state, reads = jax.lax.scan(step, initial_state, tokens)
  return jnp.swapaxes(reads, 0, 1), state
