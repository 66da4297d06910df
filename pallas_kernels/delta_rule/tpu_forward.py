"""The forward pass of the delta rules in one kernel for TPUs.

For a chunk of one head, with sums G of the log-decays, D_ij = e^{G_i - G_j} for j <= i of one document, else 0, strengths s,
and L = K K^T D without its diagonal:

    R = V - e^G K S                          U = (I + s L)^-1 s R
    O = scale (e^G Q S + (Q K^T D) U)        S <- e^{G_C} S + K^T e^{G_C - G} U

Without strengths U is V. Only inverses T of halves of 32 tokens are made: U_1 = T_1 s R_1, then U_2 = T_2 s (R_2 - L_21 U_1).

The order of the stages here is the order of the schedule: what is loaded or spread over lanes too early has to be stored.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..compat import varying_shape
from ..tpu_products import by_parts
from .tpu_step import Blocks, Chunk, Step, head, put, start, whole
from .tpu_tiles import CHUNK, HALF, by_tokens, grams, in_one_pass, inverses, masks, two, two_of_exact


def call(
  step: Step,
  tokens: Sequence[Any],
  columns: jax.Array,
  rows: jax.Array,
  initial_state: jax.Array,
  *,
  out_dtype: jnp.dtype,
  keep: bool,
  interpret: Any = False,
  kernel: Callable[..., None] | None = None,
  name: str = "delta_rule_forward",
) -> tuple[jax.Array, ...]:
  """The output [B, T, H * V], the final state, and if `keep` the states before all chunks, [chunks, B, H, K, V].

  Args:
    step: static arguments.
    tokens: of whole chunks, q [B, T, Hk * K], for every update k [B, T, Hk * K], for the last updates v [B, T, H * V], the
      others being zero, and for another kernel log-decays [B, T, H * K], and covectors [B, T, Hk * K] of every update or none.
    columns, rows: of `tpu_step.prepare`.
    initial_state: [B, H, K, V].
    out_dtype: of the output.
    keep: whether to return the states before all chunks.
    interpret: as for `pallas_call`.
    kernel: another kernel, of decays by channel.
    name: of the kernel.
  """
  _, ks, vs, *by_channel = tokens
  v, constants, shape = vs[-1], masks(step.updates), initial_state.shape
  chunks = v.shape[1] // step.tokens
  operands = *tokens, columns, rows, *constants, initial_state
  blocks, like = Blocks(step, chunks, shape), partial(varying_shape, like=jax.tree.leaves(operands))
  out = [like(v.shape, out_dtype), like(shape, jnp.float32)]
  kept = [like((chunks, *shape), jnp.float32)] if keep else []
  places = [blocks.keys, [blocks.keys] * len(ks), [blocks.values] * len(vs)]
  if by_channel:
    places += [blocks.decays, [blocks.keys] * len(by_channel[1])]
  gates = map(blocks.gates, (columns, rows))
  return pl.pallas_call(
    step.kernel(kernel or _kernel),
    grid=blocks.grid,
    in_specs=[*places, *gates, *map(whole, constants), blocks.state],
    out_specs=[blocks.values, blocks.state, blocks.states][: 2 + len(kept)],
    out_shape=[*out, *kept],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name=name,
  )(*operands)


def _kernel(
  step: Step,
  q_ref: Any,
  k_refs: list[Any],
  v_refs: list[Any],
  columns_ref: Any,
  rows_ref: Any,
  mask_ref: Any,
  block_ref: Any,
  initial_ref: Any,
  out_ref: Any,
  state_ref: Any,
  *states_ref: Any,
) -> None:
  """One chunk of all states of a step. The state stays in the block of the final state, which is the same for all chunks."""

  start(step, initial_ref, state_ref, states_ref)
  chunk = Chunk(step, q_ref, k_refs, columns_ref, rows_ref, mask_ref)
  states, everyone, pairs = step.states, range(len(step.states)), range(len(step.pairs))
  # What is multiplied with keys and with states, above queries.
  above = CHUNK if step.erases else 0
  both = [jnp.concatenate([k, q]) if step.erases else q for k, q in zip(chunk.keys, chunk.queries, strict=True)]
  products = [
    grams(xs, ks, step.keys[a] == step.keys[b])
    for xs, ks, (a, b) in zip(chunk.pairs(both), chunk.pairs(chunk.keys), step.pairs, strict=True)
  ]
  reads = [by_parts(x, state_ref[at]) for x, at in zip(both, states, strict=True)]
  decays = [jnp.exp(chunk.exponents(p) + mask_ref[0]) for p in pairs]
  score = two if step.erases else two_of_exact
  scores = [score(x[above:] * decay) for x, decay in zip(products, decays, strict=True)]
  if step.erases:
    lower = [x[:CHUNK] * (decay * mask_ref[1]) for x, decay in zip(products, decays, strict=True)]
    solve = solver(chunk, lower, block_ref)

  values = [head(step, v_refs, step.value_dim, *at) for at in states]
  entering = [chunk.column("entering", i, step.value_dim) for i in everyone]
  if step.erases:
    rest = [v.astype(jnp.float32) - e * read[:CHUNK] for v, e, read in zip(values, entering, reads, strict=True)]
    added = solve(rest)
    outs = [scores[i // 2](i % 2, added[i]) for i in everyone]
  else:
    added = [v.astype(jnp.float32) for v in values]
    outs = [scores[i // 2](i % 2, values[i]) for i in everyone]

  changes = [by_tokens(chunk.keys[i], chunk.column("leaving", i, step.value_dim) * added[i]) for i in everyone]
  for i, (b, h) in enumerate(states):
    out = step.scale * (entering[i] * reads[i][above:] + outs[i])
    put(step, [out_ref], b, h, out)
    state_ref[b, h] = chunk.keep[:, i : i + 1] * state_ref[b, h] + changes[i]


def solver(chunk: Chunk, lower: list[jax.Array], block_ref: Any) -> Callable[[list[jax.Array]], list[jax.Array]]:
  """The function from R, by state, to U = (I + s L)^-1 s R, for L of pairs, side by side."""
  made = inverses([chunk.side_by_side("strength", p) * x for p, x in enumerate(lower)], block_ref, chunk.step.updates)
  solve = [in_one_pass(x * chunk.row("strength", p)) for p, x in enumerate(made)]
  erase = [in_one_pass(x[HALF:]) for x in lower]

  def apply(rest):
    everyone = range(len(rest))
    first = [solve[i // 2](i % 2 * 2, rest[i][:HALF]) for i in everyone]
    second = [rest[i][HALF:] - erase[i // 2](i % 2 * 2, first[i]) for i in everyone]
    second = [solve[i // 2](i % 2 * 2 + 1, second[i]) for i in everyone]
    return [jnp.concatenate(halves) for halves in zip(first, second, strict=True)]

  return apply
