"""What a chunk computes from its tokens alone, before it knows the state: its rows, masks, decays and inner products.

A chunk has C tokens and R = C * r updates, one row each. The axes of arrays are N (chunks x batch x heads), C and R. N is one
axis because XLA on a CPU is slow at products with several batch axes, and crashes on some.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..documents import Documents
from ..numerics import FULL, Precision, einsum, inner_products, sums
from ..partition import varying_alike

# exp() of this is 0 in every float type, and so is its gradient. Unlike -inf, it gives 0 when multiplied by the 0 of a mask.
_MIN_LOG_DECAY = -1e4
# The largest exponent of one factor of a split decay. Two factors multiply to e^80 at most, far from overflow in float32.
_MAX_EXPONENT = 40.0


class Update(NamedTuple):
  """One rank-1 update of every token, S <- S - (strength k)(e^T S) + k (strength v)^T.

  Attributes:
    key: k, [B, T, Hk, K].
    strength: [B, T, H]; `None` for 1.
    value: v, [B, T, H, V]; `None` for zero.
    covector: e, [B, T, Hk, K]; `None` for the key or, without a strength, for an update that only adds, S <- S + k v^T.
  """

  key: jax.Array
  strength: jax.Array | None
  value: jax.Array | None
  covector: jax.Array | None = None

  @property
  def erases(self) -> bool:
    return self.strength is not None or self.covector is not None


class Walk(NamedTuple):
  """How the state goes through the chunks of a block; see `chunked.walk` and `chunked.walk_back`.

  Attributes:
    forward, backward: called as these are.
    inverse: called as `triangular.unit_lower_inverse`, in place of the usual one, or `None`.
  """

  forward: Callable[..., tuple[jax.Array, ...]]
  backward: Callable[..., tuple[jax.Array, ...]]
  inverse: Callable[[jax.Array], jax.Array] | None = None


class Plan(NamedTuple):
  """The static arguments of the chunked form.

  Attributes:
    updates: maps the operands [B, T, ...] of a variant to q [B, T, Hk, K] and its updates, which have no effect where all
      operands are zero.
    heads: number of value heads, H.
    scale: factor of the read.
    dtype: of the arithmetic, and of the state.
    out_dtype: of the output.
    chunk_size: C, a power of two.
    block: chunks in a block.
    group: tokens in a group, a power of two up to C. Rows are ordered by group, update and token within the group. One token
      per group is the order of the recurrence; eight make the rows of a group of tokens whole tiles of a TPU.
    unroll: iterations of the scan over the chunks of a block that are compiled as one.
    raw: dtype in which queries and keys are multiplied with each other; `dtype` to widen them.
    precision: of products with intermediates.
    whole_chunks: whether to prefer whole chunks to slices of them, which suits GPUs and TPUs, in the inverse of (I + A) and in
      products with decays per channel.
    decay_bound: a lower bound of every log-decay, which makes per-channel decays cheaper; or `None`.
    undecayed: whether covectors read the state before the token's decay: for one update and one decay per head.
    shares: whether the form is `sums`, which shares products between the heads of a key, instead of `chunked`.
    walk: how the state goes through the chunks; `None` for a scan over them.
  """

  updates: Callable[..., tuple[jax.Array, Sequence[Update]]]
  heads: int
  scale: float
  dtype: jnp.dtype
  out_dtype: jnp.dtype
  chunk_size: int
  block: int = 1
  group: int = 1
  unroll: int = 1
  raw: jnp.dtype | None = None
  precision: Precision = FULL
  whole_chunks: bool = False
  decay_bound: float | None = None
  undecayed: bool = False
  shares: bool = False
  walk: Walk | None = None


class Tokens(NamedTuple):
  """The tokens of N chunks, in the dtypes of the updates.

  Attributes:
    q: [N, C, K].
    keys: [N, R, K].
    covectors: [N, R, K]; `None` where they are the keys, and for updates that only add.
    strengths: [N, R]; `None` for 1.
    values: [N, R, V].
    log_decay: [N, C, K or 1], or `None`.
  """

  q: jax.Array
  keys: jax.Array
  covectors: jax.Array | None
  strengths: jax.Array | None
  values: jax.Array
  log_decay: jax.Array | None

  @property
  def erases(self) -> bool:
    return self.strengths is not None or self.covectors is not None

  @property
  def read_along(self) -> jax.Array:
    """What the updates read the state along, [N, R, K]."""
    return self.keys if self.covectors is None else self.covectors

  def times_strength(self, x: jax.Array) -> jax.Array:
    """x [N, R, X] times the strengths, in the dtype of x."""
    return x if self.strengths is None else self.strengths[..., None].astype(x.dtype) * x


class Masks(NamedTuple):
  """Which tokens and rows see each other; `None` where all do.

  Attributes:
    read: [N or 1, C, R], the rows that a token's read sees: those of its document, up to its own.
    update: [N or 1, R, R], the earlier rows of the same document.
    enters: [N, C], tokens of the document that the incoming state belongs to.
    leaves: [N, C], tokens of the document that the outgoing state belongs to.
    keeps: [N], whether these are the same document.
  """

  read: jax.Array
  update: jax.Array
  enters: jax.Array | None = None
  leaves: jax.Array | None = None
  keeps: jax.Array | None = None


class Terms(NamedTuple):
  """What N chunks contribute, apart from the state. Decays are one per channel or one in all, [..., K or 1].

  Attributes:
    scores: P, [N, C, R].
    overlaps: A without its strengths, [N, R, R]; `None` for updates that only add.
    entering: e^G, [N, C, K or 1]; 0 for tokens of later documents.
    leaving: e^{G_C - G}, [N, C, K or 1]; 0 for tokens of earlier documents.
    keep: e^{G_C}, [N, K or 1]; 0 if the document ends.
    undecayed: e^{G - g}, like `entering` but without the token's own decay; `None` if covectors read the decayed state.
  """

  scores: jax.Array
  overlaps: jax.Array | None
  entering: jax.Array
  leaving: jax.Array
  keep: jax.Array
  undecayed: jax.Array | None = None

  @property
  def erasing(self) -> jax.Array:
    """The decays of the state that the updates of each token read, [N, C, K or 1]."""
    return self.entering if self.undecayed is None else self.undecayed


def arrange_tokens(plan: Plan, docs: Documents | None, operands: Any, log_decay: jax.Array | None) -> Tokens:
  """Arranges a block's operands [B, L, ...] in chunks."""
  if docs is not None:  # the inputs at padding may hold anything
    operands, log_decay = jax.tree.map(partial(zero_padding, docs.is_token), (operands, log_decay))
  q, updates = plan.updates(*operands)

  def chunks(x):
    return None if x is None else to_chunks(_repeat_heads(x, plan.heads), plan.chunk_size)

  def rows(name):
    columns = [chunks(getattr(update, name)) for update in updates]
    present = [x for x in columns if x is not None]
    zeros = [jnp.zeros_like(present[0]) if x is None else x for x in columns] if present else []
    return _stack_rows(plan, zeros) if present else None

  return Tokens(chunks(q), *map(rows, ("key", "covector", "strength", "value")), chunks(log_decay))


def make_masks(plan: Plan, docs: Documents | None, entry: jax.Array | None, updates: int) -> Masks:
  """The masks of a block with these documents, whose incoming state belongs to document `entry` [B] of each row.

  Args:
    plan: static arguments.
    docs: documents of the block's tokens, [B, L], or `None`.
    entry: int32 [B].
    updates: r.
  """
  token, order = _rows(plan, updates)
  read, update = (token <= np.arange(plan.chunk_size)[:, None])[None], (order < order[:, None])[None]
  if docs is None:
    return Masks(jnp.asarray(read), jnp.asarray(update))
  index = to_chunks(jnp.repeat(docs.index[..., None], plan.heads, axis=2), plan.chunk_size)
  last = index[:, -1:]
  entry = jnp.concatenate([jnp.repeat(entry, plan.heads)[:, None], last])[: last.shape[0]]
  row = by_row(plan, index, updates)
  return Masks(
    jnp.asarray(read) & (index[:, :, None] == row[:, None]),
    jnp.asarray(update) & (row[:, :, None] == row[:, None]),
    index == entry,
    index == last,
    (entry == last)[:, 0],
  )


def make_terms(
  plan: Plan,
  masks: Masks,
  q: jax.Array,
  keys: jax.Array,
  covectors: jax.Array | None,
  log_decay: jax.Array | None,
  *,
  erases: bool,
) -> Terms:
  """Computes `Terms` of N chunks in parallel.

  JAX differentiates it by q [N, C, K], keys and covectors [N, R, K] (`None` for the keys), and log_decay.
  """
  log_decay = bounded_log_decay(plan, q, log_decay)
  products = partial(_decayed_products, plan, keys, log_decay)
  along = keys if covectors is None else covectors
  entering, leaving, keep = boundary_decays(plan, masks, log_decay, q.shape[0])
  return Terms(
    jnp.where(masks.read, products(q), 0) * jnp.asarray(plan.scale, plan.dtype),
    jnp.where(masks.update, products(along, undecayed=plan.undecayed), 0) if erases else None,
    entering,
    leaving,
    keep,
    _decays_before(plan, masks, log_decay, q.shape[0]) if plan.undecayed else None,
  )


def bounded_log_decay(plan: Plan, q: jax.Array, log_decay: jax.Array | None) -> jax.Array:
  """Log-decays that are finite, [N, C, D]; for `None`, zeros [1, C, 1] that vary like q."""
  if log_decay is None:
    log_decay = varying_alike(q, jnp.zeros((1, plan.chunk_size, 1), plan.dtype))
  return jnp.maximum(log_decay, _MIN_LOG_DECAY)


def boundary_decays(plan: Plan, masks: Masks, log_decay: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Decays of n chunks from and to their ends, for log_decay [n or 1, C, D]: `entering`, `leaving` and `keep` of `Terms`."""
  entering, leaving = (jnp.exp(_sum(plan, weights(plan.chunk_size), log_decay)) for weights in (_up_to, _after))
  keep = entering[:, -1]
  if masks.enters is not None:
    entering = jnp.where(masks.enters[..., None], entering, 0)
    leaving = jnp.where(masks.leaves[..., None], leaving, 0)
    keep = jnp.where(masks.keeps[:, None], keep, 0)
  return tuple(jnp.broadcast_to(x, (n, *x.shape[1:])) for x in (entering, leaving, keep))


def _decays_before(plan: Plan, masks: Masks, log_decay: jax.Array, n: int) -> jax.Array:
  """Decays from the ends of n chunks to the state before each token: `undecayed` of `Terms`."""
  decays = jnp.exp(_sum(plan, _before(plan.chunk_size), log_decay))
  decays = decays if masks.enters is None else jnp.where(masks.enters[..., None], decays, 0)
  return jnp.broadcast_to(decays, (n, *decays.shape[1:]))


def cumulative(plan: Plan, log_decay: jax.Array) -> jax.Array:
  """G, the sums of log_decay [N, C, D] up to and including each token."""
  return _sum(plan, _up_to(plan.chunk_size), log_decay)


@partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3))
def by_row(plan: Plan, x: jax.Array, updates: int, axis: int = 1) -> jax.Array:
  """Repeats x [N, C, ...] for every update of a token: [N, R, ...]; or along another axis."""
  if updates == 1:
    return x
  before, after = x.shape[:axis], x.shape[axis + 1 :]
  x = jnp.expand_dims(x.reshape(*before, -1, plan.group, *after), axis + 1)
  x = jnp.broadcast_to(x, (*x.shape[: axis + 1], updates, *x.shape[axis + 2 :]))
  return x.reshape(*before, -1, *after)


def sum_rows(plan: Plan, x: jax.Array, updates: int, axis: int = 1) -> jax.Array:
  """The transpose of `by_row`: sums x [N, R, ...] over the updates of a token, [N, C, ...]."""
  if updates == 1:
    return x
  before, after = x.shape[:axis], x.shape[axis + 1 :]
  x = x.reshape(*before, -1, updates, plan.group, *after)
  # Added one by one, the updates are fused with what computes them; a reduction would not be.
  total = functools.reduce(jnp.add, (jax.lax.index_in_dim(x, m, axis + 1, keepdims=False) for m in range(updates)))
  return total.reshape(*before, -1, *after)


by_row.defvjp(
  lambda plan, x, updates, axis: (by_row(plan, x, updates, axis), None),
  lambda plan, updates, axis, _, d: (sum_rows(plan, d, updates, axis),),
)


def _rows(plan: Plan, updates: int) -> tuple[np.ndarray, np.ndarray]:
  """The token of each row, and its place in the order of the recurrence, [R] each."""
  groups = np.arange(plan.chunk_size).reshape(-1, 1, plan.group)
  token = np.broadcast_to(groups, (len(groups), updates, plan.group))
  order = token * updates + np.arange(updates)[:, None]
  return token.reshape(-1), order.reshape(-1)


def row_order(plan: Plan, updates: int) -> tuple[int, ...]:
  """The order of the recurrence among the rows of whole groups: of one, or of as many as have 16 rows together."""
  _, order = _rows(plan, updates)
  group = plan.group * updates
  while 2 * group <= min(16, len(order)):
    group *= 2
  return tuple(map(int, np.argsort(order[:group])))


def _stack_rows(plan: Plan, updates: Sequence[jax.Array]) -> jax.Array:
  """[N, C, ...] of each update to [N, R, ...]."""
  if len(updates) == 1:
    return updates[0]
  n, c, *rest = updates[0].shape
  stacked = jnp.stack([x.reshape(n, -1, plan.group, *rest) for x in updates], axis=2)
  return stacked.reshape(n, c * len(updates), *rest)


def _decayed_products(plan: Plan, keys: jax.Array, log_decay: jax.Array, x: jax.Array, undecayed: bool = False) -> jax.Array:
  """Products x_i k_j [N, X, R] times the decay from the token of j to that of i; x [N, X, K] has some rows per token.

  Entries where j is later than i are meaningless; the caller masks them. With `undecayed`, for one decay per head, the decay of
  the token of i is left out.

  Per-channel decays multiply the factors. A span of tokens is split at its middle: rows of x in the later half are decayed from
  the middle on, keys in the earlier half up to the middle, so no exponent is positive. Spans start at single tokens and double.
  With `decay_bound` they start at the longest span whose tokens can be decayed relative to the middle in one product, with
  exponents of at most 40 in size.
  """
  c, width = log_decay.shape[1:]
  x_rows, k_rows = (partial(by_row, plan, updates=y.shape[1] // c) for y in (x, keys))
  if width == 1:
    between = decays_between(plan, log_decay, undecayed)
    return inner_products(x, keys, plan.raw, plan.precision) * k_rows(x_rows(between), axis=2)
  return (_by_masks if plan.whole_chunks else _by_halves)(plan, keys, log_decay, x, x_rows, k_rows)


def _by_halves(plan, keys, log_decay, x, x_rows, k_rows):
  """Decays per channel, with slices of spans: the fewest FLOPs, for CPUs."""
  c, width = log_decay.shape[1:]
  product = partial(einsum, "lrk,lsk->lrs", precision=plan.precision)
  span = first_span(c, plan.decay_bound)
  since_middle = _sum(plan, _since_middle(span), log_decay.reshape(-1, span, width))
  out = product(_spans(x, c // span) * jnp.exp(x_rows(since_middle)), _spans(keys, c // span) * jnp.exp(k_rows(-since_middle)))
  while span < c:
    pairs = c // span // 2
    early, late = jnp.moveaxis(log_decay.reshape(-1, 2, span, width), 1, 0)
    late_x = _spans(x, pairs, 2)[:, 1] * jnp.exp(x_rows(_sum(plan, _up_to(span), late)))
    early_keys = _spans(keys, pairs, 2)[:, 0] * jnp.exp(k_rows(_sum(plan, _after(span), early)))
    across = product(late_x, early_keys)
    first, second = jnp.moveaxis(out.reshape(-1, 2, *out.shape[1:]), 1, 0)
    top = jnp.concatenate([first, jnp.zeros_like(across)], axis=2)
    out = jnp.concatenate([top, jnp.concatenate([across, second], axis=2)], axis=1)
    span *= 2
  return out


def _by_masks(plan, keys, log_decay, x, x_rows, k_rows):
  """Decays per channel, with a product of the whole chunk for each length of span, and masks: for GPUs and TPUs."""
  c = log_decay.shape[1]
  product = partial(einsum, "lrk,lsk->lrs", precision=plan.precision)
  x_token, k_token = (_rows(plan, rows.keywords["updates"])[0] for rows in (x_rows, k_rows))
  span = first_span(c, plan.decay_bound)
  blocks = np.eye(c // span)
  since_middle = _sum(plan, np.kron(blocks, _since_middle(span)), log_decay)
  out = product(x * jnp.exp(x_rows(since_middle)), keys * jnp.exp(k_rows(-since_middle)))
  while span < c:
    pairs, half = np.eye(c // span // 2), np.arange(c) // span
    late = _sum(plan, np.kron(pairs, np.kron(np.diag([0, 1]), _up_to(span))), log_decay)
    early = _sum(plan, np.kron(pairs, np.kron(np.diag([1, 0]), _after(span))), log_decay)
    across = product(x * jnp.exp(x_rows(late)), keys * jnp.exp(k_rows(early)))
    x_half, k_half = half[x_token][:, None], half[k_token]
    out = jnp.where(jnp.asarray((x_half % 2 == 1) & (k_half == x_half - 1))[None], across, out)
    span *= 2
  return out


def first_span(chunk_size: int, decay_bound: float | None) -> int:
  """The number of tokens whose decays are split at one middle: 1 without a bound."""
  span = chunk_size
  while span > 1 and (decay_bound is None or span // 2 * -decay_bound > _MAX_EXPONENT):
    span //= 2
  return span


def _spans(x: jax.Array, *counts: int) -> jax.Array:
  """x [N, X, K] cut along its rows, [N * counts[0], *counts[1:], rows, K]."""
  return x.reshape(x.shape[0] * counts[0], *counts[1:], -1, x.shape[-1])


# Sums of log-decays are matrix products with zeros and ones. All terms have one sign, so nothing cancels, as it would in
# differences of cumulative sums.


def _up_to(c: int) -> np.ndarray:
  """Weights [C, C] of sums up to and including each token."""
  return np.tri(c)


def _before(c: int) -> np.ndarray:
  """Weights of sums over the tokens before each token."""
  return np.tri(c, k=-1)


def _after(c: int) -> np.ndarray:
  """Weights of sums over the tokens after each token."""
  return 1 - np.tri(c)


def _since_middle(c: int) -> np.ndarray:
  """Weights of sums from the middle of C to each token, negated for those before it."""
  return np.tri(c) - np.tri(c)[c // 2]


def decays_between(plan: Plan, log_decay: jax.Array, undecayed: bool = False) -> jax.Array:
  """The decay from token j to token i, [N, C, C], of log-decays [N, C, 1]; 1 where j is not before i.

  With `undecayed` it is that to the state before token i.
  """
  c = log_decay.shape[1]
  weights = _before(c) if undecayed else _up_to(c)
  return jnp.exp(_sum(plan, weights, log_decay * jnp.asarray(_after(c).T, log_decay.dtype)[None]))


def _sum(plan: Plan, weights: np.ndarray, x: jax.Array) -> jax.Array:
  """Weighted sums of x [N, C, K] over its tokens, [N, R, K], with the weights [R, C]: zeros, ones and minus ones."""
  weights = jnp.asarray(weights, x.dtype)[None]
  return sums(jnp.broadcast_to(weights, (x.shape[0], *weights.shape[1:])), x, plan.precision)


def zero_padding(is_token: jax.Array, x: jax.Array) -> jax.Array:
  """Sets the padding of x [B, T, ...] to zero."""
  return jnp.where(jnp.expand_dims(is_token, range(2, x.ndim)), x, 0)


def _repeat_heads(x: jax.Array, heads: int) -> jax.Array:
  """x [B, T, Hk, ...] with each head repeated for the value heads that share it."""
  return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def to_chunks(x: jax.Array, chunk_size: int) -> jax.Array:
  """[B, n * C, H, ...] -> [n * B * H, C, ...]."""
  batch, _, heads, *rest = x.shape
  x = x.reshape(batch, -1, chunk_size, heads, *rest)
  return x.transpose(1, 0, 3, 2, *range(4, x.ndim)).reshape(-1, chunk_size, *rest)
