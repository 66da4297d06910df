"""Memories that learn at test time: the weights of a small network, trained by gradient descent inside the forward pass.

    S_t = eta_t S_{t-1} - theta_t grad l(f(W_anchor; k_t), v_t)     W_t = W_o + a_t (W_{t-1} - W_o) + S_t     y_t = f(W_t; q_t)

`run` processes a sequence and `start` makes a fresh state. For memories that read what others retrieved, `read` reads without
writing, and `write` writes without reading, chunk by chunk. A `Spec` chooses f, l, the optimiser and the chunks. Titans
(arXiv:2501.00663), TTT (arXiv:2407.04620) and Miras (arXiv:2504.13173) are such choices; see `memzoo.layers.titans` and
`memzoo.layers.ttt`.

Every sequence and head has its own weights. A state holds the differences from the initial weights. A fresh state is therefore
zero for all parameters, and the initial weights get gradients also in calls that continue a state.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ..derivatives import reverse_only
from ..dispatch import Choice, Forms, by_platform, choose
from ..documents import Documents, check_segment_ids, documents, select_rows, undivided
from ..numerics import Precision, accumulator, intermediate_precision
from ..partition import HEADS, ROWS, partitioned
from ..states import check_state, exportable
from .chunked import carry_at_start, chunked, plans
from .layout import Layout, lay_out, one_chunk
from .recurrent import recurrent
from .spec import Carry, Gates, InitialWeights, Loss, Memory, Retention, Spec, Weights, forward

__all__ = [
  "Gates",
  "InitialWeights",
  "Loss",
  "Memory",
  "Result",
  "Retention",
  "Spec",
  "State",
  "chunk_start",
  "explain",
  "read",
  "run",
  "start",
  "write"
]  # fmt: skip


@exportable
class State(NamedTuple):
  """The memories of B sequences, as differences from the initial weights. A fresh state is all zeros.

  Attributes:
    weights: W, by name, [B, H, in, out] each; with a retention, the accumulated A. With `average`, the anchor's.
    momentum: S, likewise; `None` for a spec without it.
    anchor: the weights at which the open chunk's gradients are taken; `None` if these are `weights`.
    count: int32 [B], tokens in the open chunk.
  """

  weights: Weights
  momentum: Weights | None
  anchor: Weights | None
  count: jax.Array


class Result(NamedTuple):
  """The result of a call.

  Attributes:
    y: [B, T, H, V], in v's dtype; zeros at padding.
    state: after the last token.
    loss: float32 [B, T, H], of each token at its anchor, before its write; zeros at padding.
  """

  y: jax.Array
  state: State
  loss: jax.Array


_OF_HEADS, _TOKENS = P(HEADS), P(ROWS, None, HEADS)
_STATE = State(*[P(ROWS, HEADS)] * 3, P(ROWS))


def start(spec: Spec, batch_size: int, heads: int, dtype: jnp.dtype = jnp.float32) -> State:
  """A fresh state."""

  def zeros():
    return {name: jnp.zeros((batch_size, heads, *shape), dtype) for name, shape in spec.memory.shapes().items()}

  weights, momentum, anchor = spec.carry(zeros(), zeros())
  return State(weights, momentum, anchor and zeros(), jnp.zeros((batch_size,), jnp.int32))


def run(
  spec: Spec,
  initial: InitialWeights,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: Gates,
  *,
  initial_state: State | None = None,
  segment_ids: jax.Array | None = None,
  max_documents: int = 16,
  implementation: str = "auto",
  precision: str | None = None,
) -> Result:
  """Writes the value of every token under its key, and reads with its query.

  Args:
    spec: the kind of memory.
    initial: the weights at the start of every document.
    q, k: [B, T, H, K].
    v: [B, T, H, V].
    gates: [B, T, H] each; those that the optimiser and the loss need.
    initial_state: state of an earlier call; `None` for a fresh one. Rows whose open chunk has `chunk_size` tokens or more
      return NaN.
    segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding.
    max_documents: largest number of documents in a row, including the one that continues `initial_state`. Each begins a new
      chunk, so the number of chunks grows with it. A row with more documents returns NaN everywhere, unless its chunks fit.
    implementation: "auto", "xla" or "recurrent" (the oracle, which has no limit on documents).
    precision: `None`: where q, k and v are bfloat16, accelerators multiply float32 intermediates in three passes over bfloat16
      halves. "highest": at full precision, as where they are float32.

  Raises:
    ValueError: for shapes that do not fit the spec or each other, a state of another spec, missing or unused
      gates, an unknown implementation or precision.
  """
  _check(spec, initial, q, k, v, gates, initial_state, segment_ids, max_documents)
  fresh = initial_state is None
  how = _How(
    spec,
    explain(implementation=implementation).implementation,
    intermediate_precision(precision, q, k, v),
    accumulator(q, k, v, *gates, *jax.tree.leaves(initial)),
    fresh,
    max_documents,
  )
  state = start(spec, q.shape[0], q.shape[2], how.wide) if fresh else initial_state
  run_part = partitioned(partial(_run, how), (_OF_HEADS, *[_TOKENS] * 4, _STATE, P(ROWS)), Result(_TOKENS, _STATE, _TOKENS))
  return run_part(initial, q, k, v, gates, state, segment_ids)


def write(
  spec: Spec,
  initial: InitialWeights,
  k: jax.Array,
  v: jax.Array,
  gates: Gates,
  state: State,
  is_token: jax.Array,
  *,
  implementation: str = "auto",
  precision: str | None = None,
) -> State:
  """Writes tokens of one chunk: those that continue the open chunk of `state`, or begin one. Returns the next state.

  Args:
    spec, initial, gates, implementation, precision: as in `run`.
    k: [B, C, H, K].
    v: [B, C, H, V].
    state: of an earlier call, or a fresh one.
    is_token: bool [B, C]; others are padding, which may only follow tokens. A row with more tokens than its open chunk lacks
      returns NaN.

  Raises:
    ValueError: as in `run`.
  """
  _check_operands(spec, initial, k, v, gates, state=state)
  if is_token.shape != k.shape[:2] or is_token.dtype != bool:
    raise ValueError(f"is_token is {is_token.dtype}{list(is_token.shape)}; expected bool{list(k.shape[:2])} (batch, tokens).")
  how = _How(
    spec,
    explain(implementation=implementation).implementation,
    intermediate_precision(precision, k, v),
    accumulator(k, v, *gates, *jax.tree.leaves(initial)),
  )
  write_part = partitioned(partial(_write, how), (_OF_HEADS, *[_TOKENS] * 3, _STATE, P(ROWS)), _STATE)
  return write_part(initial, k, v, gates, state, is_token)


def chunk_start(state: State) -> Weights:
  """The weights that the open chunk began with, or else the next one begins with: `weights` for `read`."""
  return state.weights if state.anchor is None else select_rows(state.count > 0, state.anchor, state.weights)


class _How(NamedTuple):
  """What a call's program depends on, besides shapes and dtypes; see `run`. `fresh`: the state is a fresh one."""

  spec: Spec
  implementation: str
  precision: Precision
  wide: jnp.dtype
  fresh: bool = False
  max_documents: int = 1


def _run(
  how: _How,
  initial: InitialWeights,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: Gates,
  state: State,
  segment_ids: jax.Array | None,
) -> Result:
  """`run` of the rows and heads that it is given."""
  batch, tokens = q.shape[:2]
  docs = None if segment_ids is None else documents(segment_ids)

  def layout() -> Layout:
    return lay_out(batch, tokens, how.spec.chunk_size, None if how.fresh else state.count, docs, how.max_documents)

  return _learn(how, initial, q, k, v, gates, state, undivided(batch, tokens) if docs is None else docs, layout)


def _write(
  how: _How, initial: InitialWeights, k: jax.Array, v: jax.Array, gates: Gates, state: State, is_token: jax.Array
) -> State:
  """`write` of the rows and heads that it is given. Reads by the keys are not used, so XLA leaves them out."""
  docs = Documents(jnp.zeros_like(is_token, jnp.int32), is_token)
  layout = partial(one_chunk, is_token, state.count, how.spec.chunk_size)
  return _learn(how, initial, k, k, v, gates, state, docs, layout).state


def _learn(
  how: _How,
  initial: InitialWeights,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: Gates,
  state: State,
  docs: Documents,
  layout: Callable[[], Layout],
) -> Result:
  """Writes and reads all tokens, by `docs` or in the chunks of `layout()`."""
  spec, wide = how.spec, how.wide
  initial, gates = jax.tree.map(lambda x: x.astype(wide), (initial, gates))
  at_start = spec.carry(initial.weights, initial.momentum)
  if how.implementation != "recurrent":
    at_start = carry_at_start(spec, initial, gates)
  carry = jax.tree.map(lambda start, change: start[None] + change.astype(wide), at_start, Carry(*state[:3]))
  operands = initial, q, k, v, gates, carry
  if how.implementation == "recurrent":
    y, loss, carry, count = recurrent(spec, *operands, state.count, docs)
  else:
    chunks = layout()
    forms = [partial(chunked, spec, plan) for plan in plans(how.precision, chunks.is_token.shape[1])]
    y, loss, carry = by_platform(Forms(*forms), *reverse_only(operands), chunks)
    count = chunks.count
  change = jax.tree.map(lambda start, end: end - start[None], at_start, carry)
  return Result(y.astype(v.dtype), State(*change, count), loss)


def read(
  spec: Spec, initial: InitialWeights, weights: Weights, q: jax.Array, *, precision: str | None = None
) -> jax.Array:
  """Reads without writing: f(W; q), [B, T, H, V] in q's dtype.

  Args:
    spec: the kind of memory.
    initial: the weights at the start of every document.
    weights: `State.weights`.
    q: [B, T, H, K].
    precision: as in `run`.

  Raises:
    ValueError: for shapes that do not fit the spec or each other, or an unknown precision.
  """
  _check_tokens(spec, q=q)
  _check_initial(spec, initial, q.shape[2])
  check_state("weights", "this spec", weights, jax.eval_shape(lambda: start(spec, q.shape[0], q.shape[2]).weights))
  wide, product = accumulator(q, *jax.tree.leaves(initial)), intermediate_precision(precision, q)

  def one_head(initial, weights, q):
    used = spec.view({name: initial.weights[name].astype(wide) + weights[name].astype(wide) for name in weights})
    return forward(spec, used, initial.norm, q.astype(wide), product)

  rows = partitioned(
    jax.vmap(jax.vmap(one_head, (0, 0, 1), 1), (None, 0, 0)), (_OF_HEADS, _STATE.weights, _TOKENS), _TOKENS
  )
  return rows(InitialWeights(initial.weights, norm=initial.norm), weights, q).astype(q.dtype)


def explain(*, implementation: str = "auto") -> Choice:
  """Returns the implementation that would run, and why the others would not."""
  return choose("test_time_memory", implementation, {"xla": None, "recurrent": "one dependent step per token: the oracle"})


def _check(spec, initial, q, k, v, gates, initial_state, segment_ids, max_documents) -> None:
  _check_tokens(spec, q=q, k=k, v=v)
  _check_operands(spec, initial, k, v, gates, initial_state=initial_state)
  check_segment_ids(segment_ids, q.shape[:2])
  if max_documents < 1:
    raise ValueError(f"max_documents={max_documents}; expected at least one.")


def _check_operands(spec, initial, k, v, gates, **state) -> None:
  _check_tokens(spec, k=k, v=v)
  _check_gates(spec, gates, k.shape[:3])
  _check_initial(spec, initial, k.shape[2])
  for name, given in state.items():
    if given is not None:
      check_state(name, "this spec", given, jax.eval_shape(lambda: start(spec, k.shape[0], k.shape[2])))


def _check_tokens(spec: Spec, **operands: jax.Array) -> None:
  """Checks operands [B, T, H, .]: that the first has keys, and that all fit it and the memory's widths."""
  memory, (first, q) = spec.memory, next(iter(operands.items()))
  if q.ndim != 4 or q.shape[1] == 0 or q.shape[3] != memory.key_dim:
    raise ValueError(
      f"{first} has shape {list(q.shape)}; expected [batch, tokens, heads, {memory.key_dim}], at least one token."
    )
  for name, x in operands.items():
    shape = *q.shape[:3], memory.value_dim if name == "v" else memory.key_dim
    if x.shape != shape:
      raise ValueError(f"{name} has shape {list(x.shape)}; expected {list(shape)}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} is {x.dtype}; expected floats.")


def _check_gates(spec: Spec, gates: Gates, shape: tuple[int, ...]) -> None:
  wanted = {
    "step": True,
    "log_keep": None if not spec.average else False,
    "log_momentum": spec.momentum,
    "threshold": spec.loss.has_threshold,
  }
  for (name, want), gate in zip(wanted.items(), gates, strict=True):
    if gate is None and want:
      raise ValueError(f"gates.{name} is missing; expected [batch, tokens, heads] for this spec.")
    if gate is not None and want is False:
      raise ValueError(f"gates.{name} was given; expected None, because this spec does not use it.")
    if gate is not None and jnp.shape(gate) != shape:
      raise ValueError(f"gates.{name} has shape {list(jnp.shape(gate))}; expected {list(shape)} (batch, tokens, heads).")


def _check_initial(spec: Spec, initial: InitialWeights, heads: int) -> None:
  shapes = {name: (heads, *shape) for name, shape in spec.memory.shapes().items()}
  for name, matrices in (("weights", initial.weights), ("momentum", initial.momentum or initial.weights)):
    found = {key: w.shape for key, w in matrices.items()}
    if found != shapes:
      raise ValueError(f"initial.{name} has shapes {found}; expected {shapes}.")
  if spec.memory.norm != (initial.norm is not None):
    found = "missing" if initial.norm is None else "given"
    raise ValueError(f"initial.norm is {found}; expected a gain and a bias if and only if the memory has a norm.")
  if initial.norm is not None and any(a.shape != (heads, spec.memory.value_dim) for a in initial.norm):
    found, want = [list(a.shape) for a in initial.norm], [heads, spec.memory.value_dim]
    raise ValueError(f"initial.norm has shapes {found}; expected a gain and a bias of {want}.")
  if spec.average and (initial.average is None or initial.average.shape != (heads, spec.chunk_size)):
    raise ValueError(f"initial.average does not fit; expected [heads, chunk_size], {[heads, spec.chunk_size]}.")
