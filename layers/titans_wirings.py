"""Titans' three ways to combine its memory with attention: as context, as gate, as layer.

    context (MAC)   segment by segment: attention over [persistent; retrieved; segment], then the memory reads the result
    gate (MAG)      attention over a window and the memory in parallel; the outputs are multiplied
    layer (MAL)     the memory, then attention over a window

Source: Behrouz et al. 2025 (arXiv:2501.00663), section 4. Each is a memory layer with the usual contract.

The paper leaves open -> we do:

- the product of two branches -> silu(RMSNorm(a)) * silu(RMSNorm(b)), each norm with its own gain
- outputs at the persistent tokens -> dropped
- positions of the persistent tokens -> rotary position 0
- causality of MAC. As printed, a token attends to what was retrieved for later tokens of its segment, and its gate is a memory
  that has read the whole segment -> the mask is triangular for both, and the memory is read after the token's own write.
- norms and residuals of MAL -> one pre-norm for the memory and one for attention, each with its own residual
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from ..pallas_kernels import test_time_memory as ttm
from ..pallas_kernels.documents import select_rows
from ..pallas_kernels.partition import HEADS, ROWS, aligned, partitioned
from ..pallas_kernels.states import exportable
from ..pallas_kernels.test_time_memory.layout import Layout
from .attention import Attention, CacheState, softmax_attention
from .memory_layer import silence_padding
from .norms import RMSNorm, l2_normalise
from .projections import dense
from .rotary import check_rotated, rotate
from .segments import lay_out_segments, scan_segments
from .titans import TitansMemory, TitansState


@exportable
class MemoryAttentionState(NamedTuple):
  """State of a memory and attention.

  Attributes:
    memory: state of the `TitansMemory`.
    cache: state of the `Attention`.
  """

  memory: TitansState
  cache: CacheState


class MemoryAsGate(TitansMemory, kw_only=True):
  """MAG (Titans, arXiv:2501.00663, section 4.2): attention over a window, gated by the memory.

      o = silu(norm(attention([P; x]))) * silu(norm(memory([P; x])))

  Attributes:
    window: tokens that attention sees, besides the persistent tokens P.
    rope_base: base of the rotary positions.

  The other attributes are those of `TitansMemory`; attention has the same `num_heads` and `head_dim`.
  """

  window: int = 512
  rope_base: float = 10_000.0
  persistent_tokens: int = 4

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    check_rotated(self.head_dim)

  def initial_state(self, batch_size: int) -> MemoryAttentionState:
    """The state before the first token."""
    cache = self._attention(parent=None).initial_state(batch_size)
    return MemoryAttentionState(super().initial_state(batch_size), cache)

  def matrices(self, state: MemoryAttentionState) -> dict[str, jax.Array]:
    """See `TitansMemory`."""
    return super().matrices(state.memory)

  @nn.compact
  def __call__(
    self, x: jax.Array, state: MemoryAttentionState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, MemoryAttentionState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    y, memory, cache = self._combine(x, state, segment_ids, self.persistent(x.shape[-1]), fresh)
    return silence_padding(y, segment_ids), MemoryAttentionState(memory, cache)

  def _combine(self, x, state, segment_ids, persistent, fresh) -> tuple[jax.Array, TitansState, CacheState]:
    """Maps x [B, T, D] to y [B, T, D] and the next states of memory and attention."""
    m, memory = self.update_and_read(x, state.memory, segment_ids, persistent, fresh)
    a, cache = self._attend(x, state.cache, segment_ids, persistent, fresh)
    return _product(self, a, m), memory, cache

  def _attend(self, x, cache, segment_ids, persistent, fresh) -> tuple[jax.Array, CacheState]:
    return self._attention(name="attention")(x, None if fresh else cache, segment_ids, persistent)

  def _attention(self, **where: Any) -> Attention:
    return Attention(
      num_heads=self.num_heads, head_dim=self.head_dim, window=self.window, rope_base=self.rope_base, **self.types, **where
    )


class MemoryAsLayer(MemoryAsGate, kw_only=True):
  """MAL (Titans, arXiv:2501.00663, section 4.3): the memory first, attention over a window after it.

      h = x + memory([P; norm(x)])        y = h + attention([P; norm(h)])

  The output contains the input (`adds_input`), and both norms (RMSNorm with a gain) are inside: in a stack, x is the residual
  stream itself. The attributes are those of `MemoryAsGate`.
  """

  adds_input: ClassVar[bool] = True

  def _combine(self, x, state, segment_ids, persistent, fresh) -> tuple[jax.Array, TitansState, CacheState]:
    def norm(name: str, a: jax.Array) -> jax.Array:
      return RMSNorm(param_dtype=self.param_dtype, name=name)(a)

    m, memory = self.update_and_read(norm("memory_norm", x), state.memory, segment_ids, persistent, fresh)
    h = x + m
    a, cache = self._attend(norm("attention_norm", h), state.cache, segment_ids, persistent, fresh)
    return h + a, memory, cache


@exportable
class ContextState(NamedTuple):
  """State of a memory as context.

  Attributes:
    memory: after the last token; see `memzoo.pallas_kernels.test_time_memory.State`.
    context: the weights that the open segment began with, as differences from the initial ones.
    context_tail: the last inputs of the convolution of the queries that retrieve the context, [B, conv_width - 1, channels].
    query_tail, key_tail, value_tail: those of the memory's convolutions, whose inputs are y.
    keys, values: those of the open segment and of its context, [B, 2, segment, H, d], the context first.
    count: int32 [B], tokens in the open segment.
  """

  memory: ttm.State
  context: Any
  context_tail: jax.Array
  query_tail: jax.Array
  key_tail: jax.Array
  value_tail: jax.Array
  keys: jax.Array
  values: jax.Array
  count: jax.Array


_SLOTS = P(ROWS, None, None, HEADS)
_MEMORY, _TAIL = P(ROWS, HEADS), P(ROWS, None, HEADS)
_STATE = ContextState(ttm.State(*[_MEMORY] * 3, P(ROWS)), _MEMORY, *[_TAIL] * 4, _SLOTS, _SLOTS, P(ROWS))


class MemoryAsContext(TitansMemory, kw_only=True):
  """MAC (Titans, arXiv:2501.00663, section 4.1): attention sees what the memory retrieves, in front of each segment.

      h = M_{i-1}(S W_q)    y = S + attention([P; h; S])    M_i = M_{i-1} trained on y    o = silu(norm(y)) * silu(norm(M(y)))

  for the segments S of a document; attention stays within its segment. It is causal: token t attends to what was retrieved for
  tokens up to t, and M(y) at t is read after the write of t.

  Attributes:
    segment: tokens in a segment. The memory's chunks, counted from the document's first token, may be shorter or longer.
    rope_base: base of the rotary positions, counted within the segment.

  The other attributes are those of `TitansMemory`; attention has the same `num_heads` and `head_dim`. Only attention sees the
  persistent tokens.
  """

  segment: int = 64
  rope_base: float = 10_000.0
  persistent_tokens: int = 4

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    check_rotated(self.head_dim)

  def initial_state(self, batch_size: int) -> ContextState:
    """The state before the first token."""
    memory, *tails = super().initial_state(batch_size)
    context, context_tail = jax.tree.map(jnp.zeros_like, (memory.weights, tails[0]))
    shape = batch_size, 2, self.segment, self.num_heads, self.head_dim
    keys, values = (jnp.zeros(shape, self.activation_dtype()) for _ in range(2))
    return ContextState(memory, context, context_tail, *tails, keys, values, jnp.zeros((batch_size,), jnp.int32))

  @nn.compact
  def __call__(
    self, x: jax.Array, state: ContextState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, ContextState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    state = _at_least_as_wide(state, x.dtype)
    layout = self.layout(x.shape[1], state.count, segment_ids, fresh)
    persistent, initial = self.persistent(x.shape[-1]), self.initial_weights(None, None)
    state, *_ = aligned((state, x, initial), (_STATE, P(ROWS), P(HEADS)))  # the first carry

    def step(module, state, segment):
      return module.read_segment(initial, persistent, state, *segment)

    state, y = scan_segments(step, self, state, x, layout)
    return silence_padding(y, segment_ids), state._replace(count=layout.count)

  @nn.nowrap
  def layout(self, tokens: int, count: jax.Array, segment_ids: jax.Array | None, fresh: bool) -> Layout:
    """The layout of an input [B, tokens] in segments; `count` as in a state, which is `fresh` or not."""
    return lay_out_segments(self.segment, count, tokens, segment_ids, fresh, self.max_documents)

  def read_segment(
    self,
    initial: ttm.InitialWeights,
    persistent: jax.Array | None,
    state: ContextState,
    x: jax.Array,
    is_token: jax.Array,
    position: jax.Array,
    fresh: jax.Array | None,
    still_open: jax.Array | None,
  ) -> tuple[ContextState, jax.Array]:
    """One segment, or the part of it in this call: x [B, C, D] to the next state and y [B, C, D]."""
    state = select_rows(fresh, jax.tree.map(jnp.zeros_like, state), state)
    ids = is_token.astype(jnp.int32)
    projections = self.projections(x)

    q, context_tail = projections.query(x, state.context_tail, ids)
    retrieved = ttm.read(self.spec, initial, state.context, l2_normalise(self.split(q)), precision=self.precision)
    retrieved = RMSNorm(self.norm_epsilon, self.param_dtype, axis=None, name="context_norm")(retrieved.astype(x.dtype))
    retrieved = dense(x.shape[-1], ("heads", "embed"), name="context", **self.types)(retrieved.reshape(*x.shape[:2], -1))

    attended, keys, values = self._attend(x, retrieved, persistent, state, is_token, position)
    y = x + attended
    operands, tails = self.project(projections, y, (state.query_tail, state.key_tail, state.value_tail), ids)
    learned = self.learn(initial, *operands, state.memory, ids, max_documents=1)
    context = select_rows(still_open, state.context, learned.state.weights)
    state = ContextState(learned.state, context, context_tail, *tails, keys, values, state.count)
    return state, _product(self, y, self.read_out(y, learned.y))

  def _attend(
    self, x, retrieved, persistent, state: ContextState, is_token, position
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of a segment [B, C, D] to itself, its context and the persistent tokens; and the next keys and values."""
    batch, tokens = x.shape[:2]

    def project(name):
      maps = dense(self.channels, ("embed", "heads"), name=f"attention_{name}", **self.types)
      return lambda a: self.split(maps(a))

    query, key, value = project("query"), project("key"), project("value")
    slot = jnp.where(is_token, position, self.segment)
    write_rows = partitioned(jax.vmap(_write), (_SLOTS, P(ROWS), _SLOTS), _SLOTS)

    def write(cache, context, own):
      return write_rows(cache, slot, jnp.stack([context, own], axis=1).astype(cache.dtype))

    q = rotate(query(x), position, self.rope_base)
    keys = write(state.keys, *(rotate(key(a), position, self.rope_base) for a in (retrieved, x)))
    values = write(state.values, value(retrieved), value(x))
    seen = jnp.arange(self.segment, dtype=jnp.int32)[None, None] <= position[..., None]
    mask = jnp.concatenate([seen, seen], axis=2)
    k, v = (a.reshape(batch, -1, *a.shape[3:]) for a in (keys, values))
    ahead = None if persistent is None else (key(persistent[None]), value(persistent[None]))
    out = softmax_attention(q, k, v, mask, ahead).reshape(batch, tokens, -1)
    return dense(x.shape[-1], ("heads", "embed"), name="attention_output", **self.types)(out), keys, values


def _write(cache: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
  """The cache [2, segment, H, d] with `new` [2, C, H, d] in the slots [C]; padding goes one past the end and is dropped."""
  return cache.at[:, slot].set(new, mode="drop")


def _at_least_as_wide(state: ContextState, dtype: jnp.dtype) -> ContextState:
  """The state with its floats widened to `dtype`, because the carry of a scan keeps one dtype."""

  def widened(x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(dtype) if is_float and x.dtype.itemsize < dtype.itemsize else x

  return jax.tree.map(widened, state)


def _product(module: TitansMemory, y: jax.Array, m: jax.Array) -> jax.Array:
  """silu(norm(y)) * silu(norm(m))."""

  def branch(name: str, a: jax.Array) -> jax.Array:
    return nn.silu(RMSNorm(param_dtype=module.param_dtype, name=name)(a))

  return branch("attention_gate", y) * branch("memory_gate", m)
