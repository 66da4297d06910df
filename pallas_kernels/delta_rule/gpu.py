"""The delta rules by kernels for Hopper GPUs, in Pallas' Mosaic GPU dialect, which are parts of the form in chunks, `chunked`.

    gpu_walk.py      the walk of the state through the chunks, forward and backward
    gpu_prepare.py   P and (I + A)^-1 of all chunks, for decays that are one number per token
    gpu_inverse.py   (I + A)^-1 of all chunks, for decays per channel and in the backward pass

What is left to XLA are gates and, with decays per channel and in the backward pass, large products for all chunks at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..documents import Documents
from . import chunked
from .chunked import Kept
from .terms import Plan, Walk, arrange_tokens, boundary_decays, bounded_log_decay, by_row, cumulative, make_masks, zero_padding

_ROWS, _MOST_UPDATES, _WIDEST = 64, 2, 128
# Between two tokens stronger decays count as this one, e^-30 = 1e-13, so that cumulative sums keep their precision.
_MIN_LOG_DECAY = -30.0


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
  """As `chunked.forward`, but what it keeps of (I + A)^-1 is in parts, [chunks, B, H, 2, R, R].

  Raises:
    ValueError: if there is no kernel for such a call.
  """
  if why := objection(plan.updates, plan.dtype, operands, log_decay, initial_state.shape):
    raise ValueError(f"implementation='pallas' does not do for this call in a program for GPUs: {why}.")
  plan = _with_kernels(plan, operands, interpret)
  if log_decay is not None and log_decay.shape[-1] > 1:
    results, kept = chunked.forward(plan, docs, operands, log_decay, initial_state)
    return results, kept._replace(inverse=None if kept.inverse is None else _split(kept.inverse))
  return _forward(plan, docs, operands, log_decay, initial_state, keep, interpret)


def _split(x: jax.Array) -> jax.Array:
  from .gpu_tiles import split

  return split(x)


def _forward(plan, docs, operands, log_decay, initial_state, keep, interpret):
  """For decays that are one number per token: the kernels read queries, keys and values where they are."""
  from .gpu_prepare import scores_and_inverse
  from .gpu_sources import Parts, Rows, Size
  from .gpu_walk import forward, gates, whole_tiles

  (batch, length), (heads, key_dim, width) = operands[0].shape[:2], initial_state.shape[1:]
  plan, blocks, (docs, (operands, log_decay)) = chunked.in_blocks(plan, (docs, (operands, log_decay)))
  if docs is not None:
    operands, log_decay = jax.tree.map(partial(zero_padding, docs.is_token), (operands, log_decay))
  q, updates = plan.updates(*operands)
  size = Size(blocks * plan.block, batch, heads, key_dim, width)

  # Gates, arranged in chunks. Nothing else of `tokens` is used, and padding is zero already.
  tokens = arrange_tokens(plan, None, operands, log_decay)
  masks = make_masks(plan, docs, jnp.zeros((batch,), jnp.int32), len(updates))
  decay = bounded_log_decay(plan, q, tokens.log_decay)
  n = size.chunks * size.matrices
  entering, leaving, kept_share = boundary_decays(plan, masks, decay, n)
  since_start = jnp.broadcast_to(cumulative(plan, jnp.maximum(decay, _MIN_LOG_DECAY))[..., 0], (n, plan.chunk_size))
  document = jnp.zeros_like(since_start) if docs is None else _documents(plan, docs).astype(jnp.float32)
  per_row = partial(by_row, plan, updates=len(updates))
  erases = tokens.strengths is not None
  strength = tokens.strengths.astype(plan.dtype) if erases else jnp.ones_like(per_row(since_start))
  vectors = since_start, document, per_row(since_start), per_row(document), strength
  vectors = jnp.stack([jnp.pad(x, ((0, 0), (0, _ROWS - x.shape[1]))) for x in vectors], axis=1)
  factors = plan.scale * entering[..., 0], strength, strength * per_row(entering)[..., 0], per_row(leaving)[..., 0]

  def rows(arrays, shared, **options):
    x = arrays[0] if len(arrays) == 1 else jnp.stack(arrays, axis=2).reshape(batch, -1, *arrays[0].shape[2:])
    x = whole_tiles(x, -1)
    return Rows(x.reshape(*x.shape[:2], -1), plan.chunk_size * len(arrays), x.shape[-1], shared, **options)

  first = next(update.value for update in updates if update.value is not None)
  values = [jnp.zeros_like(first) if update.value is None else update.value for update in updates]
  shared = heads // q.shape[2]
  queries, keys = rows([q], shared), rows([update.key for update in updates], shared, slots=2)
  scores, *inverse = scores_and_inverse(
    queries, keys, plan.scale, vectors, size, updates=len(updates), erases=erases, interpret=interpret
  )
  sources = {"queries": queries, "keys": keys, "values": rows(values, 1, by_columns=True), "scores": Parts(scores)}
  sources |= {"gates": gates(factors, kept_share, key_dim)} | ({"inverse": Parts(*inverse)} if erases else {})
  out_width = sources["values"].width
  out = jax.ShapeDtypeStruct((batch, size.chunks * plan.chunk_size, heads * out_width), jnp.bfloat16)
  out = Rows(out, plan.chunk_size, out_width)
  state = initial_state.reshape(-1, key_dim, width)
  state, y, *states = forward(sources, size, state, out, keep=keep, interpret=interpret)
  y = y.reshape(batch, -1, heads, out_width)[:, :length, :, :width]
  results = y, state.reshape(initial_state.shape)
  if not keep:
    return results, None
  states, *inverse = (x.reshape(-1, batch, heads, *x.shape[1:]) for x in (*states, *inverse))
  return results, Kept(states[..., :key_dim, :width], None, *inverse if erases else (None,))


def _documents(plan: Plan, docs: Documents) -> jax.Array:
  """The document of every token of chunks, [n * B * H, C]."""
  return chunked.to_chunks(jnp.repeat(docs.index[..., None], plan.heads, axis=2), plan.chunk_size)


def kept_shapes(plan: Plan, operands: Any, initial_state: jax.Array) -> Kept:
  """The shapes of what `forward` keeps."""
  kept = chunked.kept_shapes(_with_kernels(plan, operands), operands, initial_state)
  if kept.inverse is None:
    return kept
  *of, rows, columns = kept.inverse.shape
  return kept._replace(inverse=jax.ShapeDtypeStruct((*of, 2, rows, columns), jnp.bfloat16))


def backward(
  plan: Plan,
  docs: Documents | None,
  operands: Any,
  log_decay: jax.Array | None,
  kept: Kept,
  *cotangents: jax.Array,
  interpret: Any = False,
) -> tuple[Any, jax.Array | None, jax.Array]:
  """As `chunked.backward`."""
  inverse = None if kept.inverse is None else jnp.sum(kept.inverse.astype(plan.dtype), axis=-3)
  plan = _with_kernels(plan, operands, interpret)
  return chunked.backward(plan, docs, operands, log_decay, kept._replace(inverse=inverse), *cotangents)


def _with_kernels(plan: Plan, operands: Any, interpret: Any = False) -> Plan:
  """The plan that uses kernels. Only who needs them waits for the import of Mosaic GPU, an eighth of a second."""
  from .gpu_inverse import unit_lower_inverse
  from .gpu_walk import walk, walk_back

  _, updates = jax.eval_shape(plan.updates, *operands)
  kernels = Walk(*(partial(kernel, interpret=interpret) for kernel in (walk, walk_back, unit_lower_inverse)))
  # Rows in the order of the recurrence make A triangular.
  return plan._replace(chunk_size=_ROWS // max(1, len(updates)), group=1, walk=kernels, shares=False)


def objection(
  updates: Callable[..., Any],
  dtype: jnp.dtype,
  operands: tuple[jax.Array, ...],
  log_decay: jax.Array | None,
  state: tuple[int, ...],
) -> str | None:
  """Why the kernels do not compute this, or `None`; arguments as for `tpu.objection`."""
  del log_decay
  q, made = jax.eval_shape(updates, *operands)
  if any(update.covector is not None for update in made):
    return "the kernels for GPUs read the state along the key of each update, and not along another vector"
  dtypes = {x.dtype for x in [q, *(x for update in made for x in (update.key, update.value) if x is not None)]}
  if dtype != jnp.float32 or dtypes != {jnp.dtype(jnp.bfloat16)}:
    given = ", ".join(sorted({str(x) for x in (*dtypes, jnp.dtype(dtype))} - {"bfloat16"}))
    return f"the kernels for GPUs take queries, keys and values in bfloat16 and compute in float32, not {given}"
  if len(made) > _MOST_UPDATES:
    return f"the kernels make at most {_MOST_UPDATES} updates per token, not {len(made)}"
  if max(state[2:]) > _WIDEST:
    return f"the kernels for GPUs have heads of at most {_WIDEST} channels, not {max(state[2:])}"
  return None
