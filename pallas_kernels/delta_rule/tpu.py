"""The forward pass in one kernel for TPUs, of one update per token and one decay per head.

A step of its grid takes a chunk of 64 tokens of up to sixteen heads, whose states stay in fast memory from step to step. For
one head, with sums G of the log-decays, D_ij = e^{G_i - G_j} for j <= i of one document, else 0, strengths s, and L = K K^T D
without its diagonal:

    R = V - e^G K S                          U = (I + s L)^-1 s R
    O = scale (e^G Q S + (Q K^T D) U)        S <- e^{G_C} S + K^T e^{G_C - G} U

Without strengths U is V. Products with a float32 operand are made in three passes over bfloat16 halves, as `numerics.SPLIT`
says; queries, keys and values are bfloat16 already. So errors are about those of rounding the output.

What the layout is for:

- Two heads lie side by side in matrices [64, 128], since a chunk is half as wide as the matrix unit and the registers.
- A product over 64 tokens uses half of the unit's depth. The other half takes the second half of its right operand:
  [P P] [U_high; U_low] = P U in one pass.
- (I + s L)^-1 is made for halves of 32 tokens only: U_1 = T_1 s R_1, then U_2 = T_2 s (R_2 - L_21 U_1). With a depth of 32,
  three passes fit in one. T itself grows by rows up to 16 tokens, and from 16 to 32 by [T_1, 0; -T_2 s L_21 T_1, T_2].
- All heads of a step go through each stage together. One head is a chain of products that wait for each other.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..documents import Documents
from .terms import Plan

CHUNK, LANES = 64, 128
_HALF, _BASE = 32, 16  # tokens whose inverse is made by products, and by rows
# Kernels shift and mask: a division of integers asks for the chip at hand, also when compiling for another.
_LOG_HALF, _LOG_BASE = 5, 4
_HEADS = 16  # of a step
# e^-104 is 0 in float32. Sums of 64 such log-decays are still exact to 5e-4.
_MIN_LOG_DECAY = -104.0
_MASKED = -1e4

_BY_ROWS = ((1,), (1,))  # x y^T
_BY_TOKENS = ((0,), (0,))  # x^T y


class _Step(NamedTuple):
  """The static arguments of a step.

  Attributes:
    rows, heads: rows of the batch, and heads of each.
    per_key: heads that share a key.
    key_dim, value_dim, scale: K, V, and the factor of the read.
    documents: whether there are boundaries of documents.
    erases: whether updates have strengths.
  """

  rows: int
  heads: int
  per_key: int
  key_dim: int
  value_dim: int
  scale: float
  documents: bool
  erases: bool

  @property
  def states(self) -> list[tuple[int, int]]:
    """(row, head) of every state."""
    return [(b, h) for b in range(self.rows) for h in range(self.heads)]

  @property
  def pairs(self) -> list[tuple[int, int]]:
    """Indices of the states that lie side by side. One that is left over lies beside itself."""
    last = len(self.states) - 1
    return [(i, min(i + 1, last)) for i in range(0, last + 1, 2)]


def forward(
  plan: Plan,
  docs: Documents | None,
  operands: Any,
  log_decay: jax.Array | None,
  initial_state: jax.Array,
  *,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, H, V] in the dtype of the values, and the final state [B, H, K, V].

  Args:
    plan: static arguments; those of the arithmetic are not used.
    docs: document boundaries and padding; `None` for one document without padding.
    operands: of the variant, bfloat16 arrays [B, T, ...], and strengths if updates have any.
    log_decay: `None` or [B, T, H, 1].
    initial_state: float32 [B, H, K, V].
    interpret: as for `pallas_call`.
  """
  q, (update,) = plan.updates(*operands)
  inputs = q, update.key, update.value, update.strength, log_decay
  batch, tokens, key_heads, _ = q.shape
  step = _step_of(plan, batch, key_heads, initial_state.shape, docs is not None, update.strength is not None)
  if docs is not None:  # the inputs at padding may hold anything
    inputs = jax.tree.map(lambda x: jnp.where(docs.is_token.reshape(docs.is_token.shape + (1,) * (x.ndim - 2)), x, 0), inputs)
  inputs, docs = jax.tree.map(partial(_pad, tokens=-(-tokens // CHUNK) * CHUNK), (inputs, docs))
  q, k, v, strength, log_decay = inputs
  columns, rows = _gates(step, v.shape[:3], docs, strength, log_decay)
  out, state = _call(step, *(x.reshape(*x.shape[:2], -1) for x in (q, k, v)), columns, rows, initial_state, interpret)
  return out.reshape(batch, -1, *v.shape[2:])[:, :tokens], state


def _pad(x: jax.Array, tokens: int) -> jax.Array:
  """x [B, T, ...] with zeros up to so many tokens, or the last number of a document."""
  missing = ((0, 0), (0, tokens - x.shape[1])) + ((0, 0),) * (x.ndim - 2)
  return jnp.pad(x, missing, mode="edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant")


def _step_of(plan: Plan, batch: int, key_heads: int, state: tuple[int, ...], documents: bool, erases: bool) -> _Step:
  """The largest step: so many heads of a row as fit, and so many rows."""
  _, heads, key_dim, value_dim = state
  per_key = heads // key_heads

  def fits(n):
    whole_keys = n % per_key == 0 or per_key % n == 0
    return heads % n == 0 and whole_keys and (n == heads or all(n * d % LANES == 0 for d in (key_dim, value_dim)))

  in_step = next(n for n in range(min(heads, _HEADS), 0, -1) if fits(n)) if any(map(fits, range(1, _HEADS + 1))) else heads
  rows = next(n for n in range(max(1, _HEADS // in_step), 0, -1) if batch % n == 0)
  return _Step(rows, in_step, min(per_key, in_step), key_dim, value_dim, plan.scale, documents, erases)


def _gates(
  step: _Step, shape: tuple[int, ...], docs: Documents | None, strength: jax.Array | None, log_decay: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """What the kernel needs of strengths, decays and documents, in float32, by step and chunk.

  Returns:
    columns: [B / rows, H / heads, chunks, 64, n], tokens by states: strengths, G, the document, e^G and e^{G_C - G}.
    rows: [B / rows, H / heads, chunks, m, 128], pairs by the tokens of both: strengths, G, and the document; in a last row
      e^{G_C}, one number per state.
  """
  batch, tokens, heads = shape

  def by_state(x):  # [B, T, H] to [B / rows, H / heads, chunks, states, 64]
    x = x.reshape(batch // step.rows, step.rows, tokens // CHUNK, CHUNK, heads // step.heads, step.heads)
    x = x.transpose(0, 4, 2, 1, 5, 3)
    return x.reshape(*x.shape[:3], -1, CHUNK)

  decay = jnp.zeros((batch, tokens, heads)) if log_decay is None else jnp.maximum(log_decay[..., 0], _MIN_LOG_DECAY)
  total = jnp.cumsum(by_state(decay.astype(jnp.float32)), axis=-1)
  end = total[..., -1:]
  entering, leaving, keep = jnp.exp(total), jnp.exp(end - total), jnp.exp(end)
  both = [total] if strength is None else [by_state(strength.astype(jnp.float32)), total]
  if docs is not None:
    index = by_state(jnp.broadcast_to(docs.index[..., None], (batch, tokens, heads)).astype(jnp.float32))
    last = index[..., -1:]
    entry = jnp.concatenate([jnp.zeros_like(last[:, :, :1]), last[:, :, :-1]], axis=2)
    entering, leaving = jnp.where(index == entry, entering, 0), jnp.where(index == last, leaving, 0)
    keep = jnp.where(entry == last, keep, 0)
    both.append(index)
  columns = jnp.concatenate([*both, entering, leaving], axis=-2).swapaxes(-1, -2)
  first, second = map(np.array, zip(*step.pairs, strict=True))
  rows = [jnp.concatenate([x[..., first, :], x[..., second, :]], axis=-1) for x in both]
  keep = jnp.pad(keep.swapaxes(-1, -2), ((0, 0),) * 4 + ((0, LANES - keep.shape[-2]),))
  return columns, jnp.concatenate([*rows, keep], axis=-2)


def _call(step, q, k, v, columns, rows, initial_state, interpret):
  """Runs the kernel on q, k [B, T, Hk * K] and v [B, T, H * V]."""
  batch, tokens, width = v.shape
  heads = initial_state.shape[1]
  steps = batch // step.rows, heads // step.heads, tokens // CHUNK
  shared = heads // (q.shape[2] // step.key_dim) // step.per_key  # steps that share a key

  def tokens_of(dim, share):
    return pl.BlockSpec((step.rows, CHUNK, dim), lambda b, h, n: (b, n, h if share == 1 else jax.lax.div(h, share)))

  keys = tokens_of(max(1, step.heads // step.per_key) * step.key_dim, shared)
  values = tokens_of(step.heads * step.value_dim, 1)
  state = pl.BlockSpec((step.rows, step.heads, step.key_dim, step.value_dim), lambda b, h, n: (b, h, 0, 0))
  gates = [pl.BlockSpec((1, 1, 1, *x.shape[3:]), lambda b, h, n: (b, h, n, 0, 0)) for x in (columns, rows)]
  constants = _masks()
  return pl.pallas_call(
    partial(_kernel, step),
    grid=steps,
    in_specs=[keys, keys, values, *gates, *(pl.BlockSpec(x.shape, lambda b, h, n: (0, 0, 0)) for x in constants), state],
    out_specs=[values, state],
    out_shape=[jax.ShapeDtypeStruct((batch, tokens, width), v.dtype), jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name="delta_rule_forward",
  )(q, k, v, columns, rows, *constants, initial_state)


def _masks() -> tuple[np.ndarray, np.ndarray]:
  """Constants of the kernel.

  Returns:
    [2, 64, 128]: what is added to log-decays, 0 up to the diagonal of both heads; and 1 strictly below it.
    [2, 128, 128]: 1 in diagonal blocks of 16; and in the blocks below those that are the first of two.
  """
  i, j = np.indices((CHUNK, LANES))
  j = j % CHUNK
  r, c = np.indices((LANES, LANES)) // _BASE
  of_tokens = [np.where(i >= j, 0, _MASKED), i > j]
  of_blocks = [r == c, (r == c + 1) & (c % 2 == 0)]
  return np.stack(of_tokens).astype(np.float32), np.stack(of_blocks).astype(np.float32)


def _kernel(
  step: _Step, q_ref, k_ref, v_ref, columns_ref, rows_ref, mask_ref, block_ref, initial_ref, out_ref, state_ref
) -> None:
  """One chunk of all states of a step."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    @pl.loop(0, step.heads)
    def _(h):
      state_ref[:, h] = initial_ref[:, h]

  states, pairs = step.states, step.pairs
  everyone = range(len(states))
  columns = columns_ref[0, 0, 0]
  *strength_and_total, entering, leaving = (columns[:, i : i + len(states)] for i in range(0, columns.shape[1], len(states)))
  gates = dict(zip(_gate_names(step), strength_and_total, strict=True))
  rows = {name: rows_ref[0, 0, 0, i * len(pairs) : (i + 1) * len(pairs)] for i, name in enumerate(gates)}
  keep = rows_ref[0, 0, 0, rows_ref.shape[3] - 1 :]
  left = _lane((CHUNK, LANES)) < CHUNK

  def column(x, i, width=LANES):
    return jnp.broadcast_to(x[:, i : i + 1], (CHUNK, width))

  def side_by_side(name, pair):
    return jnp.where(left, *(column(gates[name], i) for i in pair))

  def head(ref, dim, row, h):
    return ref[row, :, h * dim : (h + 1) * dim]

  key_of = [(b, h // step.per_key) for b, h in states]
  keys = {at: head(k_ref, step.key_dim, *at) for at in key_of}
  queries = {at: head(q_ref, step.key_dim, *at) for at in key_of}
  # What is multiplied with keys and with states, above queries.
  above = CHUNK if step.erases else 0
  both = {at: jnp.concatenate([keys[at], queries[at]]) if step.erases else queries[at] for at in keys}
  grams = [_grams(*([x[key_of[i]] for i in pair] for x in (both, keys)), key_of[pair[0]] == key_of[pair[1]]) for pair in pairs]
  reads = [sum(_dot(both[key_of[i]], part) for part in _parts(state_ref[states[i]])) for i in everyone]

  exponents = [side_by_side("total", pair) - rows["total"][p : p + 1] + mask_ref[0] for p, pair in enumerate(pairs)]
  if step.documents:
    same = [side_by_side("document", pair) == rows["document"][p : p + 1] for p, pair in enumerate(pairs)]
    exponents = [jnp.where(s, x, _MASKED) for s, x in zip(same, exponents, strict=True)]
  decays = [jnp.exp(x) for x in exponents]
  prepare = _two if step.erases else _two_of_exact
  scores = [prepare(gram[above:] * decay) for gram, decay in zip(grams, decays, strict=True)]

  if step.erases:
    lower = [gram[:CHUNK] * (decay * mask_ref[1]) for gram, decay in zip(grams, decays, strict=True)]
    inverses = _inverses([side_by_side("strength", pair) * x for pair, x in zip(pairs, lower, strict=True)], block_ref)
    apply = [_in_one_pass(x * rows["strength"][p : p + 1]) for p, x in enumerate(inverses)]
    erase = [_in_one_pass(x[_HALF:]) for x in lower]
  values = [head(v_ref, step.value_dim, *at) for at in states]
  decayed = [column(entering, i, step.value_dim) for i in everyone]
  if step.erases:
    rest = [v.astype(jnp.float32) - d * read[:CHUNK] for v, d, read in zip(values, decayed, reads, strict=True)]
    first = [apply[i // 2](i % 2 * 2, rest[i][:_HALF]) for i in everyone]
    second = [rest[i][_HALF:] - erase[i // 2](i % 2 * 2, first[i]) for i in everyone]
    second = [apply[i // 2](i % 2 * 2 + 1, second[i]) for i in everyone]
    added = [jnp.concatenate(halves) for halves in zip(first, second, strict=True)]
    outs = [scores[i // 2](i % 2, added[i]) for i in everyone]
  else:
    added = [v.astype(jnp.float32) for v in values]
    outs = [scores[i // 2](i % 2, values[i]) for i in everyone]

  written = [_parts(column(leaving, i, step.value_dim) * added[i]) for i in everyone]
  changes = [_dot(jnp.concatenate([keys[key_of[i]]] * 2), jnp.concatenate(written[i]), _BY_TOKENS) for i in everyone]
  for i, (b, h) in enumerate(states):
    out = step.scale * (decayed[i] * reads[i][above:] + outs[i])
    out_ref[b, :, h * step.value_dim : (h + 1) * step.value_dim] = out.astype(out_ref.dtype)
    state_ref[b, h] = keep[:, i : i + 1] * state_ref[b, h] + changes[i]


def _gate_names(step: _Step) -> list[str]:
  """What columns and rows begin with."""
  return ["strength"] * step.erases + ["total"] + ["document"] * step.documents


def _grams(xs: list[jax.Array], keys: list[jax.Array], shared: bool) -> jax.Array:
  """x K^T of two states side by side, [n, 128]; of one product if they share their key."""
  if shared:
    return _dot(xs[0], jnp.concatenate([keys[0]] * 2), _BY_ROWS)
  zeros = jnp.zeros_like(keys[0])
  return _dot(xs[0], jnp.concatenate([keys[0], zeros]), _BY_ROWS) + _dot(xs[1], jnp.concatenate([zeros, keys[1]]), _BY_ROWS)


def _dot(x: jax.Array, y: jax.Array, contract: tuple = ((1,), (0,))) -> jax.Array:
  """A product of bfloat16 operands in one pass, in float32."""
  return jax.lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=jnp.float32)


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x as bfloat16, and the rest."""
  high = x.astype(jnp.bfloat16)
  return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _lane(shape: tuple[int, int]) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _two(x: jax.Array) -> Callable[[int, jax.Array], jax.Array]:
  """The function from a side and y [64, V] to the product of the left (0) or right (1) half of x [64, 128] with y."""
  left, low = _lane(x.shape) < CHUNK, _parts(x)[1]
  other = pltpu.roll(x, CHUNK, 1)
  twice = [jnp.where(left, a, b).astype(jnp.bfloat16) for a, b in ((x, other), (other, x))]

  def times(side, y):
    high, rest = _parts(y)
    zeros = jnp.zeros_like(high)
    by_low = _dot(low, jnp.concatenate([zeros, high] if side else [high, zeros]))
    return _dot(twice[side], jnp.concatenate([high, rest])) + by_low

  return times


def _two_of_exact(x: jax.Array) -> Callable[[int, jax.Array], jax.Array]:
  """The same for y in bfloat16: the high half of a side in its place, and its low half in place of the other side."""
  left, high = _lane(x.shape) < CHUNK, x.astype(jnp.bfloat16).astype(jnp.float32)
  low = pltpu.roll(x - high, CHUNK, 1)
  halves = [jnp.where(left, a, b).astype(jnp.bfloat16) for a, b in ((high, low), (low, high))]
  return lambda side, y: _dot(halves[side], jnp.concatenate([y, y]))


def _in_one_pass(x: jax.Array) -> Callable[[int, jax.Array], jax.Array]:
  """The function from b and y [32, V] to the product of block b of x [32, 128], four blocks [32, 32], with y.

  The left operand has the high half of block b in its place, the low half in the next one, and the high half again in the one
  after that; the right operand has the high half of y twice, then its low half.
  """
  block = _lane(x.shape) >> _LOG_HALF
  high = x.astype(jnp.bfloat16).astype(jnp.float32)
  low, again = pltpu.roll(x - high, _HALF, 1), pltpu.roll(high, 2 * _HALF, 1)

  def times(b, y):
    y_high, y_low = _parts(y)
    right = [y_high, y_high, y_low, jnp.zeros_like(y_high)]
    places = [(b + i) % 4 for i in range(3)]
    left = jnp.where(block == places[0], high, jnp.where(block == places[1], low, jnp.where(block == places[2], again, 0)))
    return _dot(left.astype(jnp.bfloat16), jnp.concatenate([right[(i - b) % 4] for i in range(4)]))

  return times


def _inverses(matrices: list[jax.Array], block_ref: Any) -> list[jax.Array]:
  """(I + A)^-1 of the diagonal blocks of 32 of matrices [64, 128], four of them side by side, [32, 128]."""
  block = _lane((_BASE, LANES)) >> _LOG_BASE

  def gather(x, first):
    """For every block of 16 lanes, 16 rows: those of the diagonal, or of the block below, for the first of two blocks."""
    per_head = CHUNK // _BASE
    rows = [x[i * _BASE : (i + 1) * _BASE] for i in range(per_head)]
    out = jnp.zeros_like(rows[0]) if first else rows[0]
    for i in range(0, per_head, 2) if first else range(1, per_head):
      out = jnp.where(block & per_head - 1 == i, rows[i + first], out)
    return out

  diagonal = _by_rows(jnp.stack([gather(x, 0) for x in matrices]))
  below = [gather(x, 1) for x in matrices]
  inner = _three_passes(below, diagonal, block_ref[0])
  corner = _three_passes(diagonal, inner, block_ref[1])
  even = block & 1 == 0
  return [
    jnp.concatenate([jnp.where(even, x, 0), jnp.where(even, -y, x)]) for x, y in zip(diagonal, corner, strict=True)
  ]


def _by_rows(a: jax.Array) -> list[jax.Array]:
  """(I + A)^-1 of strictly lower matrices [16, 16], eight side by side in each of a [n, 16, 128]: row by row."""
  flat = a.reshape(-1, LANES)
  lane = _lane(flat.shape)
  identity = (_lane(a.shape[1:]) & _BASE - 1 == jax.lax.broadcasted_iota(jnp.int32, a.shape[1:], 0)).astype(jnp.float32)
  x = jnp.broadcast_to(identity, a.shape)
  for j in range(_BASE - 1):
    column = jnp.take_along_axis(flat, (lane & -_BASE) + j, axis=1).reshape(a.shape)
    x = x - column * x[:, j : j + 1]
  return list(x)


def _three_passes(xs: list[jax.Array], ys: list[jax.Array], mask: jax.Array) -> list[jax.Array]:
  """Products of blocks x [16, 128] with y [16, 128], eight of each. The mask says which y belongs to which x."""

  def spread(y):
    # Masked in float32: on packed bfloat16 it goes through memory.
    return (jnp.concatenate([y.astype(jnp.float32)] * (LANES // _BASE)) * mask).astype(jnp.bfloat16)

  x_parts = [_parts(x) for x in xs]
  y_parts = [tuple(map(spread, _parts(y))) for y in ys]
  by_high = [_dot(jnp.concatenate(x), high) for x, (high, _) in zip(x_parts, y_parts, strict=True)]
  by_low = [_dot(high, low) for (high, _), (_, low) in zip(x_parts, y_parts, strict=True)]
  return [x[:_BASE] + x[_BASE:] + y for x, y in zip(by_high, by_low, strict=True)]
