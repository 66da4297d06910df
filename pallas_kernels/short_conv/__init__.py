"""Short causal convolution of each channel over the last W tokens of the document, padding excluded.

    y_t = sum_{j=0}^{W-1} w_j x_{t-W+1+j},      x = 0 before the first token of a document

W is 3 or 4 in practice. Most linear-attention layers apply this convolution to queries, keys and values.
"""

import jax
import jax.numpy as jnp

from ..dispatch import Choice, choose
from ..documents import check_segment_ids
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
  """Convolves x along tokens.

  Args:
    x: [B, T, D].
    weight: [W, D]; the last row multiplies the current token. Sums are float32 (float64 where x is).
    initial_state: the W - 1 inputs before this call, [B, W - 1, D], oldest first; zeros by default.
    segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding, which is skipped and yields zeros.
    implementation: "auto", "recurrent" (the oracle) or "xla".

  Returns:
    y [B, T, D] in x's dtype, and the last W - 1 inputs of the last document, [B, W - 1, D], zeros where it has fewer.

  Raises:
    ValueError: for shapes that do not fit together, and for an unknown implementation.
  """
  if x.ndim != 3 or x.shape[1] == 0:
    raise ValueError(f"x has shape {list(x.shape)}; expected [batch, tokens, channels] with at least one token.")
  if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[2]:
    raise ValueError(f"weight has shape {list(weight.shape)}; expected [width, {x.shape[2]}], one column per channel of x.")
  check_segment_ids(segment_ids, x.shape[:2])
  before = (x.shape[0], weight.shape[0] - 1, x.shape[2])
  if initial_state is None:
    initial_state = jnp.zeros(before, x.dtype)
  if initial_state.shape != before:
    shape = list(initial_state.shape)
    raise ValueError(f"initial_state has shape {shape}; expected {list(before)} (batch, width - 1, channels).")
  chosen = explain(implementation=implementation).implementation
  run = recurrent if chosen == "recurrent" else shifted
  return run(x, weight, initial_state.astype(x.dtype), segment_ids)


def explain(*, implementation: str = "auto") -> Choice:
  """Says which implementation runs, and why the others do not."""
  return choose("short_conv", implementation, {"xla": None, "recurrent": "one dependent step per token: the oracle"})
