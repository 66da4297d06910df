"""What both kernels for TPUs share: the size of a step of their grid, what it needs of gates, and how a kernel reads that.

A chunk has 64 updates. Of two updates per token, those of eight tokens lie together: eight first updates, then eight second
ones, so that whole registers are moved.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ..documents import Documents
from ..tpu_products import LANES, full_precision
from .tpu_tiles import CHUNK, GROUP, MASKED, is_left

# States of a step with heads of 128 channels. Backwards, what sixteen store in between would not fit into a v4's 16 MiB.
STATES, STATES_BACKWARDS = 16, 8
# e^-104 is 0 in float32. Sums of 64 such log-decays are still exact to 5e-4.
MIN_LOG_DECAY = -104.0
# The largest exponent of a factor of a decay by channel. e^80 is far from the largest float.
_MAX_EXPONENT = 80.0


class Step(NamedTuple):
  """The static arguments of a step.

  Attributes:
    rows, heads: rows of the batch, and heads of each.
    per_key: heads of the step that share a key.
    shared: steps that share a key.
    key_dim, value_dim, scale: K, V, and the factor of the read.
    documents: whether there are boundaries of documents.
    erases: whether updates have strengths.
    by_channel: whether every channel has a decay of its own.
    span: tokens of the spans that have an M in their middle, a power of two from 8 to 32; see `tpu_decays.py`.
    updates: updates of a token, 1 or 2.
    full: whether activations are float32, and multiplied at full precision.
  """

  rows: int
  heads: int
  per_key: int
  shared: int
  key_dim: int
  value_dim: int
  scale: float
  documents: bool
  erases: bool
  by_channel: bool = False
  span: int = 8
  updates: int = 1
  full: bool = False

  def kernel(self, function: Callable[..., None]) -> Callable[..., None]:
    """The kernel of a function of the step and references."""
    return (full_precision if self.full else lambda kernel: kernel)(partial(function, self))

  @property
  def tokens(self) -> int:
    """Tokens of a chunk."""
    return CHUNK // self.updates

  @property
  def min_log_decay(self) -> float:
    """Smaller log-decays are like this one."""
    return -2 * _MAX_EXPONENT / self.span if self.by_channel else MIN_LOG_DECAY

  @property
  def states(self) -> list[tuple[int, int]]:
    """(row, head) of every state."""
    return [(b, h) for b in range(self.rows) for h in range(self.heads)]

  @property
  def pairs(self) -> list[tuple[int, int]]:
    """Indices of the states that lie side by side. One that is left over lies beside itself."""
    last = len(self.states) - 1
    return [(i, min(i + 1, last)) for i in range(0, last + 1, 2)]

  @property
  def keys(self) -> list[tuple[int, int]]:
    """(row, key) of every state."""
    return [(b, h // self.per_key) for b, h in self.states]

  @property
  def gates(self) -> list[str]:
    """What `prepare` begins with."""
    return ["strength"] * self.erases + ["total"] * (not self.by_channel) + ["document"] * self.documents

  def of_updates(self, *xs: jax.Array, axis: int = 0) -> jax.Array:
    """Arrays of a chunk's tokens, one for every update, as one of its updates; or one array for all updates of a token."""
    if self.updates == 1:
      return xs[0]
    before, after = xs[0].shape[:axis], xs[0].shape[axis + 1 :]
    groups = [x.reshape(*before, -1, 1, GROUP, *after) for x in (xs if len(xs) == self.updates else xs * self.updates)]
    return jnp.concatenate(groups, axis=axis + 1).reshape(*before, -1, *after)

  def of_tokens(self, x: jax.Array, axis: int = 0) -> list[jax.Array]:
    """The inverse of `of_updates`: for every update, an array of the tokens."""
    if self.updates == 1:
      return [x]
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*before, -1, self.updates, GROUP, *after)
    parts = (jax.lax.index_in_dim(x, m, axis + 1, keepdims=False) for m in range(self.updates))
    return [part.reshape(*before, -1, *after) for part in parts]


class Blocks:
  """The parts of arrays that a step takes, as `BlockSpec`s.

  Args:
    step: static arguments.
    chunks: number of chunks.
    state: shape of the state, (B, H, K, V).
    backwards: whether steps go from the last chunk to the first.

  Attributes:
    keys: of [B, T, Hk * K].
    key_gradients: of [shared, B, T, Hk * K], a part of the sum for every step that shares the key.
    values: of [B, T, H * V].
    decays: of [B, T, H * K].
    state: of [B, H, K, V], the same for all chunks, so it has one buffer.
    states: of [chunks, B, H, K, V].
    grid: the steps of rows [B], heads [H] and chunks.
  """

  def __init__(self, step: Step, chunks: int, state: tuple[int, ...], backwards: bool = False):
    batch, heads, *_ = state
    self.grid = batch // step.rows, heads // step.heads, chunks
    self._chunk = (lambda n: chunks - 1 - n) if backwards else (lambda n: n)
    width = max(1, step.heads // step.per_key) * step.key_dim

    def key(h):
      return h if step.shared == 1 else jax.lax.div(h, h.dtype.type(step.shared))

    def part(h):
      return 0 if step.shared == 1 else jax.lax.rem(h, h.dtype.type(step.shared))

    def spec(shape, index):
      return pl.BlockSpec(shape, lambda b, h, n: index(b, h, self._chunk(n)))

    of_state = step.rows, step.heads, step.key_dim, step.value_dim
    self.keys = spec((step.rows, step.tokens, width), lambda b, h, n: (b, n, key(h)))
    self.key_gradients = spec((1, step.rows, step.tokens, width), lambda b, h, n: (part(h), b, n, key(h)))
    self.values = spec((step.rows, step.tokens, step.heads * step.value_dim), lambda b, h, n: (b, n, h))
    self.decays = spec((step.rows, step.tokens, step.heads * step.key_dim), lambda b, h, n: (b, n, h))
    self.state = pl.BlockSpec(of_state, lambda b, h, n: (b, h, 0, 0), pipeline_mode=pl.Buffered(1))
    self.states = spec((1, *of_state), lambda b, h, n: (n, b, h, 0, 0))

  def gates(self, x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Of the arrays of `prepare`."""
    return pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, h, n: (b, h, self._chunk(n), 0, 0))


def whole(x: np.ndarray) -> pl.BlockSpec:
  """All of a constant."""
  return pl.BlockSpec(x.shape, lambda b, h, n: (0,) * x.ndim, pipeline_mode=pl.Buffered(1))


def largest(states: int, batch: int, key_heads: int, state: tuple[int, ...], *others: Any) -> Step:
  """The largest step: so many heads of a row as fit, and so many rows.

  Args:
    states: the most states of 128 by 128 channels.
    batch, key_heads: numbers of rows, and of heads with keys.
    state: shape of the state, (B, H, K, V).
    *others: the last fields of `Step`.
  """
  _, heads, key_dim, value_dim = state
  states = max(1, min(states, states * LANES**2 // (key_dim * value_dim)))
  per_key = heads // key_heads

  def fits(n):  # the arrays of a step begin at whole registers
    keys = max(1, n // per_key)
    aligned = n * value_dim % LANES == 0 and keys * key_dim % LANES == 0
    return heads % n == 0 and (n % per_key == 0 or per_key % n == 0) and (aligned or n == heads)

  in_step = next((n for n in range(min(heads, states), 0, -1) if fits(n)), heads)
  rows = next(n for n in range(max(1, states // in_step), 0, -1) if batch % n == 0)
  return Step(rows, in_step, min(per_key, in_step), max(1, per_key // in_step), key_dim, value_dim, *others)


def longest_span(decay_bound: float | None) -> int:
  """The most tokens whose decays by channel do not leave the range of floats, as `Step.span`. Without a bound it is 8."""
  return next((n for n in (32, 16) if decay_bound is not None and n * -decay_bound <= 2 * _MAX_EXPONENT), 8)


def prepare(
  step: Step, shape: tuple[int, ...], docs: Documents | None, strengths: Sequence[jax.Array], log_decay: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """What kernels need of strengths, decays and documents, in float32, by step and chunk.

  Args:
    step: static arguments.
    shape: (B, T, H).
    docs: documents of the tokens, or `None`.
    strengths: of every update, [B, T, H], or none.
    log_decay: [B, T, H], or `None`, as it is if every channel has one.

  Returns:
    columns: [B / rows, H / heads, chunks, 64, n], updates by states: strengths, sums G of log-decays, the document, e^G and
      e^{G_C - G}.
    rows: [B / rows, H / heads, chunks, m, 128], pairs by the updates of both: strengths, G, and the document; in a last row
      e^{G_C}, one number per state.
  """
  decay = jnp.zeros(shape, jnp.float32) if log_decay is None else jnp.maximum(log_decay.astype(jnp.float32), MIN_LOG_DECAY)
  total = jnp.cumsum(_by_state(step, decay), axis=-1)
  end = total[..., -1:]
  entering, leaving, keep = jnp.exp(total), jnp.exp(end - total), jnp.exp(end)
  both = [] if step.by_channel else [total]
  if docs is not None:
    index = _by_state(step, jnp.broadcast_to(docs.index[..., None], shape).astype(jnp.float32))
    last = index[..., -1:]
    entry = jnp.concatenate([jnp.zeros_like(last[:, :, :1]), last[:, :, :-1]], axis=2)
    entering, leaving = jnp.where(index == entry, entering, 0), jnp.where(index == last, leaving, 0)
    keep = jnp.where(entry == last, keep, 0)
    both.append(index)
  *both, entering, leaving = (step.of_updates(x, axis=x.ndim - 1) for x in (*both, entering, leaving))
  if strengths:
    both.insert(0, step.of_updates(*(_by_state(step, x.astype(jnp.float32)) for x in strengths), axis=total.ndim - 1))
  columns = jnp.concatenate([*both, entering, leaving], axis=-2).swapaxes(-1, -2)
  first, second = map(np.array, zip(*step.pairs, strict=True))
  rows = [jnp.concatenate([x[..., first, :], x[..., second, :]], axis=-1) for x in both]
  keep = jnp.pad(keep.swapaxes(-1, -2), ((0, 0),) * 4 + ((0, LANES - keep.shape[-2]),))
  return columns, jnp.concatenate([*rows, keep], axis=-2)


def _by_state(step: Step, x: jax.Array) -> jax.Array:
  """[B, T, H] to [B / rows, H / heads, chunks, states, tokens]."""
  batch, tokens, heads = x.shape
  x = x.reshape(batch // step.rows, step.rows, tokens // step.tokens, step.tokens, heads // step.heads, step.heads)
  x = x.transpose(0, 4, 2, 1, 5, 3)
  return x.reshape(*x.shape[:3], -1, step.tokens)


def _by_token(step: Step, x: jax.Array) -> jax.Array:
  """The inverse of `_by_state`."""
  x = x.reshape(*x.shape[:3], step.rows, step.heads, step.tokens).transpose(0, 3, 2, 5, 1, 4)
  return x.reshape(x.shape[0] * step.rows, x.shape[2] * step.tokens, -1)


def gate_gradients(step: Step, columns: jax.Array, rows: jax.Array) -> tuple[list[jax.Array], jax.Array]:
  """The gradients of strengths and log-decays, [B, T, H], from their parts.

  Args:
    step: static arguments.
    columns: [B / rows, H / heads, chunks, 64, n], updates by states: of strengths, of sums of log-decays, and what all later
      log-decays of the chunk get from a token.
    rows: [B / rows, H / heads, chunks, m, 128], pairs by the updates of both: of strengths, and of sums of log-decays; in a
      last row what all log-decays of the chunk get, one number per state.
  """
  states, pairs = len(step.states), len(step.pairs)

  def by_column(i):
    return columns[..., i * states : (i + 1) * states].swapaxes(-1, -2)

  def by_row(i):
    return rows[..., i * pairs : (i + 1) * pairs, :].reshape(*rows.shape[:3], -1, CHUNK)[..., :states, :]

  i = int(step.erases)
  strengths = strength_gradients(step, columns[..., :states], rows[..., :pairs, :]) if step.erases else []
  total, write = (sum(step.of_tokens(x, axis=x.ndim - 1)) for x in (by_column(i) + by_row(i), by_column(i + 1)))
  later = jnp.flip(jnp.cumsum(jnp.flip(total, -1), axis=-1), -1)
  # A token writes after its own decay. Sums of earlier tokens instead of differences: those would cancel if decays are strong.
  earlier = jnp.pad(jnp.cumsum(write, axis=-1)[..., :-1], ((0, 0),) * 4 + ((1, 0),))
  return strengths, _by_token(step, later + earlier + rows[..., -1, :states, None])


def strength_gradients(step: Step, columns: jax.Array, rows: jax.Array) -> list[jax.Array]:
  """The gradients of every update's strengths, [B, T, H], from parts: updates by states, and pairs by the updates of both."""
  by_row = rows.reshape(*rows.shape[:3], -1, CHUNK)[..., : len(step.states), :]
  total = columns.swapaxes(-1, -2) + by_row
  return [_by_token(step, x) for x in step.of_tokens(total, axis=total.ndim - 1)]


class Chunk:
  """What a step of a kernel reads of its chunk.

  Attributes:
    keys, queries: by state, [64, K].
    keep: e^{G_C}, [1, 128].
  """

  def __init__(self, step: Step, q_ref: Any, k_refs: Sequence[Any], columns_ref: Any, rows_ref: Any, mask_ref: Any):
    self.step, self.mask_ref = step, mask_ref
    states, pairs = len(step.states), len(step.pairs)
    columns, names = columns_ref[0, 0, 0], [*step.gates, "entering", "leaving"]
    self.columns = {name: columns[:, i * states : (i + 1) * states] for i, name in enumerate(names)}
    self.rows = {name: rows_ref[0, 0, 0, i * pairs : (i + 1) * pairs] for i, name in enumerate(step.gates)}
    self.keep = rows_ref[0, 0, 0, rows_ref.shape[3] - 1 :]
    keys, queries = ({at: head(step, refs, step.key_dim, *at) for at in step.keys} for refs in (k_refs, [q_ref]))
    self.keys, self.queries = [keys[at] for at in step.keys], [queries[at] for at in step.keys]

  def column(self, name: str, i: int, width: int) -> jax.Array:
    """A gate of state i, in all of `width` lanes, [64, width]."""
    return jnp.broadcast_to(self.columns[name][:, i : i + 1], (CHUNK, width))

  def side_by_side(self, name: str, p: int) -> jax.Array:
    """A gate of pair p by rows, [64, 128]."""
    return jnp.where(is_left(), *(self.column(name, i, LANES) for i in self.step.pairs[p]))

  def row(self, name: str, p: int) -> jax.Array:
    """A gate of pair p by columns, [1, 128]."""
    return self.rows[name][p : p + 1]

  def exponents(self, p: int) -> jax.Array:
    """G_i - G_j of pair p, and `MASKED` between documents."""
    difference = self.side_by_side("total", p) - self.row("total", p)
    if self.step.documents:
      difference = jnp.where(self.side_by_side("document", p) == self.row("document", p), difference, MASKED)
    return difference

  def pairs(self, x: list[jax.Array]) -> list[list[jax.Array]]:
    return [[x[i] for i in pair] for pair in self.step.pairs]


def head(step: Step, refs: Sequence[Any], dim: int, row: int, h: int) -> jax.Array:
  """Head h of a row of the last updates, each [rows, tokens, heads * dim], as one of the chunk's updates, [64, dim].

  Earlier updates are zero.
  """
  xs = [ref[row, :, h * dim : (h + 1) * dim] for ref in refs]
  if step.updates == 1:
    return xs[0]
  wide = [x.astype(jnp.float32) for x in xs]
  return step.of_updates(*[jnp.zeros_like(wide[0])] * (step.updates - len(xs)), *wide).astype(xs[0].dtype)


def put(step: Step, refs: Sequence[Any], row: int, h: int, x: jax.Array) -> None:
  """Writes the last updates of x [64, dim] as head h of a row, the inverse of `head`."""
  for ref, part in zip(refs, step.of_tokens(x)[step.updates - len(refs) :], strict=True):
    ref[row, :, h * x.shape[1] : (h + 1) * x.shape[1]] = part.astype(ref.dtype)


def start(step: Step, initial_ref: Any, state_ref: Any, states_ref: tuple[Any, ...] = ()) -> None:
  """Begins with the initial state, or its cotangent, and keeps that before the chunk, if there is a reference for it."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    @pl.loop(0, step.heads)
    def _(h):
      state_ref[:, h] = initial_ref[:, h]

  for ref in states_ref:

    @pl.loop(0, step.heads)
    def _(h, ref=ref):
      ref[0, :, h] = state_ref[:, h]
