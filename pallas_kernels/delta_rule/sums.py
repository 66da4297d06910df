"""Updates that only add, with one decay per head or none: no inverse, and products shared by the heads of a key.

The equations of `chunked` with U = V and no A. A decay per head scales rows of results only, so the G value heads that share a
key are the columns of one matrix: values [C, G V] and states [K, G V]. For head g of these, with its own decays,

    P_g = scale (q k^T) E_g           q k^T: once for all heads
    O   = scale e^G (q S) + [P_g V_g]_g         S <- e^{G_C} S + k^T (e^{G_C - G} V)         one product for all heads

and the gradient, where D marks the cotangent of the quantity that follows it,

    DV = [P_g^T DO_g]_g + e^{G_C - G} (k DS)      DP_g = DO_g V_g^T
    Dq = scale (e^G DO) S^T + (sum_g scale DP_g E_g) k      Dk = (e^{G_C - G} V) DS^T + (sum_g scale DP_g E_g)^T q
    DS <- e^{G_C} DS + q^T (scale e^G DO)

The sums over heads in Dq and Dk are part of the products. What chunks write does not depend on the state, so only
S <- e^{G_C} S + (what the chunk writes) goes from chunk to chunk; all else is parallel over the chunks of a block.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..documents import Documents
from ..numerics import einsum, inner_products, matmul
from . import chunked
from .chunked import Kept
from .terms import Masks, Plan, Tokens, boundary_decays, bounded_log_decay, decays_between, make_masks

_Operands = tuple[jax.Array, jax.Array, jax.Array]


class _Terms(NamedTuple):
  """What N chunks contribute, apart from the state, for D heads with decays of their own: G, or 1 without decays.

  Attributes:
    scores: P, [N, D, C, C].
    entering: e^G, [N, C, D]; 0 for tokens of later documents.
    leaving: e^{G_C - G}, [N, C, D]; 0 for tokens of earlier documents.
    keep: e^{G_C}, [N, D]; 0 if the document ends.
  """

  scores: jax.Array
  entering: jax.Array
  leaving: jax.Array
  keep: jax.Array


def forward(
  plan: Plan, docs: Documents | None, operands: _Operands, log_decay: jax.Array | None, initial_state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Kept]:
  """As `chunked.forward`, for operands q, k [B, T, Hk, K] and v [B, T, H, V], and log_decay `None` or [B, T, H, 1].

  It keeps states [chunks, B, Hk, K, G V].
  """
  keys, heads = operands[1].shape[2], plan.heads
  inputs, state = _by_key(keys, operands, log_decay), _side_by_side(initial_state, keys)
  (out, state), kept = chunked.forward(plan._replace(heads=keys), docs, *inputs, state, _block)
  return (out.reshape(operands[2].shape), _apart(state, heads)), kept


def kept_shapes(plan: Plan, operands: _Operands, initial_state: jax.Array) -> Kept:
  """The shapes of what `forward` keeps."""
  keys = operands[1].shape[2]
  state = jax.eval_shape(partial(_side_by_side, keys=keys), initial_state)
  return chunked.kept_shapes(plan._replace(heads=keys), operands, state)


def backward(
  plan: Plan,
  docs: Documents | None,
  operands: _Operands,
  log_decay: jax.Array | None,
  kept: Kept,
  d_out: jax.Array,
  d_final: jax.Array,
) -> tuple[_Operands, jax.Array | None, jax.Array]:
  """The cotangents of `operands`, `log_decay` and the initial state, from those of the output and the final state."""
  keys, heads = operands[1].shape[2], plan.heads
  inputs = _by_key(keys, operands, log_decay)
  d_out, d_final = d_out.reshape(inputs[0][2].shape), _side_by_side(d_final, keys)
  plan = plan._replace(heads=keys)
  *d_inputs, d_state = chunked.backward(plan, docs, *inputs, kept, d_out, d_final, _block_backward)
  d_operands, d_log_decay = jax.tree.map(lambda d, x: d.reshape(x.shape), tuple(d_inputs), (operands, log_decay))
  return d_operands, d_log_decay, _apart(d_state, heads)


def _block(
  plan: Plan, docs: Documents | None, entry: jax.Array | None, tokens: Tokens, state: jax.Array
) -> tuple[jax.Array, jax.Array, Kept]:
  """A block: the state after it, its output [n, M, C, G V], and what the gradient needs; M = B * Hk."""
  terms, _ = _prepare(plan, docs, entry, tokens)
  product = partial(matmul, precision=plan.precision)
  heads, scale = terms.keep.shape[-1], jnp.asarray(plan.scale, plan.dtype)
  written = product(_transpose(tokens.keys), _scaled(terms.leaving, tokens.values.astype(plan.dtype)))
  after, states = _accumulate(plan, written, terms.keep, state)
  within = _joined(product(_flat(terms.scores), _per_head(tokens.values, heads)), heads)
  out = within + _scaled(scale * terms.entering, product(tokens.q, _flat(states)))
  return after, _chunks(plan, out.astype(plan.out_dtype)), Kept(states, None, None)


def _block_backward(
  plan: Plan, docs: Documents | None, entry: jax.Array | None, tokens: Tokens, kept: Kept, d_out: jax.Array, d_after: jax.Array
) -> tuple[jax.Array, Tokens]:
  """The cotangents of a block's incoming state and of its tokens, from those of its outputs and of the state after it."""
  terms, pull_back = _prepare(plan, docs, entry, tokens)
  product = partial(matmul, precision=plan.precision)
  by_rows = partial(einsum, "ncw,nkw->nck", precision=plan.precision)  # on a CPU, it does not copy to transpose
  q, keys, values = tokens.q, tokens.keys, tokens.values
  heads, scale, states = terms.keep.shape[-1], jnp.asarray(plan.scale, plan.dtype), _flat(kept.states)
  d_read = _scaled(scale * terms.entering, d_out.astype(plan.dtype))
  d_before, d_after = _accumulate(plan, product(_transpose(q), d_read), terms.keep, d_after, reverse=True)
  d_after = _flat(d_after)
  d_written = product(keys, d_after)
  d_out_of, values_of = (_per_head(x, heads) for x in (d_out, values))
  d_within = _joined(product(_transpose(_flat(terms.scores)), d_out_of), heads)
  d_terms = _Terms(
    scores=product(d_out_of, _transpose(values_of)).reshape(terms.scores.shape),
    entering=scale * _inner(d_out, product(q, states), heads),
    leaving=_inner(values, d_written, heads),
    keep=jnp.sum(_inner(states, d_after, heads), axis=1),
  )
  by_q, by_keys, d_log_decay = pull_back(d_terms)
  d_q = by_q + by_rows(d_read, states)
  d_keys = by_keys + by_rows(_scaled(terms.leaving, values.astype(plan.dtype)), d_after)
  return d_before, Tokens(d_q, d_keys, None, None, d_within + _scaled(terms.leaving, d_written), d_log_decay)


def _accumulate(
  plan: Plan, x: jax.Array, keep: jax.Array, start: jax.Array, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
  """S <- keep S + x, over chunks of x [n * M, K, G V]: the last S [M, K, G V], and S before each chunk [n, M, K, G V]."""

  def step(state, chunk):
    x, keep = chunk
    return _scaled(keep[:, None], state) + x, state

  chunks = _chunks(plan, x), _chunks(plan, keep)
  return jax.lax.scan(step, start, chunks, reverse=reverse, unroll=min(plan.unroll, plan.block))


def _prepare(
  plan: Plan, docs: Documents | None, entry: jax.Array | None, tokens: Tokens
) -> tuple[_Terms, Callable[[_Terms], tuple[jax.Array, jax.Array, jax.Array | None]]]:
  """The terms of all chunks of a block, and the function from their cotangents to those of q, keys and log_decay."""
  masks = make_masks(plan, docs, entry, 1)
  wide = [None if x is None else x.astype(plan.dtype) for x in (tokens.q, tokens.keys, tokens.log_decay)]
  return jax.vjp(partial(_make_terms, plan, masks), *wide)


def _make_terms(plan: Plan, masks: Masks, q: jax.Array, keys: jax.Array, log_decay: jax.Array | None) -> _Terms:
  """Computes the terms of N chunks from q, keys [N, C, K] and log_decay [N, C, D]."""
  scores = inner_products(q, keys, plan.raw, plan.precision)
  finite = bounded_log_decay(plan, q, log_decay)
  if log_decay is None:
    scores = scores[:, None]
  else:
    n, c, heads = finite.shape
    between = decays_between(plan, finite.swapaxes(1, 2).reshape(n * heads, c, 1)).reshape(n, heads, c, c)
    # An einsum, so that its gradient is not a sum over a product; see the README.
    scores = einsum("nij,ngij->ngij", scores, between)
  scores = jnp.where(masks.read[:, None], scores, 0) * jnp.asarray(plan.scale, plan.dtype)
  return _Terms(scores, *boundary_decays(plan, masks, finite, q.shape[0]))


def _by_key(keys: int, operands: _Operands, log_decay: jax.Array | None) -> tuple[_Operands, jax.Array | None]:
  """The inputs with the value heads of a key side by side: v [B, T, Hk, G V] and log_decay [B, T, Hk, G]."""
  q, k, v = operands
  grouped = [None if x is None else x.reshape(*x.shape[:2], keys, x.shape[2] // keys * x.shape[3]) for x in (v, log_decay)]
  return (q, k, grouped[0]), grouped[1]


def _side_by_side(state: jax.Array, keys: int) -> jax.Array:
  """[B, H, K, V] -> [B, Hk, K, G V]."""
  batch, heads, width, columns = state.shape
  group = heads // keys
  return state.reshape(batch, keys, group, width, columns).swapaxes(2, 3).reshape(batch, keys, width, group * columns)


def _apart(state: jax.Array, heads: int) -> jax.Array:
  """[B, Hk, K, G V] -> [B, H, K, V]."""
  batch, keys, width, columns = state.shape
  group = heads // keys
  state = state.reshape(batch, keys, width, group, columns // group).swapaxes(2, 3)
  return state.reshape(batch, heads, width, columns // group)


def _per_head(x: jax.Array, heads: int) -> jax.Array:
  """[N, C, D V] -> [N * D, C, V]."""
  n, c, width = x.shape
  return x.reshape(n, c, heads, width // heads).swapaxes(1, 2).reshape(n * heads, c, width // heads)


def _joined(x: jax.Array, heads: int) -> jax.Array:
  """[N * D, C, V] -> [N, C, D V]."""
  n, c, width = x.shape
  return x.reshape(n // heads, heads, c, width).swapaxes(1, 2).reshape(n // heads, c, heads * width)


def _scaled(decay: jax.Array, x: jax.Array) -> jax.Array:
  """x [N, X, D V], with the columns of each head scaled by its decay [N, X or 1, D]."""
  heads = decay.shape[-1]
  columns = x.reshape(*x.shape[:2], heads, x.shape[2] // heads)
  return (decay[..., None] * columns).reshape(x.shape)


def _inner(x: jax.Array, y: jax.Array, heads: int) -> jax.Array:
  """Inner products of the rows of each head, [N, X, D], of x and y [N, X, D V]."""
  x, y = (z.reshape(*z.shape[:2], heads, z.shape[2] // heads) for z in (x, y))
  return einsum("nxgv,nxgv->nxg", x, y)


def _flat(x: jax.Array) -> jax.Array:
  """[n, M, ...] -> [n * M, ...]."""
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _chunks(plan: Plan, x: jax.Array) -> jax.Array:
  """[n * M, ...] -> [n, M, ...]."""
  return x.reshape(plan.block, -1, *x.shape[1:])


def _transpose(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)
