"""The call of the selective scan: its gradient rule, on raw operands, with a plan for each platform.

Rows and channels are independent, but for the gradients by b and c, which are sums over channels. These are computed in parts,
each of which one device has whole, and added outside.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from ..derivatives import reverse_only
from ..dispatch import Forms, Kernels, by_platform, kept_by_platform, objection_to_kernels
from ..documents import Documents, documents
from ..partition import HEADS, ROWS, aligned, partitioned, with_gradient
from ..sizes import bounded, pieces, quotient
from . import tpu
from .chunked import Plan, backward, forward
from .recurrent import recurrent

# CPUs: as many tokens at a time as keep the arrays of a block, [tokens, rows, N, D], in a core's cache.
_CPU_ELEMENTS, _CPU_LONGEST = 1 << 18, 64
# GPUs and TPUs: few tokens in sequence, and so many chunks at once that their states fill the units.
_CHUNK, _STATES = 16, 1 << 21

# Parts of the channels in the gradients by b and c: at most so many devices can share the channels. A part of whole registers
# has a kernel.
_PARTS = 8

# Names for `jax.checkpoint` policies: with both saved, the backward pass does not run the forward again.
OUTPUT, KEPT = "selective_scan_output", "selective_scan_kept"

_TOKENS, _STATE, _RATES, _SHARED = P(ROWS, None, HEADS), P(ROWS, None, HEADS), P(None, HEADS), P(ROWS)
_KEPT, _PARTIAL = P(None, ROWS, None, HEADS), P(ROWS, None, HEADS)


class Inputs(NamedTuple):
  """The arrays of a call: segment_ids [B, T] or `None`, x and step [B, T, D], a [N, D], b and c [B, T, N], state [B, N, D]."""

  segment_ids: jax.Array | None
  x: jax.Array
  step: jax.Array
  a: jax.Array
  b: jax.Array
  c: jax.Array
  state: jax.Array


_SPECS = Inputs(P(ROWS), _TOKENS, _TOKENS, _RATES, _SHARED, _SHARED, _STATE)


class Options(NamedTuple):
  """What a call asks for: `chunk_size` tokens one after another, or `None`; and which programs use kernels."""

  chunk_size: int | None = None
  kernels: Kernels = Kernels.NEVER


def run(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
  """y [B, T, D] in x's dtype and the final state [B, N, D]."""
  return _scan(options, reverse_only(aligned(inputs, _SPECS)))


def objection(options: Options, inputs: Inputs) -> str | None:
  """Why there is no kernel for such a call, or `None`."""
  own = partial(tpu.objection, inputs.state.dtype, inputs.x, inputs.state.shape)
  return objection_to_kernels(inputs, _SPECS, options.chunk_size, own)


def recurrence(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
  """The same function as `run`, by the oracle. JAX differentiates it."""

  def local(inputs):
    y, state = recurrent(*inputs[1:], _documents(inputs))
    return y.astype(inputs.x.dtype), state

  return partitioned(local, (_SPECS,), (_TOKENS, _STATE))(inputs)


def _values(options, inputs):
  return partitioned(partial(_run, options), (_SPECS,), (_TOKENS, _STATE), differentiable=False)(inputs)


def _scan_forward(options, inputs):
  local = partial(_run_and_keep, options)
  results, kept = partitioned(local, (_SPECS,), ((_TOKENS, _STATE), _KEPT), differentiable=False)(inputs)
  return checkpoint_name(results, OUTPUT), (inputs, checkpoint_name(kept, KEPT))


def _scan_backward(options, residuals, cotangents):
  inputs, kept = residuals
  channels = inputs.x.shape[2]
  parts = jnp.zeros((math.gcd(_PARTS, channels if channels % tpu.LANES else channels // tpu.LANES),), jnp.int32)
  local = partitioned(
    partial(_pull_back, options),
    (_SPECS, _KEPT, (_TOKENS, _STATE), P(HEADS)),
    (_TOKENS, _TOKENS, _STATE, _PARTIAL, _PARTIAL, _STATE),
    differentiable=False,
  )
  dx, d_step, da, db, dc, d_state = local(inputs, kept, cotangents, parts)
  da, db, dc = jnp.sum(da, axis=0), jnp.sum(db, axis=2), jnp.sum(dc, axis=2)
  like = inputs.a, inputs.b, inputs.c
  return (Inputs(None, dx, d_step, *(d.astype(z.dtype) for d, z in zip((da, db, dc), like, strict=True)), d_state),)


_scan = with_gradient(_values, _scan_forward, _scan_backward)


def _run(options, inputs):
  return by_platform(_forms(options, inputs, _results), inputs)


def _results(platform, plan, inputs):
  # What is kept for a gradient is not computed here: XLA sees that nobody reads it, and kernels are told.
  return _forward(platform, plan, inputs, keep=plan is not None)[0]


def _run_and_keep(options, inputs):
  forms, kept = (_forms(options, inputs, function) for function in (_forward, _kept_shape))
  return kept_by_platform(forms, kept, inputs)


def _pull_back(options, inputs, kept, cotangents, parts):
  return by_platform(_forms(options, inputs, partial(_backward, len(parts))), inputs, kept, cotangents)


# Compiled functions within a program are traced once for equal plans and shapes, so once for equal layers.
@partial(jax.jit, static_argnums=(0, 1), static_argnames="keep")
def _forward(platform: str, plan: Plan | None, inputs: Inputs, keep: bool = True):
  if plan is None:
    return tpu.forward(_documents(inputs), *inputs[1:], keep=keep)
  return forward(plan, _documents(inputs), *inputs[1:])


def _kept_shape(platform: str, plan: Plan | None, inputs: Inputs) -> jax.ShapeDtypeStruct:
  """What `_forward` keeps: the states before all blocks of tokens."""
  block = tpu.CHUNK if plan is None else plan.chunk_size * plan.chunks
  return jax.ShapeDtypeStruct((pieces(inputs.x.shape[1], block), *inputs.state.shape), inputs.state.dtype)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(parts: int, platform: str, plan: Plan | None, inputs: Inputs, kept: Forms, cotangents):
  given = _documents(inputs), *inputs[1:-1], getattr(kept, platform), *cotangents, parts
  return tpu.backward(*given) if plan is None else backward(plan, *given)


def _forms(options: Options, inputs: Inputs, function: Callable[..., Any]) -> Forms:
  """`function` of the name and the plan of each platform, for one device's part. Kernels have no plan."""
  plans = dict(zip(("cpu", "others"), _plans(options.chunk_size, inputs), strict=True))
  if options.kernels == Kernels.ON_TPU:
    plans["tpu"] = None
  if options.kernels == Kernels.ALWAYS:
    plans = dict.fromkeys(plans)
  return Forms(*(partial(function, name, plan) for name, plan in plans.items()))


def _plans(chunk_size: int | None, inputs: Inputs) -> tuple[Plan, Plan]:
  """The plans of the form in programs for CPUs, and in programs for other platforms, for one device's part."""
  (batch, tokens, _), (_, states, channels) = inputs.x.shape, inputs.state.shape
  size = batch * states * channels
  on_cpu = bounded(tokens, chunk_size or min(_CPU_LONGEST, quotient(_CPU_ELEMENTS, size)))
  length = bounded(tokens, chunk_size or _CHUNK)
  chunks = 1 << (bounded(pieces(tokens, length), quotient(_STATES, size)).bit_length() - 1)
  return Plan(on_cpu), Plan(length, chunks, in_bulk=False)


def _documents(inputs: Inputs) -> Documents | None:
  return None if inputs.segment_ids is None else documents(inputs.segment_ids)
