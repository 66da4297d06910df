"""The delta-rule family: one operation behind six variants.

    S <- Diag(exp g_t) S;   r times:  S <- S - k (a^T S) + k z^T;   o_t = S^T (scale q_t)

One log-decay a token (none, one for the head, or one a channel), then r rank-1 updates, each erasing along a covector
`a` and writing `z` along `k`. Specs: linear attention (Katharopoulos et al. 2020), DeltaNet (Yang et al. 2024,
arXiv:2406.06484), Gated DeltaNet (arXiv:2412.06464), Kimi Delta Attention (arXiv:2510.26692), DeltaProduct
(arXiv:2502.10297), Erase-then-Delta Attention (arXiv:2606.26560).

Common to all variants, with B batch rows, T tokens, Hk key heads, Hv = G * Hk value heads (value head h uses key head h // G):

  q, k: [B, T, Hk, K]. Normalise keys to unit length: the rule contracts for 0 <= beta |k|^2 <= 2.
  v: [B, T, Hv, V].
  beta: [B, T, Hv], the write strength; up to 2.
  log_decay: `None`, [B, T, Hv] or [B, T, Hv, K]; not positive. Float32 keeps what a bfloat16 sum would lose.
  scale: of the read, K ** -0.5 unless given.
  initial_state: [B, Hv, K, V], float32 (float64 where inputs are); zeros unless given.
  segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding. See `memzoo.pallas_kernels.documents`.
  decay_bound: a promise that no log_decay is below this, such as -5. Speed only, for decays by channel, and wrong if broken.
  chunk_size: tokens solved at once, a power of two. Speed only.
  implementation: "auto", "recurrent" (the oracle) or "xla" (chunk-parallel); `explain` tells what "auto" means.

  Returns the output [B, T, Hv, V] in v's dtype and the final state [B, Hv, K, V], both differentiable in every input.

  Raises `ValueError` for shapes that do not fit together, an unknown implementation or a bad chunk size.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..dispatch import Choice, choose
from ..documents import check_segment_ids, documents
from ..numerics import accumulator, scaled
from .chunked import chunked
from .recurrent import recurrent

__all__ = [
  "delta_product",
  "delta_rule",
  "erase_then_delta_rule",
  "explain",
  "gated_delta_rule",
  "kimi_delta_rule",
  "linear_attention",
]

_CHUNK_SIZE = 32


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  decay_bound: float | None = None,
  chunk_size: int | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Linear attention, S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T: what every delta rule is without its erase.

  With `log_decay` it is RetNet, GLA or Mamba-2's SSD, by where the decay comes from. See the module for arguments.
  """
  _check_tokens(q, k, v)
  operands = q, k, v
  return _run(_additive_update, operands, log_decay, scale, initial_state, segment_ids, decay_bound, chunk_size, implementation)


def delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk_size: int | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """The delta rule, S_t = (I - beta k k^T) S_{t-1} + beta k v^T (Yang et al. 2024, arXiv:2406.06484).

  See the module for arguments.
  """
  _check_tokens(q, k, v)
  _check("beta", beta, v.shape[:3], "batch, tokens, value heads")
  operands = q, k, v, beta
  return _run(_delta_update, operands, None, scale, initial_state, segment_ids, None, chunk_size, implementation)


def gated_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  decay_bound: float | None = None,
  chunk_size: int | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """The gated delta rule, S_t = (I - beta k k^T) Diag(exp g) S_{t-1} + beta k v^T (arXiv:2412.06464).

  See the module for arguments.
  """
  _check_tokens(q, k, v)
  _check("beta", beta, v.shape[:3], "batch, tokens, value heads")
  operands = q, k, v, beta
  return _run(_delta_update, operands, log_decay, scale, initial_state, segment_ids, decay_bound, chunk_size, implementation)


def kimi_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  log_decay: jax.Array,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  decay_bound: float | None = None,
  chunk_size: int | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """The gated delta rule with a decay for every channel, `log_decay` [B, T, Hv, K] (Kimi Linear, arXiv:2510.26692).

  See the module for arguments.
  """
  _check_tokens(q, k, v)
  _check("beta", beta, v.shape[:3], "batch, tokens, value heads")
  _check("log_decay", log_decay, (*v.shape[:3], k.shape[-1]), "batch, tokens, value heads, key width")
  operands = q, k, v, beta
  return _run(_delta_update, operands, log_decay, scale, initial_state, segment_ids, decay_bound, chunk_size, implementation)


def delta_product(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  decay_bound: float | None = None,
  chunk_size: int | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """r delta rules a token, decayed once before the first and read after the last (arXiv:2502.10297).

  Args:
    q: [B, T, Hk, K].
    k: [B, T, r, Hk, K].
    v: [B, T, r, Hv, V].
    beta: [B, T, r, Hv].
    log_decay: as the module says, like all other arguments.
  """
  if k.ndim != 5 or v.ndim != 5 or k.shape[2] != v.shape[2]:
    raise ValueError(
      f"k has shape {list(k.shape)} and v {list(v.shape)}; want [batch, tokens, r, heads, width], with equal r."
    )
  _check_tokens(q, k[:, :, 0], v[:, :, 0])
  _check("beta", beta, v.shape[:4], "batch, tokens, r, value heads")
  operands = q, k, v, beta
  return _run(_delta_updates, operands, log_decay, scale, initial_state, segment_ids, decay_bound, chunk_size, implementation)


def erase_then_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  erase_key: jax.Array,
  erase_strength: jax.Array,
  log_decay: jax.Array | None = None,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  decay_bound: float | None = None,
  chunk_size: int | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """S_t = (I - beta k k^T)(I - gamma e e^T) Diag(exp g) S_{t-1} + beta k v^T (arXiv:2606.26560, eq. 8).

  Args:
    q, k, v, beta: as the module says, like all other arguments.
    erase_key: e, [B, T, Hk, K], of unit length.
    erase_strength: gamma, [B, T, Hv].
  """
  _check_tokens(q, k, v)
  _check("beta", beta, v.shape[:3], "batch, tokens, value heads")
  _check("erase_key", erase_key, k.shape, "batch, tokens, key heads, key width")
  _check("erase_strength", erase_strength, v.shape[:3], "batch, tokens, value heads")
  operands = q, k, v, beta, erase_key, erase_strength
  options = scale, initial_state, segment_ids, decay_bound, chunk_size, implementation
  return _run(_erase_and_delta_updates, operands, log_decay, *options)


def explain(tokens: int, *, implementation: str = "auto") -> Choice:
  """Which implementation runs for calls of this many tokens, and why not the others."""
  single = tokens == 1
  return choose(
    "delta_rule",
    implementation,
    {
      "xla": "a chunk of a single token is the recurrence with more work around it" if single else None,
      "recurrent": None if single else "one dependent step a token: the oracle, and the way to decode",
    },
  )


class Variant(NamedTuple):
  """From the operands of a public function, [B, T, ...], to `recurrent`'s q, k, a, z.

  `chunked` calls it a few tokens at a time, so that nothing it makes is as long as the sequence.

  Attributes:
    rank_one_updates: from the operands to q [B, T, Hk, K], write vectors k [B, T, r, Hk or Hv, K], erase covectors a
      [B, T, r, Hv, K] or None, and values z [B, T, r, Hv, V].
    scale: of the read.
    dtype: of the arithmetic.
  """

  rank_one_updates: Callable
  scale: float
  dtype: jnp.dtype

  def __call__(self, *operands: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    q, k, a, z = self.rank_one_updates(*operands)
    heads = z.shape[3]
    q = _repeat_heads(q, heads, axis=2).astype(self.dtype) * jnp.asarray(self.scale, self.dtype)
    k, a, z = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 3), (_repeat_heads(k, heads, axis=3), a, z))
    return q, k, a, z


def _additive_update(q, k, v):
  return q, k[:, :, None], None, v[:, :, None]


def _delta_update(q, k, v, beta):
  return _delta_updates(q, k[:, :, None], v[:, :, None], beta[:, :, None])


def _delta_updates(q, k, v, beta):
  k = _repeat_heads(k, v.shape[3], axis=3)
  return q, k, scaled(k, beta), scaled(v, beta)


def _erase_and_delta_updates(q, k, v, beta, erase_key, erase_strength):
  wide = accumulator(beta, erase_strength)
  strengths = jnp.stack([erase_strength.astype(wide), beta.astype(wide)], axis=2)
  return _delta_updates(q, jnp.stack([erase_key, k], axis=2), jnp.stack([jnp.zeros_like(v), v], axis=2), strengths)


def _repeat_heads(x: jax.Array, heads: int, axis: int) -> jax.Array:
  return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)


def _run(
  rank_one_updates: Callable,
  operands: tuple[jax.Array, ...],
  log_decay: jax.Array | None,
  scale: float | None,
  initial_state: jax.Array | None,
  segment_ids: jax.Array | None,
  decay_bound: float | None,
  chunk_size: int | None,
  implementation: str,
) -> tuple[jax.Array, jax.Array]:
  """The general operation. The first three operands are q [B, T, Hk, K], k and v, whose last two axes are like q's."""
  q, _, v, *_ = operands
  (batch, tokens, _, width), (heads, value_width) = q.shape, v.shape[-2:]
  _check_log_decay(log_decay, (batch, tokens, heads), width)
  if decay_bound is not None and decay_bound >= 0:
    raise ValueError(f"decay_bound={decay_bound}; want a negative number that no log_decay is below, or None.")
  check_segment_ids(segment_ids, (batch, tokens))
  dtype = accumulator(*operands, log_decay, initial_state)
  if initial_state is None:
    initial_state = jnp.zeros((batch, heads, width, value_width), dtype)
  _check("initial_state", initial_state, (batch, heads, width, value_width), "batch, value heads, key width, value width")

  variant = Variant(rank_one_updates, width**-0.5 if scale is None else float(scale), dtype)
  docs = None if segment_ids is None else documents(segment_ids)
  initial_state = initial_state.astype(dtype)
  if explain(tokens, implementation=implementation).implementation == "recurrent":
    out, state = recurrent(*variant(*operands), log_decay, initial_state, docs)
  else:
    size = _chunk_size(chunk_size, tokens)
    out, state = chunked(variant, operands, log_decay, initial_state, docs, chunk_size=size, decay_bound=decay_bound)
  return out.astype(v.dtype), state


def _chunk_size(requested: int | None, tokens: int) -> int:
  """The chunk requested for, or the one measured best; never more than the tokens there are, rounded up."""
  if requested is not None and (requested < 1 or requested & (requested - 1)):
    raise ValueError(f"chunk_size={requested}; want a power of two, such as 16, 32 or 64.")
  return min(requested or _CHUNK_SIZE, 1 << (tokens - 1).bit_length())


def _check(name: str, x: jax.Array, shape: tuple[int, ...], axes: str) -> None:
  if x.shape != shape:
    raise ValueError(f"{name} has shape {list(x.shape)}; want {list(shape)} ({axes}).")


def _check_tokens(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
  """Checks q, k [B, T, Hk, K] against v [B, T, Hv, V]."""
  for name, x in (("q", q), ("k", k), ("v", v)):
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; want floats [batch, tokens, heads, width].")
  if q.shape[1] == 0:
    raise ValueError("q has no tokens; want at least one.")
  _check("k", k, q.shape, "batch, tokens, key heads, key width, as q")
  if v.shape[:2] != q.shape[:2]:
    raise ValueError(f"v has shape {list(v.shape)}; want {list(q.shape[:2])} (batch, tokens) first, as q.")
  if v.shape[2] % k.shape[2]:
    raise ValueError(f"v has {v.shape[2]} heads; want a multiple of k's {k.shape[2]}.")


def _check_log_decay(log_decay: jax.Array | None, tokens_by_heads: tuple[int, int, int], width: int) -> None:
  if log_decay is not None and log_decay.shape not in (tokens_by_heads, (*tokens_by_heads, width)):
    raise ValueError(
      f"log_decay has shape {list(log_decay.shape)}; want {list(tokens_by_heads)} (batch, tokens, value heads), "
      f"or one a channel, {[*tokens_by_heads, width]}."
    )
