"""The delta rule in chunks of C tokens: matrix products instead of T dependent steps.

With one row i = (t, m) per update, token-major, G the cumulative log-decay of the chunk and E_ij = exp(G_i - G_j),

    A_ij = sum_d a_id k_jd E_ijd      for j < i                 P_tj = sum_d q_td k_jd E_tjd      for j up to t's own updates
    (I + A) U = Z - (a e^G) S         U: the rows that the updates of the chunk add; one solve gives all
    O  = (q e^G) S + P U              S <- Diag(e^{G_C}) S + (k e^{G_C - G})^T U

The decay between two tokens is computed from the sum of the log-decays between them, never as a quotient of cumulative
products. No exponent is positive, so nothing overflows and nothing cancels, however strong the decays are. There is one
exception: if the caller bounds per-channel decays, they are split at the middle of a span into factors of at most e^40.

The gradient is written by hand. It keeps the inputs, U, (I + A)^-1 and the states at chunk boundaries, recomputes the rest,
and goes through the chunks in reverse. D marks the cotangent of the quantity that follows it:

    DU = P^T DO + (k e^{G_C - G}) DS      DR = (I + A)^-T DU      DZ = DR      DP = DO U^T      DA = -DR U^T
    D(q e^G) = DO S^T      D(a e^G) = -DR S^T      D(k e^{G_C - G}) = U DS^T
    DS <- Diag(e^{G_C}) DS + (q e^G)^T DO - (a e^G)^T DR

Chunks are grouped in blocks. Values that do not depend on the state are computed for all chunks of a block at once. Large
blocks keep a GPU or TPU busy. On a CPU a block is one chunk, so that these arrays stay in the core's cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..documents import Documents
from ..numerics import einsum, matmul, scaled
from ..triangular import unit_lower_inverse

# exp() of this is 0 in every float type, and so is its gradient. Unlike -inf, it gives 0 when multiplied by the 0 of a mask.
_MIN_LOG_DECAY = -1e4
# The largest exponent of one factor of a split decay. Two factors multiply to e^80 at most, far from overflow in float32.
_MAX_EXPONENT = 40.0
# Chunks in a block on GPUs and TPUs.
_BLOCK = 64


class Plan(NamedTuple):
  """The static arguments of the chunked form.

  Attributes:
    expand: maps the operands [B, T, ...] of a variant to the arguments (q, k, a, z) of `recurrent`.
    chunk_size: C, a power of two.
    block: chunks in a block.
    decay_bound: a lower bound of every log-decay, which makes per-channel decays cheaper; or `None`.
  """

  expand: Callable[..., tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]]
  chunk_size: int
  block: int
  decay_bound: float | None


class Chunks(NamedTuple):
  """Everything about n chunks that does not depend on the state.

  The leading axes are [n, M], M = B * H. R = C * r is the number of updates in a chunk, token-major.

  Attributes:
    reads: q e^G, [C, K].
    erases: a e^G, [R, K]; `None` for a variant that does not erase.
    writes: k e^{G_C - G}, [R, K].
    values: Z, [R, V].
    scores: P, [C, R].
    overlaps: A, [R, R]; `None` for a variant that does not erase.
    keep: e^{G_C}, [K] or [1], the decay of the state over the whole chunk.
  """

  reads: jax.Array
  erases: jax.Array | None
  writes: jax.Array
  values: jax.Array
  scores: jax.Array
  overlaps: jax.Array | None
  keep: jax.Array


@partial(jax.jit, static_argnames=("expand", "chunk_size", "decay_bound", "block"))
def chunked(
  expand: Callable,
  operands: Any,
  log_decay: jax.Array | None,
  initial_state: jax.Array,
  docs: Documents | None,
  *,
  chunk_size: int,
  decay_bound: float | None = None,
  block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes `recurrent(*expand(*operands), log_decay, initial_state, docs)`.

  Args:
    expand: hashable; see `Plan`.
    operands: arrays [B, T, ...].
    log_decay: `None`, [B, T, H] or [B, T, H, K].
    initial_state: [B, H, K, V]; its dtype is that of the arithmetic.
    docs: document boundaries and padding; `None` for one document without padding.
    chunk_size, decay_bound: see `Plan`.
    block: see `Plan`; `None` chooses by platform.
  """
  tokens = operands[0].shape[1]
  chunks = -(-tokens // chunk_size)
  if block is None:
    block = 1 if jax.default_backend() == "cpu" else _BLOCK
  block = -(-chunks // -(-chunks // block))  # blocks of nearly equal size; padding completes the last one
  if log_decay is not None and log_decay.ndim == 3:
    log_decay = log_decay[..., None]
  missing = -tokens % (chunk_size * block)
  docs, inputs = jax.tree.map(partial(_pad, missing=missing), (docs, (operands, log_decay)))
  out, state = _chunked(Plan(expand, chunk_size, block, decay_bound), docs, inputs, initial_state)
  return out[:, :tokens], state


def _pad(x: jax.Array, missing: int) -> jax.Array:
  """Appends `missing` tokens, which have no effect, to x [B, T, ...]."""
  if not missing:
    return x
  # Zeros write nothing. The document index is repeated, because the final state belongs to the last token's document.
  mode = "edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant"
  return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), mode=mode)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan, docs, inputs, initial_state):
  return _forward(plan, docs, inputs, initial_state)[0]


def _forward(plan, docs, inputs, initial_state):
  batch, heads, _, value_width = initial_state.shape
  length, blocks = _blocks(plan, inputs)

  def block(carry, i):
    state, out = carry
    chunks = _prepare(plan, initial_state.dtype, _entry_document(docs, i, length), *_slice_block((docs, *inputs), i, length))
    inverse = _inverse(chunks.overlaps)
    state, (block_out, *kept) = jax.lax.scan(chunk, state, (chunks, inverse))
    return (state, _set_block(out, _from_chunks(block_out, batch, heads), i)), (*kept, inverse)

  def chunk(state, xs):
    chunk, inverse = xs
    u = chunk.values if inverse is None else matmul(inverse, chunk.values - matmul(chunk.erases, state))
    out = matmul(chunk.reads, state) + matmul(chunk.scores, u)
    return chunk.keep[..., None] * state + matmul(_transpose(chunk.writes), u), (out, state, u)

  entry = initial_state.reshape(-1, *initial_state.shape[2:])
  out = jnp.empty((batch, blocks * length, heads, value_width), initial_state.dtype)
  (final_state, out), kept = jax.lax.scan(block, (entry, out), jnp.arange(blocks, dtype=jnp.int32))
  return (out, final_state.reshape(initial_state.shape)), (docs, inputs, kept)


def _backward(plan, residuals, cotangents):
  docs, inputs, kept = residuals
  d_out, d_final = cotangents
  length, blocks = _blocks(plan, inputs)

  def block(carry, xs):
    d_state, d_inputs = carry
    i, states, us, inverse = xs
    block_docs, block_inputs, block_d_out = _slice_block((docs, inputs, d_out), i, length)
    prepare = partial(_prepare, plan, d_final.dtype, _entry_document(docs, i, length), block_docs)
    chunks, pull_back = jax.vjp(prepare, *block_inputs)
    block_d_out = _split(_to_chunks(block_d_out, plan.chunk_size), plan.block)
    d_state, d_chunks = jax.lax.scan(chunk, d_state, (chunks, inverse, states, us, block_d_out), reverse=True)
    return (d_state, jax.tree.map(partial(_set_block, i=i), d_inputs, pull_back(d_chunks))), None

  def chunk(d_state, xs):
    chunk, inverse, state, u, d_out = xs
    du = matmul(_transpose(chunk.scores), d_out) + matmul(chunk.writes, d_state)
    dr = du if inverse is None else matmul(_transpose(inverse), du)
    d_keep = einsum("mkv,mkv->mk", state, d_state)
    d_chunk = Chunks(
      reads=matmul(d_out, _transpose(state)),
      erases=None if inverse is None else -matmul(dr, _transpose(state)),
      writes=matmul(u, _transpose(d_state)),
      values=dr,
      scores=matmul(d_out, _transpose(u)),
      overlaps=None if inverse is None else -matmul(dr, _transpose(u)),
      keep=d_keep if chunk.keep.shape == d_keep.shape else jnp.sum(d_keep, axis=-1, keepdims=True),
    )
    d_state = chunk.keep[..., None] * d_state + matmul(_transpose(chunk.reads), d_out)
    return d_state if inverse is None else d_state - matmul(_transpose(chunk.erases), dr), d_chunk

  d_exit = d_final.reshape(-1, *d_final.shape[2:])
  carry = d_exit, jax.tree.map(jnp.empty_like, inputs)
  xs = jnp.arange(blocks, dtype=jnp.int32), *kept
  (d_entry, d_inputs), _ = jax.lax.scan(block, carry, xs, reverse=True)
  return None, d_inputs, d_entry.reshape(d_final.shape)


_chunked.defvjp(_forward, _backward)


def _inverse(overlaps: jax.Array | None) -> jax.Array | None:
  """(I + A)^-1 of every chunk."""
  if overlaps is None:
    return None
  return unit_lower_inverse(overlaps.reshape(-1, *overlaps.shape[2:])).reshape(overlaps.shape)


def _blocks(plan: Plan, inputs: Any) -> tuple[int, int]:
  """Returns the number of tokens in a block and the number of blocks."""
  length = plan.chunk_size * plan.block
  return length, jax.tree.leaves(inputs)[0].shape[1] // length


def _entry_document(docs: Documents | None, i: jax.Array, length: int) -> jax.Array | None:
  """Index of the document that the state at the start of block i belongs to, int32 [B]."""
  if docs is None:
    return None
  last = jnp.take(docs.index, jnp.maximum(i * length - 1, 0), axis=1)
  return jnp.where(i == 0, 0, last)


def _slice_block(tree: Any, i: jax.Array, length: int) -> Any:
  """Block i of arrays [B, T, ...]."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=1), tree)


def _set_block(x: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
  """x [B, T, ...] with its block i [B, L, ...] replaced."""
  return jax.lax.dynamic_update_slice_in_dim(x, block, i * block.shape[1], axis=1)


def _prepare(
  plan: Plan,
  dtype: jnp.dtype,
  entry: jax.Array | None,
  docs: Documents | None,
  operands: Any,
  log_decay: jax.Array | None,
) -> Chunks:
  """Computes `Chunks` for all chunks of a block in parallel. JAX differentiates this function.

  Chunks, batch and heads are one leading axis here: XLA on a CPU is slow at products with several batch axes, and crashes on
  some.

  Args:
    plan: static arguments.
    dtype: dtype of the arithmetic.
    entry: int32 [B], index of the document that the state at the start of the block belongs to; `None` without `docs`.
    docs, operands, log_decay: those of the block's L tokens, [B, L, ...]; log_decay [B, L, H, K or 1] or `None`.
  """
  chunk_size = plan.chunk_size
  if docs is not None:  # the inputs at padding may hold anything
    operands, log_decay = jax.tree.map(partial(_zero_padding, docs.is_token), (operands, log_decay))
  q, k, a, z = plan.expand(*operands)
  heads = q.shape[2]
  if log_decay is None:
    log_decay = jnp.zeros((1, chunk_size, 1, 1), dtype)
  q, k, a, z, log_decay = jax.tree.map(lambda x: _to_chunks(x.astype(dtype), chunk_size), (q, k, a, z, log_decay))
  log_decay = jnp.maximum(log_decay, _MIN_LOG_DECAY)
  r = k.shape[2]
  read_mask, update_mask = (jnp.asarray(mask)[None] for mask in _causal(chunk_size, r))
  entering, leaving = jnp.exp(_sum_up_to(log_decay)), jnp.exp(_sum_after(log_decay))
  keep = jnp.exp(jnp.sum(log_decay, axis=1))
  if docs is not None:
    index = _to_chunks(jnp.repeat(docs.index[..., None], heads, axis=2), chunk_size)  # [L, C]
    last = index[:, -1:]
    entry = jnp.concatenate([jnp.repeat(entry, heads)[:, None], last])[: len(last)]
    same = (index[:, :, None] == index[:, None, :])[:, :, None, :, None]
    read_mask, update_mask = read_mask & same, update_mask & same
    entering = jnp.where((index == entry)[..., None], entering, 0)
    leaving = jnp.where((index == last)[..., None], leaving, 0)
    keep = jnp.where(entry == last, keep, 0)

  products = partial(_decayed_products, k=k, log_decay=log_decay, decay_bound=plan.decay_bound)
  scores = jnp.where(read_mask, products(q[:, :, None]), 0)
  overlaps = None if a is None else jnp.where(update_mask, products(a), 0)
  chunks = Chunks(
    reads=_decayed(q, entering),
    erases=None if a is None else _merge(_decayed(a, entering[:, :, None])),
    writes=_merge(_decayed(k, leaving[:, :, None])),
    values=_merge(z),
    scores=scores.reshape(-1, chunk_size, chunk_size * r),
    overlaps=None if a is None else overlaps.reshape(-1, chunk_size * r, chunk_size * r),
    keep=jnp.broadcast_to(keep, (len(q), keep.shape[-1])),
  )
  return jax.tree.map(lambda x: _split(x, plan.block), chunks)


def _causal(chunk_size: int, r: int) -> tuple[np.ndarray, np.ndarray]:
  """Masks of the updates before each token's read, [C, 1, C, r], and before each update, [C, r, C, r]."""
  read, update = np.arange(chunk_size) * r + r - 1, np.arange(chunk_size * r)
  read_mask, update_mask = update <= read[:, None], update < update[:, None]
  return read_mask.reshape(chunk_size, 1, chunk_size, r), update_mask.reshape(chunk_size, r, chunk_size, r)


def _decayed_products(x: jax.Array, k: jax.Array, log_decay: jax.Array, decay_bound: float | None) -> jax.Array:
  """Products x_t k_s^T times the decay from s to t, [L, C, p, C, r]. Entries with s > t are meaningless; the caller masks them.

  Per-channel decays multiply the factors. A span of tokens is split at its middle: rows of x in the later half are decayed from
  the middle on, rows of k in the earlier half up to the middle, so no exponent is positive. Spans start at single tokens and
  double. With `decay_bound` they start at the longest span whose halves can be decayed relative to the middle in one product,
  with exponents of at most 40 in size.

  Args:
    x: [L, C, p, K].
    k: [L, C, r, K].
    log_decay: [L, C, K or 1].
    decay_bound: as for `Plan`.
  """
  if log_decay.shape[-1] == 1:
    return _products(x, k) * jnp.exp(_sum_between(log_decay))[:, :, None, :, None]
  c, p, width = x.shape[1:]
  r = k.shape[2]
  span = c
  while span > 1 and (decay_bound is None or span // 2 * -decay_bound > _MAX_EXPONENT):
    span //= 2
  since_middle = _sum_since_middle(log_decay.reshape(-1, span, width))[:, :, None]
  out = _products(
    x.reshape(-1, span, p, width) * jnp.exp(since_middle), k.reshape(-1, span, r, width) * jnp.exp(-since_middle)
  )
  while span < c:
    late_x = x.reshape(-1, 2, span, p, width)[:, 1]
    early_k = k.reshape(-1, 2, span, r, width)[:, 0]
    early_decay, late_decay = jnp.moveaxis(log_decay.reshape(-1, 2, span, width), 1, 0)
    late_x = late_x * jnp.exp(_sum_up_to(late_decay))[:, :, None]
    early_k = early_k * jnp.exp(_sum_after(early_decay))[:, :, None]
    across = _products(late_x, early_k)
    first, second = jnp.moveaxis(out.reshape(-1, 2, span, p, span, r), 1, 0)
    top = jnp.concatenate([first, jnp.zeros_like(across)], axis=3)
    out = jnp.concatenate([top, jnp.concatenate([across, second], axis=3)], axis=1)
    span *= 2
  return out.reshape(-1, c, p, c, r)


def _products(x: jax.Array, k: jax.Array) -> jax.Array:
  """Inner products of x [L, C, p, K] and k [L, C, r, K], [L, C, p, C, r]."""
  products = einsum("lrk,lsk->lrs", _merge(x), _merge(k))
  return products.reshape(*x.shape[:3], *k.shape[1:3])


# Sums of log-decays are matrix products with zeros and ones. All terms have one sign, so nothing cancels, as it would in
# differences of cumulative sums.


def _sum_up_to(x: jax.Array) -> jax.Array:
  """Sums of x [L, C, K] up to and including each token, [L, C, K]."""
  return _sum(np.tri(x.shape[1]), x)


def _sum_after(x: jax.Array) -> jax.Array:
  """Sums of x [L, C, K] over the tokens after each token, [L, C, K]."""
  return _sum(1 - np.tri(x.shape[1]), x)


def _sum_since_middle(x: jax.Array) -> jax.Array:
  """Sums of x [L, C, K] from the middle of C to each token, negated for those before it, [L, C, K]."""
  up_to = np.tri(x.shape[1])
  return _sum(up_to - up_to[x.shape[1] // 2], x)


def _sum_between(x: jax.Array) -> jax.Array:
  """Sums of x [L, C, 1] over the tokens after j and up to i, [L, C, C]; zero where there are none."""
  after = 1 - np.tri(x.shape[1])
  return _sum_up_to(x * jnp.asarray(after.T, x.dtype)[None])


def _sum(weights: np.ndarray, x: jax.Array) -> jax.Array:
  """Weighted sums of x [L, C, K] over its tokens, [L, R, K], with the weights [R, C]."""
  weights = jnp.asarray(weights, x.dtype)[None]
  return matmul(jnp.broadcast_to(weights, (x.shape[0], *weights.shape[1:])), x)


def _decayed(x: jax.Array, decay: jax.Array) -> jax.Array:
  """x [..., K] times decay [..., K or 1]."""
  if decay.shape[-1] > 1:
    return x * decay
  return scaled(x, jnp.broadcast_to(decay[..., 0], x.shape[:-1]))


def _zero_padding(is_token: jax.Array, x: jax.Array) -> jax.Array:
  """Sets the padding of x [B, T, ...] to zero."""
  return jnp.where(jnp.expand_dims(is_token, range(2, x.ndim)), x, 0)


def _merge(x: jax.Array) -> jax.Array:
  """[L, C, r, X] -> [L, C * r, X]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _transpose(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _split(x: jax.Array, n: int) -> jax.Array:
  """[n * M, ...] -> [n, M, ...]."""
  return x.reshape(n, -1, *x.shape[1:])


def _to_chunks(x: jax.Array, chunk_size: int) -> jax.Array:
  """[B, n * C, H, ...] -> [n * B * H, C, ...]."""
  batch, _, heads, *rest = x.shape
  x = x.reshape(batch, -1, chunk_size, heads, *rest)
  return x.transpose(1, 0, 3, 2, *range(4, x.ndim)).reshape(-1, chunk_size, *rest)


def _from_chunks(x: jax.Array, batch: int, heads: int) -> jax.Array:
  """[n, B * H, C, V] -> [B, n * C, H, V]."""
  n, _, c, width = x.shape
  return x.reshape(n, batch, heads, c, width).transpose(1, 0, 3, 2, 4).reshape(batch, n * c, heads, width)
