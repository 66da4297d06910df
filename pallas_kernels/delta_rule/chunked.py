"""The delta rule in chunks of C tokens: matrix products instead of T dependent steps.

Every token decays the state and makes r updates with key k, covector e (often the key), strength s and value v. With one row
i = (t, m) per update, G the cumulative log-decay of the chunk, E_ij = exp(G_i - G_j) and products of rows
e_i k_j E_ij = sum_d e_id k_jd E_ijd,

    A_ij = s_i e_i k_j E_ij      for j < i                 P_tj = scale q_t k_j E_tj      for j up to t's own updates
    (I + A) U = W,   W = s (v - (e e^G) S)        U: the rows that the updates of the chunk add; one solve gives all
    O  = scale (q e^G) S + P U            S <- e^{G_C} S + (k e^{G_C - G})^T U

Covectors that read the state before the decay of their own token have G - g in place of their G.

Decays that are one number per token scale the rows of the products' results, so that the products see keys and queries as they
came; decays per channel scale the keys and queries. The decay between two tokens is computed from the sum of the log-decays
between them, never as a quotient of cumulative products. No exponent is positive, so nothing overflows and nothing cancels,
however strong the decays are. There is one exception: if the caller bounds per-channel decays, they are split at the middle of
a span into factors of at most e^40.

The gradient is written by hand. It keeps the inputs, (I + A)^-1, the states at chunk boundaries and, on a CPU, U; it recomputes
the rest, and goes through the chunks in reverse. D marks the cotangent of the quantity that follows it:

    DU = P^T DO + (k e^{G_C - G}) DS      DW = (I + A)^-T DU      DP = DO U^T      DA = -DW U^T
    D(q e^G) = scale DO S^T      D(e e^G) = -s DW S^T      D(k e^{G_C - G}) = U DS^T
    DS <- e^{G_C} DS + scale (q e^G)^T DO - (e e^G)^T (s DW)

Chunks are grouped in blocks. Values that do not depend on the state are computed for all chunks of a block at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..documents import Documents
from ..numerics import einsum, inner, matmul, unfused
from ..partition import varying_alike
from ..sizes import Size, known, pad_end, pieces
from ..triangular import unit_lower_inverse, unit_lower_inverse_in_lanes
from .terms import (
  Plan,
  Terms,
  Tokens,
  arrange_tokens,
  by_row,
  make_masks,
  make_terms,
  row_order,
  sum_rows,
  to_chunks,
)


class Kept(NamedTuple):
  """What the forward pass keeps for the gradient, of each chunk.

  Attributes:
    states: the incoming states, [chunks, B, H, K, V].
    rows: U, [chunks, B, H, R, V]; `None` for updates that only add, and for `whole_chunks`, which compute U again.
    inverse: (I + A)^-1, [chunks, B, H, R, R]; `None` for updates that only add.
  """

  states: jax.Array
  rows: jax.Array | None
  inverse: jax.Array | None


class Chunks(NamedTuple):
  """The chunks of a block, arrays [n, B * H, ...]: their tokens, what these contribute, and (I + A)^-1."""

  tokens: Tokens
  terms: Terms
  inverse: jax.Array | None


def forward(
  plan: Plan,
  docs: Documents | None,
  operands: Any,
  log_decay: jax.Array | None,
  initial_state: jax.Array,
  of_block: Callable | None = None,
) -> tuple[tuple[jax.Array, jax.Array], Kept]:
  """The output [B, T, H, V] in the dtype of the values, the final state [B, H, K, V], and what the gradient needs.

  Args:
    plan: static arguments.
    docs: document boundaries and padding; `None` for one document without padding.
    operands: of the variant, arrays [B, T, ...].
    log_decay: `None` or [B, T, H, K or 1].
    initial_state: [B, H, K, V].
    of_block: what computes a block, called like `_block_forward`, the default. Its heads may be groups of heads.
  """
  of_block = of_block or _block_forward
  batch, heads, _, width = initial_state.shape
  plan, blocks, (docs, inputs) = in_blocks(plan, (docs, (operands, log_decay)))

  tokens_of = _arranged(plan, blocks, docs, inputs)

  def block(carry, i):
    state, out = carry
    state, block_out, kept = of_block(plan, *_documents(plan, docs, i), tokens_of(i), state)
    if not plan.whole_chunks:
      out, block_out = _set_block(out, _from_chunks(block_out, batch, heads), i), None
    return (state, out), (block_out, kept)

  out = None
  if not plan.whole_chunks:
    shape = batch, blocks * plan.block * plan.chunk_size, heads, width
    out = varying_alike(initial_state, jnp.empty(shape, plan.out_dtype))
  carry = initial_state.reshape(-1, *initial_state.shape[2:]), out
  (state, out), (outs, kept) = jax.lax.scan(block, carry, jnp.arange(blocks, dtype=jnp.int32))
  if plan.whole_chunks:
    out = _from_chunks(outs.reshape(-1, *outs.shape[2:]), batch, heads)
  kept = jax.tree.map(lambda x: x.reshape(-1, batch, heads, *x.shape[3:]), kept)
  results = out[:, : operands[0].shape[1]], state.reshape(initial_state.shape)
  return unfused(results) if blocks == 1 else results, kept  # a loop of one step is no loop


def kept_shapes(plan: Plan, operands: Any, initial_state: jax.Array) -> Kept:
  """The shapes of what `forward` keeps."""
  batch, heads, *_, width = initial_state.shape
  _, updates = jax.eval_shape(plan.updates, *operands)
  plan, blocks = _blocks(plan, operands[0].shape[1])
  chunks, rows = blocks * plan.block, plan.chunk_size * len(updates)

  def array(*shape):
    return jax.ShapeDtypeStruct((chunks, batch, heads, *shape), plan.dtype)

  erases = any(update.erases for update in updates)
  u = array(rows, width) if erases and not plan.whole_chunks else None
  return Kept(array(*initial_state.shape[2:]), u, array(rows, rows) if erases else None)


def _block_forward(
  plan: Plan, docs: Documents | None, entry: jax.Array | None, tokens: Tokens, state: jax.Array
) -> tuple[jax.Array, jax.Array, Kept]:
  """A block: the state after it, its output [n, B * H, C, V], and what the gradient needs, arrays [n, B * H, ...]."""
  terms, _ = _prepare(plan, docs, entry, tokens)
  chunks = _split(plan, Chunks(tokens, terms, _inverse(plan, tokens, terms)))
  forwards = walk if plan.walk is None else plan.walk.forward
  state, out, states, u = forwards(plan, chunks, state)
  return state, out, Kept(states, u, chunks.inverse)


def walk(plan: Plan, chunks: Chunks, state: jax.Array) -> tuple[jax.Array, ...]:
  """From the state before the chunks: the state after them, their outputs, the states before each, and U or `None`."""
  state, (out, states, u) = jax.lax.scan(partial(_step, plan), state, chunks, unroll=min(plan.unroll, plan.block))
  return state, out, states, u


def _step(plan: Plan, state: jax.Array, chunk: Chunks) -> tuple[jax.Array, tuple]:
  """One chunk: from the state before it to (the state after it, (its output, the state before it, U))."""
  tokens, terms, inverse = chunk
  u = added(plan, state, chunk)
  scale = jnp.asarray(plan.scale, plan.dtype)
  out = scale * read(plan, tokens.q, terms.entering, state) + matmul(terms.scores, u, plan.precision)
  after = terms.keep[..., None] * state + write(plan, tokens.keys, rows_of(plan, terms.leaving, tokens), u)
  return after, (out.astype(plan.out_dtype), state, None if inverse is None or plan.whole_chunks else u)


def added(plan: Plan, state: jax.Array, chunk: Chunks) -> jax.Array:
  """U, the rows that the updates of a chunk add."""
  tokens, terms, inverse = chunk
  if inverse is None:
    return tokens.values
  held = read(plan, tokens.read_along, rows_of(plan, terms.erasing, tokens), state)
  return matmul(inverse, tokens.times_strength(tokens.values.astype(plan.dtype) - held), plan.precision)


def backward(
  plan: Plan,
  docs: Documents | None,
  operands: Any,
  log_decay: jax.Array | None,
  kept: Kept,
  d_out: jax.Array,
  d_final: jax.Array,
  of_block: Callable | None = None,
) -> tuple[Any, jax.Array | None, jax.Array]:
  """The cotangents of `operands`, `log_decay` and the initial state, from those of the output and the final state.

  `of_block` is what computes a block, called like `_block_backward`, the default.
  """
  of_block = of_block or _block_backward
  length = operands[0].shape[1]
  plan, blocks, (docs, inputs, d_out) = in_blocks(plan, (docs, (operands, log_decay), d_out))
  kept = jax.tree.map(lambda x: x.reshape(blocks, plan.block, -1, *x.shape[3:]), kept)

  tokens_of, d_out_of = _arranged(plan, blocks, docs, inputs), _arranged_out(plan, blocks, d_out)

  def block(carry, xs):
    d_state, d_inputs = carry
    i, kept = xs
    tokens, documents = tokens_of(i), _documents(plan, docs, i)
    d_state, d_tokens = of_block(plan, *documents, tokens, kept, d_out_of(i), d_state)
    if plan.whole_chunks:
      return (d_state, None), d_tokens
    d_block = _arrange_back(plan, documents[0], jax.tree.map(lambda x: _slice(plan, x, i), inputs), d_tokens)
    return (d_state, jax.tree.map(partial(_set_block, i=i), d_inputs, d_block)), None

  d_inputs = None if plan.whole_chunks else jax.tree.map(jnp.empty_like, inputs)
  carry = d_final.reshape(-1, *d_final.shape[2:]), d_inputs
  xs = jnp.arange(blocks, dtype=jnp.int32), kept
  (d_entry, d_inputs), d_tokens = jax.lax.scan(block, carry, xs, reverse=True)
  if plan.whole_chunks:
    d_inputs = _arrange_back(plan, docs, inputs, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), d_tokens))
  d_operands, d_log_decay = jax.tree.map(lambda x: x[:, :length], d_inputs)
  results = d_operands, d_log_decay, d_entry.reshape(d_final.shape)
  return unfused(results) if blocks == 1 else results


def _block_backward(
  plan: Plan, docs: Documents | None, entry: jax.Array | None, tokens: Tokens, kept: Kept, d_out: jax.Array, d_state: jax.Array
) -> tuple[jax.Array, Tokens]:
  """The backward pass of a block: the cotangents of its incoming state and of its tokens.

  Args:
    plan: static arguments.
    docs, entry, tokens: of the block, as for `_prepare`.
    kept: of the block, arrays [n, B * H, ...].
    d_out: cotangent of the outputs, [n * B * H, C, V].
    d_state: cotangent of the outgoing state, [B * H, K, V].
  """
  product = partial(matmul, precision=plan.precision)
  terms, pull_back = _prepare(plan, docs, entry, tokens)
  q, keys, values = tokens.q, tokens.keys, tokens.values
  scale = jnp.asarray(plan.scale, plan.dtype)
  erasing, leaving = (rows_of(plan, x, tokens) for x in (terms.erasing, terms.leaving))
  backwards = walk_back if plan.walk is None else plan.walk.backward
  chunks = Chunks(*_split(plan, (tokens, terms)), kept.inverse)
  d_entry, *d_chunks = backwards(plan, chunks, _split(plan, d_out), d_state)

  # All that follows is parallel over chunks.
  d_after, dw, kept = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (*d_chunks, kept))
  states = kept.states
  u = added(plan, states, Chunks(tokens, terms, kept.inverse)) if kept.rows is None else kept.rows
  by_read, by_write = product(d_out, transpose(states)), product(u, transpose(d_after))
  d_q, d_keys = scale * terms.entering * by_read, leaving * by_write
  d_entering = scale * _like_decay(q, by_read, terms.entering)
  d_leaving = _sum_rows(plan, _like_decay(keys, by_write, terms.leaving), tokens)
  d_values, d_covectors, d_strengths, d_overlaps, d_undecayed = dw, None, None, None, None
  if tokens.erases:
    along, by_erase, d_a = tokens.read_along, product(dw, transpose(states)), -product(dw, transpose(u))
    d_covectors = -tokens.times_strength(erasing * by_erase)
    d_erasing = -_sum_rows(plan, tokens.times_strength(_like_decay(along, by_erase, terms.erasing)), tokens)
    if tokens.strengths is not None:
      held = inner(erasing * along.astype(plan.dtype), by_erase)
      d_strengths = inner(values.astype(plan.dtype), dw) - held + inner(d_a, terms.overlaps)
    d_values, d_overlaps = tokens.times_strength(dw), tokens.times_strength(d_a)
    if tokens.covectors is None:
      d_keys, d_covectors = d_keys + d_covectors, None
    d_entering, d_undecayed = (d_entering, d_erasing) if plan.undecayed else (d_entering + d_erasing, None)
  d_keep = inner(states, d_after) if terms.keep.shape[-1] > 1 else einsum("lkv,lkv->l", states, d_after)[:, None]
  d_terms = Terms(product(d_out, transpose(u)), d_overlaps, d_entering, d_leaving, d_keep, d_undecayed)
  by_q, by_keys, by_covectors, d_log_decay = pull_back(d_terms)
  if d_covectors is not None:
    d_covectors += by_covectors
  return d_entry, Tokens(d_q + by_q, d_keys + by_keys, d_covectors, d_strengths, d_values, d_log_decay)


def walk_back(plan: Plan, chunks: Chunks, d_out: jax.Array, d_state: jax.Array) -> tuple[jax.Array, ...]:
  """From the cotangent of the state after the chunks: those of the state before them, the states after each, and their W.

  For updates that only add, that of U in place of W.
  """

  def step(d_state, xs):
    (tokens, terms, inverse), d_out = xs
    du = matmul(transpose(terms.scores), d_out, plan.precision)
    du = du + read(plan, tokens.keys, rows_of(plan, terms.leaving, tokens), d_state)
    scale = jnp.asarray(plan.scale, plan.dtype)
    before = terms.keep[..., None] * d_state + write(plan, tokens.q, scale * terms.entering, d_out)
    if inverse is None:
      return before, (d_state, du)
    dw = matmul(transpose(inverse), du, plan.precision)
    erased = tokens.times_strength(dw)
    return before - write(plan, tokens.read_along, rows_of(plan, terms.erasing, tokens), erased), (d_state, dw)

  unroll = min(plan.unroll, plan.block)
  d_entry, (d_after, dw) = jax.lax.scan(step, d_state, (chunks, d_out), reverse=True, unroll=unroll)
  return d_entry, d_after, dw


def _prepare(
  plan: Plan, docs: Documents | None, entry: jax.Array | None, tokens: Tokens
) -> tuple[Terms, Callable[[Terms], tuple[jax.Array | None, ...]]]:
  """The terms of all chunks of a block, and the function from their cotangents to those of q, keys, covectors and log_decay.

  Args:
    plan: static arguments.
    docs: of the block's tokens, [B, L], or `None`.
    entry: int32 [B], index of the document that the state at the start of the block belongs to; `None` without `docs`.
    tokens: of the block.
  """
  mask = make_masks(plan, docs, entry, _updates(plan, tokens))
  given = tokens.q, tokens.keys, tokens.covectors, tokens.log_decay
  wide = [None if x is None else x.astype(plan.dtype) for x in given]
  return jax.vjp(partial(make_terms, plan, mask, erases=tokens.erases), *wide)


def _arranged(plan: Plan, blocks: int, docs: Documents | None, inputs: Any) -> Callable[[jax.Array], Tokens]:
  """The function from i to the tokens of block i: all arranged at once for `whole_chunks`, else one block at a time."""
  if not plan.whole_chunks:
    return lambda i: arrange_tokens(plan, *jax.tree.map(lambda x: _slice(plan, x, i), (docs, *inputs)))
  return _indexed(blocks, arrange_tokens(plan, docs, *inputs))


def _arranged_out(plan: Plan, blocks: int, out: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """The same for an array like the output, [B, T, H, V]: to [n * B * H, C, V]."""
  if not plan.whole_chunks:
    return lambda i: to_chunks(_slice(plan, out, i), plan.chunk_size)
  return _indexed(blocks, to_chunks(out, plan.chunk_size))


def _indexed(blocks: int, tree: Any) -> Callable[[jax.Array], Any]:
  """The function from i to block i of arrays [blocks * N, ...]."""
  tree = jax.tree.map(lambda x: x.reshape(blocks, -1, *x.shape[1:]), tree)
  return lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _arrange_back(plan: Plan, docs: Documents | None, inputs: Any, d_tokens: Tokens) -> Any:
  """The cotangents of inputs [B, L, ...] from those of their tokens."""
  # Cotangents of several value heads, and those of a key by its two parts, are added before they are rounded.
  adds = inputs[0][0].shape[2] < plan.heads or d_tokens.covectors is not None
  like = jax.tree.map(lambda x: x.astype(plan.dtype), inputs) if adds else inputs
  arrange = partial(arrange_tokens, plan, docs)
  d_tokens = jax.tree.map(lambda d, x: d.astype(x.dtype), d_tokens, jax.eval_shape(arrange, *like))
  d_inputs = jax.vjp(arrange, *like)[1](d_tokens)
  return jax.tree.map(lambda d, x: d.astype(x.dtype), d_inputs, inputs)


def read(plan: Plan, x: jax.Array, decay: jax.Array, state: jax.Array) -> jax.Array:
  """(x decay) S, for x [M, X, K], decay [M, X, K or 1] and S [M, K, V]."""
  if decay.shape[-1] == 1:
    return decay * matmul(x, state, plan.precision)
  return matmul(x.astype(plan.dtype) * decay, state, plan.precision)


def write(plan: Plan, x: jax.Array, decay: jax.Array, rows: jax.Array) -> jax.Array:
  """(x decay)^T U, for x [M, X, K], decay [M, X, K or 1] and U [M, X, V]."""
  if decay.shape[-1] == 1:
    return matmul(transpose(x), decay * rows.astype(plan.dtype), plan.precision)
  return matmul(transpose(x.astype(plan.dtype) * decay), rows, plan.precision)


def _like_decay(x: jax.Array, d_decayed: jax.Array, decay: jax.Array) -> jax.Array:
  """The cotangent of `decay` in x * decay, one per row or one per channel as it is."""
  x = x.astype(d_decayed.dtype)
  return x * d_decayed if decay.shape[-1] > 1 else inner(x, d_decayed)[..., None]


def _inverse(plan: Plan, tokens: Tokens, terms: Terms) -> jax.Array | None:
  """(I + A)^-1 of every chunk."""
  if not tokens.erases:
    return None
  a = tokens.times_strength(terms.overlaps)
  if plan.walk is not None and plan.walk.inverse is not None:
    return plan.walk.inverse(a)
  if plan.whole_chunks:
    return unit_lower_inverse_in_lanes(a, row_order(plan, _updates(plan, tokens)))
  return unit_lower_inverse(a)


def _updates(plan: Plan, tokens: Tokens) -> int:
  """r, the number of updates of a token."""
  return tokens.keys.shape[-2] // plan.chunk_size


def rows_of(plan: Plan, x: jax.Array, tokens: Tokens) -> jax.Array:
  return by_row(plan, x, _updates(plan, tokens))


def _sum_rows(plan: Plan, x: jax.Array, tokens: Tokens) -> jax.Array:
  return sum_rows(plan, x, _updates(plan, tokens))


def in_blocks(plan: Plan, tree: Any) -> tuple[Plan, int, Any]:
  """The plan with blocks of nearly equal size, their number, and arrays [B, T, ...] with padding that completes the last."""
  tokens = jax.tree.leaves(tree)[0].shape[1]
  plan, blocks = _blocks(plan, tokens)
  missing = blocks * plan.block * plan.chunk_size - tokens
  return plan, blocks, jax.tree.map(partial(append_tokens, missing=missing), tree)


def _blocks(plan: Plan, tokens: Size) -> tuple[Plan, Size]:
  """The plan with blocks of nearly equal size, and their number."""
  chunks = pieces(tokens, plan.chunk_size)
  blocks = pieces(chunks, plan.block)
  return plan._replace(block=pieces(chunks, blocks)) if known(chunks) else plan, blocks


def append_tokens(x: jax.Array, missing: Size) -> jax.Array:
  """Appends `missing` tokens, which have no effect, to x [B, T, ...]."""
  if known(missing) and not missing:
    return x
  # Zeros write nothing. The document index is repeated, because the final state belongs to the last token's document.
  return pad_end(x, missing, fill=None if jnp.issubdtype(x.dtype, jnp.integer) else 0)


def _documents(plan: Plan, docs: Documents | None, i: jax.Array) -> tuple[Documents | None, jax.Array | None]:
  """Documents of block i, and the index of the document that the state at its start belongs to, int32 [B]."""
  if docs is None:
    return None, None
  last = jnp.take(docs.index, jnp.maximum(i * plan.block * plan.chunk_size - 1, 0), axis=1)
  return jax.tree.map(lambda x: _slice(plan, x, i), docs), jnp.where(i == 0, 0, last)


def _slice(plan: Plan, x: jax.Array, i: jax.Array) -> jax.Array:
  """Block i of x [B, T, ...]."""
  length = plan.block * plan.chunk_size
  return jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=1)


def _set_block(x: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
  """x [B, T, ...] with its block i [B, L, ...] replaced."""
  return jax.lax.dynamic_update_slice_in_dim(x, block, i * block.shape[1], axis=1)


def _split(plan: Plan, tree: Any) -> Any:
  """[n * M, ...] -> [n, M, ...]."""
  return jax.tree.map(lambda x: x.reshape(plan.block, -1, *x.shape[1:]), tree)


def transpose(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _from_chunks(x: jax.Array, batch: int, heads: int) -> jax.Array:
  """[n, B * H, C, V] -> [B, n * C, H, V]."""
  n, _, c, width = x.shape
  return x.reshape(n, batch, heads, c, width).transpose(1, 0, 3, 2, 4).reshape(batch, n * c, heads, width)
