"""The delta rule a chunk of C tokens at a time: matrix products instead of T dependent steps.

With rows i = (t, m), token-major, G the cumulative log-decay of the chunk and E_ij = exp(G_i - G_j),

    A_ij = sum_d a_id k_jd E_ijd      j before i, strictly            P_tj = sum_d q_td k_jd E_tjd      own token included
    (I + A) U = Z - (a e^G) S         every micro-step's correction, solved at once
    O  = (q e^G) S + P U              S <- Diag(e^{G_C}) S + (k e^{G_C - G})^T U

No exponent is ever positive where log-decays are not: pairs of tokens are decayed by sums of the log-decays between them,
never by a quotient of cumulative products, so nothing overflows and nothing cancels however hard a channel forgets.

The gradient is written by hand. It keeps the inputs and the states at chunk boundaries, recomputes the rest, and walks the
chunks backwards. With D the cotangent of whatever follows it,

    DU = P^T DO + (k e^{G_C - G}) DS      DR = (I + A)^-T DU      DZ = DR      [DP; DA] = [DO; -DR] U^T
    [D(q e^G); D(a e^G)] = [DO; -DR] S^T      D(k e^{G_C - G}) = U DS^T
    DS <- Diag(e^{G_C}) DS + (q e^G)^T DO - (a e^G)^T DR
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..precision import einsum, matmul
from ..segments import Documents
from ..triangular import unit_lower_inverse

# exp() of this is 0 in every float, as is its gradient; unlike -inf, it may be multiplied by the zeros of a mask.
_FORGET = -1e4


class Chunks(NamedTuple):
  """What each chunk does to the state. Leaves lead with [N, B, H]; R = C * r rows, (t, m) token-major.

  Attributes:
    reads: [q e^G; a e^G], [C + R, K]; the first C rows alone where nothing is erased.
    scores: [P; A], [C + R, R]; the first C rows alone where nothing is erased.
    writes: k e^{G_C - G}, [R, K].
    values: Z, [R, V].
    keep: e^{G_C}, [K] or [1], of the state that the chunk found.
  """

  reads: jax.Array
  scores: jax.Array
  writes: jax.Array
  values: jax.Array
  keep: jax.Array


def chunked(
  q: jax.Array,
  k: jax.Array,
  a: jax.Array | None,
  z: jax.Array,
  log_decay: jax.Array | None,
  initial_state: jax.Array,
  docs: Documents | None,
  chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
  """As `recurrent`, with the same arguments and results; `chunk_size` is a power of two."""
  if log_decay is not None and log_decay.ndim == 3:
    log_decay = log_decay[..., None]
  return _chunked(chunk_size, docs, (q, k, a, z, log_decay), initial_state)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk_size, docs, inputs, initial_state):
  return _forward(chunk_size, docs, inputs, initial_state)[0]


def _forward(chunk_size, docs, inputs, initial_state):
  chunks = _prepare(chunk_size, docs, initial_state.dtype, inputs)
  inverse = _inverse(chunks, chunk_size)

  def step(state, xs):
    chunk, inverse = xs
    read, u = _read(chunk, inverse, state)
    out = read + matmul(chunk.scores[..., :chunk_size, :], u)
    return chunk.keep[..., None] * state + matmul(_t(chunk.writes), u), (out, state)

  final_state, (out, entering) = jax.lax.scan(step, initial_state, (chunks, inverse))
  out = _from_chunks(out, tokens=inputs[0].shape[1])
  return (out, final_state), (docs, inputs, entering)


def _backward(chunk_size, residuals, cotangents):
  docs, inputs, entering = residuals
  d_out, d_final = cotangents
  chunks, pull_back = jax.vjp(partial(_prepare, chunk_size, docs, entering.dtype), inputs)

  def step(d_state, xs):
    chunk, inverse, state, d_out = xs
    _, u = _read(chunk, inverse, state)
    du = matmul(_t(chunk.scores[..., :chunk_size, :]), d_out) + matmul(chunk.writes, d_state)
    dr = du if inverse is None else matmul(_t(inverse), du)
    d_rows = d_out if inverse is None else jnp.concatenate([d_out, -dr], axis=-2)
    d_keep = jnp.sum(state * d_state, axis=-1)
    d_chunk = Chunks(
      reads=matmul(d_rows, _t(state)),
      scores=matmul(d_rows, _t(u)),
      writes=matmul(u, _t(d_state)),
      values=dr,
      keep=d_keep if chunk.keep.shape == d_keep.shape else jnp.sum(d_keep, axis=-1, keepdims=True),
    )
    return chunk.keep[..., None] * d_state + matmul(_t(chunk.reads), d_rows), d_chunk

  xs = (chunks, _inverse(chunks, chunk_size), entering, _to_chunks(d_out, chunk_size))
  d_initial, d_chunks = jax.lax.scan(step, d_final, xs, reverse=True)
  (d_inputs,) = pull_back(d_chunks)
  return None, d_inputs, d_initial


_chunked.defvjp(_forward, _backward)


def _read(chunk: Chunks, inverse: jax.Array | None, state: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What the queries find in the entering state [C, V], and the chunk's corrections U [R, V]."""
  found = matmul(chunk.reads, state)
  if inverse is None:
    return found, chunk.values
  read, erased = jnp.split(found, [found.shape[-2] - chunk.values.shape[-2]], axis=-2)
  return read, matmul(inverse, chunk.values - erased)


def _inverse(chunks: Chunks, chunk_size: int) -> jax.Array | None:
  """(I + A)^-1 of every chunk, `None` where nothing is erased."""
  a = chunks.scores[..., chunk_size:, :]
  return unit_lower_inverse(a) if a.shape[-2] else None


def _prepare(chunk_size, docs, dtype, inputs) -> Chunks:
  """Everything that does not depend on the state, for all chunks in parallel. JAX differentiates it."""
  if docs is not None:  # padding does nothing, whatever it holds
    inputs = jax.tree.map(lambda x: jnp.where(jnp.expand_dims(docs.is_token, range(2, x.ndim)), x, 0), inputs)
  q, k, a, z, log_decay = jax.tree.map(lambda x: _to_chunks(x.astype(dtype), chunk_size), inputs)
  rows = q[..., None, :] if a is None else jnp.concatenate([q[..., None, :], a], axis=-2)  # [N, B, H, C, 1 + r, K]
  if log_decay is None:
    log_decay = jnp.zeros((1, 1, 1, chunk_size, 1), dtype)
  log_decay = jnp.maximum(log_decay, _FORGET)

  products = _decayed_products(rows, k, log_decay)  # [N, B, H, C, 1 + r, C, r]
  entering = jnp.exp(_sum_up_to(log_decay))[..., None, :]
  leaving = jnp.exp(_sum_after(log_decay))[..., None, :]
  keep = jnp.exp(jnp.sum(log_decay, axis=-2))
  causal = jnp.asarray(_causal(chunk_size, rows.shape[-2], k.shape[-2]))[None, None, None]
  if docs is None:
    products = jnp.where(causal, products, 0)
  else:
    index = _to_chunks(docs.index[..., None], chunk_size, mode="edge")  # [N, B, 1, C]
    last = index[..., -1:]
    entry = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    same = index[..., :, None] == index[..., None, :]
    products = jnp.where(causal & same[..., :, None, :, None], products, 0)
    entering = jnp.where((index == entry)[..., None, None], entering, 0)
    leaving = jnp.where((index == last)[..., None, None], leaving, 0)
    keep = jnp.where(entry == last, keep, 0)

  return Chunks(
    reads=_queries_first(rows * entering),
    scores=_queries_first(products.reshape(*products.shape[:-2], -1)),
    writes=_merge(k * leaving),
    values=_merge(z),
    keep=jnp.broadcast_to(keep, (*q.shape[:3], keep.shape[-1])),
  )


def _causal(chunk_size: int, rows: int, writes: int) -> np.ndarray:
  """Which write reaches which row, bool [C, rows, C, writes]: row 0 reads after its token's writes, row m before write m."""
  token, row = np.arange(chunk_size), np.arange(rows)
  token_i, row_i, token_j, write_j = np.ix_(token, row, token, np.arange(writes))
  return (token_i > token_j) | ((token_i == token_j) & ((row_i == 0) | (row_i - 1 > write_j)))


def _decayed_products(rows: jax.Array, k: jax.Array, log_decay: jax.Array) -> jax.Array:
  """sum_d rows_d k_d exp(sum of log_decay after k's token, up to rows' token), [..., C, p, C, r].

  Finite everywhere, meaningful where k's token is not later than rows'. A decay shared by the channels multiplies the plain
  product. One of each channel's own goes into the factors, split at the middle of ever larger blocks of tokens:
  later half against earlier half, the one decayed since the middle and the other up to it.

  Args:
    rows: [..., C, p, K].
    k: [..., C, r, K].
    log_decay: [..., C, 1] or [..., C, K].
  """
  if log_decay.shape[-1] == 1:
    return _products(rows, k) * jnp.exp(_sum_between(log_decay))[..., :, None, :, None]

  *lead, c, p, width = rows.shape
  r = k.shape[-2]
  # Leading axes are merged into the blocks': a product of many batch axes is slow, or worse, on CPU.
  out = _products(rows.reshape(-1, 1, p, width), k.reshape(-1, 1, r, width))
  half = 1
  while half < c:
    early_k = k.reshape(-1, 2, half, r, width)[:, 0]
    late_rows = rows.reshape(-1, 2, half, p, width)[:, 1]
    early_decay, late_decay = jnp.moveaxis(log_decay.reshape(-1, 2, half, width), 1, 0)
    late_rows = late_rows * jnp.exp(_sum_up_to(late_decay))[..., None, :]
    early_k = early_k * jnp.exp(_sum_after(early_decay))[..., None, :]
    across = _products(late_rows, early_k)
    first, second = jnp.moveaxis(out.reshape(-1, 2, half, p, half, r), 1, 0)
    top = jnp.concatenate([first, jnp.zeros_like(across)], axis=-2)
    out = jnp.concatenate([top, jnp.concatenate([across, second], axis=-2)], axis=1)
    half *= 2
  return out.reshape(*lead, c, p, c, r)


def _products(rows: jax.Array, k: jax.Array) -> jax.Array:
  """Inner products of rows [..., C, p, K] and k [..., C, r, K], as [..., C, p, C, r]."""
  *lead, c, p, width = rows.shape
  r = k.shape[-2]
  return matmul(rows.reshape(*lead, c * p, width), _t(k.reshape(*lead, c * r, width))).reshape(*lead, c, p, c, r)


def _sum_up_to(x: jax.Array) -> jax.Array:
  """Sums of x [..., C, K] over the tokens up to and including each, [..., C, K]."""
  return _masked_sum(np.tril, 0, x)


def _sum_after(x: jax.Array) -> jax.Array:
  """Sums of x [..., C, K] over the tokens after each, [..., C, K]."""
  return _masked_sum(np.triu, 1, x)


def _sum_between(x: jax.Array) -> jax.Array:
  """Sums of x [..., C, 1] over the tokens after j and up to i, [..., C, C]; zero where there are none."""
  c = x.shape[-2]
  after_j = jnp.asarray(np.tril(np.ones((c, c)), -1), x.dtype)
  return _sum_up_to(x * jnp.expand_dims(after_j, range(x.ndim - 2)))


def _masked_sum(triangle, diagonal: int, x: jax.Array) -> jax.Array:
  # A product with a triangle of ones: adding up what is summed, where a difference of cumulative sums would cancel.
  mask = jnp.asarray(triangle(np.ones((x.shape[-2],) * 2), diagonal), x.dtype)
  return einsum("ij,...jk->...ik", mask, x)


def _queries_first(rows: jax.Array) -> jax.Array:
  """[..., C, 1 + r, X] -> [..., C + R, X]: every token's read, then every micro-step's erase."""
  return jnp.concatenate([rows[..., 0, :], _merge(rows[..., 1:, :])], axis=-2)


def _merge(x: jax.Array) -> jax.Array:
  """[..., C, r, X] -> [..., C * r, X]."""
  return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _t(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _to_chunks(x: jax.Array, chunk_size: int, mode: str = "constant") -> jax.Array:
  """[B, T, H, ...] -> [N, B, H, C, ...], padded to whole chunks with zeros, or with the last entry (`mode="edge"`)."""
  batch, tokens, heads, *rest = x.shape
  x = jnp.pad(x, [(0, 0), (0, -tokens % chunk_size)] + [(0, 0)] * (x.ndim - 2), mode=mode)
  x = x.reshape(batch, -1, chunk_size, heads, *rest)
  return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def _from_chunks(x: jax.Array, tokens: int) -> jax.Array:
  """[N, B, H, C, V] -> [B, tokens, H, V]."""
  n, batch, heads, c, width = x.shape
  return x.transpose(1, 0, 3, 2, 4).reshape(batch, n * c, heads, width)[:, :tokens]
