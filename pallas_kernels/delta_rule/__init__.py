"""The delta-rule family: one operation behind eight public functions.

    S <- Diag(exp g_t) S;   r times:  S <- S - k (a^T S) + k z^T;   o_t = S^T (scale q_t)

Each token decays the state once (not at all, by one factor per head, or by one per channel) and then makes r rank-1 updates.
An update removes what the state holds along the covector `a` and writes the value `z` along `k`. Sources: linear attention
(Katharopoulos et al. 2020), DeltaNet (Yang et al. 2024, arXiv:2406.06484), Gated DeltaNet (arXiv:2412.06464), Kimi Delta
Attention (arXiv:2510.26692), DeltaProduct (arXiv:2502.10297), Erase-then-Delta Attention (arXiv:2606.26560), Gated DeltaNet-2
(arXiv:2605.22791), Comba (arXiv:2506.02475).

Arguments of all functions, for B batch rows, T tokens, Hk key heads and Hv = G * Hk value heads (value head h uses key head
h // G):

  q, k: [B, T, Hk, K]. Normalise keys to unit length: the rule contracts for 0 <= beta |k|^2 <= 2.
  v: [B, T, Hv, V].
  beta: [B, T, Hv], the write strength; at most 2.
  log_decay: `None`, [B, T, Hv] or [B, T, Hv, K]; at most 0. Pass float32: bfloat16 loses digits when decays are summed.
  **options: see `Options`.

All functions return the output [B, T, Hv, V] in v's dtype and the final state [B, Hv, K, V]. Both are differentiable in
every input.

Under `jax.checkpoint` with the policy `save_only_these_names(OUTPUT, KEPT)` the backward pass does not run the forward again.

All functions raise `ValueError` for shapes that do not fit together, an unknown implementation or a bad chunk size, and
`TypeError` for an unknown option.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..dispatch import choose_by_length, choose_kernels, explain
from ..documents import check_segment_ids
from ..numerics import accumulator, intermediate_precision
from .call import KEPT, OUTPUT, TOKENS, UPDATES, Inputs, objections, recurrence, run
from .call import Options as CallOptions
from .terms import Update

__all__ = [
  "KEPT",
  "OUTPUT",
  "Options",
  "comba_rule",
  "delta_product",
  "delta_rule",
  "erase_then_delta_rule",
  "explain",
  "gated_delta_rule",
  "gated_delta_rule_2",
  "kimi_delta_rule",
  "linear_attention",
]


class Options(TypedDict, total=False):
  """Keyword arguments that all functions of this module take.

  Keys:
    scale: factor of the read; K ** -0.5 by default.
    initial_state: [B, Hv, K, V], float32 (float64 where inputs are); zeros by default.
    segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding. See `memzoo.pallas_kernels.documents`.
    decay_bound: a lower bound of every log_decay, such as -5. It makes per-channel decays faster and has no other effect. If a
      log_decay is lower, the results are wrong.
    chunk_size: tokens per chunk, a power of two. It affects speed only; `None` chooses it for the platform.
    precision: `None`, by the operands: 16-bit queries and keys are multiplied in one pass, and what is computed from them in
      three passes of bfloat16 on GPUs and TPUs; float32 at full precision. "highest": everything at full precision.
    implementation: "auto" (default), "pallas" (kernels for TPUs and Hopper GPUs), "xla" (chunk-parallel) or "recurrent" (the
      oracle). `explain` says what "auto" chooses.
  """

  scale: float | None
  initial_state: jax.Array | None
  segment_ids: jax.Array | None
  decay_bound: float | None
  chunk_size: int | None
  precision: str | None
  implementation: str


def linear_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None = None, **options: Unpack[Options]
) -> tuple[jax.Array, jax.Array]:
  """Linear attention, S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T: a delta rule without the erase.

  With `log_decay` this is RetNet, GLA or Mamba-2's SSD, depending on how the decay is made. Arguments: see the module.
  """
  _check_tokens(q, k, v)
  return _run("linear_attention", _additive_update, (q, k, v), log_decay, **options)


def delta_rule(
  q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, **options: Unpack[Options]
) -> tuple[jax.Array, jax.Array]:
  """The delta rule, S_t = (I - beta k k^T) S_{t-1} + beta k v^T (Yang et al. 2024, arXiv:2406.06484).

  Arguments: see the module.
  """
  _check_tokens(q, k, v)
  _check("beta", beta, v.shape[:3], "batch, tokens, value heads")
  return _run("delta_rule", _delta_update, (q, k, v, beta), None, **options)


def gated_delta_rule(
  q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None = None, **options: Unpack[Options]
) -> tuple[jax.Array, jax.Array]:
  """The gated delta rule, S_t = (I - beta k k^T) Diag(exp g) S_{t-1} + beta k v^T (arXiv:2412.06464).

  Arguments: see the module.
  """
  _check_tokens(q, k, v)
  _check("beta", beta, v.shape[:3], "batch, tokens, value heads")
  return _run("gated_delta_rule", _delta_update, (q, k, v, beta), log_decay, **options)


def kimi_delta_rule(
  q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array, **options: Unpack[Options]
) -> tuple[jax.Array, jax.Array]:
  """The gated delta rule with a decay for every channel, `log_decay` [B, T, Hv, K] (Kimi Linear, arXiv:2510.26692).

  Arguments: see the module.
  """
  _check_tokens(q, k, v)
  _check("beta", beta, v.shape[:3], "batch, tokens, value heads")
  _check("log_decay", log_decay, (*v.shape[:3], k.shape[-1]), "batch, tokens, value heads, key width")
  return _run("kimi_delta_rule", _delta_update, (q, k, v, beta), log_decay, **options)


def delta_product(
  q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None = None, **options: Unpack[Options]
) -> tuple[jax.Array, jax.Array]:
  """r delta-rule updates per token; the state decays before the first and is read after the last (arXiv:2502.10297).

  Args:
    q: [B, T, Hk, K].
    k: [B, T, r, Hk, K].
    v: [B, T, r, Hv, V].
    beta: [B, T, r, Hv].
    log_decay, **options: see the module.
  """
  if k.ndim != 5 or v.ndim != 5 or k.shape[2] != v.shape[2]:
    raise ValueError(
      f"k has shape {list(k.shape)} and v {list(v.shape)}; expected [batch, tokens, r, heads, width], with equal r."
    )
  _check_tokens(q, *(jax.ShapeDtypeStruct((*x.shape[:2], *x.shape[3:]), x.dtype) for x in (k, v)))
  _check("beta", beta, v.shape[:4], "batch, tokens, r, value heads")
  specs = TOKENS, UPDATES, UPDATES, UPDATES
  return _run("delta_product", _delta_updates, (q, k, v, beta), log_decay, specs=specs, **options)


def erase_then_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  erase_key: jax.Array,
  erase_strength: jax.Array,
  log_decay: jax.Array | None = None,
  **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array]:
  """S_t = (I - beta k k^T)(I - gamma e e^T) Diag(exp g) S_{t-1} + beta k v^T (arXiv:2606.26560, eq. 8).

  Args:
    q, k, v, beta, log_decay, **options: see the module.
    erase_key: e, [B, T, Hk, K], of unit length.
    erase_strength: gamma, [B, T, Hv].
  """
  _check_tokens(q, k, v)
  _check("beta", beta, v.shape[:3], "batch, tokens, value heads")
  _check("erase_key", erase_key, k.shape, "batch, tokens, key heads, key width")
  _check("erase_strength", erase_strength, v.shape[:3], "batch, tokens, value heads")
  operands = q, k, v, beta, erase_key, erase_strength
  return _run("erase_then_delta_rule", _erase_and_delta_updates, operands, log_decay, **options)


def gated_delta_rule_2(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  erase_gate: jax.Array,
  write_gate: jax.Array,
  log_decay: jax.Array | None = None,
  **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array]:
  """S_t = (I - k (b * k)^T) Diag(exp g) S_{t-1} + k (w * v)^T: what is erased and what is written are gated by channel.

  Source: Gated DeltaNet-2 (arXiv:2605.22791). With b = w = beta it is `kimi_delta_rule`. Unlike there, the state can grow where
  nothing is written, because k and b * k differ.

  Args:
    q, k, v, log_decay, **options: see the module.
    erase_gate: b, [B, T, Hk, K].
    write_gate: w, [B, T, Hv, V].
  """
  _check_tokens(q, k, v)
  _check("erase_gate", erase_gate, k.shape, "batch, tokens, key heads, key width")
  _check("write_gate", write_gate, v.shape, "batch, tokens, value heads, value width")
  return _run("gated_delta_rule_2", _gated_update, (q, k, v, erase_gate, write_gate), log_decay, **options)


def comba_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  feedback_key: jax.Array,
  log_decay: jax.Array | None = None,
  **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array]:
  """S_t = (exp(g) - beta k p^T) S_{t-1} + beta k v^T: the feedback p^T S reads the state before its decay.

  Source: Comba (arXiv:2506.02475). The transition can flip signs where exp(g) is less than beta p^T k.

  Args:
    q, k, v, beta, **options: see the module.
    feedback_key: p, [B, T, Hk, K], in the paper a part of k.
    log_decay: `None` or [B, T, Hv].
  """
  _check_tokens(q, k, v)
  _check("beta", beta, v.shape[:3], "batch, tokens, value heads")
  _check("feedback_key", feedback_key, k.shape, "batch, tokens, key heads, key width")
  if log_decay is not None:
    _check("log_decay", log_decay, v.shape[:3], "batch, tokens, value heads")
  return _run("comba_rule", _feedback_update, (q, k, v, beta, feedback_key), log_decay, undecayed=True, **options)


def _additive_update(q, k, v):
  return q, [Update(k, None, v)]


def _delta_update(q, k, v, beta):
  return q, [Update(k, beta, v)]


def _delta_updates(q, k, v, beta):
  return q, [Update(k[:, :, m], beta[:, :, m], v[:, :, m]) for m in range(k.shape[2])]


def _erase_and_delta_updates(q, k, v, beta, erase_key, erase_strength):
  return q, [Update(erase_key, erase_strength, None), Update(k, beta, v)]


def _gated_update(q, k, v, erase_gate, write_gate):
  dtype = accumulator(q, erase_gate)  # rounded to 16 bits, b * k and w * v would double the error of the output
  erased, written = (gate.astype(dtype) * x.astype(dtype) for gate, x in ((erase_gate, k), (write_gate, v)))
  return q, [Update(k, None, written, erased)]


def _feedback_update(q, k, v, beta, feedback_key):
  return q, [Update(k, beta, v, feedback_key)]


def _run(
  name: str,
  updates: Callable[..., tuple[jax.Array, list[Update]]],
  operands: tuple[jax.Array, ...],
  log_decay: jax.Array | None,
  /,
  *,
  specs: Sequence[PartitionSpec] | None = None,
  undecayed: bool = False,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  decay_bound: float | None = None,
  chunk_size: int | None = None,
  precision: str | None = None,
  implementation: str = "auto",
  **unknown: object,
) -> tuple[jax.Array, jax.Array]:
  """The general operation, called by the public function `name`.

  `updates` maps the operands to q and the updates of each token. The first three operands are q [B, T, Hk, K], k and v. The
  last two axes of k and v are heads and width. With `undecayed`, a token's covector reads the state before its decay.
  """
  if unknown:
    expected = ", ".join(Options.__annotations__)
    raise TypeError(f"{name}() got an unexpected option {next(iter(unknown))!r}; expected some of {expected}.")
  q, _, v, *_ = operands
  (batch, tokens, _, width), (heads, value_width) = q.shape, v.shape[-2:]
  _check_log_decay(log_decay, (batch, tokens, heads), width)
  if decay_bound is not None and decay_bound >= 0:
    raise ValueError(f"decay_bound={decay_bound}; expected a negative lower bound of log_decay, or None.")
  check_segment_ids(segment_ids, (batch, tokens))
  dtype = accumulator(*operands, log_decay, initial_state)
  if initial_state is None:
    initial_state = jnp.zeros((batch, heads, width, value_width), dtype)
  _check("initial_state", initial_state, (batch, heads, width, value_width), "batch, value heads, key width, value width")

  if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
    raise ValueError(f"chunk_size={chunk_size}; expected a power of two, such as 16, 32 or 64.")
  precise = intermediate_precision(precision, *operands[:3])

  if log_decay is not None and log_decay.ndim == 3:
    log_decay = log_decay[..., None]
  scale = width**-0.5 if scale is None else float(scale)
  specs = specs or (TOKENS,) * len(operands)
  call = CallOptions(updates, specs, scale, dtype, precise, chunk_size, decay_bound, undecayed)
  inputs = Inputs(segment_ids, operands, log_decay, initial_state.astype(dtype))
  chosen, kernels = choose_kernels(name, implementation, partial(choose_by_length, tokens), objections(call, inputs))
  return recurrence(call, inputs) if chosen == "recurrent" else run(call._replace(kernels=kernels), inputs)


def _check(name: str, x: jax.Array, shape: tuple[int, ...], axes: str) -> None:
  if x.shape != shape:
    raise ValueError(f"{name} has shape {list(x.shape)}; expected {list(shape)} ({axes}).")


def _check_tokens(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
  """Checks q, k [B, T, Hk, K] against v [B, T, Hv, V]."""
  for name, x in (("q", q), ("k", k), ("v", v)):
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; expected floats [batch, tokens, heads, width].")
  if q.shape[1] == 0:
    raise ValueError("q has no tokens; expected at least one.")
  _check("k", k, q.shape, "batch, tokens, key heads, key width, like q")
  if v.shape[:2] != q.shape[:2]:
    raise ValueError(f"v has shape {list(v.shape)}; expected {list(q.shape[:2])} (batch, tokens) first, like q.")
  if v.shape[2] % k.shape[2]:
    raise ValueError(f"v has {v.shape[2]} heads; expected a multiple of k's {k.shape[2]}.")


def _check_log_decay(log_decay: jax.Array | None, tokens_by_heads: tuple[int, int, int], width: int) -> None:
  if log_decay is not None and log_decay.shape not in (tokens_by_heads, (*tokens_by_heads, width)):
    raise ValueError(
      f"log_decay has shape {list(log_decay.shape)}; expected {list(tokens_by_heads)} (batch, tokens, value heads), "
      f"or one per channel, {[*tokens_by_heads, width]}."
    )
