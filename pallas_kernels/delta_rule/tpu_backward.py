"""The backward pass of the delta rules in one kernel for TPUs, from the last chunk to the first.

With the letters of `tpu_forward.py`, P = Q K^T D, U = s U', and scale in dO, the cotangents are

    dU = P^T dO + e^{G_C - G} K dS           dR = (I + s L)^-T s dU
    N = (dO U^T) D                           E = -(dR U'^T) s D, below the diagonal
    dQ = e^G dO S^T + N K                    dV = dR
    dK = -e^G dR S^T + e^{G_C - G} U dS^T + N^T Q + (E + E^T) K
    ds = sum_v dU U' - sum_i L (dR U'^T)     dS <- e^{G_C} dS + (e^G Q)^T dO - (e^G K)^T dR

dG_i is the sum of row i of N (Q K^T) + E (K K^T), less that of column i, and the products of q_i and k_i with what they get for
reading S. A log-decay gets dG of its own and all later tokens, the products of earlier keys with what they get for writing, and
e^{G_C} <S, dS>. Without strengths U is V, dV is dU, and dR and E are zero. U' is computed again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..compat import varying_shape
from ..tpu_products import BY_ROWS, BY_TOKENS, LANES, by_parts, dot, parts
from .tpu_step import Blocks, Chunk, Step, head, put, start, whole
from .tpu_tiles import (
  CHUNK,
  HALF,
  beside,
  by_tokens,
  grams,
  in_one_pass,
  inverses,
  is_left,
  masks,
  row_sums,
  three_passes,
  transposed,
  two_of_exact,
)


def call(
  step: Step,
  tokens: Sequence[Any],
  d_out: jax.Array,
  columns: jax.Array,
  rows: jax.Array,
  states: jax.Array,
  d_final: jax.Array,
  *,
  interpret: Any = False,
  kernel: Callable[..., None] | None = None,
  name: str = "delta_rule_backward",
) -> tuple[Any, ...]:
  """The cotangents of all tokens and of the initial state, and parts of those of gates.

  Args:
    step: static arguments.
    tokens, columns, rows: as for `tpu_forward.call`.
    d_out: [B, T, H * V].
    states: before all chunks, [chunks, B, H, K, V].
    d_final: cotangent of the final state, [B, H, K, V].
    interpret: as for `pallas_call`.
    kernel: another kernel, of decays by channel.
    name: of the kernel.

  Returns:
    The parts of gates' cotangents, in the last two arrays, are for `tpu_step.gate_gradients`, or with decays by channel for
    `tpu_step.strength_gradients`, and there only with strengths.
  """
  q, ks, vs, *by_channel = tokens
  covectors = by_channel[1] if by_channel else []
  constants, count, pairs = masks(step.updates), len(step.states), len(step.pairs)
  operands = *tokens, d_out, columns, rows, *constants, states, d_final
  blocks = Blocks(step, d_out.shape[1] // step.tokens, d_final.shape, backwards=True)
  like = partial(varying_shape, like=jax.tree.leaves(operands))
  dtype = jnp.float32 if covectors else q.dtype
  of_keys = like((step.shared, *q.shape), dtype if step.shared == 1 else jnp.float32)
  by_column, by_row = (1 + step.erases + 1, (1 + step.erases) * pairs + 1) if not by_channel else (1, pairs)
  d_gates = [like((*columns.shape[:4], by_column * count), jnp.float32), like((*rows.shape[:3], by_row, LANES), jnp.float32)]
  d_gates = d_gates if step.erases or not by_channel else []
  key_places, value_places = [blocks.keys] * len(ks), [blocks.values] * len(vs)
  channel_places, d_channel_places, of_channels = [], [], []
  if by_channel:
    channel_places = [blocks.decays, [blocks.keys] * len(covectors)]
    d_channel_places = [blocks.decays, [blocks.key_gradients] * len(covectors)]
    of_channels = [like(by_channel[0].shape, by_channel[0].dtype), [of_keys] * len(covectors)]
  d_q, d_ks, d_vs, *others = pl.pallas_call(
    step.kernel(kernel or _kernel),
    grid=blocks.grid,
    in_specs=[
      *(blocks.keys, key_places, value_places, *channel_places, blocks.values),
      *(*map(blocks.gates, (columns, rows)), *map(whole, constants), blocks.states, blocks.state),
    ],
    out_specs=[
      *(blocks.key_gradients, [blocks.key_gradients] * len(ks), value_places, *d_channel_places),
      *(blocks.state, *map(blocks.gates, d_gates)),
    ],
    out_shape=[
      *(of_keys, [of_keys] * len(ks), [like(v.shape, v.dtype) for v in vs], *of_channels),
      *(like(d_final.shape, jnp.float32), *d_gates),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name=name,
  )(*operands)

  def of_steps(ds):
    return jax.tree.map(lambda d: jnp.sum(d, axis=0).astype(dtype) if step.shared > 1 else d[0], ds)

  if by_channel:
    others[1] = of_steps(others[1])
  return *of_steps((d_q, d_ks)), d_vs, *others


def _kernel(
  step: Step,
  q_ref: Any,
  k_refs: list[Any],
  v_refs: list[Any],
  d_out_ref: Any,
  columns_ref: Any,
  rows_ref: Any,
  mask_ref: Any,
  block_ref: Any,
  states_ref: Any,
  d_final_ref: Any,
  d_q_ref: Any,
  d_k_refs: list[Any],
  d_v_refs: list[Any],
  d_state_ref: Any,
  d_columns_ref: Any,
  d_rows_ref: Any,
) -> None:
  """One chunk of all states of a step. The cotangent of the state stays in the block of that of the initial state."""
  start(step, d_final_ref, d_state_ref)
  chunk = Chunk(step, q_ref, k_refs, columns_ref, rows_ref, mask_ref)
  states, everyone, pairs = step.states, range(len(step.states)), range(len(step.pairs))
  keys, queries, wide = chunk.keys, chunk.queries, step.value_dim
  d_outs = [head(step, [d_out_ref], wide, *at) for at in states]
  values = [head(step, v_refs, wide, *at) for at in states]
  before = [states_ref[0, b, h] for b, h in states]
  d_after = [d_state_ref[at] for at in states]

  # Products of keys and queries, and decays; both also transposed.
  above = CHUNK if step.erases else 0
  both = [jnp.concatenate([k, q]) if step.erases else q for k, q in zip(keys, queries, strict=True)]
  same = [step.keys[a] == step.keys[b] for a, b in step.pairs]
  of_keys, of_queries = chunk.pairs(keys), chunk.pairs(queries)
  products = [grams(x, k, s) for x, k, s in zip(chunk.pairs(both), of_keys, same, strict=True)]
  crossed = [grams(k, q, s) for k, q, s in zip(of_keys, of_queries, same, strict=True)]
  exponents = [chunk.exponents(p) for p in pairs]
  decays = [jnp.exp(x + mask_ref[0]) for x in exponents]
  back = [jnp.exp(mask_ref[2] - jnp.abs(x)) for x in exponents]
  scores = [two_of_exact(x * d) for x, d in zip(crossed, back, strict=True)]
  by_state = [by_parts(k, d) for k, d in zip(keys, d_after, strict=True)]
  leaving = [chunk.column("leaving", i, wide) for i in everyone]
  d_added = [step.scale * scores[i // 2](i % 2, d_outs[i]) + leaving[i] * by_state[i] for i in everyone]
  entering = [chunk.column("entering", i, wide) for i in everyone]
  if step.erases:
    reads = [by_parts(k, s) for k, s in zip(keys, before, strict=True)]
    rest = [v.astype(jnp.float32) - e * r for v, e, r in zip(values, entering, reads, strict=True)]
    lower = [x[:CHUNK] * (d * mask_ref[1]) for x, d in zip(products, decays, strict=True)]
    upper = [x[:CHUNK] * (d * mask_ref[3]) for x, d in zip(products, back, strict=True)]
    of_strength = [chunk.row("strength", p) for p in pairs]
    erased = [x * s for x, s in zip(lower, of_strength, strict=True)]
    back = [(x * chunk.side_by_side("strength", p))[:HALF] for p, x in enumerate(upper)]
    added, d_rest, d_parts, d_lower, d_scores = solve(chunk, erased, back, block_ref, rest, d_added, d_outs)
    d_grams = [-y * (s * (d * mask_ref[1])) for y, s, d in zip(d_lower, of_strength, decays, strict=True)]  # E
  else:
    d_scores = [step.scale * grams(o, v) for o, v in zip(chunk.pairs(d_outs), chunk.pairs(values), strict=True)]
  d_products = [d * x for d, x in zip(decays, d_scores, strict=True)]  # N
  # What G gets by rows, and loses by columns. Without products within a token, which would cancel, but for rounding.
  turned = [x * (y[above:] * mask_ref[1]) for x, y in zip(d_products, products, strict=True)]
  if step.erases:
    turned = [t + e * x[:CHUNK] for t, e, x in zip(turned, d_grams, products, strict=True)]
    turned = [t * mask_ref[4] for t in turned] if step.updates > 1 else turned
    d_rows = [-jnp.sum(x * y, axis=0, keepdims=True) for x, y in zip(lower, d_lower, strict=True)]
  d_rows = [*(d_rows if step.erases else []), *(-jnp.sum(t, axis=0, keepdims=True) for t in turned)]

  # Cotangents of queries and keys.
  entering, leaving = ([chunk.column(name, i, step.key_dim) for i in everyone] for name in ("entering", "leaving"))
  read_q = [step.scale * e * by_parts(o, s, BY_ROWS) for e, o, s in zip(entering, d_outs, before, strict=True)]
  if step.erases:
    read_k = [-e * three_passes(d, parts(s)) for e, d, s in zip(entering, d_parts, before, strict=True)]
    written = [parts(chunk.column("strength", i, wide) * a) for i, a in enumerate(added)]
    write_k = [x * three_passes(w, parts(d)) for x, w, d in zip(leaving, written, d_after, strict=True)]
    symmetric = [e + transposed(e) for e in d_grams]
    by_token = [beside(e, transposed(n)) for e, n in zip(symmetric, d_products, strict=True)]
    by_token = [sum(dot(x, both[i]) for x in parts(by_token[i // 2][i % 2])) for i in everyone]
  else:
    write_k = [x * by_parts(v, d, BY_ROWS) for x, v, d in zip(leaving, values, d_after, strict=True)]
    by_token = [two_of_exact(transposed(n)) for n in d_products]
    by_token = [by_token[i // 2](i % 2, queries[i]) for i in everyone]
  by_key = [two_of_exact(n) for n in d_products]
  d_queries = [read_q[i] + by_key[i // 2](i % 2, keys[i]) for i in everyone]
  d_keys = [w + x for w, x in zip(write_k, by_token, strict=True)]
  grows = [q.astype(jnp.float32) * r for q, r in zip(queries, read_q, strict=True)]
  if step.erases:
    d_keys = [d + r for d, r in zip(d_keys, read_k, strict=True)]
    grows = [g + k.astype(jnp.float32) * r for g, k, r in zip(grows, keys, read_k, strict=True)]

  # Those of the gates and of the state.
  d_total = [row_sums(g) + row_sums(jnp.where(is_left() == (i % 2 == 0), turned[i // 2], 0)) for i, g in enumerate(grows)]
  by_write = [row_sums(k.astype(jnp.float32) * w) for k, w in zip(keys, write_k, strict=True)]
  d_strengths = [row_sums(d * a) for d, a in zip(d_added, added, strict=True)] if step.erases else []
  d_columns_ref[0, 0, 0] = jnp.concatenate([*d_strengths, *d_total, *by_write], axis=1)
  keep = [chunk.keep[:, i : i + 1] for i in everyone]
  ends = [k * jnp.sum(s * d, keepdims=True) for k, s, d in zip(keep, before, d_after, strict=True)]
  ends = jnp.concatenate([*ends, jnp.zeros((1, LANES - len(states)), jnp.float32)], axis=1)
  d_rows_ref[0, 0, 0] = jnp.concatenate([*d_rows, ends])
  entering = [chunk.column("entering", i, wide) for i in everyone]
  by_read = [step.scale * e * o.astype(jnp.float32) for e, o in zip(entering, d_outs, strict=True)]
  if step.erases:
    by_read = [jnp.concatenate([-e * d, r]) for r, e, d in zip(by_read, entering, d_rest, strict=True)]
    changes = [by_parts(x, r, BY_TOKENS) for x, r in zip(both, by_read, strict=True)]
  else:
    changes = [by_tokens(q, r) for q, r in zip(queries, by_read, strict=True)]
  for refs, gradients in (([d_q_ref], d_queries), (d_k_refs, d_keys)):
    for b, h in dict.fromkeys(step.keys):
      total = sum(d for d, at in zip(gradients, step.keys, strict=True) if at == (b, h))
      put(step, [ref.at[0] for ref in refs], b, h, total)
  for i, (b, h) in enumerate(states):
    put(step, d_v_refs, b, h, (d_rest if step.erases else d_added)[i])
    d_state_ref[b, h] = keep[i] * d_after[i] + changes[i]


class Solved(NamedTuple):
  """What the erase needs, by state; matrices of pairs are side by side.

  Attributes:
    added: U', (I + L s) U' = R.
    d_rest, d_parts: dR, (I + L s)^T dR = s dU, and the same in parts.
    d_lower: dR U'^T, [64, 128], of pairs.
    d_scores: scale dO U^T, for U = s U'.
  """

  added: list[jax.Array]
  d_rest: list[jax.Array]
  d_parts: list[tuple[jax.Array, jax.Array]]
  d_lower: list[jax.Array]
  d_scores: list[jax.Array]


def solve(
  chunk: Chunk,
  erased: list[jax.Array],
  erased_back: list[jax.Array],
  block_ref: Any,
  rest: list[jax.Array],
  d_added: list[jax.Array],
  d_outs: list[jax.Array],
) -> Solved:
  """Solves for what is added and for dR, by inverses of halves of 32 tokens that are applied one after the other.

  Args:
    chunk: of the step.
    erased: L s of pairs, [64, 128].
    erased_back: the first half of its transposed matrices, [32, 128].
    block_ref: masks of blocks.
    rest: R, [64, V].
    d_added: dU.
    d_outs: dO, as activations.
  """
  everyone, step = range(len(rest)), chunk.step
  made = inverses(erased, block_ref, step.updates)
  forwards, backwards = [in_one_pass(x) for x in made], [in_one_pass(transposed(x)) for x in made]
  erase, erase_back = [in_one_pass(x[HALF:]) for x in erased], [in_one_pass(x) for x in erased_back]
  first = [forwards[i // 2](i % 2 * 2, rest[i][:HALF]) for i in everyone]
  second = [rest[i][HALF:] - erase[i // 2](i % 2 * 2, first[i]) for i in everyone]
  second = [forwards[i // 2](i % 2 * 2 + 1, second[i]) for i in everyone]
  added = [jnp.concatenate(halves) for halves in zip(first, second, strict=True)]
  scaled = [chunk.column("strength", i, step.value_dim) * d for i, d in enumerate(d_added)]
  second = [backwards[i // 2](i % 2 * 2 + 1, scaled[i][HALF:]) for i in everyone]
  first = [scaled[i][:HALF] - erase_back[i // 2](i % 2 * 2 + 1, second[i]) for i in everyone]
  first = [backwards[i // 2](i % 2 * 2, first[i]) for i in everyone]
  d_rest = [jnp.concatenate(halves) for halves in zip(first, second, strict=True)]

  # [dR; dO] U'^T, part by part of U': all parts of dR with the first one, and the first one with the others.
  d_parts, a_parts = [parts(x) for x in d_rest], [[*x] for x in zip(*map(parts, added), strict=True)]
  products = []
  for n, a in enumerate(a_parts):
    rows = [jnp.concatenate([*d[: len(d) - n], o]) for d, o in zip(d_parts, d_outs, strict=True)]
    products.append([grams(x, y) for x, y in zip(chunk.pairs(rows), chunk.pairs(a), strict=True)])
  d_lower, d_scores = [], []
  for p, found in enumerate(zip(*products, strict=True)):
    blocks = [[x[n : n + CHUNK] for n in range(0, len(x), CHUNK)] for x in found]
    d_lower.append(sum(block for x in blocks for block in x[:-1]))
    d_scores.append(step.scale * chunk.row("strength", p) * sum(x[-1] for x in blocks))
  return Solved(added, d_rest, d_parts, d_lower, d_scores)
