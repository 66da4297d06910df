"""The delta rules by kernels for Hopper GPUs, in Pallas' Mosaic GPU dialect: what they compute, and the plan that uses them.

They are two parts of the form in chunks, `chunked`: the inverses (`gpu_inverse.py`), and the walk of the state through the
chunks, forward and backward (`gpu_walk.py`). What is left to XLA are large products for all chunks at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..documents import Documents
from . import chunked
from .chunked import Kept
from .terms import Plan, Walk

_ROWS, _MOST_UPDATES, _WIDEST = 64, 2, 128


def forward(
  plan: Plan, docs: Documents | None, operands: Any, log_decay: jax.Array | None, initial_state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Kept]:
  """As `chunked.forward`.

  Raises:
    ValueError: if there is no kernel for such a call.
  """
  return chunked.forward(_with_kernels(plan, operands, initial_state), docs, operands, log_decay, initial_state)


def kept_shapes(plan: Plan, operands: Any, initial_state: jax.Array) -> Kept:
  """The shapes of what `forward` keeps."""
  return chunked.kept_shapes(_with_kernels(plan, operands), operands, initial_state)


def backward(
  plan: Plan, docs: Documents | None, operands: Any, log_decay: jax.Array | None, kept: Kept, *cotangents: jax.Array
) -> tuple[Any, jax.Array | None, jax.Array]:
  """As `chunked.backward`."""
  return chunked.backward(_with_kernels(plan, operands), docs, operands, log_decay, kept, *cotangents)


def _with_kernels(plan: Plan, operands: Any, state: jax.Array | None = None) -> Plan:
  if state is not None and (why := objection(plan.updates, plan.dtype, operands, state.shape)):
    raise ValueError(f"implementation='pallas' does not do for this call in a program for GPUs: {why}.")
  _, updates = jax.eval_shape(plan.updates, *operands)
  # Rows in the order of the recurrence make (I + A) triangular.
  return plan._replace(chunk_size=_ROWS // len(updates), group=1, walk=kernels(), shares=False)


def kernels() -> Walk:
  """The kernels. Only who needs them waits for the import of Mosaic GPU, an eighth of a second."""
  from .gpu_inverse import unit_lower_inverse
  from .gpu_walk import walk, walk_back

  return Walk(walk, walk_back, unit_lower_inverse)


def objection(
  updates: Callable[..., Any], dtype: jnp.dtype, operands: tuple[jax.Array, ...], state: tuple[int, ...]
) -> str | None:
  """Why the kernels do not compute this, or `None`; arguments as for `tpu.objection`."""
  q, made = jax.eval_shape(updates, *operands)
  dtypes = {x.dtype for x in [q, *(x for update in made for x in (update.key, update.value) if x is not None)]}
  if dtype != jnp.float32 or dtypes != {jnp.dtype(jnp.bfloat16)}:
    given = ", ".join(sorted({str(x) for x in (*dtypes, jnp.dtype(dtype))} - {"bfloat16"}))
    return f"the kernels for GPUs take queries, keys and values in bfloat16 and compute in float32, not {given}"
  if len(made) > _MOST_UPDATES:
    return f"the kernels make at most {_MOST_UPDATES} updates per token, not {len(made)}"
  if max(state[2:]) > _WIDEST:
    return f"the kernels for GPUs have heads of at most {_WIDEST} channels, not {max(state[2:])}"
  return None
