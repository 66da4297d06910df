"""What a memory holds: how full it is, how its gates are set, and how well and how long each write can be read back.

    curves = curves_over_time(model, params, tokens, every=16)      # norm and effective rank of every memory matrix
    inner_losses(model, params, tokens)                             # errors of memories that learn at test time, per token
    gates(model, params, tokens)                                    # write strengths, decays, erase strengths
    routing(model, params, tokens)                                  # shares of tokens that each memory or expert gets
    distances(model, params, tokens)                                # of queries from the keys, in local linear attention
    retention(model, params, tokens)                                # how well each written value can be read later
    linear_response(lambda x: layer.apply(params, x)[0], x, 0)      # how strongly an input affects later outputs
    recall(model, params, task.batch(key, 64))                      # right answers, and their distance from the write

`model` is a `LanguageModel` or a single layer, `params` its variables and `inputs` what it is called with, tokens [B, T] or
vectors [B, T, D]. Matrices are those that a layer names (`MemoryLayer.matrices`). They are called "block 2/memory" after
their place in the model, or "memory" in a single layer. The sequence is read in pieces that pass the state on. By the
layers' contract this changes nothing, so the state between two pieces is the state of the model at that time.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from ..layers.experts import MixtureOfExperts
from ..layers.hierarchical_memory import HierarchicalMemory, Level
from ..layers.inner_learner import InnerLearner
from ..layers.linear_attention import LinearAttention
from ..layers.local_linear_attention import LocalLinearAttention
from ..layers.memory_layer import MemoryLayer
from ..layers.mixture_of_memories import MixtureOfMemories
from ..layers.projections import LogDecay, LogShare, Strength
from ..layers.titans_wirings import MemoryAsContext
from ..pallas_kernels import test_time_memory as ttm
from ..pallas_kernels.documents import Documents, documents, select_rows
from ..pallas_kernels.numerics import einsum
from .stack import Stack, sublayer_names, unroll_params, unroll_state


class Curves(NamedTuple):
  """Memory matrices over time.

  Attributes:
    times: [N], tokens read.
    norm: Frobenius norm of each matrix, [N, B, H].
    rank: effective rank of each matrix, [N, B, H].
  """

  times: np.ndarray
  norm: dict[str, jax.Array]
  rank: dict[str, jax.Array]


class Writes(NamedTuple):
  """Keys and values of all writes; each token makes r writes per head.

  Attributes:
    key: [B, T, r, H, K].
    value: [B, T, r, H, V].
  """

  key: jax.Array
  value: jax.Array


class Retention(NamedTuple):
  """What the key of each write reads at later times; nan before the write, and after its document has ended.

  Attributes:
    times: [N], tokens read.
    cosine: between the value read and the value written, [N, B, T, r, H]; token t is written from time t + 1 on.
    share: share of the written value that is read, (S^T k . v) / |v|^2, [N, B, T, r, H].
    floor: mean cosine between the value read and the values that all tokens write, [N, B, T, r, H]. Values resemble each other,
      so only what lies above the floor is memory.
  """

  times: np.ndarray
  cosine: jax.Array
  share: jax.Array
  floor: jax.Array


class InnerLoss(NamedTuple):
  """The error of a memory that learns at test time on each token, [B, T, H].

  Attributes:
    before: error at the weights where the token's gradient is taken.
    after: error at the weights after the token's own write; nan for a memory that cannot be read there (`Memora`).
  """

  before: jax.Array
  after: jax.Array


class Recall(NamedTuple):
  """Answers to the queries of a recall task whose writes were found.

  Attributes:
    distance: [N], tokens from the written value to the query.
    right: bool [N], whether the answer is right.
  """

  distance: np.ndarray
  right: np.ndarray


class Shares(NamedTuple):
  """Right answers in groups of similar distance.

  Attributes:
    distance: [M], the mean of each group.
    share: [M], of answers that are right.
    count: [M], number of answers.
  """

  distance: np.ndarray
  share: np.ndarray
  count: np.ndarray


def memories(model: nn.Module, state: Any) -> dict[str, jax.Array]:
  """The memory matrices [B, H, K, V] in a state of `model`, by name.

  Raises:
    ValueError: if there are none.
  """
  layers = _layers(model, state)
  found = {f"{place}{name}": matrix for place, (layer, own) in layers.items() for name, matrix in layer.matrices(own).items()}
  if not found:
    kinds = ", ".join(sorted({type(layer).__name__ for layer, _ in layers.values()}))
    raise ValueError(
      f"model has no memory matrices: its layers are {kinds}. Expected a model with a layer that names them "
      "(MemoryLayer.matrices), such as DeltaNet. Attention keeps keys and values, not a matrix."
    )
  return found


def _layers(model: nn.Module, state: Any) -> dict[str, tuple[nn.Module, Any]]:
  """Every layer of `model` with its state, by place: "block 2/", or "" for a layer on its own."""
  if not isinstance(model, Stack):
    return {"": (model, state)}
  found = {}
  for i, states in enumerate(unroll_state(model, state)):
    for name, layer, own in zip(sublayer_names(model.block(i)), model.block(i), states, strict=True):
      found[f"block {i}/" if name == "mixer" else f"block {i}/{name}/"] = layer, own
  return {place: (layer, own) for place, (layer, own) in found.items() if isinstance(layer, MemoryLayer)}


def over_time(
  model: nn.Module,
  params: Any,
  inputs: jax.Array,
  look: Callable[..., Any],
  *args: Any,
  every: int = 1,
  segment_ids: jax.Array | None = None,
) -> tuple[np.ndarray, Any]:
  """Applies `look` to the memory matrices after every `every` tokens.

  Args:
    model, params, inputs, segment_ids: a call of the model; see the module's docstring.
    look: a function of `memories` and `args` that returns a tree of arrays. It is traced, and compiled once per function.
    every: tokens between two looks; the last look is at the end of the sequence.

  Returns:
    The times [N], in tokens read, and the tree, each leaf with a leading axis of N.

  Raises:
    ValueError: if `every` is less than one, or the model has no memory matrices.
  """
  if every < 1:
    raise ValueError(f"every={every}; expected at least 1 token between two looks.")
  length = inputs.shape[1]
  times = np.unique([*range(every, length + 1, every), length])
  return times, _looks(model, look, min(every, length), params, inputs, segment_ids, args)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _looks(model, look, every, params, inputs, segment_ids, args):
  model, params = _unrolled(model, params)
  fresh = model.apply(params, len(inputs), method="initial_state")
  docs = None if segment_ids is None else documents(segment_ids)

  def read(carry, piece):
    state, last = carry
    inputs, segment_ids, docs = piece
    if docs is not None:
      state, last = _forget_between(state, fresh, docs, last), docs.index[:, -1]
    _, state = model.apply(params, inputs, state, segment_ids)
    return (state, last), look(memories(model, state), *args)

  whole = inputs.shape[1] // every * every
  sequence = inputs, segment_ids, docs
  pieces = jax.tree.map(lambda a: _cut(a[:, :whole], every), sequence)
  carry, seen = jax.lax.scan(read, (fresh, jnp.zeros(len(inputs), jnp.int32)), pieces)
  if whole < inputs.shape[1]:
    _, last = read(carry, jax.tree.map(lambda a: a[:, whole:], sequence))
    seen = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), seen, last)
  return seen


def _unrolled(model: nn.Module, params: Any) -> tuple[nn.Module, Any]:
  """A stack without `scan`, so that every block has its own place; any other model unchanged."""
  return unroll_params(model, params) if isinstance(model, Stack) else (model, params)


def _forget_between(state: Any, fresh: Any, docs: Documents, last: jax.Array) -> Any:
  """`state`, reset in rows whose first token in the piece is not of document `last`, the last document of the piece before.

  A call continues its incoming state, so the caller must handle a change of document between two calls.
  """
  first = jnp.take_along_axis(docs.index, jnp.argmax(docs.is_token, axis=1)[:, None], axis=1)[:, 0]
  return select_rows(first == last, state, fresh)


def _cut(a: jax.Array, size: int) -> jax.Array:
  """[B, N * size, ...] -> [N, B, size, ...]."""
  return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)


def effective_rank(matrices: jax.Array) -> jax.Array:
  """exp of the entropy of the normalised singular values (Roy & Vetterli 2007), [..., K, V] -> [...]; 0 for a zero matrix."""
  singular = jnp.linalg.svd(matrices, compute_uv=False)
  total = singular.sum(axis=-1, keepdims=True)
  share = singular / jnp.where(total > 0, total, 1)
  return jnp.where(total[..., 0] > 0, jnp.exp(jax.scipy.special.entr(share).sum(axis=-1)), 0)


def curves_over_time(
  model: nn.Module, params: Any, inputs: jax.Array, *, every: int = 16, segment_ids: jax.Array | None = None
) -> Curves:
  """Norm and effective rank of every memory matrix over time. Arguments and errors: see `over_time`."""
  times, (norm, rank) = over_time(model, params, inputs, _norm_and_rank, every=every, segment_ids=segment_ids)
  return Curves(times, norm, rank)


def _norms(matrices):
  return jax.tree.map(partial(jnp.linalg.norm, axis=(-2, -1)), matrices)


def _norm_and_rank(matrices):
  return _norms(matrices), jax.tree.map(effective_rank, matrices)


def gates(model: nn.Module, params: Any, inputs: jax.Array, segment_ids: jax.Array | None = None) -> dict[str, jax.Array]:
  """The values of all gates on a sequence, by place: "block 0/beta", "block 0/decay", "block 0/gamma".

  Strengths are [B, T, H]. Decays are the share that is kept, in (0, 1], [B, T, H] or [B, T, H, K].

  Raises:
    ValueError: if the model has no gates.
  """
  return _capture(model, _gate, params, inputs, segment_ids) or _nothing(model, "gates (Strength, LogShare, LogDecay)")


def writes(model: nn.Module, params: Any, inputs: jax.Array, segment_ids: jax.Array | None = None) -> dict[str, Writes]:
  """The keys and values that layers of the linear-attention family write for a sequence, by memory.

  Raises:
    ValueError: if the model has no such layer.
  """
  found = _capture(model, _write, params, inputs, segment_ids) or _nothing(model, "layers of the linear-attention family")
  return {f"{place}/memory".lstrip("/"): written for place, written in found.items()}


def routing(model: nn.Module, params: Any, inputs: jax.Array, segment_ids: jax.Array | None = None) -> dict[str, jax.Array]:
  """The share of each row's tokens that is sent to each memory or expert, [B, M], by place: "block 0/routing".

  Shares add up to the number of memories, or of experts, of a token. A memory or an expert that all tokens share is left out.

  Raises:
    ValueError: if the model has no such layer.
  """
  found = _capture(model, _sent, params, inputs, segment_ids)
  found = found or _nothing(model, "layers that route", "MixtureOfMemories")
  is_token = jnp.ones(inputs.shape[:2], bool) if segment_ids is None else segment_ids != 0
  return {f"{place}/routing".lstrip("/"): sent.mean(axis=1, where=is_token[..., None]) for place, sent in found.items()}


def distances(model: nn.Module, params: Any, inputs: jax.Array, segment_ids: jax.Array | None = None) -> dict[str, jax.Array]:
  """How far each query of local linear attention lies from the keys that it attends to, [B, T, H]: "block 0/distance".

  The squared Mahalanobis distance of `memzoo.pallas_kernels.local_linear.squared_distance`. `draw_gates` draws it.

  Raises:
    ValueError: if the model has no such layer.
  """
  found = _capture(model, _distance, params, inputs, segment_ids)
  found = found or _nothing(model, "local linear attention", "LocalLinearAttention")
  return {f"{place}/distance".lstrip("/"): distance for place, distance in found.items()}


def inner_losses(
  model: nn.Module, params: Any, inputs: jax.Array, segment_ids: jax.Array | None = None
) -> dict[str, InnerLoss]:
  """The error of each memory that learns at test time on each token, before and after it writes the token, by place.

  Raises:
    ValueError: if the model has no such memory.
  """
  return _capture(model, _inner_loss, params, inputs, segment_ids) or _nothing(model, "memories that learn at test time")


def inner_weights(
  model: nn.Module, params: Any, inputs: jax.Array, *, every: int = 16, segment_ids: jax.Array | None = None
) -> tuple[np.ndarray, dict[str, jax.Array]]:
  """How far the inner weights have moved from the start of their document: times [N], and norms [N, B, H] by matrix.

  Arguments and errors: see `over_time`.
  """
  return over_time(model, params, inputs, _norms, every=every, segment_ids=segment_ids)


def _inner_loss(module, method, args, result):
  if method == "learn" and isinstance(module, InnerLearner):
    if module.spec.retention.kind == "simplex":
      return InnerLoss(result.loss, jnp.full_like(result.loss, jnp.nan))
    (initial, _, k, v, gates, state, segment_ids), documents = args, module.max_documents
  elif method == "write" and isinstance(module, Level):
    initial, state, x, is_token = args
    (k, v, gates), segment_ids, documents = module.pairs(x), is_token.astype(jnp.int32), 1  # tokens of one document
  else:
    return None
  spec = dataclasses.replace(module.spec, read="after")
  options = {"initial_state": state, "segment_ids": segment_ids, "max_documents": documents}
  learned = ttm.run(spec, initial, k, k, v, gates, **options)  # reads with each token's key, after the token is written
  after = spec.loss(*(a.astype(learned.loss.dtype) for a in (learned.y, v)), gates.threshold)
  return InnerLoss(learned.loss, after if segment_ids is None else jnp.where(segment_ids[..., None] != 0, after, 0))


def _gate(module, method, args, result):
  if method == "__call__" and isinstance(module, Strength):
    return result
  if method == "__call__" and isinstance(module, LogDecay | LogShare):
    return jnp.exp(result)
  return None


def _distance(module, method, args, result):
  if method != "attend" or not isinstance(module, LocalLinearAttention):
    return None
  q, k, _, _, segment_ids, _, ridge = args
  return module.distances(q, k, ridge, segment_ids)


def _sent(module, method, args, result):
  """Whether each token is sent to each memory or expert, 0 or 1 in [B, T, M]."""
  if method != "route" or not isinstance(module, MixtureOfMemories | MixtureOfExperts):
    return None
  (scores,), (chosen, _) = args, result
  return jax.nn.one_hot(chosen, scores.shape[-1], dtype=scores.dtype).sum(axis=2)


def _write(module, method, args, result):
  if method != "update" or not isinstance(module, LinearAttention):
    return None
  _, _, k, v = args
  shape = (*k.shape[:2], module.writes)
  k, v = k.reshape(*shape, *k.shape[-2:]), v.reshape(*shape, *v.shape[-2:])
  return Writes(jnp.repeat(k, v.shape[3] // k.shape[3], axis=3), v)


@partial(jax.jit, static_argnums=(0, 1))
def _capture(model, capture, params, inputs, segment_ids) -> dict[str, Any]:
  """The results of `capture(module, method, args, result)` for all calls of one forward pass, by place, where not `None`.

  If a module is called several times, the last call counts: the earlier ones read persistent tokens.
  """
  model, params = _unrolled(model, params)
  segmented = {}

  def between(call, args, kwargs, context):
    module, method = context.module, context.method_name
    result = call(*args, **kwargs)
    if method in ("__call__", "in_stack") and isinstance(module, MemoryAsContext | HierarchicalMemory):
      segmented[module.path] = module
    found = capture(module, method, args, result)
    if found is not None:
      module.sow("intermediates", "captured", found)  # a closure could not carry it out of scans and checkpointed blocks
    return result

  with nn.intercept_methods(between):
    _, kept = model.apply(params, inputs, None, segment_ids, mutable="intermediates")
  captured = {}
  for (*path, _), found in flatten_dict(kept.get("intermediates", {})).items():
    around = next((module for place, module in segmented.items() if place == tuple(path[: len(place)])), None)
    captured[_place(path)] = found[-1] if around is None else _by_token(around, found[-1], inputs.shape[:2], segment_ids)
  return captured


def _by_token(
  module: MemoryAsContext | HierarchicalMemory, found: Any, shape: tuple[int, int], segment_ids: jax.Array | None
) -> Any:
  """Converts what was captured by segments, [N, B, C, ...], to [B, T, ...]; one number for a segment, C = 1, to its tokens."""
  layout = module.layout(shape[1], jnp.zeros(shape[:1], jnp.int32), segment_ids, fresh=True)

  def tokens(a):
    a = jnp.swapaxes(a, 0, 1)
    return layout.tokens(jnp.broadcast_to(a, (*layout.is_token.shape, *a.shape[3:])), shape[1])

  return jax.tree.map(tokens, found)


def _place(path: list[str]) -> str:
  """("blocks_2", "mixer", "beta") -> "block 2/beta"."""
  return "/".join(re.sub(r"^blocks_(\d+)$", r"block \1", part) for part in path if part != "mixer")


def _nothing(model: nn.Module, what: str, layer: str = "GatedDeltaNet"):
  raise ValueError(f"model, a {type(model).__name__}, has no {what}; expected a model with a layer such as {layer}.")


def read_back(memory: jax.Array, written: Writes) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Reads `memory` [B, H, K, V] with the keys of `written`: cosine, share and floor [B, T, r, H], as in `Retention`."""
  value = written.value.astype(memory.dtype)
  read = einsum("bhkv,btrhk->btrhv", memory, written.key.astype(memory.dtype))
  size = jnp.linalg.norm(value, axis=-1, keepdims=True)
  read_direction, direction = _over(read, jnp.linalg.norm(read, axis=-1, keepdims=True)), _over(value, size)
  cosine = jnp.sum(read_direction * direction, axis=-1)
  share = _over(jnp.sum(read * direction, axis=-1), size[..., 0])
  floor = jnp.sum(read_direction * direction.mean(axis=(1, 2), keepdims=True), axis=-1)
  return cosine, share, floor


def _over(a: jax.Array, b: jax.Array) -> jax.Array:
  """a / b, or 0 where b is 0."""
  return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def retention(
  model: nn.Module, params: Any, inputs: jax.Array, *, every: int = 1, segment_ids: jax.Array | None = None
) -> dict[str, Retention]:
  """How well each value that the sequence writes can be read with its key at each later time, by memory.

  Arguments and errors: see `over_time` and `writes`. Writes of documents that have ended are nan.
  """
  written = writes(model, params, inputs, segment_ids)
  times, found = over_time(model, params, inputs, _read_all, written, every=every, segment_ids=segment_ids)
  visible = _visible(times, inputs.shape[:2], segment_ids)[..., None, None]
  return {name: Retention(times, *(jnp.where(visible, a, jnp.nan) for a in three)) for name, three in found.items()}


def _read_all(matrices, written):
  return {name: read_back(matrices[name], own) for name, own in written.items()}


def _visible(times: np.ndarray, shape: tuple[int, int], segment_ids: jax.Array | None) -> np.ndarray:
  """Whether the memory should hold the write of each token at each time, bool [N, B, T]."""
  batch, length = shape
  before = np.broadcast_to(np.arange(length) < times[:, None, None], (len(times), batch, length))
  if segment_ids is None:
    return before
  docs = jax.tree.map(np.asarray, documents(segment_ids))
  return before & docs.is_token & (docs.index == docs.index[:, times - 1].T[..., None])


def by_lag(found: Retention) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Averages a `Retention` over writes of the same age: lags [N] in tokens, and mean cosine, share and floor [N, H].

  A lag of 0 is right after the write. Lags without a write are left out.
  """
  length = found.cosine.shape[2]
  lag = found.times[:, None] - 1 - np.arange(length)
  lags = np.unique(lag[lag >= 0])
  return lags, *(np.stack([_mean(np.moveaxis(np.asarray(a), 2, 1)[lag == n]) for n in lags]) for a in found[1:])


def _mean(a: np.ndarray) -> np.ndarray:
  """The mean over all axes but the last, ignoring nan; nan if all values are nan."""
  a = a.reshape(-1, a.shape[-1])
  there = ~np.isnan(a)
  count = there.sum(axis=0)
  return np.where(count > 0, np.where(there, a, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def linear_response(function: Callable[[jax.Array], jax.Array], x: jax.Array, position: int) -> jax.Array:
  """How strongly an input affects later outputs: |d y_{t+n} / d x_t| / |d y_t / d x_t|, in Frobenius norms.

  Exact, by one Jacobian-vector product for each of the D directions of x_t. Each is made of two vector-Jacobian products,
  because the layers' hand-written gradients exist only in reverse mode.

  Args:
    function: a causal map [B, T, D] -> [B, T, E], rows independent: `lambda x: layer.apply(params, x)[0]`.
    x: the input around which the function is linearised.
    position: t.

  Returns:
    [B, T - t], for n = 0, 1, ...; the first is 1.

  Raises:
    ValueError: if x has no such position.
  """
  length, width = x.shape[1:]
  if not 0 <= position < length:
    raise ValueError(f"position={position}; expected 0 to {length - 1}, a token of x.")

  def pushed(direction):
    y, pull = jax.vjp(function, x)
    _, push = jax.vjp(lambda cotangent: pull(cotangent)[0], jnp.zeros_like(y))
    (moved,) = push(jnp.zeros_like(x).at[:, position].set(direction[None]))
    return moved[:, position:]

  squares = jnp.sum(jax.vmap(pushed)(jnp.eye(width, dtype=x.dtype)) ** 2, axis=(0, 3))
  return jnp.sqrt(squares / squares[:, :1])


def recall(model: nn.Module, params: Any, example: Any) -> Recall:
  """A model's answers to a batch of a recall task of `memzoo.train.tasks`, with the distance of each to its write.

  The write of a query is the last place where its token was followed by the answer. Queries without one, such as those
  whose answer is "gone", are left out.

  Args:
    model, params: a `LanguageModel` and its variables.
    example: `task.batch(key, size)`.

  Raises:
    ValueError: if the task is continuous, or no query has such a write.
  """
  if not jnp.issubdtype(example.tokens.dtype, jnp.integer):
    kind = example.tokens.dtype
    raise ValueError(f"example.tokens is {kind}; expected the integer tokens of a recall task, such as MultiQueryRecall.")
  logits = _logits(model, params, example.tokens, example.segment_ids)
  tokens, targets, ids = (np.asarray(a) for a in (example.tokens, example.targets, example.segment_ids))
  length = tokens.shape[1]
  pair = (tokens[:, :, None] == tokens[:, None, :-1]) & (targets[:, :, None] == tokens[:, None, 1:])
  value = np.arange(1, length)
  pair &= (value < np.arange(length)[:, None]) & (ids[:, :, None] == ids[:, None, 1:])
  written = np.where(pair, value, -1).max(axis=2)
  asked = (np.asarray(example.weights) > 0) & (written >= 0)
  if not asked.any():
    raise ValueError("example has no query whose key and answer are adjacent before it; expected a recall task.")
  right = np.asarray(logits.argmax(axis=-1)) == targets
  return Recall((np.arange(length) - written)[asked], right[asked])


@partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, segment_ids):
  return model.apply(params, tokens, None, segment_ids)[0]


def by_distance(found: Recall, bins: int = 8) -> Shares:
  """The share of right answers by distance, in at most `bins` groups of about equal size."""
  if bins < 1:
    raise ValueError(f"bins={bins}; expected at least 1.")
  edges = np.unique(np.quantile(found.distance, np.linspace(0, 1, bins + 1)[1:-1]))
  group = np.searchsorted(edges, found.distance)
  groups = [group == g for g in np.unique(group)]
  means = ([values[g].mean() for g in groups] for values in found)
  return Shares(*map(np.array, means), np.array([g.sum() for g in groups]))
