"""The selective scan: a linear recurrence for every channel and state, whose step and directions depend on the token (S6).

    h_t = exp(step_t a) h_{t-1} + step_t x_t b_t^T        y_t = c_t . h_t

The state h has N rows for each of D channels. Source: Mamba (Gu & Dao 2023, arXiv:2312.00752).

The paper and its code differ -> we do: the write is step * b, as in the code; the paper's text has an integral.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ..dispatch import Objections, choose_by_length, choose_kernels, explain
from ..documents import check_segment_ids
from ..numerics import accumulator
from .call import KEPT, OUTPUT, Inputs, Options, objection, recurrence, run

__all__ = ["KEPT", "OUTPUT", "explain", "selective_scan"]


def selective_scan(
  x: jax.Array,
  step: jax.Array,
  a: jax.Array,
  b: jax.Array,
  c: jax.Array,
  *,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk_size: int | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Scans x along tokens. The result is differentiable in every float.

  Args:
    x: [B, T, D].
    step: [B, T, D], at least 0; pass float32.
    a: [N, D], at most 0: log-decays for a step of 1; pass float32.
    b, c: [B, T, N], the directions that tokens write and read, shared by all channels.
    initial_state: [B, N, D], float32 (float64 where inputs are); zeros by default.
    segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding, which is skipped and yields zeros.
    chunk_size: tokens that are computed one after another before the next chunk. It affects speed only; `None` chooses it.
    implementation: "auto" (default), "pallas" (kernels for TPUs), "xla" (in blocks) or "recurrent" (the oracle). `explain`
      says what "auto" chooses.

  Returns:
    y [B, T, D] in x's dtype and the final state [B, N, D]. Sums are float32, or float64 where an input is. Under
    `jax.checkpoint` with the policy `save_only_these_names(OUTPUT, KEPT)` the backward pass does not run the forward again.

  Raises:
    ValueError: for shapes that do not fit together, an unknown implementation or a bad chunk size.
  """
  if x.ndim != 3 or x.shape[1] == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x is {x.dtype}{list(x.shape)}; expected floats [batch, tokens, channels] with at least one token.")
  batch, tokens, channels = x.shape
  if a.ndim != 2 or 0 in a.shape or a.shape[1] != channels:
    raise ValueError(f"a has shape {list(a.shape)}; expected [states, {channels}], one column per channel of x.")
  states = a.shape[0]
  _check("step", step, x.shape, "batch, tokens, channels, like x")
  for name, z in (("b", b), ("c", c)):
    _check(name, z, (batch, tokens, states), "batch, tokens, states")
  check_segment_ids(segment_ids, (batch, tokens))
  dtype = accumulator(x, step, a, b, c, initial_state)
  if initial_state is None:
    initial_state = jnp.zeros((batch, states, channels), dtype)
  _check("initial_state", initial_state, (batch, states, channels), "batch, states, channels")
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size}; expected at least 1, or None.")
  inputs = Inputs(segment_ids, x, step, a, b, c, initial_state.astype(dtype))
  options = Options(chunk_size)
  others, against = partial(choose_by_length, tokens), Objections(objection(options, inputs))
  chosen, kernels = choose_kernels("selective_scan", implementation, others, against)
  return recurrence(inputs) if chosen == "recurrent" else run(options._replace(kernels=kernels), inputs)


def _check(name: str, x: jax.Array, shape: tuple[int, ...], axes: str) -> None:
  if x.shape != shape:
    raise ValueError(f"{name} has shape {list(x.shape)}; expected {list(shape)} ({axes}).")
