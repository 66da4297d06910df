"""The call of the operation: its one gradient rule, above the implementations, with a plan for each platform.

The rule sees raw operands: heads are not repeated, and nothing is widened. Its forward and its backward run on each device for
that device's rows and heads.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from ..derivatives import reverse_only
from ..dispatch import Forms, Kernels, Objections, by_platform, kept_by_platform, objection_to_kernels
from ..documents import documents
from ..numerics import FULL, Precision
from ..partition import HEADS, ROWS, aligned, partitioned, with_gradient
from ..sizes import known, pieces, quotient
from . import affine, chunked, gpu, sums, tpu
from .recurrent import recurrent
from .terms import Plan, Update, first_span

# CPUs: small chunks, one at a time, so that its arrays stay in a core's cache.
_CPU_CHUNK, _CPU_CHUNK_OF_SUMS = 32, 64
# GPUs and TPUs: rows of a chunk, tokens of a group of rows, and matrices of a block (chunks x batch x heads), so many that its
# arrays fit into a TPU's fast memory. Sums without decays need little: a whole sequence of so many matrices is one block.
_ROWS, _ROWS_OF_SUMS, _GROUP, _UNROLL = 64, 128, 8, 4
_MATRICES, _MATRICES_BY_CHANNEL, _MATRICES_OF_SUMS = 256, 128, 1024
# GPUs: many matrices keep all of a GPU busy, and take about 0.7 MiB each, for keys and values of 128 channels.
_MATRICES_ON_GPU = 2048

# Names for `jax.checkpoint` policies: with both saved, the backward pass does not run the forward again.
OUTPUT, KEPT = "delta_rule_output", "delta_rule_kept"

# The axes of arrays [B, T, H, ...], [B, T, r, H, ...], [B, H, ...], and of what the forward keeps, [chunks, B, H, ...].
TOKENS, UPDATES, STATE = P(ROWS, None, HEADS), P(ROWS, None, None, HEADS), P(ROWS, HEADS)
_KEPT = P(None, ROWS, HEADS)


class Options(NamedTuple):
  """What a call of the operation asks for.

  Attributes:
    updates: maps the operands [B, T, ...], of which the third has the dtype of the output, to q and the updates of every token;
      see `Plan`.
    specs: which axes of each operand are `ROWS` and `HEADS`.
    scale: factor of the read.
    dtype: of the arithmetic, and of the state.
    precision: of products with intermediates.
    chunk_size: tokens per chunk, or `None`.
    decay_bound: a lower bound of every log-decay, or `None`.
    undecayed: whether covectors read the state before the token's decay.
    kernels: whether programs for TPUs use kernels, and whether nothing else will do.
  """

  updates: Callable[..., tuple[jax.Array, Sequence[Update]]]
  specs: tuple[P, ...]
  scale: float
  dtype: jnp.dtype
  precision: Precision
  chunk_size: int | None
  decay_bound: float | None
  undecayed: bool = False
  kernels: Kernels = Kernels.NEVER


class Inputs(NamedTuple):
  """The arrays of a call.

  Attributes:
    segment_ids: int32 [B, T], or `None`.
    operands: of the variant, arrays [B, T, ...]; the first is q.
    log_decay: `None` or [B, T, H, K or 1].
    state: the initial state, [B, H, K, V].
  """

  segment_ids: jax.Array | None
  operands: tuple[jax.Array, ...]
  log_decay: jax.Array | None
  state: jax.Array


def run(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, H, V] in the dtype of the values, and the final state [B, H, K, V]."""
  return _rule(options, reverse_only(aligned(inputs, _specs(options, inputs))))


def _values(options, inputs):
  return partitioned(partial(_run, options), (_specs(options, inputs),), (TOKENS, STATE), differentiable=False)(inputs)


def _run(options, inputs):
  return by_platform(_forms(options, inputs, _results), inputs)


def _results(form, inputs):
  # What is kept for a gradient is not computed here: XLA sees that nobody reads it, and kernels are told.
  return _forward(form, inputs, form.module not in (tpu, gpu))[0]


def _results_and_kept(form, inputs):
  return _forward(form, inputs, True)


def _run_forward(options, inputs):
  local = partial(_run_and_keep, options)
  results, kept = partitioned(local, (_specs(options, inputs),), ((TOKENS, STATE), _KEPT), differentiable=False)(inputs)
  return checkpoint_name(results, OUTPUT), (inputs, checkpoint_name(kept, KEPT))


def _run_and_keep(options, inputs):
  forms, kept = (_forms(options, inputs, function) for function in (_results_and_kept, _kept_shapes))
  return kept_by_platform(forms, kept, inputs)


def _run_backward(options, residuals, cotangents):
  inputs, kept = residuals
  local, specs = partial(_pull_back, options), _specs(options, inputs)
  parts = specs._replace(operands=options.specs)
  d_inputs = partitioned(local, (specs, _KEPT, (TOKENS, STATE)), parts, differentiable=False)(inputs, kept, cotangents)
  operands = map(_sum_of_devices, specs.operands, options.specs, d_inputs.operands)
  return (d_inputs._replace(operands=tuple(operands)),)


def _sum_of_devices(given: P, part: P, d: jax.Array) -> jax.Array:
  """The cotangent of an operand, whose parts by device lie along its heads where the operand is whole on each device."""
  return d if given == part else jnp.sum(d, axis=tuple(part).index(HEADS), keepdims=True, dtype=d.dtype)


def _pull_back(options, inputs, kept, cotangents):
  return by_platform(_forms(options, inputs, _backward), inputs, kept, cotangents)


_rule = with_gradient(_values, _run_forward, _run_backward)


def objections(options: Options, inputs: Inputs) -> Objections:
  """Why there are no kernels for such a call, by platform."""
  call = options.updates, options.dtype, inputs.operands, inputs.log_decay, inputs.state.shape
  own = (partial(module.objection, *call) for module in (tpu, gpu))
  return Objections(*(objection_to_kernels(inputs, _specs(options, inputs), options.chunk_size, each) for each in own))


def recurrence(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
  """The same function as `run`, by the oracle. JAX differentiates it."""

  def local(inputs):
    q, updates = options.updates(*inputs.operands)
    given = inputs.log_decay, inputs.state, _documents(inputs)
    out, state = recurrent(q, updates, options.scale, *given, options.undecayed)
    return out.astype(inputs.operands[2].dtype), state

  return partitioned(local, (_specs(options, inputs),), (TOKENS, STATE))(inputs)


def _specs(options: Options, inputs: Inputs) -> Inputs:
  """Which axes of the inputs are `ROWS` and `HEADS`. A single head of keys for all value heads is whole on each device."""
  heads = inputs.state.shape[1]

  def place(spec, x):
    return P(ROWS) if heads > 1 and x.shape[tuple(spec).index(HEADS)] == 1 else spec

  return Inputs(P(ROWS), tuple(map(place, options.specs, inputs.operands)), TOKENS, STATE)


def _documents(inputs: Inputs):
  return None if inputs.segment_ids is None else documents(inputs.segment_ids)


class _Form(NamedTuple):
  """A form: the platform that it is for, as in `Forms`, the module with its `forward` and `backward`, and its plan."""

  platform: str
  module: ModuleType
  plan: Plan


# Compiled functions within a program are traced once for equal plans and shapes, so once for equal layers.
@partial(jax.jit, static_argnums=(0, 2))
def _forward(form: _Form, inputs: Inputs, keep: bool):
  options = {} if keep else {"keep": False}
  return form.module.forward(form.plan, _documents(inputs), *inputs[1:], **options)


def _kept_shapes(form: _Form, inputs: Inputs) -> Any:
  return form.module.kept_shapes(form.plan, inputs.operands, inputs.state)


@partial(jax.jit, static_argnums=0)
def _backward(form: _Form, inputs: Inputs, kept: Forms, cotangents) -> Inputs:
  given = inputs.operands, inputs.log_decay, getattr(kept, form.platform), *cotangents
  return Inputs(None, *form.module.backward(form.plan, _documents(inputs), *given))


def _forms(options: Options, inputs: Inputs, function: Callable[..., Any]) -> Forms:
  """`function` of the form of each platform, for one device's part."""
  plans = _plans(options, inputs)
  forms = {name: _Form(name, sums if plan.shares else chunked, plan) for name, plan in plans.items()}
  if options.kernels != Kernels.NEVER:
    forms["tpu"] = _Form("tpu", tpu, plans["others"])
  if options.kernels == Kernels.ALWAYS:
    forms = {name: _Form(name, tpu, plans["others"]) for name in ("cpu", "others")} | {"gpu": _Form("gpu", gpu, plans["gpu"])}
  return Forms(**{name: partial(function, form) for name, form in forms.items()})


def _plans(options: Options, inputs: Inputs) -> dict[str, Plan]:
  """The plans of the chunked form in programs for CPUs, GPUs and other platforms, for one device's part."""
  q, updates = jax.eval_shape(options.updates, *inputs.operands)
  (batch, tokens), heads = q.shape[:2], inputs.state.shape[1]

  def size(default):
    chunk = options.chunk_size or default
    # No chunk is longer than the sequence, rounded up to a power of two.
    return min(chunk, 1 << (tokens - 1).bit_length()) if known(tokens) else chunk

  per_channel = inputs.log_decay is not None and inputs.log_decay.shape[-1] > 1
  adds = not per_channel and not any(update.erases for update in updates)
  shares = adds and q.shape[2] < heads  # with a key for each head, `chunked` is as fast on a CPU, or faster
  rows = size(_CPU_CHUNK_OF_SUMS if shares else _CPU_CHUNK)
  bounds = {"decay_bound": options.decay_bound, "undecayed": options.undecayed}
  dtypes = options.dtype, inputs.operands[2].dtype
  common = Plan(options.updates, heads, options.scale, *dtypes, rows, shares=shares, **bounds)
  chunk = size(_ROWS_OF_SUMS if adds else _ROWS >> (len(updates) - 1).bit_length())
  in_groups = len(updates) > 1 and not (per_channel and first_span(chunk, options.decay_bound) < _GROUP)
  raw = {x.dtype for x in (q, *(x for update in updates for x in (update.key, update.covector) if x is not None))}
  whole = pieces(tokens, chunk) * batch * heads
  matrices = _MATRICES_BY_CHANNEL if per_channel else _MATRICES
  if adds and inputs.log_decay is None and known(whole) and whole <= _MATRICES_OF_SUMS:
    matrices = whole
  others = common._replace(
    chunk_size=chunk,
    block=quotient(matrices, batch * heads),
    group=min(_GROUP, chunk) if in_groups else 1,
    unroll=_UNROLL,
    raw=q.dtype if len(raw) == 1 and options.precision is not FULL else None,
    precision=options.precision,
    whole_chunks=True,
    shares=adds,
  )
  gpu = others._replace(block=quotient(_MATRICES_ON_GPU, batch * heads), walk=None if adds else affine.WALK)
  return {"cpu": common, "others": others, "gpu": gpu}
