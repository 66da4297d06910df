"""The delta rule a chunk of C tokens at a time: matrix products instead of T dependent steps.

With rows i = (t, m), token-major, G the cumulative log-decay of the chunk and E_ij = exp(G_i - G_j),

    A_ij = sum_d a_id k_jd E_ijd      j before i, strictly            P_tj = sum_d q_td k_jd E_tjd      own token included
    (I + A) U = Z - (a e^G) S         every micro-step's correction, solved at once
    O  = (q e^G) S + P U              S <- Diag(e^{G_C}) S + (k e^{G_C - G})^T U

Pairs of tokens are decayed by sums of the log-decays between them, never by a quotient of cumulative products: no exponent
is positive, so nothing overflows and nothing cancels however hard a channel forgets. Only where the caller bounds the decays
by channel are they split at the middle of the chunk, into factors of at most e^40.

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
# Of a factor; two of them multiply to e^80 at most, far from overflow in float32.
_LARGEST_EXPONENT = 40.0


class Chunks(NamedTuple):
  """What each chunk does to the state. Leaves lead with [N, M], M = B * H; R = C * r micro-steps, token-major.

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
  decay_bound: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """As `recurrent`, with the same arguments and results.

  Args:
    chunk_size: C, a power of two.
    decay_bound: a promise that no log-decay is less, which makes per-channel decays cheaper.
  """
  if log_decay is not None and log_decay.ndim == 3:
    log_decay = log_decay[..., None]
  return _chunked(chunk_size, decay_bound, docs, (q, k, a, z, log_decay), initial_state)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(chunk_size, decay_bound, docs, inputs, initial_state):
  return _forward(chunk_size, decay_bound, docs, inputs, initial_state)[0]


def _forward(chunk_size, decay_bound, docs, inputs, initial_state):
  chunks = _prepare(chunk_size, decay_bound, docs, initial_state.dtype, inputs)
  inverse = _inverse(chunks, chunk_size)

  def step(state, xs):
    chunk, inverse = xs
    read, u = _read(chunk, inverse, state)
    out = read + matmul(chunk.scores[:, :chunk_size], u)
    return chunk.keep[..., None] * state + matmul(_t(chunk.writes), u), (out, state)

  batch, tokens, heads = inputs[0].shape[:3]
  entry = initial_state.reshape(-1, *initial_state.shape[2:])
  final_state, (out, entering) = jax.lax.scan(step, entry, (chunks, inverse))
  out = _from_chunks(out, batch, heads)[:, :tokens]
  return (out, final_state.reshape(initial_state.shape)), (docs, inputs, entering)


def _backward(chunk_size, decay_bound, residuals, cotangents):
  docs, inputs, entering = residuals
  d_out, d_final = cotangents
  chunks, pull_back = jax.vjp(partial(_prepare, chunk_size, decay_bound, docs, entering.dtype), inputs)

  def step(d_state, xs):
    chunk, inverse, state, d_out = xs
    _, u = _read(chunk, inverse, state)
    du = matmul(_t(chunk.scores[:, :chunk_size]), d_out) + matmul(chunk.writes, d_state)
    dr = du if inverse is None else matmul(_t(inverse), du)
    d_rows = d_out if inverse is None else jnp.concatenate([d_out, -dr], axis=1)
    d_keep = jnp.sum(state * d_state, axis=-1)
    d_chunk = Chunks(
      reads=matmul(d_rows, _t(state)),
      scores=matmul(d_rows, _t(u)),
      writes=matmul(u, _t(d_state)),
      values=dr,
      keep=d_keep if chunk.keep.shape == d_keep.shape else jnp.sum(d_keep, axis=-1, keepdims=True),
    )
    return chunk.keep[..., None] * d_state + matmul(_t(chunk.reads), d_rows), d_chunk

  xs = (chunks, _inverse(chunks, chunk_size), entering, _split(_to_chunks(d_out, chunk_size), len(entering)))
  d_entry, d_chunks = jax.lax.scan(step, d_final.reshape(entering.shape[1:]), xs, reverse=True)
  (d_inputs,) = pull_back(d_chunks)
  return None, d_inputs, d_entry.reshape(d_final.shape)


_chunked.defvjp(_forward, _backward)


def _read(chunk: Chunks, inverse: jax.Array | None, state: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What the queries find in the entering state [M, C, V], and the chunk's corrections U [M, R, V]."""
  found = matmul(chunk.reads, state)
  if inverse is None:
    return found, chunk.values
  read, erased = jnp.split(found, [found.shape[1] - chunk.values.shape[1]], axis=1)
  return read, matmul(inverse, chunk.values - erased)


def _inverse(chunks: Chunks, chunk_size: int) -> jax.Array | None:
  """(I + A)^-1 of every chunk, `None` where nothing is erased."""
  a = chunks.scores[:, :, chunk_size:]
  if not a.shape[2]:
    return None
  return unit_lower_inverse(a.reshape(-1, *a.shape[2:])).reshape(a.shape)


def _prepare(chunk_size, decay_bound, docs, dtype, inputs) -> Chunks:
  """Everything that does not depend on the state, for all chunks in parallel. JAX differentiates it.

  Chunks, batch and heads are one leading axis here: products with many batch axes are slow on CPU, and worse.
  """
  batch, tokens, heads = inputs[0].shape[:3]
  if docs is not None:  # padding does nothing, whatever it holds
    inputs = jax.tree.map(lambda x: jnp.where(jnp.expand_dims(docs.is_token, range(2, x.ndim)), x, 0), inputs)
  q, k, a, z, log_decay = jax.tree.map(lambda x: _to_chunks(x.astype(dtype), chunk_size), inputs)
  r = k.shape[2]
  if log_decay is None:
    log_decay = jnp.zeros((1, chunk_size, 1), dtype)
  log_decay = jnp.maximum(log_decay, _FORGET)

  def to_writes(x):  # [L, C, ...], a row for each micro-step
    return jnp.repeat(x, r, axis=1)

  def to_rows(x):  # and the reads before
    return x if a is None else jnp.concatenate([x, to_writes(x)], axis=1)

  rows, writes = q if a is None else jnp.concatenate([q, _merge(a)], axis=1), _merge(k)
  if log_decay.shape[-1] == 1:
    scores = _inner(rows, writes) * jnp.repeat(to_rows(jnp.exp(_sum_between(log_decay))), r, axis=2)
  elif decay_bound is not None and chunk_size // 2 * -decay_bound <= _LARGEST_EXPONENT:
    since_middle = _sum_since_middle(log_decay)
    scores = _inner(rows * to_rows(jnp.exp(since_middle)), writes * to_writes(jnp.exp(-since_middle)))
  else:
    scores = _decayed_products(q, k, a, log_decay)
  causal = jnp.asarray(_causal(chunk_size, r)[: rows.shape[1]])[None]
  entering, leaving = jnp.exp(_sum_up_to(log_decay)), jnp.exp(_sum_after(log_decay))
  keep = jnp.exp(jnp.sum(log_decay, axis=1))
  if docs is not None:
    index = _to_chunks(jnp.repeat(docs.index[..., None], heads, axis=2), chunk_size, mode="edge")  # [L, C]
    last = index[:, -1:]
    entry = jnp.concatenate([jnp.zeros((batch * heads, 1), index.dtype), last])[: len(last)]
    causal = causal & (to_rows(index)[:, :, None] == to_writes(index)[:, None, :])
    entering = jnp.where((index == entry)[..., None], entering, 0)
    leaving = jnp.where((index == last)[..., None], leaving, 0)
    keep = jnp.where(entry == last, keep, 0)

  chunks = Chunks(
    reads=rows * to_rows(entering),
    scores=jnp.where(causal, scores, 0),
    writes=writes * to_writes(leaving),
    values=_merge(z),
    keep=jnp.broadcast_to(keep, (len(q), keep.shape[-1])),
  )
  return jax.tree.map(lambda x: _split(x, -(-tokens // chunk_size)), chunks)


def _causal(chunk_size: int, r: int) -> np.ndarray:
  """Which writes (columns) the rows of `Chunks.scores` see, bool [C + R, R].

  A read sees those up to its token's last, a micro-step those before it.
  """
  write = np.arange(chunk_size * r)
  last_seen = np.concatenate([np.arange(chunk_size) * r + r - 1, write - 1])
  return write <= last_seen[:, None]


def _decayed_products(q: jax.Array, k: jax.Array, a: jax.Array | None, log_decay: jax.Array) -> jax.Array:
  """[q; a] k^T decayed in between, [L, C + R, R], for channels with decays of their own that nothing bounds.

  They go into the factors, split at the middle of ever larger blocks of tokens: the later half, decayed since the middle,
  against the earlier half, decayed up to it. No exponent is positive.

  Args:
    q: [L, C, K].
    k, a: [L, C, r, K].
    log_decay: [L, C, K].
  """
  rows = q[:, :, None] if a is None else jnp.concatenate([q[:, :, None], a], axis=2)
  c, p, width = rows.shape[1:]
  r = k.shape[2]
  out = _products(rows.reshape(-1, 1, p, width), k.reshape(-1, 1, r, width))
  half = 1
  while half < c:
    early_k = k.reshape(-1, 2, half, r, width)[:, 0]
    late_rows = rows.reshape(-1, 2, half, p, width)[:, 1]
    early_decay, late_decay = jnp.moveaxis(log_decay.reshape(-1, 2, half, width), 1, 0)
    late_rows = late_rows * jnp.exp(_sum_up_to(late_decay))[:, :, None]
    early_k = early_k * jnp.exp(_sum_after(early_decay))[:, :, None]
    across = _products(late_rows, early_k)
    first, second = jnp.moveaxis(out.reshape(-1, 2, half, p, half, r), 1, 0)
    top = jnp.concatenate([first, jnp.zeros_like(across)], axis=3)
    out = jnp.concatenate([top, jnp.concatenate([across, second], axis=3)], axis=1)
    half *= 2
  out = out.reshape(-1, c, p, c * r)
  return jnp.concatenate([out[:, :, 0], _merge(out[:, :, 1:])], axis=1)


def _products(rows: jax.Array, k: jax.Array) -> jax.Array:
  """Inner products of rows [L, C, p, K] and k [L, C, r, K], [L, C, p, C, r]."""
  return _inner(_merge(rows), _merge(k)).reshape(*rows.shape[:3], *k.shape[1:3])


# Sums of log-decays are products with zeros and ones: everything that is summed has one sign, where differences of a
# cumulative sum would cancel.


def _sum_up_to(x: jax.Array) -> jax.Array:
  """Sums of x [L, C, K] over the tokens up to and including each, [L, C, K]."""
  return _sum(np.tri(x.shape[1]), x)


def _sum_after(x: jax.Array) -> jax.Array:
  """Sums of x [L, C, K] over the tokens after each, [L, C, K]."""
  return _sum(1 - np.tri(x.shape[1]), x)


def _sum_since_middle(x: jax.Array) -> jax.Array:
  """Sums of x [L, C, K] from the middle of C to each token, negated for those before it, [L, C, K]."""
  up_to = np.tri(x.shape[1])
  return _sum(up_to - up_to[x.shape[1] // 2], x)


def _sum_between(x: jax.Array) -> jax.Array:
  """Sums of x [L, C, 1] over the tokens after j and up to i, [L, C, C]; zero where there are none."""
  after = 1 - np.tri(x.shape[1])
  return _sum_up_to(x * jnp.asarray(after.T, x.dtype)[None])


def _sum(which: np.ndarray, x: jax.Array) -> jax.Array:
  """Sums of x [L, C, K] over its tokens, each as often as `which` [R, C] says."""
  which = jnp.asarray(which, x.dtype)[None]
  return matmul(jnp.broadcast_to(which, (x.shape[0], *which.shape[1:])), x)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
  """Inner products of the rows of x [L, R, K] and y [L, S, K], [L, R, S]."""
  return einsum("lrk,lsk->lrs", x, y)


def _merge(x: jax.Array) -> jax.Array:
  """[L, C, r, X] -> [L, C * r, X]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _t(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _split(x: jax.Array, n: int) -> jax.Array:
  """[N * M, ...] -> [N, M, ...]."""
  return x.reshape(n, -1, *x.shape[1:])


def _to_chunks(x: jax.Array, chunk_size: int, mode: str = "constant") -> jax.Array:
  """[B, T, H, ...] -> [N * B * H, C, ...], padded to whole chunks with zeros, or with the last entry (`mode="edge"`)."""
  batch, tokens, heads, *rest = x.shape
  x = jnp.pad(x, [(0, 0), (0, -tokens % chunk_size)] + [(0, 0)] * (x.ndim - 2), mode=mode)
  x = x.reshape(batch, -1, chunk_size, heads, *rest)
  return x.transpose(1, 0, 3, 2, *range(4, x.ndim)).reshape(-1, chunk_size, *rest)


def _from_chunks(x: jax.Array, batch: int, heads: int) -> jax.Array:
  """[N, B * H, C, V] -> [B, N * C, H, V]."""
  n, _, c, width = x.shape
  return x.reshape(n, batch, heads, c, width).transpose(1, 0, 3, 2, 4).reshape(batch, n * c, heads, width)
