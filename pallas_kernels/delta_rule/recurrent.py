"""The delta rule as in the papers, token by token. This is the oracle: every other form must equal it.

    S <- Diag(exp g_t) S                                            (where a document starts: S <- 0)
    for m = 1..r:   S <- S - s_{t,m} k_{t,m} (e_{t,m}^T S) + s_{t,m} k_{t,m} v_{t,m}^T
    o_t = S^T (scale q_t)

The covector e is the key k unless an update has another. `S` [K, V] has key rows and value columns. Padding leaves `S`
unchanged, and its reads are zero.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..documents import Documents
from ..numerics import einsum
from .terms import Update


def recurrent(
  q: jax.Array,
  updates: Sequence[Update],
  scale: float,
  log_decay: jax.Array | None,
  initial_state: jax.Array,
  docs: Documents | None,
  undecayed: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Runs the recurrence.

  Args:
    q: read vectors [B, T, Hk, K].
    updates: the r updates of every token.
    scale: factor of the read.
    log_decay: `None` or [B, T, H, K or 1]; applied once per token, before the first update.
    initial_state: [B, H, K, V]; its dtype is that of the arithmetic.
    docs: document boundaries and padding; `None` for one document without padding.
    undecayed: whether the covector of a single update reads the state before the token's decay.

  Returns:
    Reads [B, T, H, V] in the state's dtype, and the final state [B, H, K, V].
  """
  dtype, heads = initial_state.dtype, initial_state.shape[1]
  starts = None if docs is None else docs.starts
  is_token = None if docs is None else docs.is_token

  def wide(x):
    """x [B, Hk, ...], with key heads repeated for the value heads that share them."""
    return jnp.repeat(x.astype(dtype), heads // x.shape[1], axis=1)

  def step(entering, token):
    q, updates, log_decay, starts, is_token = token
    state = before = entering if starts is None else jnp.where(starts[:, None, None, None], 0, entering)
    if log_decay is not None:
      state = state * jnp.exp(log_decay.astype(dtype))[..., None]
    for update in updates:
      k = wide(update.key)
      written = jnp.zeros_like(state[:, :, 0]) if update.value is None else update.value.astype(dtype)
      if update.erases:
        along = k if update.covector is None else wide(update.covector)
        written = written - einsum("bhkv,bhk->bhv", before if undecayed else state, along)
      if update.strength is not None:
        written = update.strength.astype(dtype)[..., None] * written
      state = state + k[..., None] * written[..., None, :]
    read = einsum("bhkv,bhk->bhv", state, wide(q) * jnp.asarray(scale, dtype))
    if is_token is not None:
      state = jnp.where(is_token[:, None, None, None], state, entering)
      read = jnp.where(is_token[:, None, None], read, 0)
    return state, read

  tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, list(updates), log_decay, starts, is_token))
  state, reads = jax.lax.scan(step, initial_state, tokens)
  return jnp.swapaxes(reads, 0, 1), state
