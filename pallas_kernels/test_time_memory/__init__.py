"""Memories that learn at test time: the weights of a small network, trained by gradient descent inside the forward pass.

    S_t = eta_t S_{t-1} - theta_t grad l(f(W_anchor; k_t), v_t)      W_t = a_t W_{t-1} + S_t      y_t = f(W_t; q_t)

`run` goes through a sequence, `start` gives a fresh state, `read` asks a memory without writing. What f, l, the optimiser and
the chunks are is said by a `Spec`; Titans (arXiv:2501.00663), TTT (arXiv:2407.04620) and Miras (arXiv:2504.13173) are choices
of these, made in `memzoo.layers.titans`.

Every sequence and head has weights of its own. A state holds what they differ by from what a document begins with, so that a
fresh one is zeros whatever the parameters are, and what a document begins with is learned also where states are handed on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..dispatch import Choice, choose
from ..documents import check_segment_ids, documents, undivided
from ..numerics import accumulator
from ..states import check_state
from .chunked import chunked
from .layout import lay_out
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
  "explain",
  "read",
  "run",
  "start"
]  # fmt: skip


class State(NamedTuple):
  """A memory of B sequences: by how much it differs from what a document begins with. All zeros is a fresh one.

  Attributes:
    weights: W, by name [B, H, in, out]; of what is accumulated, where a retention says that this is not the weights in use.
      With `average`, those of the anchor.
    momentum: S, likewise; `None` for a spec that carries none.
    anchor: where the open chunk's gradients are taken; `None` where that is at `weights`.
    count: int32 [B], tokens in the open chunk.
  """

  weights: Weights
  momentum: Weights | None
  anchor: Weights | None
  count: jax.Array


class Result(NamedTuple):
  """What comes of a call.

  Attributes:
    y: [B, T, H, V], in v's dtype; zeros at padding.
    state: after the last token.
    loss: float32 [B, T, H], each token's at its anchor, before it was written; zeros at padding.
  """

  y: jax.Array
  state: State
  loss: jax.Array


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
) -> Result:
  """Writes every token's value under its key, and reads with its query.

  Args:
    spec: what kind of memory.
    initial: what every document begins with.
    q, k: [B, T, H, K].
    v: [B, T, H, V].
    gates: [B, T, H] each; those that the spec's optimiser and loss ask for.
    initial_state: of an earlier call; fresh unless given. Rows in the middle of a chunk longer than `spec` has come out as nan.
    segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding.
    max_documents: that a row of `segment_ids` may hold, the one that goes on from `initial_state` included. The chunk grid
      begins anew with each, so there must be room for that many broken chunks. A row with more comes out as nan, all of it,
      unless its chunks find room all the same: never wrong, never in part.
    implementation: "auto", "xla" or "recurrent" (the oracle, which knows no bound on documents).

  Raises:
    ValueError: for shapes that do not fit the spec or each other, a state of another spec, gates that are missing or too
      many, or an unknown implementation.
  """
  _check(spec, initial, q, k, v, gates, initial_state, segment_ids, max_documents)
  batch, tokens, heads = q.shape[:3]
  wide = accumulator(q, k, v, *gates, *jax.tree.leaves(initial))
  initial, gates = jax.tree.map(lambda x: x.astype(wide), (initial, gates))
  if spec.accumulates and initial.momentum is None:
    initial = initial._replace(momentum=jax.tree.map(jnp.zeros_like, initial.weights))
  fresh = initial_state is None
  state = start(spec, batch, heads, wide) if fresh else initial_state
  begun = spec.carry(initial.weights, initial.momentum)
  carry = jax.tree.map(lambda start, change: start[None] + change.astype(wide), begun, Carry(*state[:3]))
  docs = None if segment_ids is None else documents(segment_ids)
  operands = spec, initial, *(x.astype(wide) for x in (q, k, v)), gates, carry
  if explain(implementation=implementation).implementation == "recurrent":
    y, loss, carry, count = recurrent(*operands, state.count, undivided(batch, tokens) if docs is None else docs)
  else:
    layout = lay_out(batch, tokens, spec.chunk_size, None if fresh else state.count, docs, max_documents)
    y, loss, carry = chunked(*operands, layout)
    count = layout.count
  change = jax.tree.map(lambda start, end: end - start[None], begun, carry)
  return Result(y.astype(v.dtype), State(*change, count), loss)


def read(spec: Spec, initial: InitialWeights, weights: Weights, q: jax.Array) -> jax.Array:
  """What memories answer without being written to, [B, T, H, V] in q's dtype.

  Args:
    spec: what kind of memory.
    initial: what every document begins with.
    weights: `State.weights`.
    q: [B, T, H, K].

  Raises:
    ValueError: for shapes that do not fit the spec or each other.
  """
  _check_tokens(spec, q=q)
  _check_initial(spec, initial, q.shape[2])
  check_state("weights", "this spec", weights, jax.eval_shape(lambda: start(spec, q.shape[0], q.shape[2]).weights))
  wide = accumulator(q, *jax.tree.leaves(initial))

  def one_head(initial, weights, q):
    used = spec.view({name: initial.weights[name].astype(wide) + weights[name].astype(wide) for name in weights})
    return forward(spec, used, initial.norm, q.astype(wide))

  rows = jax.vmap(jax.vmap(one_head, (0, 0, 1), 1), (None, 0, 0))
  return rows(InitialWeights(initial.weights, norm=initial.norm), weights, q).astype(q.dtype)


def explain(*, implementation: str = "auto") -> Choice:
  """Which implementation runs, and why not the others."""
  return choose("test_time_memory", implementation, {"xla": None, "recurrent": "one dependent step a token: the oracle"})


def _check(spec, initial, q, k, v, gates, initial_state, segment_ids, max_documents) -> None:
  _check_tokens(spec, q=q, k=k, v=v)
  _check_gates(spec, gates, q.shape[:3])
  _check_initial(spec, initial, q.shape[2])
  if initial_state is not None:
    check_state("initial_state", "this spec", initial_state, jax.eval_shape(lambda: start(spec, q.shape[0], q.shape[2])))
  check_segment_ids(segment_ids, q.shape[:2])
  if max_documents < 1:
    raise ValueError(f"max_documents={max_documents}; want at least one.")


def _check_tokens(spec: Spec, q: jax.Array, **others: jax.Array) -> None:
  """Checks q [B, T, H, K], and others to be like it, of the memory's widths."""
  memory = spec.memory
  if q.ndim != 4 or q.shape[1] == 0 or q.shape[3] != memory.key_dim:
    raise ValueError(f"q has shape {list(q.shape)}; want [batch, tokens, heads, {memory.key_dim}], at least one token.")
  for name, x in {"q": q, **others}.items():
    shape = *q.shape[:3], memory.value_dim if name == "v" else memory.key_dim
    if x.shape != shape:
      raise ValueError(f"{name} has shape {list(x.shape)}; want {list(shape)}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} is {x.dtype}; want floats.")


def _check_gates(spec: Spec, gates: Gates, shape: tuple[int, ...]) -> None:
  wanted = {
    "step": True,
    "log_keep": None if not spec.average else False,
    "log_momentum": spec.momentum,
    "threshold": spec.loss.has_threshold,
  }
  for (name, want), gate in zip(wanted.items(), gates, strict=True):
    if gate is None and want:
      raise ValueError(f"gates.{name} is missing; want [batch, tokens, heads] for this spec.")
    if gate is not None and want is False:
      raise ValueError(f"gates.{name} was given; want None, for this spec has no use for it.")
    if gate is not None and jnp.shape(gate) != shape:
      raise ValueError(f"gates.{name} has shape {list(jnp.shape(gate))}; want {list(shape)} (batch, tokens, heads).")


def _check_initial(spec: Spec, initial: InitialWeights, heads: int) -> None:
  shapes = {name: (heads, *shape) for name, shape in spec.memory.shapes().items()}
  for name, matrices in (("weights", initial.weights), ("momentum", initial.momentum or initial.weights)):
    found = {key: w.shape for key, w in matrices.items()}
    if found != shapes:
      raise ValueError(f"initial.{name} has shapes {found}; want {shapes}.")
  if spec.memory.norm != (initial.norm is not None):
    found = "missing" if initial.norm is None else "given"
    raise ValueError(f"initial.norm is {found}; want it exactly where the memory has a norm.")
  if initial.norm is not None and any(a.shape != (heads, spec.memory.value_dim) for a in initial.norm):
    found, want = [list(a.shape) for a in initial.norm], [heads, spec.memory.value_dim]
    raise ValueError(f"initial.norm has shapes {found}; want a gain and a bias of {want}.")
  if spec.average and (initial.average is None or initial.average.shape != (heads, spec.chunk_size)):
    raise ValueError(f"initial.average does not fit; want [heads, chunk_size], {[heads, spec.chunk_size]}.")
