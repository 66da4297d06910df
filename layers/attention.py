"""Causal softmax attention with a bounded cache: the baseline, and the local part of hybrid models.

    o_t = sum_s softmax_s(q_t . k_s d^{-1/2}) v_s          over the last `window` tokens s <= t of t's document

Queries and keys carry rotary positions (Su et al. 2021, arXiv:2104.09864), counted from the start of the document. Several
query heads may share a key head (Ainslie et al. 2023, arXiv:2305.13245). Inputs longer than the window are cut into blocks of
`window` tokens; each block attends to itself and to the block before, so the cost is O(T window).
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.dispatch import Forms, by_platform
from ..pallas_kernels.documents import Documents, documents, positions, undivided
from ..pallas_kernels.numerics import einsum
from ..pallas_kernels.partition import HEADS, ROWS, partitioned
from ..pallas_kernels.sizes import at_most
from ..pallas_kernels.states import exportable
from .columns import blocks, merge_blocks, padding_last, take_tokens, windows
from .memory_layer import MemoryLayer, count_key_heads, silence_padding
from .norms import RMSNorm
from .projected_memory import GATES
from .projections import dense
from .rotary import RopeScaling, check_rotated, rotate

_BY_ROW, _BY_HEAD, _PREFIX = P(ROWS), P(ROWS, None, HEADS), P(None, None, HEADS)


@exportable
class CacheState(NamedTuple):
  """A ring of the last keys and values. Slot p % slots holds the token at position p of the current document.

  Heads come before slots, so that a token reads each head's keys and values as they lie in memory.

  Attributes:
    keys: rotated, [B, Hk, slots, d].
    values: [B, Hk, slots, d].
    length: int32 [B], number of tokens of the current document so far.
  """

  keys: jax.Array
  values: jax.Array
  length: jax.Array


class Tokens(NamedTuple):
  """Document of each token and position in it, int32 [B, T]. The document of padding and of empty slots is -1."""

  document: jax.Array
  position: jax.Array


class Attention(MemoryLayer):
  """Causal softmax attention over a window (Vaswani et al. 2017, arXiv:1706.03762), with rotary positions.

      o_t = sum_s softmax_s(q_t . k_s d^{-1/2}) v_s

  Attributes:
    num_heads: number of query heads, H.
    head_dim: width of a head, d; even unless `rope_base` is `None`.
    num_key_heads: number of key and value heads, a divisor of `num_heads`; `None` for `num_heads`.
    window: number of tokens that each token attends to, itself included; `None` for `max_length`.
    max_length: the window if `window` is `None`. Tokens further back are not attended to, in parallel and in decoding alike.
    rope_base: base of the rotary frequencies; `None` for no rotary positions.
    rope_dim: number of channels of a head, its first ones, that carry rotary positions; `None` for all.
    rope_scaling: how the frequencies are changed for texts longer than those of the first training.
    qk_norm: whether queries and keys are normalised (RMSNorm).
    joint_qk_norm: whether that norm is over all heads together.
    zero_centred_norms: whether its factors are 1 + scale.
    norm_epsilon: its epsilon.
    output_gate: activation of W_g x, which multiplies what the heads read: "none" (no gate), "silu" or "sigmoid".
    norm_after: whether a stack normalises what comes out, x + norm(attention(x)), and not what goes in.
  """

  num_heads: int
  head_dim: int
  num_key_heads: int | None = None
  window: int | None = None
  max_length: int = 2048
  rope_base: float | None = 10_000.0
  rope_dim: int | None = None
  rope_scaling: RopeScaling = RopeScaling()
  qk_norm: bool = False
  joint_qk_norm: bool = False
  zero_centred_norms: bool = False
  norm_epsilon: float = 1e-6
  output_gate: str = "none"
  norm_after: bool = False

  @property
  def key_heads(self) -> int:
    return count_key_heads(self.num_heads, self.num_key_heads)

  @property
  def slots(self) -> int:
    """Number of slots of the cache, which is the number of tokens that each token attends to."""
    return self.max_length if self.window is None else self.window

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    count_key_heads(self.num_heads, self.num_key_heads)
    if self.output_gate not in GATES:
      raise ValueError(f"output_gate={self.output_gate!r}; expected one of {list(GATES)}.")
    if self.rope_base is not None:
      check_rotated(self.head_dim, self.rope_dim)

  def initial_state(self, batch_size: int) -> CacheState:
    """An empty cache."""
    shape = (batch_size, self.key_heads, self.slots, self.head_dim)
    keys, values = (jnp.zeros(shape, self.activation_dtype()) for _ in range(2))
    return CacheState(keys, values, jnp.zeros((batch_size,), jnp.int32))

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    state: CacheState | None = None,
    segment_ids: jax.Array | None = None,
    prefix: jax.Array | None = None,
  ) -> tuple[jax.Array, CacheState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`. All tokens also attend to `prefix` [N, D], at position 0."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    queries = self._heads("query", self.num_heads, self.qk_norm)
    keys = self._heads("key", self.key_heads, self.qk_norm)
    values = self._heads("value", self.key_heads)
    q, k, v = queries(x), keys(x), values(x)
    prefix_kv = None if prefix is None else tuple(project(prefix[None].astype(x.dtype)) for project in (keys, values))

    out, state = self.attend(q, k, v, state, segment_ids, prefix_kv, *self._extras(x), fresh=fresh)
    return self._output(x, out, segment_ids), state

  def _output(self, x: jax.Array, out: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """y [B, T, D] of what the heads read, out [B, T, H, d]."""
    out = out.reshape(*out.shape[:2], -1)
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    if activation := GATES[self.output_gate]:
      out *= activation(dense(out.shape[-1], ("embed", "heads"), name="gate", **types)(x))
    y = dense(x.shape[-1], ("heads", "embed"), name="output", **types)(out)
    return silence_padding(y, segment_ids)

  def _rotate(self, x: jax.Array, position: jax.Array) -> jax.Array:
    return rotate(x, position, self.rope_base, self.rope_dim, self.rope_scaling)

  def _extras(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """Further arrays [B, T, H, ...] that `_attend` and `_over` need. Layers with another attention override all three."""
    del x
    return ()

  def _heads(self, name: str, heads: int, normed: bool = False) -> Callable[[jax.Array], jax.Array]:
    """The map from x [B, T, D] to [B, T, heads, d]."""
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    axis = "heads" if heads > 1 else None  # a single head is whole on each device
    project = dense(heads * self.head_dim, ("embed", axis), name=name, **types)
    options = {"axis": None, "zero_centred": self.zero_centred_norms, "name": f"{name}_norm"}
    norm = RMSNorm(self.norm_epsilon, self.param_dtype, **options) if normed else lambda x: x

    def split(x):
      return x.reshape(*x.shape[:2], heads, self.head_dim)

    return (lambda x: split(norm(project(x)))) if self.joint_qk_norm else (lambda x: norm(split(project(x))))

  @nn.nowrap
  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: CacheState,
    segment_ids: jax.Array | None = None,
    prefix_kv: tuple[jax.Array, jax.Array] | None = None,
    *extras: jax.Array,
    fresh: bool = False,
  ) -> tuple[jax.Array, CacheState]:
    """What the layer does between its projections, without parameters: attention, and the next state.

    Args:
      q: [B, T, H, d], not yet rotated.
      k, v: [B, T, Hk, d].
      state, segment_ids: those of the call.
      prefix_kv: keys and values that all tokens also attend to, [1, N, Hk, d], or `None`.
      *extras: see `_extras`.
      fresh: whether `state` is known to be empty.
    """
    docs, position, length = locate(q.shape[1], segment_ids, state.length)
    # A key head for all query heads is whole on each device.
    by_head, first, slots = (_BY_HEAD, _PREFIX, P(ROWS, HEADS)) if k.shape[2] > 1 else (_BY_ROW, P(), _BY_ROW)
    cached = CacheState(slots, slots, _BY_ROW)
    write = partitioned(self._rotate_and_write, (by_head, by_head, cached, _BY_ROW), (by_head, cached))
    k, after = write(k, v, state, (docs, position, length))
    # One token lies in the cache, and sees nothing else: no second copy of the cache is made.
    by_cache = q.shape[1] == 1 and not fresh
    seen = after if by_cache else None if fresh else state
    specs = _BY_HEAD, by_head, by_head, None if seen is None else cached, _BY_ROW, first, *[_BY_HEAD] * len(extras)
    attend = partitioned(self._read_cache if by_cache else self._rotate_and_attend, specs, _BY_HEAD)
    return attend(q, k, v, seen, (docs, position), prefix_kv, *extras), after

  def _rotate_and_write(self, k, v, state: CacheState, where) -> tuple[jax.Array, CacheState]:
    """The keys with their positions, and the cache after these tokens."""
    docs, position, length = where
    k = self._positioned(k, position)
    keys, values = (write_ring(a, new, docs, position, length) for a, new in ((state.keys, k), (state.values, v)))
    return k, CacheState(keys, values, length)

  def _read_cache(self, q, k, v, state: CacheState, where, prefix_kv, *extras) -> jax.Array:
    """The output [B, 1, H, d] of one token, which is in the cache."""
    docs, position = where
    token = Tokens(jnp.where(docs.is_token, jnp.int32(0), -1), position)
    cached = (a.swapaxes(1, 2) for a in (state.keys, state.values))
    return self._over(self._positioned(q, position), *cached, token, in_ring(state.keys, state.length), prefix_kv, *extras)

  def _rotate_and_attend(self, q, k, v, state: CacheState | None, where, prefix_kv, *extras) -> jax.Array:
    """The output [B, T, H, d] of new tokens, to which those of the cache `state` come before."""
    docs, position = where
    return self._attend(self._positioned(q, position), k, v, state, docs, position, prefix_kv, *extras)

  def _positioned(self, x: jax.Array, position: jax.Array) -> jax.Array:
    return x if self.rope_base is None else self._rotate(x, position)

  def _attend(self, q, k, v, state, docs: Documents, position, prefix_kv) -> jax.Array:
    """Attention [B, T, H, d] of the new tokens to themselves, to `prefix_kv` and, unless `state` is `None`, to the cache."""
    tokens = q.shape[1]
    if not at_most(tokens, self.slots):  # move padding to the end: blocks count columns, the window counts tokens
      order, back = padding_last(docs)
      q, k, v, docs, position = take_tokens((q, k, v, docs, position), order)

    query_tokens = Tokens(docs.index, position)
    k, v, key_tokens = self._after_cache(k, v, state, docs, position)
    if at_most(tokens, self.slots):
      return self._over(q, k, v, query_tokens, key_tokens, prefix_kv)
    if state is None:
      before = [(0, 0), (self.slots, 0)]
      k, v = (jnp.pad(a, [*before, (0, 0), (0, 0)]) for a in (k, v))
      key_tokens = jax.tree.map(lambda a: jnp.pad(a, before, constant_values=-1), key_tokens)
    return take_tokens(self._blocked(q, k, v, query_tokens, key_tokens, prefix_kv), back)

  def _over(self, q, k, v, query_tokens: Tokens, key_tokens: Tokens, prefix_kv) -> jax.Array:
    """Attention [B, T, H, d] of any queries to any keys, those of `prefix_kv` included. Layers with extras override it."""
    return _windowed(q, k, v, query_tokens, key_tokens, self.slots, prefix_kv)

  def _after_cache(self, k, v, state: CacheState | None, docs: Documents, position) -> tuple[jax.Array, jax.Array, Tokens]:
    """Keys and values of the cache, unless it is `None`, and of the new tokens; and what they are."""
    tokens = Tokens(jnp.where(docs.is_token, docs.index, -1), position)
    if state is None:
      return k, v, tokens
    k, v = (jnp.concatenate([cache.swapaxes(1, 2), new], axis=1) for cache, new in ((state.keys, k), (state.values, v)))
    return k, v, jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), in_ring(state.keys, state.length), tokens)

  def _blocked(self, q, k, v, query_tokens: Tokens, key_tokens: Tokens, prefix_kv) -> jax.Array:
    """`_over` for T queries and slots + T keys, in blocks of `slots` queries, each against two blocks of keys."""
    batch, tokens = q.shape[:2]
    q, query_tokens = jax.tree.map(lambda a: merge_blocks(blocks(a, self.slots)), (q, query_tokens))
    k, v = (merge_blocks(windows(a, self.slots)) for a in (k, v))
    key_tokens = jax.tree.map(lambda a: merge_blocks(windows(a, self.slots, fill=-1)), key_tokens)
    out = self._over(q, k, v, query_tokens, key_tokens, prefix_kv)
    return out.reshape(batch, -1, *out.shape[2:])[:, :tokens]


def in_ring(ring: jax.Array, length: jax.Array) -> Tokens:
  """The tokens in the slots of `ring` [B, H, slots, d]: slot s holds the last position p < `length` with p % slots = s."""
  slot = jnp.arange(ring.shape[2], dtype=jnp.int32)[None]
  last = length[:, None] - 1
  position = last - (last - slot) % ring.shape[2]
  return Tokens(jnp.where(position >= 0, jnp.int32(0), -1), position)


def write_ring(cache: jax.Array, new: jax.Array, docs: Documents, position: jax.Array, length: jax.Array) -> jax.Array:
  """A ring [B, H, slots, d] after new [B, T, H, d]: the last `slots` tokens of the last document, whose length is `length`."""
  slots = cache.shape[2]
  kept = _in_last_document(docs) & (position >= length[:, None] - slots)
  slot = jnp.where(kept, position % slots, slots)  # out of bounds, and therefore dropped
  given = cache, slot, new.swapaxes(1, 2).astype(cache.dtype)
  if new.shape[1] != 1:
    return _write_slots(*given)
  # XLA for a TPU writes a token where a cache lies in an order of axes that suits nothing else, and copies it there and back.
  return by_platform(Forms(_write_slots, _write_slots, tpu=_write_by_selection), *given)


def _write_slots(cache: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
  """The cache [B, H, slots, d] with new [B, H, T, d] in slots [B, T]."""
  # An index for each head, though all are equal: XLA on a CPU does a write of one slice twice, each in a copy of the cache.
  slots = jnp.broadcast_to(slot[:, None], (*cache.shape[:2], slot.shape[1]))
  return jax.vmap(jax.vmap(lambda cache, slot, new: cache.at[slot].set(new, mode="drop")))(cache, slots, new)


def _write_by_selection(cache: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
  """The same for one token. It is fused with what reads the cache."""
  here = jnp.arange(cache.shape[2], dtype=slot.dtype)[None] == slot
  return jnp.where(here[:, None, :, None], new, cache)


def locate(tokens: int, segment_ids: jax.Array | None, length: jax.Array) -> tuple[Documents, jax.Array, jax.Array]:
  """The documents of `tokens` tokens, the tokens' positions in them, and the length of the last one; `length` as in a cache."""
  return partitioned(partial(_locate, tokens), in_specs=_BY_ROW, out_specs=_BY_ROW)(segment_ids, length)


def _locate(tokens: int, segment_ids: jax.Array | None, length: jax.Array) -> tuple[Documents, jax.Array, jax.Array]:
  docs = undivided(length.shape[0], tokens) if segment_ids is None else documents(segment_ids)
  carried = jnp.where(docs.index[:, -1] == 0, length, 0)
  return docs, positions(docs, length), carried + jnp.sum(_in_last_document(docs), axis=1, dtype=jnp.int32)


def _in_last_document(docs: Documents) -> jax.Array:
  """bool [B, T]: whether a token belongs to the last document of its row."""
  return docs.is_token & (docs.index == docs.index[:, -1:])


def _windowed(q, k, v, query_tokens: Tokens, key_tokens: Tokens, window: int, prefix_kv) -> jax.Array:
  """Attention of q [B, T, H, d] to k, v [B, S, Hk, d], masked to the same document and the last `window` positions."""
  distance = query_tokens.position[:, :, None] - key_tokens.position[:, None, :]
  mask = (query_tokens.document[:, :, None] == key_tokens.document[:, None, :]) & (distance >= 0) & (distance < window)
  return softmax_attention(q, k, v, mask, prefix_kv)


def softmax_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, prefix_kv: tuple[jax.Array, jax.Array] | None = None
) -> jax.Array:
  """softmax(q k^T d^{-1/2}) v over the keys that `mask` [B, T, S] allows; q [B, T, H, d], k [B, S, Hk, d], v [B, S, Hk, e].

  The softmax is float32 (float64 where q is). Its result is rounded to v's dtype, so all products of 16-bit inputs take one
  pass. All queries of all rows also attend to `prefix_kv`, keys and values [1, N, Hk, d].
  """
  return partitioned(_softmax_attention, (*[_BY_HEAD] * 3, _BY_ROW, _PREFIX), _BY_HEAD)(q, k, v, mask, prefix_kv)


def _softmax_attention(q, k, v, mask, prefix_kv) -> jax.Array:
  rows = _rows(q, k)
  logits = _logits(rows, k, mask)
  out = _mixed(jax.nn.softmax(logits, axis=-1), v)
  if prefix_kv is not None:  # a softmax of its own, and its share of the whole: joined with the keys, a cache would be copied
    first_k, first_v = (first[0].swapaxes(0, 1).astype(a.dtype) for first, a in zip(prefix_kv, (k, v), strict=True))
    ahead = einsum("bhmd,hnd->bhmn", rows, first_k) * q.shape[-1] ** -0.5
    first = einsum("bhmn,hnd->bhmd", jax.nn.softmax(ahead, axis=-1).astype(v.dtype), first_v)
    share = jax.nn.sigmoid(jax.nn.logsumexp(ahead, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
    out = out + share[..., None] * (first - out)
  return _by_token(out, q)


def _rows(q: jax.Array, k: jax.Array) -> jax.Array:
  """q [B, T, H, d] as [B, Hk, T * H / Hk, d], for keys k [B, S, Hk, d]."""
  # The queries of a group are rows of one product. With an axis of their own, XLA on a CPU takes a third longer.
  batch, tokens, heads, width = q.shape
  groups = heads // k.shape[2]
  return q.reshape(batch, tokens, -1, groups, width).swapaxes(1, 2).reshape(batch, -1, tokens * groups, width)


def _logits(rows: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
  """Scaled products of `_rows` with the keys that mask [B, T, S] allows, and the lowest number elsewhere."""
  groups = rows.shape[2] // mask.shape[1]
  mask = jnp.repeat(mask, groups, axis=1)[:, None] if groups > 1 else mask[:, None]
  logits = einsum("bhmd,bhsd->bhms", rows, k.swapaxes(1, 2)) * rows.shape[-1] ** -0.5
  return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def _mixed(weights: jax.Array, v: jax.Array) -> jax.Array:
  return einsum("bhms,bhsd->bhmd", weights.astype(v.dtype), v.swapaxes(1, 2))


def _by_token(out: jax.Array, q: jax.Array) -> jax.Array:
  """What was mixed for the rows of q [B, T, H, d], as [B, T, H, e] in q's dtype."""
  batch, tokens, heads, _ = q.shape
  groups = heads // out.shape[1]
  return out.reshape(batch, -1, tokens, groups, out.shape[-1]).swapaxes(1, 2).reshape(batch, tokens, heads, -1).astype(q.dtype)


class Source(NamedTuple):
  """Keys, and what reads them: q [B, T, H, d], k [B, S, Hk, d], v [B, S, Hk, e] and mask [B, T, S]."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  mask: jax.Array


def joint_attention(sources: Sequence[Source]) -> jax.Array:
  """`softmax_attention` with one softmax over the keys of all sources. No keys and no logits are joined."""
  logits = [_logits(_rows(s.q, s.k), s.k, s.mask) for s in sources]
  largest = [jnp.max(part, axis=-1, keepdims=True) for part in logits]
  largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, largest))  # any number in its place gives the same output
  powers = [jnp.exp(part - largest) for part in logits]
  total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in powers)
  out = sum(_mixed(part, s.v) for part, s in zip(powers, sources, strict=True)) / total
  return _by_token(out, sources[0].q)


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """The oracle of `softmax_attention`, in the precision of the inputs: q [B, T, H, d], k and v [B, S, Hk, d]."""
  k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
  logits = einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
  weights = jax.nn.softmax(jnp.where(mask[:, None], logits, jnp.finfo(logits.dtype).min), axis=-1)
  return einsum("bhts,bshd->bthd", weights, v.astype(weights.dtype)).astype(q.dtype)
