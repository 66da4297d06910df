"""Products of a chunk with a decay for every channel, in the kernels for TPUs.

A product with the decay between two updates j <= i is split at a vector M between their sums G of log-decays,

    sum_k x_ik y_jk e^{G_ik - G_jk} = (x e^{G - M}) (y e^{M - G})^T

and its cotangent X goes back by rows, e^{G - M} (X (y e^{M - G})), and by columns, e^{M - G} (X^T (x e^{G - M})). One M does
for all updates whose factors stay in the range of floats. Where j > i factors may overflow, so that is masked by selection.
"""

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from .tpu_step import Chunk
from .tpu_tiles import (
  BY_ROWS,
  BY_TOKENS,
  CHUNK,
  GROUP,
  HALF,
  LANES,
  beside,
  dot,
  in_one_pass,
  is_left,
  lane,
  parts,
  sums_of_tokens,
  swapped,
  three,
  transposed,
  two,
)

# By rows, [64, K] of each of them, and by columns, [64, K].
Pulled = Generator[None, None, tuple[list[jax.Array], jax.Array]]


def scaled_tokens(chunk: Chunk, decay_ref: Any) -> "Scaled":
  """What the kernels need of log-decays [rows, tokens, heads * K]."""
  return (Bounded if chunk.step.bounded else Unbounded)(chunk, decay_ref)


class Scaled:
  """The keys and queries of a chunk, times decays, by state.

  Attributes:
    keys, queries: [64, K], float32.
    totals: G, [64, K].
    both: [K; Q], or without an erase [Q].
  """

  def __init__(self, chunk: Chunk, decay_ref: Any):
    self.chunk, self.step = chunk, chunk.step
    wide = self.step.key_dim
    decays = [decay_ref[b, :, h * wide : (h + 1) * wide] for b, h in self.step.states]
    self.totals = [self.step.of_updates(sums_of_tokens(x)) for x in decays]
    self._ends = [g[CHUNK - 1 :] for g in self.totals]
    self.keys, self.queries = ([x.astype(jnp.float32) for x in xs] for xs in (chunk.keys, chunk.queries))
    self.both = [[k, q] if self.step.erases else [q] for k, q in zip(self.keys, self.queries, strict=True)]

  def by_row_of_state(self, *xs: jax.Array) -> list[jax.Array]:
    """e^x of vectors x [1, K], [K, 1]."""
    factors = jnp.exp(jnp.concatenate(xs)).T
    return [factors[:, i : i + 1] for i in range(len(xs))]

  def products(self) -> list[jax.Array]:
    """[K; Q] D K^T of pairs, side by side, [n, 128]. Above the diagonal it is anything."""
    raise NotImplementedError

  def pull_back(self, i: int, x: jax.Array) -> Pulled:
    """For state i and the cotangent x of its pair's product: the cotangents of [K; Q] by rows, and that of K by columns.

    It yields where it waits for products of matrices, so that several states can go in step.
    """
    raise NotImplementedError

  def read(self, i: int, state: jax.Array, only_keys: bool = False) -> jax.Array:
    """[K; Q] e^G S, or only K e^G S."""
    raise NotImplementedError

  def write_back(self, i: int, d_read: jax.Array) -> jax.Array:
    """The cotangent of S for that of its read, ([K; Q] e^G)^T d_read."""
    raise NotImplementedError

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


class Bounded(Scaled):
  """For log-decays of at least -5: two vectors M, one for columns of the first half of a chunk, and one for the others.

  No exponent exceeds 80, and e^80 is far from the largest float. A factor e^{G - M} may be rounded to zero if D_ij < e^-7. The
  first M also serves the reads: Q e^G S = (Q e^{G - M}) (e^M S).
  """

  def __init__(self, chunk: Chunk, decay_ref: Any):
    super().__init__(chunk, decay_ref)
    middles = [[_middle(g[i : i + HALF]) for i in (0, HALF)] for g in self.totals]
    # What rows of states are multiplied with.
    factors, count = self.by_row_of_state(*(first for first, _ in middles), *self._ends), len(middles)
    self._at_read, self._keep = factors[:count], factors[count:]
    each = [*zip(self.totals, middles, strict=True)]
    self._early = [jnp.exp(g - m[0]) for g, m in each]
    self._late = [jnp.exp(g[HALF:] - m[1]) for g, m in each]
    self._inverse = [jnp.exp(jnp.concatenate([m[0] - g[:HALF], m[1] - g[HALF:]])) for g, m in each]
    self._first = [parts(jnp.concatenate([x * e for x in xs])) for xs, e in zip(self.both, self._early, strict=True)]
    self._second = [parts(jnp.concatenate([x[HALF:] * e for x in xs])) for xs, e in zip(self.both, self._late, strict=True)]
    self._columns = [k * e for k, e in zip(self.keys, self._inverse, strict=True)]

  def products(self) -> list[jax.Array]:
    columns, found = [*map(parts, self._columns)], []
    for pair in self.step.pairs:
      first, second, ys = ([x[i] for i in pair] for x in (self._first, self._second, columns))
      found.append(_both_halves(_grams(first, ys), _grams(second, ys)))
    return found

  def pull_back(self, i: int, x: jax.Array) -> Pulled:
    side, ys = i % 2, self._columns[i]
    rest = jnp.concatenate([x[n + HALF : n + CHUNK] for n in range(0, len(x), CHUNK)])
    early, late = in_one_pass(x)(2 * side, ys[:HALF]), in_one_pass(rest)(2 * side + 1, ys[HALF:])
    turned = [transposed(x[n : n + CHUNK]) for n in range(0, len(x), CHUNK)]
    yield
    by_rows = []
    for n in range(len(x) // CHUNK):
      whole = self._early[i] * early[n * CHUNK : (n + 1) * CHUNK]
      by_rows.append(jnp.concatenate([whole[:HALF], whole[HALF:] + self._late[i] * late[n * HALF : (n + 1) * HALF]]))
    zeros = jnp.zeros_like(self._late[i]).astype(jnp.bfloat16)
    of_late = [jnp.concatenate([y for n in range(0, len(x), HALF) for y in (zeros, x[n : n + HALF])]) for x in self._second[i]]
    if self.step.erases:
      columns = parts(beside(*turned)[side])
      early = three(tuple(x[:HALF] for x in columns), self._first[i])
      late = three(tuple(x[HALF:] for x in columns), of_late)
    else:
      times = two(turned[0])
      early, late = (times(side, sum(x.astype(jnp.float32) for x in y)) for y in (self._first[i], of_late))
      early, late = early[:HALF], late[HALF:]
    yield
    return by_rows, self._inverse[i] * jnp.concatenate([early, late])

  def read(self, i: int, state: jax.Array, only_keys: bool = False) -> jax.Array:
    first = tuple(x[:CHUNK] for x in self._first[i]) if only_keys else self._first[i]
    return three(first, parts(self._at_read[i] * state))

  def write_back(self, i: int, d_read: jax.Array) -> jax.Array:
    return self._at_read[i] * three(self._first[i], parts(d_read), BY_TOKENS)


class Unbounded(Scaled):
  """For any log-decays: spans of eight tokens have an M in their middle, and pairs of longer and longer spans one between them.

  With M between two spans no exponent is positive. Within eight tokens none exceeds 70, because no log-decay is taken to be
  less than -20, and e^-20 is 2e-9.
  """

  def __init__(self, chunk: Chunk, decay_ref: Any):
    super().__init__(chunk, decay_ref)
    self._keep = self.by_row_of_state(*self._ends)
    self._shortest = GROUP * self.step.updates
    self._levels = [w for w in (GROUP, 2 * GROUP, HALF) if w >= self._shortest]
    since = [_since_middle(g, self._shortest) for g in self.totals]
    self._late, self._inverse = [jnp.exp(x) for x in since], [jnp.exp(-x) for x in since]
    self._columns = [k * e for k, e in zip(self.keys, self._inverse, strict=True)]

  def _scaled(self, i: int, w: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For pairs of spans of w updates: e^{-|G - M|} and its product with K, [64, K], and [K; Q] e^{G - M} of later spans."""
    factor = jnp.exp(_beyond_middle(self.totals[i], w))
    ys = self.keys[i] * factor
    rows = [_later(ys, w)] * self.step.erases + [_later(self.queries[i], w) * _later(factor, w)]
    return factor, ys, jnp.concatenate(rows)

  def products(self) -> list[jax.Array]:
    found = []
    for pair in self.step.pairs:
      rows = [parts(jnp.concatenate([x * self._late[i] for x in self.both[i]])) for i in pair]
      product = _grams(rows, [parts(self._columns[i]) for i in pair])
      for w in self._levels:
        _, ys, rows = zip(*(self._scaled(i, w) for i in pair), strict=True)
        across = _grams([*map(parts, rows)], [*map(parts, ys)])
        here = _later(product, w)
        product = _joined(_earlier(product, w), jnp.where(_is_before(len(here), w), across, here), w)
      found.append(product)
    return found

  def pull_back(self, i: int, x: jax.Array) -> Pulled:
    side, here, width = i % 2, [], len(x) // CHUNK
    within = jnp.where(_is_within(len(x), self._shortest), x, 0)
    by_span = two(within)(side, self._columns[i])
    turned = [transposed(within[n : n + CHUNK]) for n in range(0, len(x), CHUNK)]
    for w in self._levels:
      factor, ys, rows = self._scaled(i, w)
      later = _later(x, w)
      later = jnp.where(_is_before(len(later), w), later, 0)
      back = later if width == 2 else jnp.concatenate([later, jnp.zeros_like(later)])
      rows = rows if width == 2 else jnp.concatenate([rows, jnp.zeros_like(rows)])
      here.append((w, factor, rows, two(later)(side, ys), _earlier(transposed(back), w)))
    yield
    by_rows = jnp.concatenate([self._late[i]] * width) * by_span
    rows = jnp.concatenate([y * self._late[i] for y in self.both[i]])
    columns = three(parts(beside(*turned)[side]), parts(rows)) if width == 2 else two(turned[0])(side, rows)
    for w, factor, _, across, _ in here:
      by_rows = _joined(_earlier(by_rows, w), _later(by_rows, w) + jnp.concatenate([_later(factor, w)] * width) * across, w)
    by_level = [(w, factor, two(back)(side, rows)) for w, factor, rows, _, back in here]
    yield
    columns = self._inverse[i] * columns
    for w, factor, across in by_level:
      columns = _joined(_earlier(columns, w) + _earlier(factor, w) * across, _later(columns, w), w)
    return [by_rows[n : n + CHUNK] for n in range(0, len(x), CHUNK)], columns

  def _of_read(self, i: int, xs: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    decay = jnp.exp(self.totals[i])
    return parts(jnp.concatenate([x * decay for x in xs]))

  def read(self, i: int, state: jax.Array, only_keys: bool = False) -> jax.Array:
    return three(self._of_read(i, self.both[i][:1] if only_keys else self.both[i]), parts(state))

  def write_back(self, i: int, d_read: jax.Array) -> jax.Array:
    return three(self._of_read(i, self.both[i]), parts(d_read), BY_TOKENS)


def _middle(g: jax.Array) -> jax.Array:
  """Between the first and the last of sums g [n, K], [1, K]."""
  return (g[:1] + g[len(g) - 1 :]) * 0.5


def _since_middle(g: jax.Array, n: int) -> jax.Array:
  """g - M of sums g [64, K], for the middle M of spans of n updates."""
  spans = g.reshape(-1, n, g.shape[1])
  return (spans - (spans[:, :1] + spans[:, n - 1 :]) * 0.5).reshape(g.shape)


def _beyond_middle(g: jax.Array, w: int) -> jax.Array:
  """-|g - M| of sums g [64, K], for the M between two spans of w updates."""
  pairs = g.reshape(-1, 2 * w, g.shape[1])
  middle = pairs[:, w - 1 : w]
  return jnp.concatenate([middle - pairs[:, :w], pairs[:, w:] - middle], axis=1).reshape(g.shape)


def _earlier(x: jax.Array, w: int) -> jax.Array:
  """The first of every two spans of w rows of x."""
  return x.reshape(-1, 2 * w, x.shape[1])[:, :w].reshape(-1, x.shape[1])


def _later(x: jax.Array, w: int) -> jax.Array:
  """The second of every two spans of w rows of x."""
  return x.reshape(-1, 2 * w, x.shape[1])[:, w:].reshape(-1, x.shape[1])


def _joined(earlier: jax.Array, later: jax.Array, w: int) -> jax.Array:
  """The inverse of `_earlier` and `_later`."""
  width = earlier.shape[1]
  return jnp.concatenate([x.reshape(-1, w, width) for x in (earlier, later)], axis=1).reshape(-1, width)


def _is_before(n: int, w: int) -> jax.Array:
  """Of n rows of later spans, and columns of two chunks: where the column is in the span before that of the row, [n, 128]."""
  shift = w.bit_length() - 1
  row = jax.lax.broadcasted_iota(jnp.int32, (n, LANES), 0) & HALF - 1
  return (lane((n, LANES)) & CHUNK - 1) >> shift == (row >> shift) * 2


def _is_within(n: int, w: int) -> jax.Array:
  """Of n rows, and columns of two chunks: where both are in the same span of w, [n, 128]."""
  shift = w.bit_length() - 1
  row = jax.lax.broadcasted_iota(jnp.int32, (n, LANES), 0) & CHUNK - 1
  return (lane((n, LANES)) & CHUNK - 1) >> shift == row >> shift


def _grams(xs: list, ys: list) -> jax.Array:
  """x y^T of two pairs x [n, K], y [64, K] in parts, side by side, [n, 128]."""
  (x, x_low), (other, other_low) = xs
  (y, y_low), (beside, beside_low) = ys
  left = is_left(len(x))
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
