"""The delta rules on a TPU: one kernel forward, and one backward; others for decays by channel.

Both go through a sequence in chunks of 64 updates, one chunk of up to sixteen heads in a step of their grid, whose states, or
their cotangents, stay in fast memory from step to step. All heads of a step go through each stage together: one head alone is a
chain of products that wait for each other. With bfloat16 activations products of float32 operands take three passes
(`tpu_tiles.py`), so errors are about those of rounding the results; with float32 activations as many as full precision takes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..documents import Documents
from ..sizes import pieces
from . import tpu_backward, tpu_channels, tpu_channels_backward, tpu_forward, tpu_step
from .chunked import Kept, append_tokens
from .terms import Plan, zero_padding
from .tpu_tiles import CHUNK

_WIDEST, _MOST_UPDATES = 256, 2


def forward(
  plan: Plan,
  docs: Documents | None,
  operands: Any,
  log_decay: jax.Array | None,
  initial_state: jax.Array,
  *,
  keep: bool = True,
  interpret: Any = False,
) -> tuple[tuple[jax.Array, jax.Array], Kept | None]:
  """The output [B, T, H, V] in the dtype of the values, the final state [B, H, K, V], and what the gradient needs.

  Args:
    plan: static arguments; those of the arithmetic are not used.
    docs: document boundaries and padding; `None` for one document without padding.
    operands: of the variant, bfloat16 or float32 arrays [B, T, ...], and strengths or gates if updates have any.
    log_decay: `None` or [B, T, H, K or 1].
    initial_state: float32 [B, H, K, V].
    keep: whether to return what the gradient needs.
    interpret: as for `pallas_call`.
  """
  *tokens, covectors, strengths = _arrange(plan, docs, operands)
  step, gates = _prepare(plan, docs, operands, strengths, log_decay, initial_state.shape)
  options = {"out_dtype": plan.out_dtype, "keep": keep, "interpret": interpret}
  if step.by_channel:
    tokens += [_decays(docs, step, log_decay), covectors]
    options |= {"kernel": tpu_channels.kernel, "name": "delta_rule_by_channel_forward"}
  out, state, *states = tpu_forward.call(step, tokens, *gates, initial_state, **options)
  return (_tokens(out, operands[0].shape[1], plan.heads), state), Kept(*states, None, None) if keep else None


def kept_shapes(plan: Plan, operands: Any, initial_state: jax.Array) -> Kept:
  """The shapes of what `forward` keeps."""
  _, updates = jax.eval_shape(plan.updates, *operands)
  chunks = pieces(operands[0].shape[1], CHUNK // len(updates))
  return Kept(jax.ShapeDtypeStruct((chunks, *initial_state.shape), jnp.float32), None, None)


def backward(
  plan: Plan,
  docs: Documents | None,
  operands: Any,
  log_decay: jax.Array | None,
  kept: Kept,
  d_out: jax.Array,
  d_final: jax.Array,
  *,
  interpret: Any = False,
) -> tuple[Any, jax.Array | None, jax.Array]:
  """The cotangents of `operands`, `log_decay` and the initial state, from those of the output and the final state."""
  arrange = partial(_arrange, plan, docs)
  *tokens, covectors, strengths = arrange(operands)
  # Cotangents of a key by its two parts are added before they are rounded.
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), operands) if covectors else operands
  pull_back = jax.vjp(arrange, wide)[1]
  step, gates = _prepare(plan, docs, operands, strengths, log_decay, d_final.shape, backwards=True)
  d_out = _joined(_whole_chunks(step.updates, d_out.astype(plan.out_dtype)))
  by_channel, d_covectors = {}, []
  if step.by_channel:
    tokens += [_decays(docs, step, log_decay), covectors]
    by_channel = {"kernel": tpu_channels_backward.kernel, "name": "delta_rule_by_channel_backward"}
  found = tpu_backward.call(step, tokens, d_out, *gates, kept.states, d_final, interpret=interpret, **by_channel)
  if step.by_channel:
    *d_tokens, d_log_decay, d_covectors, d_initial = found[:6]
    d_strengths = tpu_step.strength_gradients(step, *found[6:]) if step.erases else []
  else:
    *d_tokens, d_initial = found[:4]
    d_strengths, d_log_decay = tpu_step.gate_gradients(step, *found[4:])
  d_strengths = [d.astype(x.dtype) for d, x in zip(d_strengths, strengths, strict=False)]  # strengths of 1 have none
  (d_operands,) = pull_back((*d_tokens, d_covectors, d_strengths))
  d_operands = jax.tree.map(lambda d, x: d.astype(x.dtype), d_operands, operands)
  if log_decay is None:
    return d_operands, None, d_initial
  d_log_decay = d_log_decay[:, : log_decay.shape[1]].reshape(log_decay.shape).astype(log_decay.dtype)
  counts = log_decay >= step.min_log_decay
  return d_operands, jnp.where(counts if docs is None else counts & docs.is_token[..., None, None], d_log_decay, 0), d_initial


def objection(
  updates: Callable[..., Any],
  dtype: jnp.dtype,
  operands: tuple[jax.Array, ...],
  log_decay: jax.Array | None,
  state: tuple[int, ...],
) -> str | None:
  """Why the kernels do not compute this, or `None`.

  Args:
    updates: maps the operands to q and the updates of every token.
    dtype: of the arithmetic and of the state.
    operands: of the variant.
    log_decay: `None` or [B, T, H, K or 1].
    state: shape of the state, (B, H, K, V).
  """
  if operands[0].dtype not in (jnp.bfloat16, jnp.float32) or dtype != jnp.float32:
    return f"the kernels take bfloat16 or float32 and compute in float32, not {operands[0].dtype} in {jnp.dtype(dtype)}"
  q, made = jax.eval_shape(updates, *operands)
  if len(made) > _MOST_UPDATES:
    return f"the kernels make at most {_MOST_UPDATES} updates per token, not {len(made)}"
  covectors = any(update.covector is not None for update in made)
  if covectors and (log_decay is None or log_decay.shape[-1] == 1):
    return "without a decay for every channel, the kernels read the state along the key of each update, not another vector"
  raw = (x for update in made for x in (update.key, None if covectors else update.value) if x is not None)
  if other := {x.dtype for x in raw} - {q.dtype}:
    return f"the kernels take q, k and v in {q.dtype}, and not {', '.join(map(str, other))}"
  if max(state[2:]) > _WIDEST:
    return f"the kernels have heads of at most {_WIDEST} channels, not {max(state[2:])}"
  return None


def _arrange(plan: Plan, docs: Documents | None, operands: Any) -> tuple[jax.Array, list, list, list, list]:
  """Queries, keys of every update, values of the last ones and covectors, [B, T, heads * width] of whole chunks; and strengths.

  There are covectors of every update, or none, and so with strengths, [B, T, H].
  """
  q, updates = plan.updates(*(_Parts(x) if x.ndim == 5 else x for x in operands))
  first = next(i for i, update in enumerate(updates) if update.value is not None)  # earlier ones only erase
  values = [jnp.zeros_like(updates[first].value) if x.value is None else x.value for x in updates[first:]]
  covectors = [update.covector for update in updates if update.covector is not None]
  strengths = [update.strength for update in updates if update.strength is not None]
  tokens = q, [update.key for update in updates], values, covectors, strengths
  *tokens, strengths = jax.tree.map(partial(_tokens_only, docs, len(updates)), tokens)
  return *jax.tree.map(_joined, tokens), strengths


class _Parts:
  """An array x [B, T, r, H, n] whose updates x[:, :, m] are cut from [B, T, r * H * n], as projections make it.

  A TPU would copy it to cut it along an axis of r.
  """

  def __init__(self, x: jax.Array):
    self.shape, self._flat = x.shape, x.reshape(*x.shape[:2], -1)

  def __getitem__(self, index: tuple[slice, slice, int]) -> jax.Array:
    part = jnp.split(self._flat, self.shape[2], axis=-1)[index[2]]
    return part.reshape(*self.shape[:2], *self.shape[3:])


def _prepare(plan, docs, operands, strengths, log_decay, state, backwards=False):
  """The step, and the gates that the kernels need."""
  q, updates = jax.eval_shape(plan.updates, *operands)
  by_channel = log_decay is not None and log_decay.shape[-1] > 1
  full, covectors = q.dtype == jnp.float32, any(update.covector is not None for update in updates)
  states = (tpu_step.STATES_BACKWARDS if backwards else tpu_step.STATES) // (2 if full or covectors else 1)
  span = tpu_step.longest_span(plan.decay_bound)
  others = plan.scale, docs is not None, bool(strengths) or covectors, by_channel, span, len(updates), full
  step = tpu_step.largest(states, q.shape[0], q.shape[2], state, *others)
  decay = None if log_decay is None or by_channel else _tokens_only(docs, step.updates, log_decay[..., 0])
  shape = q.shape[0], pieces(q.shape[1], step.tokens) * step.tokens, state[1]
  docs = jax.tree.map(partial(_whole_chunks, step.updates), docs)
  if step.erases and not strengths:
    strengths = [jnp.ones(shape, jnp.float32)]
  return step, tpu_step.prepare(step, shape, docs, strengths, decay)


def _decays(docs: Documents | None, step: tpu_step.Step, log_decay: jax.Array) -> jax.Array:
  """Decays of channels, [B, T, H * K], of whole chunks."""
  return _joined(_tokens_only(docs, step.updates, jnp.maximum(log_decay.astype(jnp.float32), step.min_log_decay)))


def _tokens_only(docs: Documents | None, updates: int, x: jax.Array) -> jax.Array:
  """x [B, T, ...] of whole chunks, with zeros for padding, which may hold anything."""
  return _whole_chunks(updates, x if docs is None else zero_padding(docs.is_token, x))


def _whole_chunks(updates: int, x: jax.Array) -> jax.Array:
  """x [B, T, ...] with tokens that have no effect after it."""
  return append_tokens(x, -x.shape[1] % (CHUNK // updates))


def _joined(x: jax.Array) -> jax.Array:
  """[B, T, heads, width] to [B, T, heads * width]."""
  return x.reshape(*x.shape[:2], -1)


def _tokens(x: jax.Array, tokens: int, heads: int) -> jax.Array:
  """[B, T, heads * width] of whole chunks to [B, tokens, heads, width]."""
  return x[:, :tokens].reshape(x.shape[0], tokens, heads, -1)
