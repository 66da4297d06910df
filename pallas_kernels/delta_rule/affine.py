"""A walk through the chunks of a block with one product per chunk, for GPUs, where every product in a loop is a launch.

A chunk maps the state that it begins with to an affine function of it, whose two terms do not depend on the state. With the
symbols of `chunked`, and U = W_v - W_k S where W_v = (I + A)^-1 (s v) and W_k = (I + A)^-1 (s e e^G),

    S <- M S + N      M = e^{G_C} - (k e^{G_C - G})^T W_k      N = (k e^{G_C - G})^T W_v

and back, where D marks the cotangent of the quantity that follows it,

    DS <- M^T DS + scale (q e^G)^T DO - W_k^T P^T DO

Everything but these two products is computed for all chunks of a block at once. M costs about as much as what it replaces.
"""

import jax
import jax.numpy as jnp

from ..numerics import matmul
from .chunked import Chunks, added, read, rows_of, transpose, write
from .terms import Plan, Walk


def _forward(plan: Plan, chunks: Chunks, state: jax.Array) -> tuple[jax.Array, ...]:
  """As `chunked.walk`."""
  flat = _flat(chunks)
  tokens, terms, inverse = flat
  values = tokens.values
  if inverse is not None:
    values = matmul(inverse, tokens.times_strength(values.astype(plan.dtype)), plan.precision)
  written = write(plan, tokens.keys, rows_of(plan, terms.leaving, tokens), values)
  maps = _maps(plan, flat), _apart(plan, written)
  state, states = jax.lax.scan(lambda state, m: (_map(plan, m, state), state), state, maps)
  before = states.reshape(-1, *states.shape[2:])
  out = jnp.asarray(plan.scale, plan.dtype) * read(plan, tokens.q, terms.entering, before)
  out = out + matmul(terms.scores, added(plan, before, flat), plan.precision)
  return state, _apart(plan, out.astype(plan.out_dtype)), states, None


def _backward(plan: Plan, chunks: Chunks, d_out: jax.Array, d_state: jax.Array) -> tuple[jax.Array, ...]:
  """As `chunked.walk_back`."""
  flat, d_out = _flat(chunks), _flat(d_out)
  tokens, terms, inverse = flat
  d_rows = matmul(transpose(terms.scores), d_out, plan.precision)
  d_before = write(plan, tokens.q, jnp.asarray(plan.scale, plan.dtype) * terms.entering, d_out)
  if inverse is not None:
    d_before = d_before - matmul(transpose(_erased(plan, flat)), d_rows, plan.precision)
  maps = _maps(plan, flat)
  maps = maps if inverse is None else transpose(maps), _apart(plan, d_before)
  d_state, d_after = jax.lax.scan(lambda d, m: (_map(plan, m, d), d), d_state, maps, reverse=True)
  by_write = read(plan, tokens.keys, rows_of(plan, terms.leaving, tokens), d_after.reshape(-1, *d_after.shape[2:]))
  du = d_rows + by_write
  dw = du if inverse is None else matmul(transpose(inverse), du, plan.precision)
  return d_state, d_after, _apart(plan, dw)


WALK = Walk(_forward, _backward)


def _map(plan: Plan, m: tuple[jax.Array, jax.Array], state: jax.Array) -> jax.Array:
  """M S + N, for M a matrix [K, K] or a decay per channel, [K or 1]."""
  by_state = m[0][..., None] * state if m[0].ndim < state.ndim else matmul(m[0], state, plan.precision)
  return by_state + m[1]


def _maps(plan: Plan, flat: Chunks) -> jax.Array:
  """M of every chunk, [n, B * H, K, K]; its diagonal, [n, B * H, K or 1], for updates that only add."""
  tokens, terms, inverse = flat
  if inverse is None:
    return _apart(plan, terms.keep)
  erased = write(plan, tokens.keys, rows_of(plan, terms.leaving, tokens), _erased(plan, flat))
  return _apart(plan, terms.keep[..., None] * jnp.eye(erased.shape[-1], dtype=plan.dtype)[None] - erased)


def _erased(plan: Plan, flat: Chunks) -> jax.Array:
  """W_k = (I + A)^-1 (s e e^G), [N, R, K]."""
  tokens, terms, inverse = flat
  along = tokens.times_strength(rows_of(plan, terms.erasing, tokens) * tokens.read_along.astype(plan.dtype))
  return matmul(inverse, along, plan.precision)


def _flat(tree):
  """[n, B * H, ...] to [N, ...]."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _apart(plan: Plan, x: jax.Array) -> jax.Array:
  """[N, ...] to [n, B * H, ...]."""
  return x.reshape(plan.block, -1, *x.shape[1:])
