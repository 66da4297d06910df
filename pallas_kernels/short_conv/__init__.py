"""Short causal convolution of each channel over its own last W tokens, blind across documents and to padding.

    y_t = sum_{j=0}^{W-1} w_j x_{t-W+1+j},      zeros before a document's first token

The width is 3 or 4 in practice; it stands before the keys and values of most linear-attention layers.
"""

import jax
import jax.numpy as jnp

from ..dispatch import Choice, choose
from ..documents import check_segment_ids, documents
from .recurrent import recurrent
from .shifted import shifted

__all__ = ["explain", "short_conv"]


def short_conv(
  x: jax.Array,
  weight: jax.Array,
  *,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Convolves along tokens.

  Args:
    x: [B, T, D].
    weight: [W, D], the last row for the current token. Sums are float32 (float64 where x is).
    initial_state: the W - 1 inputs before this call, [B, W - 1, D], oldest first; zeros unless given.
    segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding (skipped, zeros come out).
    implementation: "auto", "recurrent" (the oracle) or "xla".

  Returns:
    y [B, T, D] in x's dtype, and the last W - 1 inputs of the last document, [B, W - 1, D], zeros where it has fewer.

  Raises:
    ValueError: for shapes that do not fit together, or an unknown implementation.
  """
  if x.ndim != 3 or x.shape[1] == 0:
    raise ValueError(f"x has shape {list(x.shape)}; want [batch, tokens, channels] with at least one token.")
  if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[2]:
    raise ValueError(f"weight has shape {list(weight.shape)}; want [width, {x.shape[2]}], a column for each channel of x.")
  check_segment_ids(segment_ids, x.shape[:2])
  before = (x.shape[0], weight.shape[0] - 1, x.shape[2])
  if initial_state is None:
    initial_state = jnp.zeros(before, x.dtype)
  if initial_state.shape != before:
    raise ValueError(f"initial_state has shape {list(initial_state.shape)}; want {list(before)} (batch, width - 1, channels).")
  docs = None if segment_ids is None else documents(segment_ids)
  chosen = explain(implementation=implementation).implementation
  run = recurrent if chosen == "recurrent" else shifted
  return run(x, weight, initial_state.astype(x.dtype), docs)


def explain(*, implementation: str = "auto") -> Choice:
  """Which implementation runs, and why not the others."""
  return choose("short_conv", implementation, {"xla": None, "recurrent": "one dependent step a token: the oracle"})
