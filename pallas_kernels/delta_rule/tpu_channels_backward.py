"""The backward pass of the delta rules with a decay for every channel, in one kernel for TPUs; see `tpu_channels.py`.

With the cotangents dO of the output and dS' of the state after the chunk, strengths s, the products A of keys and P of queries
with keys, U = s U', and X = [dA; dP] below the diagonal, the diagonal of dP apart:

    dU = scale P^T dO + (K e^{G_C - G}) dS'    (I + A s)^T dR = s dU    dA = -dR U'^T s    dP = scale dO U^T

`tpu_decays.py` takes X back to keys and queries, by rows and by columns. A sum G gets q dQ + k dK by rows and loses k dK by
columns; not by the diagonal.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from ..tpu_products import BY_ROWS, by_parts, parts
from .tpu_backward import solve
from .tpu_decays import Scaled
from .tpu_step import Chunk, Step, head, put, start
from .tpu_tiles import CHUNK, HALF, grams, of_token_before, row_sums, sums_of_tokens, three, transposed, two_of_exact


def kernel(
  step: Step,
  q_ref: Any,
  k_refs: list[Any],
  v_refs: list[Any],
  decay_ref: Any,
  covector_refs: list[Any],
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
  d_decay_ref: Any,
  d_covector_refs: list[Any],
  d_state_ref: Any,
  *d_gate_refs: Any,
) -> None:
  """One chunk of all states of a step. The cotangent of the state stays in the block of that of the initial state."""
  start(step, d_final_ref, d_state_ref)
  chunk = Chunk(step, q_ref, k_refs, columns_ref, rows_ref, mask_ref)
  scaled = Scaled(chunk, decay_ref, covector_refs)
  states, everyone, pairs = step.states, range(len(step.states)), range(len(step.pairs))
  wide, above = step.value_dim, CHUNK if step.erases else 0
  keys, queries = scaled.keys, scaled.queries
  d_outs = [head(step, [d_out_ref], wide, *at) for at in states]
  values = [head(step, v_refs, wide, *at) for at in states]

  def before(i):
    return states_ref[(0, *states[i])]

  def d_after(i):
    return d_state_ref[states[i]]

  products = scaled.products()
  scores = [two_of_exact(transposed(scaled.seen(x[above:], p, False))) for p, x in enumerate(products)]
  by_state = [three(parts(k * scaled.leaving(i)), parts(d_after(i))) for i, k in enumerate(keys)]
  d_added = [step.scale * scores[i // 2](i % 2, d_outs[i]) + by_state[i] for i in everyone]
  if step.erases:
    reads = [scaled.read(i, before(i), only_keys=True) for i in everyone]
    if step.documents:
      reads = [chunk.column("entering", i, wide) * read for i, read in enumerate(reads)]
    rest = [v.astype(jnp.float32) - read for v, read in zip(values, reads, strict=True)]
    lower = [scaled.seen(x[:CHUNK], p, True) for p, x in enumerate(products)]
    of_strength = [chunk.row("strength", p) for p in pairs]
    erased = [x * s for x, s in zip(lower, of_strength, strict=True)]
    back = [transposed(x)[:HALF] for x in erased]
    added, d_rest, d_parts, d_lower, d_scores = solve(chunk, erased, back, block_ref, rest, d_added, d_outs)
    d_lower = [scaled.seen(x, p, True) for p, x in enumerate(d_lower)]
    d_erased = [-s * x for s, x in zip(of_strength, d_lower, strict=True)]  # dA
    written = [chunk.column("strength", i, wide) * a for i, a in enumerate(added)]  # U
  else:
    d_scores = [step.scale * grams(o, v) for o, v in zip(chunk.pairs(d_outs), chunk.pairs(values), strict=True)]
    written = [v.astype(jnp.float32) for v in values]
  d_scores = [scaled.seen(x, p, True) for p, x in enumerate(d_scores)]  # dP without its diagonal

  if step.erases:
    d_columns_ref, d_rows_ref = d_gate_refs
    d_columns_ref[0, 0, 0] = jnp.concatenate([row_sums(d * a) for d, a in zip(d_added, added, strict=True)], axis=1)
    d_rows_ref[0, 0, 0] = jnp.concatenate([-jnp.sum(x * y, axis=0, keepdims=True) for x, y in zip(lower, d_lower, strict=True)])
  joined = [jnp.concatenate(x) for x in zip(d_erased, d_scores, strict=True)] if step.erases else d_scores  # X
  sums: dict[tuple[int, int], list[jax.Array]] = {}

  def finish(i):
    """The cotangents of state i and its tokens. It stops where it waits for products, so that several states go in step."""
    b, h = states[i]
    by_rows, by_columns = yield from scaled.pull_back(i, joined[i // 2])
    entering, keep = scaled.entering(i), scaled.keep(i)
    read = by_parts(d_outs[i], before(i), BY_ROWS)
    write = three(parts(written[i]), parts(d_after(i)), BY_ROWS)
    if step.erases:
      erase = three(d_parts[i], parts(before(i)), BY_ROWS)
    yield
    d_query = by_rows[-1] + step.scale * entering * read
    write = scaled.leaving(i) * write
    grows, d_key = queries[i] * d_query, by_columns + write
    by_read = step.scale * d_outs[i].astype(jnp.float32)
    if step.erases:
      d_covector = by_rows[0] - entering * erase
      grows = grows + scaled.covectors[i] * d_covector
      by_read = jnp.concatenate([-d_rest[i], by_read])
    # A token writes after its own decay. Sums without it, not less it, which would cancel if decays are strong.
    writes = keys[i] * write
    grows, writes = (sum(step.of_tokens(x)) for x in (grows - keys[i] * by_columns, writes))
    later, earlier = sums_of_tokens(grows, later=True), sums_of_tokens(of_token_before(writes))
    end = jnp.broadcast_to(keep * row_sums(before(i) * d_after(i)), (step.key_dim, 8)).T[:1]
    yield
    d_decay_ref[b, :, h * step.key_dim : (h + 1) * step.key_dim] = later + earlier + end
    diagonal = step.scale * row_sums(d_outs[i].astype(jnp.float32) * written[i])
    of_key = [d_query + diagonal * keys[i], d_key + diagonal * queries[i]]
    if d_covector_refs:
      of_key.append(d_covector)
    elif step.erases:
      of_key[1] += d_covector
    key = step.keys[i]
    sums[key] = [x + y for x, y in zip(sums[key], of_key, strict=True)] if key in sums else of_key
    if step.documents:
      by_read = jnp.concatenate([chunk.column("entering", i, wide)] * (1 + step.erases)) * by_read
    change = scaled.write_back(i, by_read)
    put(step, d_v_refs, b, h, (d_rest if step.erases else d_added)[i])
    yield
    d_state_ref[b, h] = keep * d_after(i) + change
    if key not in step.keys[i + 1 :]:
      given = [[d_q_ref], d_k_refs, *[d_covector_refs] * bool(d_covector_refs)]
      for refs, total in zip(given, sums[key], strict=True):
        put(step, [ref.at[0] for ref in refs], *key, total)

  for _ in itertools.zip_longest(*map(finish, everyone)):
    pass
