"""The forward pass of the delta rules with a decay for every channel, in one kernel for TPUs.

As in `tpu_forward.py`, but D_ij is a vector over channels, and the products of a chunk are

    (K e^{G - M}) (K e^{M - G})^T        (Q e^{G - M}) (K e^{M - G})^T

for a vector M between sums G of log-decays of the columns. Columns of the first 32 tokens have one, and those of the others
another: for log-decays of at least -5 no exponent exceeds 80, and e^80 is far from the largest float. Above the diagonal
factors may overflow, so it is masked by selection. Below it a factor e^{G - M} may be rounded to zero if D_ij < e^-7.

The first M also serves the reads: Q e^G S = (Q e^{G - M}) (e^M S).
"""

from typing import Any

import jax
import jax.numpy as jnp

from .tpu_forward import solver
from .tpu_step import Chunk, Step, head, put, start
from .tpu_tiles import BY_ROWS, BY_TOKENS, CHUNK, HALF, LANES, dot, lane, parts, sums_of_tokens, swapped, three, two


def kernel(
  step: Step,
  q_ref: Any,
  k_refs: list[Any],
  v_refs: list[Any],
  decay_ref: Any,
  columns_ref: Any,
  rows_ref: Any,
  mask_ref: Any,
  block_ref: Any,
  initial_ref: Any,
  out_ref: Any,
  state_ref: Any,
  *states_ref: Any,
) -> None:
  """One chunk of all states of a step."""
  start(step, initial_ref, state_ref, states_ref)
  chunk = Chunk(step, q_ref, k_refs, columns_ref, rows_ref, mask_ref)
  scaled = Scaled(chunk, decay_ref)
  states, everyone, above = step.states, range(len(step.states)), CHUNK if step.erases else 0
  products = scaled.products()
  scores = [two(scaled.seen(x[above:], p, False)) for p, x in enumerate(products)]
  reads = [three(x, parts(f * state_ref[at])) for x, f, at in zip(scaled.first, scaled.at_read, states, strict=True)]
  if step.documents:
    entering = [chunk.column("entering", i, step.value_dim) for i in everyone]
    reads = [jnp.concatenate([e] * (1 + step.erases)) * read for e, read in zip(entering, reads, strict=True)]
  added = [head(step, v_refs, step.value_dim, *at).astype(jnp.float32) for at in states]
  if step.erases:
    lower = [scaled.seen(x[:CHUNK], p, True) for p, x in enumerate(products)]
    added = solver(chunk, lower, block_ref)([v - read[:CHUNK] for v, read in zip(added, reads, strict=True)])
  outs = [scores[i // 2](i % 2, added[i]) for i in everyone]

  for i, (b, h) in enumerate(states):
    (key, key_low), (high, low) = parts(scaled.keys[i] * scaled.leaving(i)), parts(added[i])
    change = dot(jnp.concatenate([key] * 2), jnp.concatenate([high, low]), BY_TOKENS) + dot(key_low, high, BY_TOKENS)
    out = step.scale * (reads[i][above:] + outs[i])
    put(step, [out_ref], b, h, out)
    state_ref[b, h] = scaled.keep(i) * state_ref[b, h] + change


class Scaled:
  """The keys and queries of a chunk, times decays, by state.

  Attributes:
    keys, queries: [64, K], float32.
    totals: G, [64, K].
    early, late: e^{G - M} of all tokens for the first M, and of the last 32 for the second one.
    inverse: e^{M - G}, [64, K].
    first, second: [K; Q] e^{G - M}, or without an erase Q e^{G - M}, in parts: rows of all tokens, and of the last 32.
    columns: K e^{M - G}.
    at_read: e^M of the first M, [K, 1].
  """

  def __init__(self, chunk: Chunk, decay_ref: Any):
    self.chunk, self.step = chunk, chunk.step
    wide = self.step.key_dim
    decays = [decay_ref[b, :, h * wide : (h + 1) * wide] for b, h in self.step.states]
    totals = [self.step.of_updates(sums_of_tokens(x)) for x in decays]
    middles = [[(g[i : i + 1] + g[i + HALF - 1 : i + HALF]) * 0.5 for i in (0, HALF)] for g in totals]
    self.totals, self._ends = totals, [g[CHUNK - 1 :] for g in totals]
    # What rows of states are multiplied with.
    factors, count = jnp.exp(jnp.concatenate([first for first, _ in middles] + self._ends)).T, len(totals)
    self.at_read, self._keep = ([factors[:, i : i + 1] for i in range(n, n + count)] for n in (0, count))
    self.keys, self.queries = ([x.astype(jnp.float32) for x in xs] for xs in (chunk.keys, chunk.queries))
    both = [[k, q] if self.step.erases else [q] for k, q in zip(self.keys, self.queries, strict=True)]
    each = [*zip(totals, middles, strict=True)]
    self.early = [jnp.exp(g - m[0]) for g, m in each]
    self.late = [jnp.exp(g[HALF:] - m[1]) for g, m in each]
    self.inverse = [jnp.exp(jnp.concatenate([m[0] - g[:HALF], m[1] - g[HALF:]])) for g, m in each]
    self.first = [parts(jnp.concatenate([x * e for x in xs])) for xs, e in zip(both, self.early, strict=True)]
    self.second = [parts(jnp.concatenate([x[HALF:] * e for x in xs])) for xs, e in zip(both, self.late, strict=True)]
    self.columns = [k * e for k, e in zip(self.keys, self.inverse, strict=True)]

  def products(self) -> list[jax.Array]:
    """[K; Q] e^{G - M} (K e^{M - G})^T of pairs, side by side. Above the diagonal it is anything."""
    columns, found = [*map(parts, self.columns)], []
    for pair in self.step.pairs:
      first, second, ys = ([x[i] for i in pair] for x in (self.first, self.second, columns))
      found.append(_both_halves(_grams(first, ys), _grams(second, ys)))
    return found

  def seen(self, x: jax.Array, p: int, strictly: bool) -> jax.Array:
    """Of pair p, x [64, 128] up to, or strictly below, the diagonal and within documents, else 0."""
    mask = self.chunk.mask_ref[1] > 0 if strictly else self.chunk.mask_ref[0] == 0
    if self.step.documents:
      mask &= self.chunk.side_by_side("document", p) == self.chunk.row("document", p)
    return jnp.where(mask, x, 0)

  def leaving(self, i: int) -> jax.Array:
    """e^{G_C - G} of tokens of the last document, [64, K], else 0."""
    decay = jnp.exp(self._ends[i] - self.totals[i])
    return decay * self.chunk.column("leaving", i, self.step.key_dim) if self.step.documents else decay

  def entering(self, i: int) -> jax.Array:
    """e^G of tokens of the document that the state belongs to, [64, K], else 0."""
    decay = jnp.exp(self.totals[i])
    return decay * self.chunk.column("entering", i, self.step.key_dim) if self.step.documents else decay

  def keep(self, i: int) -> jax.Array:
    """e^{G_C}, [K, 1], or 0 if a document ended."""
    return self._keep[i] * self.chunk.keep[:, i : i + 1] if self.step.documents else self._keep[i]


def _grams(xs: list, ys: list) -> jax.Array:
  """x y^T of two pairs x [n, K], y [64, K] in parts, side by side, [n, 128]."""
  (x, x_low), (other, other_low) = xs
  (y, y_low), (beside, beside_low) = ys
  left = lane((len(x), LANES)) < CHUNK
  zeros = jnp.zeros_like(y)
  by_first = dot(x, jnp.concatenate([y, y_low]), BY_ROWS)
  by_second = dot(other, jnp.concatenate([beside_low, beside]), BY_ROWS)
  by_low = dot(x_low, jnp.concatenate([y, zeros]), BY_ROWS) + dot(other_low, jnp.concatenate([zeros, beside]), BY_ROWS)
  return jnp.where(left, by_first, by_second) + by_low + swapped(jnp.where(left, by_second, by_first))


def _both_halves(first: jax.Array, second: jax.Array) -> jax.Array:
  """Columns of the first 32 tokens from `first`, rows of 64 tokens, and the others from `second`, rows of the last 32."""
  in_first = lane((HALF, LANES)) & CHUNK - 1 < HALF
  out = []
  for n in range(len(first) // CHUNK):
    early, late = first[n * CHUNK : n * CHUNK + HALF], first[n * CHUNK + HALF : (n + 1) * CHUNK]
    out += [early, jnp.where(in_first, late, second[n * HALF : (n + 1) * HALF])]
  return jnp.concatenate(out)
