"""What is in a memory: how full it is, which gates made it so, what a key finds in it, and for how long.

    curves = curves_over_time(model, params, tokens, every=16)      # norm and effective rank of every memory matrix
    inner_losses(model, params, tokens)                             # of memories that learn at test time, at every write
    gates(model, params, tokens)                                    # write strengths, decays, erase strengths
    retention(model, params, tokens)                                # how well each written value can be read later on
    linear_response(lambda x: layer.apply(params, x)[0], x, 0)      # how much an input still moves later outputs
    recall(model, params, task.batch(key, 64))                      # right answers, with the distance from the write

`model` is a `LanguageModel` or a single layer, `params` its variables and `inputs` what it is called with, tokens [B, T] or
vectors [B, T, D]. Matrices are those that a layer names (`MemoryLayer.matrices`), and are called "block 2/memory" after
their place in the model, or "memory" in a layer on its own. The sequence is read in pieces with the state handed on, which
by the layers' contract changes nothing, so what is seen between pieces is what the model has at that time.
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

from ..layers.inner_learner import InnerLearner
from ..layers.linear_attention import LinearAttention
from ..layers.memory_layer import MemoryLayer
from ..layers.projections import LogDecay, LogShare, Strength
from ..layers.titans_wirings import MemoryAsContext
from ..pallas_kernels import test_time_memory as ttm
from ..pallas_kernels.documents import Documents, documents, select_rows
from ..pallas_kernels.numerics import einsum
from .stack import Stack, sublayer_names, unroll_params, unroll_state


class Curves(NamedTuple):
  """Memory matrices over time.

  Attributes:
    times: [N], tokens seen.
    norm: Frobenius norm by matrix, [N, B, H] each.
    rank: effective rank by matrix, likewise.
  """

  times: np.ndarray
  norm: dict[str, jax.Array]
  rank: dict[str, jax.Array]


class Writes(NamedTuple):
  """What is written under what: r writes a token and head.

  Attributes:
    key: [B, T, r, H, K].
    value: [B, T, r, H, V].
  """

  key: jax.Array
  value: jax.Array


class Retention(NamedTuple):
  """What every write's key finds in the memory later on; nan where it is not written yet, or forgotten by intent.

  Attributes:
    times: [N], tokens seen.
    cosine: of what is read to what was written, [N, B, T, r, H]; token t is there from time t + 1.
    share: of what was written that is read, (S^T k . v) / |v|^2, likewise.
    floor: mean cosine of what is read to what any token of the sequence writes, likewise: what a read gets for nothing, where
      values are all somewhat alike.
  """

  times: np.ndarray
  cosine: jax.Array
  share: jax.Array
  floor: jax.Array


class InnerLoss(NamedTuple):
  """What a memory that learns at test time is wrong by, of each token, [B, T, H].

  Attributes:
    before: at the weights that the token's gradient is taken at.
    after: at the weights after its own write; nan for a memory that is not read there (`Memora`).
  """

  before: jax.Array
  after: jax.Array


class Recall(NamedTuple):
  """Answers of a recall task whose writes were found.

  Attributes:
    distance: [N], tokens from the value that was written to the query.
    right: bool [N].
  """

  distance: np.ndarray
  right: np.ndarray


class Shares(NamedTuple):
  """Right answers by distance.

  Attributes:
    distance: [M], mean of those counted together.
    share: [M], of answers that are right.
    count: [M], of answers.
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
      f"model has no memory matrices, for its layers are all {kinds}; want one whose layer names them "
      "(MemoryLayer.matrices), such as DeltaNet. Attention keeps its past, not a matrix."
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
  """Looks at the memory after every so many tokens.

  Args:
    model, params, inputs, segment_ids: a call of the model; see the module.
    look: from `memories` and `args` to a tree of arrays. Traced; one function object is compiled once.
    every: tokens between two looks; the last comes at the end, whatever is left.

  Returns:
    The times [N], in tokens seen, and the tree, each leaf with a leading axis of N.

  Raises:
    ValueError: if `every` is less than one, or the model has no memory matrices.
  """
  if every < 1:
    raise ValueError(f"every={every}; want at least one token between two looks.")
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
  """A stack without `scan`, so that every block has a place of its own; any other model as it is."""
  return unroll_params(model, params) if isinstance(model, Stack) else (model, params)


def _forget_between(state: Any, fresh: Any, docs: Documents, last: jax.Array) -> Any:
  """`state`, but fresh in rows where the piece's first token is of another document than `last`, the piece's before.

  A call continues the state that comes in, so a change that falls between two calls is the caller's to see to.
  """
  first = jnp.take_along_axis(docs.index, jnp.argmax(docs.is_token, axis=1)[:, None], axis=1)[:, 0]
  return select_rows(first == last, state, fresh)


def _cut(a: jax.Array, size: int) -> jax.Array:
  """[B, N * size, ...] -> [N, B, size, ...]."""
  return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)


def effective_rank(matrices: jax.Array) -> jax.Array:
  """exp of the entropy of the normalised singular values (Roy & Vetterli 2007), [..., K, V] -> [...]; 0 for zeros."""
  singular = jnp.linalg.svd(matrices, compute_uv=False)
  total = singular.sum(axis=-1, keepdims=True)
  share = singular / jnp.where(total > 0, total, 1)
  return jnp.where(total[..., 0] > 0, jnp.exp(jax.scipy.special.entr(share).sum(axis=-1)), 0)


def curves_over_time(
  model: nn.Module, params: Any, inputs: jax.Array, *, every: int = 16, segment_ids: jax.Array | None = None
) -> Curves:
  """Norm and effective rank of every memory matrix over time. Arguments and errors as of `over_time`."""
  times, (norm, rank) = over_time(model, params, inputs, _norm_and_rank, every=every, segment_ids=segment_ids)
  return Curves(times, norm, rank)


def _norms(matrices):
  return jax.tree.map(partial(jnp.linalg.norm, axis=(-2, -1)), matrices)


def _norm_and_rank(matrices):
  return _norms(matrices), jax.tree.map(effective_rank, matrices)


def gates(model: nn.Module, params: Any, inputs: jax.Array, segment_ids: jax.Array | None = None) -> dict[str, jax.Array]:
  """What the gates of the memories are on a sequence, by place: "block 0/beta", "block 0/decay", "block 0/gamma".

  Strengths are as they are, [B, T, H]; decays are the share that is kept, in (0, 1], [B, T, H] or [B, T, H, K].

  Raises:
    ValueError: if the model has none.
  """
  return _overhear(model, _gate, params, inputs, segment_ids) or _nothing(model, "gates (Strength, LogShare, LogDecay)")


def writes(model: nn.Module, params: Any, inputs: jax.Array, segment_ids: jax.Array | None = None) -> dict[str, Writes]:
  """The keys and values that the layers of the linear-attention family write for a sequence, by memory.

  Raises:
    ValueError: if the model has no such layer.
  """
  found = _overhear(model, _write, params, inputs, segment_ids) or _nothing(model, "layers of the linear-attention family")
  return {f"{place}/memory".lstrip("/"): written for place, written in found.items()}


def inner_losses(
  model: nn.Module, params: Any, inputs: jax.Array, segment_ids: jax.Array | None = None
) -> dict[str, InnerLoss]:
  """How wrong memories that learn at test time are about each token, before and after they write it, by place.

  Raises:
    ValueError: if the model has none.
  """
  return _overhear(model, _inner_loss, params, inputs, segment_ids) or _nothing(model, "memories that learn at test time")


def inner_weights(
  model: nn.Module, params: Any, inputs: jax.Array, *, every: int = 16, segment_ids: jax.Array | None = None
) -> tuple[np.ndarray, dict[str, jax.Array]]:
  """How far the inner weights have moved from what a document begins with: times [N], and by matrix norms [N, B, H].

  Arguments and errors as of `over_time`.
  """
  return over_time(model, params, inputs, _norms, every=every, segment_ids=segment_ids)


def _inner_loss(module, method, args, result):
  if method != "learn" or not isinstance(module, InnerLearner):
    return None
  initial, _, k, v, gates, state, segment_ids = args
  if module.spec.retention.kind == "simplex":
    return InnerLoss(result.loss, jnp.full_like(result.loss, jnp.nan))
  spec = dataclasses.replace(module.spec, read="after")
  options = {"initial_state": state, "segment_ids": segment_ids, "max_documents": module.max_documents}
  y = ttm.run(spec, initial, k, k, v, gates, **options).y  # what each token's key finds once it is written
  after = spec.loss(*(a.astype(result.loss.dtype) for a in (y, v)), gates.threshold)
  return InnerLoss(result.loss, after if segment_ids is None else jnp.where(segment_ids[..., None] != 0, after, 0))


def _gate(module, method, args, result):
  if method == "__call__" and isinstance(module, Strength):
    return result
  if method == "__call__" and isinstance(module, LogDecay | LogShare):
    return jnp.exp(result)
  return None


def _write(module, method, args, result):
  if method != "update" or not isinstance(module, LinearAttention):
    return None
  _, _, k, v = args
  shape = (*k.shape[:2], module.writes)
  k, v = k.reshape(*shape, *k.shape[-2:]), v.reshape(*shape, *v.shape[-2:])
  return Writes(jnp.repeat(k, v.shape[3] // k.shape[3], axis=3), v)


@partial(jax.jit, static_argnums=(0, 1))
def _overhear(model, listen, params, inputs, segment_ids) -> dict[str, Any]:
  """What `listen(module, method, args, result)` makes of the calls within one pass, by place, where it is not `None`.

  Of calls of one module the last counts: those before it are of persistent tokens.
  """
  model, params = _unrolled(model, params)
  segmented = {}

  def between(call, args, kwargs, context):
    module, method = context.module, context.method_name
    result = call(*args, **kwargs)
    if method == "__call__" and isinstance(module, MemoryAsContext):
      segmented[module.path] = module
    found = listen(module, method, args, result)
    if found is not None:
      module.sow("intermediates", "heard", found)  # which leaves scans and checkpointed blocks, as no closure could
    return result

  with nn.intercept_methods(between):
    _, kept = model.apply(params, inputs, None, segment_ids, mutable="intermediates")
  heard = {}
  for (*path, _), found in flatten_dict(kept.get("intermediates", {})).items():
    around = next((module for place, module in segmented.items() if place == tuple(path[: len(place)])), None)
    heard[_place(path)] = found[-1] if around is None else _by_token(around, found[-1], inputs.shape[:2], segment_ids)
  return heard


def _by_token(module: MemoryAsContext, found: Any, shape: tuple[int, int], segment_ids: jax.Array | None) -> Any:
  """[B, T, ...] of what was heard by segments, [N, B, C, ...]."""
  layout = module.layout(shape, None, segment_ids)
  return jax.tree.map(lambda a: layout.tokens(jnp.swapaxes(a, 0, 1), shape[1]), found)


def _place(path: list[str]) -> str:
  """("blocks_2", "mixer", "beta") -> "block 2/beta"."""
  return "/".join(re.sub(r"^blocks_(\d+)$", r"block \1", part) for part in path if part != "mixer")


def _nothing(model: nn.Module, what: str):
  raise ValueError(f"model, a {type(model).__name__}, has no {what}; want one with a layer such as GatedDeltaNet.")


def read_back(memory: jax.Array, written: Writes) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What the keys of `written` find in `memory` [B, H, K, V]: cosine, share and floor [B, T, r, H], as in `Retention`."""
  value = written.value.astype(memory.dtype)
  read = einsum("bhkv,btrhk->btrhv", memory, written.key.astype(memory.dtype))
  size = jnp.linalg.norm(value, axis=-1, keepdims=True)
  read_direction, direction = _over(read, jnp.linalg.norm(read, axis=-1, keepdims=True)), _over(value, size)
  cosine = jnp.sum(read_direction * direction, axis=-1)
  share = _over(jnp.sum(read * direction, axis=-1), size[..., 0])
  floor = jnp.sum(read_direction * direction.mean(axis=(1, 2), keepdims=True), axis=-1)
  return cosine, share, floor


def _over(a: jax.Array, b: jax.Array) -> jax.Array:
  """a / b, and 0 where b is 0."""
  return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def retention(
  model: nn.Module, params: Any, inputs: jax.Array, *, every: int = 1, segment_ids: jax.Array | None = None
) -> dict[str, Retention]:
  """How well each value that the sequence writes can still be read under its key, at each later time, by memory.

  Arguments and errors as of `over_time` and `writes`. A write of another document than the last read is nan.
  """
  written = writes(model, params, inputs, segment_ids)
  times, found = over_time(model, params, inputs, _read_all, written, every=every, segment_ids=segment_ids)
  visible = _visible(times, inputs.shape[:2], segment_ids)[..., None, None]
  return {name: Retention(times, *(jnp.where(visible, a, jnp.nan) for a in three)) for name, three in found.items()}


def _read_all(matrices, written):
  return {name: read_back(matrices[name], own) for name, own in written.items()}


def _visible(times: np.ndarray, shape: tuple[int, int], segment_ids: jax.Array | None) -> np.ndarray:
  """Which tokens' writes the memory should hold at which times, [N, B, T]."""
  batch, length = shape
  before = np.broadcast_to(np.arange(length) < times[:, None, None], (len(times), batch, length))
  if segment_ids is None:
    return before
  docs = jax.tree.map(np.asarray, documents(segment_ids))
  return before & docs.is_token & (docs.index == docs.index[:, times - 1].T[..., None])


def by_lag(found: Retention) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Averages a `Retention` over writes: lags [N] in tokens since the write, mean cosine, share and floor, [N, H] each.

  A lag of 0 is right after the token that wrote. Lags that no write is seen at are left out.
  """
  length = found.cosine.shape[2]
  lag = found.times[:, None] - 1 - np.arange(length)
  lags = np.unique(lag[lag >= 0])
  return lags, *(np.stack([_mean(np.moveaxis(np.asarray(a), 2, 1)[lag == n]) for n in lags]) for a in found[1:])


def _mean(a: np.ndarray) -> np.ndarray:
  """Of what is not nan, over all axes but the last; nan where all is."""
  a = a.reshape(-1, a.shape[-1])
  there = ~np.isnan(a)
  count = there.sum(axis=0)
  return np.where(count > 0, np.where(there, a, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def linear_response(function: Callable[[jax.Array], jax.Array], x: jax.Array, position: int) -> jax.Array:
  """How much an input still moves the outputs after it: |d y_{t+n} / d x_t| / |d y_t / d x_t|, in Frobenius norms.

  Exact, by one Jacobian-vector product for each of the D directions of x_t. Each product is made of two transposed ones,
  for the layers' hand-written gradients exist in reverse only.

  Args:
    function: a causal map [B, T, D] -> [B, T, E], rows independent: `lambda x: layer.apply(params, x)[0]`.
    x: where to linearise.
    position: t.

  Returns:
    [B, T - t], for n = 0, 1, ...; 1 at first.

  Raises:
    ValueError: if there is no such position.
  """
  length, width = x.shape[1:]
  if not 0 <= position < length:
    raise ValueError(f"position={position}; want one of the {length} tokens of x, from 0.")

  def pushed(direction):
    y, pull = jax.vjp(function, x)
    _, push = jax.vjp(lambda cotangent: pull(cotangent)[0], jnp.zeros_like(y))
    (moved,) = push(jnp.zeros_like(x).at[:, position].set(direction[None]))
    return moved[:, position:]

  squares = jnp.sum(jax.vmap(pushed)(jnp.eye(width, dtype=x.dtype)) ** 2, axis=(0, 3))
  return jnp.sqrt(squares / squares[:, :1])


def recall(model: nn.Module, params: Any, example: Any) -> Recall:
  """A model's answers to a batch of a recall task of `memzoo.train.tasks`, with the distance that each bridges.

  The write that a query asks for is the last place where its token was followed by the answer; queries without one, such
  as those whose answer is "gone", are left out.

  Args:
    model, params: a `LanguageModel` and its variables.
    example: `task.batch(key, size)`.

  Raises:
    ValueError: if the task is continuous, or no query has such a write.
  """
  if not jnp.issubdtype(example.tokens.dtype, jnp.integer):
    raise ValueError(f"example.tokens is {example.tokens.dtype}; want the tokens of a recall task, such as MultiQueryRecall.")
  logits = _logits(model, params, example.tokens, example.segment_ids)
  tokens, targets, ids = (np.asarray(a) for a in (example.tokens, example.targets, example.segment_ids))
  length = tokens.shape[1]
  pair = (tokens[:, :, None] == tokens[:, None, :-1]) & (targets[:, :, None] == tokens[:, None, 1:])
  value = np.arange(1, length)
  pair &= (value < np.arange(length)[:, None]) & (ids[:, :, None] == ids[:, None, 1:])
  written = np.where(pair, value, -1).max(axis=2)
  asked = (np.asarray(example.weights) > 0) & (written >= 0)
  if not asked.any():
    raise ValueError("example has no query whose key and answer stand side by side before it; want a recall task.")
  right = np.asarray(logits.argmax(axis=-1)) == targets
  return Recall((np.arange(length) - written)[asked], right[asked])


@partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, segment_ids):
  return model.apply(params, tokens, None, segment_ids)[0]


def by_distance(found: Recall, bins: int = 8) -> Shares:
  """Right answers by distance, in at most `bins` groups of about as many answers each."""
  if bins < 1:
    raise ValueError(f"bins={bins}; want at least one.")
  edges = np.unique(np.quantile(found.distance, np.linspace(0, 1, bins + 1)[1:-1]))
  group = np.searchsorted(edges, found.distance)
  groups = [group == g for g in np.unique(group)]
  means = ([values[g].mean() for g in groups] for values in found)
  return Shares(*map(np.array, means), np.array([g.sum() for g in groups]))
