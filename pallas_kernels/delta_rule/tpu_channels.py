"""The forward pass of the delta rules with a decay for every channel, in one kernel for TPUs.

As in `tpu_forward.py`, but D_ij is a vector over channels; `tpu_decays.py` has the products with it.
"""

from typing import Any

import jax.numpy as jnp

from .tpu_decays import Scaled
from .tpu_forward import solver
from .tpu_step import Chunk, Step, head, put, start
from .tpu_tiles import CHUNK, by_tokens, two


def kernel(
  step: Step,
  q_ref: Any,
  k_refs: list[Any],
  v_refs: list[Any],
  decay_ref: Any,
  covector_refs: list[Any],
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
  scaled = Scaled(chunk, decay_ref, covector_refs)
  states, everyone, above = step.states, range(len(step.states)), CHUNK if step.erases else 0
  products = scaled.products()
  scores = [two(scaled.seen(x[above:], p, False)) for p, x in enumerate(products)]
  reads = [scaled.read(i, state_ref[at]) for i, at in enumerate(states)]
  if step.documents:
    entering = [chunk.column("entering", i, step.value_dim) for i in everyone]
    reads = [jnp.concatenate([e] * (1 + step.erases)) * read for e, read in zip(entering, reads, strict=True)]
  added = [head(step, v_refs, step.value_dim, *at).astype(jnp.float32) for at in states]
  if step.erases:
    lower = [scaled.seen(x[:CHUNK], p, True) for p, x in enumerate(products)]
    added = solver(chunk, lower, block_ref)([v - read[:CHUNK] for v, read in zip(added, reads, strict=True)])
  outs = [scores[i // 2](i % 2, added[i]) for i in everyone]

  for i, (b, h) in enumerate(states):
    change = by_tokens(scaled.keys[i] * scaled.leaving(i), added[i])
    out = step.scale * (reads[i][above:] + outs[i])
    put(step, [out_ref], b, h, out)
    state_ref[b, h] = scaled.keep(i) * state_ref[b, h] + change
