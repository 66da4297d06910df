"""Products of a chunk with a decay for every channel, in the kernels for TPUs.

Rows of C are covectors, along which updates read the state; mostly they are the keys K. A product with the decay between two
updates j <= i is split at a vector M between their sums G of log-decays,

    sum_k x_ik y_jk e^{G_ik - G_jk} = (x e^{G - M}) (y e^{M - G})^T

and its cotangent X goes back by rows, e^{G - M} (X (y e^{M - G})), and by columns, e^{M - G} (X^T (x e^{G - M})). One M does
for all updates whose factors stay in the range of floats. Where j > i factors may overflow, so that is masked by selection.
"""

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from ..tpu_products import BY_ROWS, BY_TOKENS, LANES, Parts, dot, parts
from .tpu_step import Chunk, head
from .tpu_tiles import CHUNK, GROUP, HALF, grams, in_one_pass, is_left, lane, sums_of_tokens, swapped, three, transposed, two

# By rows, [64, K] of each of them, and by columns, [64, K].
Pulled = Generator[None, None, tuple[list[jax.Array], jax.Array]]


class Scaled:
  """The keys, covectors and queries of a chunk, times decays, by state.

  Spans of so many tokens that no factor leaves the range of floats have an M in their middle. Pairs of longer and longer spans
  have one between them; there no exponent is positive.

  Attributes:
    keys, covectors, queries: [64, K], float32.
    totals: G, [64, K].
  """

  def __init__(self, chunk: Chunk, decay_ref: Any, covector_refs: list[Any]):
    self.chunk, self.step = chunk, chunk.step
    wide = self.step.key_dim
    decays = [decay_ref[b, :, h * wide : (h + 1) * wide] for b, h in self.step.states]
    self.totals = [self.step.of_updates(sums_of_tokens(x)) for x in decays]
    self._ends = [g[CHUNK - 1 :] for g in self.totals]
    ends = jnp.exp(jnp.concatenate(self._ends)).T
    self._keep = [ends[:, i : i + 1] for i in range(len(decays))]
    self.keys, self.queries = ([x.astype(jnp.float32) for x in xs] for xs in (chunk.keys, chunk.queries))
    self.covectors = self.keys
    if covector_refs:
      given = {at: head(self.step, covector_refs, wide, *at) for at in self.step.keys}
      self.covectors = [given[at] for at in self.step.keys]
    self._both = [[c, q] if self.step.erases else [q] for c, q in zip(self.covectors, self.queries, strict=True)]
    self._span = min(self.step.span * self.step.updates, HALF)
    self._longer = [w for w in (GROUP, 2 * GROUP, HALF) if w >= self._span]
    since = [_since_middle(g, self._span) for g in self.totals]
    self._late, self._early = [jnp.exp(x) for x in since], [jnp.exp(-x) for x in since]
    self._columns = [k * e for k, e in zip(self.keys, self._early, strict=True)]

  def products(self) -> list[jax.Array]:
    """[C; Q] D K^T of pairs, side by side, [n, 128]. Above the diagonal it is anything."""
    found = []
    for pair in self.step.pairs:
      rows = [parts(jnp.concatenate([x * self._late[i] for x in self._both[i]])) for i in pair]
      product = _grams(rows, [parts(self._columns[i]) for i in pair])
      for w in self._longer:
        _, ys, rows = zip(*(self._of_spans(i, w) for i in pair), strict=True)
        across, here = _grams([*map(parts, rows)], [*map(parts, ys)]), _later(product, w)
        product = _joined(_earlier(product, w), jnp.where(_is_before(len(here), w), across, here), w)
      found.append(product)
    return found

  def pull_back(self, i: int, x: jax.Array) -> Pulled:
    """For state i and the cotangent x of its pair's product: the cotangents of [C; Q] by rows, and that of K by columns.

    It yields where it waits for products of matrices, so that several states can go in step.
    """
    side, ys = i % 2, self._columns[i]
    pieces = []
    for h in range(2):
      half = jnp.concatenate([x[n + h * HALF : n + (h + 1) * HALF] for n in range(0, len(x), CHUNK)])
      half = half if self._span == HALF else jnp.where(_is_within(len(half), self._span), half, 0)
      by_row = in_one_pass(half)(2 * side + h, ys[h * HALF : (h + 1) * HALF])
      pieces.append((by_row, _square(half)[h * HALF : (h + 1) * HALF]))
    for w in self._longer:
      ys, later = self._of_spans(i, w)[1], _later(x, w)
      if w == HALF:
        by_row = in_one_pass(later)(2 * side, ys[:HALF])
      else:
        later = jnp.where(_is_before(len(later), w), later, 0)
        by_row = two(later)(side, ys)
      pieces.append((by_row, _earlier(_square(later), w)))
    yield
    late = self._late[i]
    of_halves = [[x[n : n + HALF] for x, _ in pieces[:2]] for n in range(0, len(pieces[0][0]), HALF)]
    by_rows = [late * jnp.concatenate(x) for x in of_halves]
    by_columns = []
    for h, (_, back) in enumerate(pieces[:2]):
      rows = [(y * late)[h * HALF : (h + 1) * HALF] for y in self._both[i]]
      by_columns.append(two(back)(side, _square_rows(jnp.concatenate(rows))))
    factors = []
    for w, (by_row, back) in zip(self._longer, pieces[2:], strict=True):
      factor, _, rows = self._of_spans(i, w)
      by_row = [_later(factor, w) * by_row[n : n + HALF] for n in range(0, len(by_row), HALF)]
      by_rows = [_joined(_earlier(x, w), _later(x, w) + y, w) for x, y in zip(by_rows, by_row, strict=True)]
      factors.append((w, factor, two(back)(side, _square_rows(rows))))
    yield
    columns = self._early[i] * jnp.concatenate(by_columns)
    for w, factor, by_column in factors:
      columns = _joined(_earlier(columns, w) + _earlier(factor, w) * by_column, _later(columns, w), w)
    return by_rows, columns

  def _of_spans(self, i: int, w: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For pairs of spans of w updates: e^{-|G - M|} and its product with K, [64, K], and [C; Q] e^{G - M} of later spans."""
    factor = jnp.exp(_beyond_middle(self.totals[i], w))
    ys = self.keys[i] * factor
    along = ys if self.covectors is self.keys else self.covectors[i] * factor
    rows = [_later(along, w)] * self.step.erases + [_later(self.queries[i], w) * _later(factor, w)]
    return factor, ys, jnp.concatenate(rows)

  def read(self, i: int, state: jax.Array, only_keys: bool = False) -> jax.Array:
    """[C; Q] e^G S, or only C e^G S."""
    return three(self._of_read(i, only_keys), parts(state))

  def write_back(self, i: int, d_read: jax.Array) -> jax.Array:
    """The cotangent of S for that of its read, ([C; Q] e^G)^T d_read."""
    return three(self._of_read(i), parts(d_read), BY_TOKENS)

  def _of_read(self, i: int, only_keys: bool = False) -> Parts:
    decay = jnp.exp(self.totals[i])
    return parts(jnp.concatenate([x * decay for x in self._both[i][: 1 if only_keys else 2]]))

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
  """Of n rows of half a chunk, and columns of four halves: where both are in the same span of w, [n, 128]."""
  shift = w.bit_length() - 1
  row = jax.lax.broadcasted_iota(jnp.int32, (n, LANES), 0) & HALF - 1
  return (lane((n, LANES)) & HALF - 1) >> shift == row >> shift


def _square(x: jax.Array) -> jax.Array:
  """The transposed matrices [n, 64] of x [n, 128], side by side, [64, 128], with zeros in the place of further rows."""
  return transposed(_square_rows(x))


def _square_rows(x: jax.Array) -> jax.Array:
  """x [n, 128] with zeros below, [64, 128]."""
  return x if len(x) == CHUNK else jnp.concatenate([x, jnp.zeros((CHUNK - len(x), x.shape[1]), x.dtype)])


def _grams(xs: list, ys: list) -> jax.Array:
  """x y^T of two pairs x [n, K], y [64, K] in parts, side by side, [n, 128]."""
  if len(xs[0]) == 1:
    return grams(*([x for (x,) in both] for both in (xs, ys)))
  (x, x_low), (other, other_low) = xs
  (y, y_low), (beside, beside_low) = ys
  left = is_left(len(x))
  zeros = jnp.zeros_like(y)
  by_first = dot(x, jnp.concatenate([y, y_low]), BY_ROWS)
  by_second = dot(other, jnp.concatenate([beside_low, beside]), BY_ROWS)
  by_low = dot(x_low, jnp.concatenate([y, zeros]), BY_ROWS) + dot(other_low, jnp.concatenate([zeros, beside]), BY_ROWS)
  return jnp.where(left, by_first, by_second) + by_low + swapped(jnp.where(left, by_second, by_first))
