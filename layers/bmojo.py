"""Attention to the last tokens, to what a memory made of those before them, and to the tokens that were hardest to predict.

    f = memory(u)        q = W_q u, k = W_k u, v = W_v u        q^f = q, k^f = W_k f, v^f = W_v f
    o_i = (sum_j e^{q_i . k_j d^{-1/2}} v_j + sum_l e^{q^f_i . k^f_l d^{-1/2}} v^f_l) / (the sum of the same without v)

    j     the context, i - w < j <= i, and the eidetic tokens: of all j <= i - w the M with the largest innovations
    l     the fading tokens, i - 2 w < l <= i - w. f_l depends on all tokens up to l, so the past has no end.

    innovation_j = |u_j - mean(u_{j-4}, ..., u_{j-1})|^2 / (|u_j|^2 + 1e-6)

with rotary positions of all keys. Source: B'MOJO (Zancato et al. 2024, arXiv:2407.06324). Without eidetic tokens (M = 0) it is
B'MOJO-F, whose code is published (awslabs/hybrid-model-factory). That code has no eidetic tokens: what is said about them here
is inferred from the paper's description, tokens that are hard to predict from the past are stored.

The paper leaves open -> we do:

- the prediction -> the mean of the last four tokens, of those that exist, which has no parameters. A learned prediction, from
  f_{j-1}, needs a loss of its own, which the output of a layer does not carry.
- when a token is stored -> when it leaves the context. It then competes with the M that are stored, token by token, so the
  tokens that a query sees do not depend on how the sequence is cut. Of equal innovations the older one stays.
- gradients -> through keys and values, and not through the choice
- positions of eidetic tokens -> their own, however far they are
- the scale of logits -> d^{-1/2}; the published code takes the root of the model's width over the number of heads
- documents -> each begins with nothing
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.documents import Documents
from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.partition import HEADS, ROWS, partitioned
from ..pallas_kernels.short_conv import short_conv
from ..pallas_kernels.sizes import pad_end
from ..pallas_kernels.states import exportable
from ..pallas_kernels.top_scores import Held, Offered, hold_highest
from .attention import Attention, CacheState, Source, in_ring, joint_attention, locate, write_ring
from .columns import before, block_size, blocks, merge_blocks, missing, padding_last, places_before, take_tokens, windows
from .mamba import Mamba2
from .memory_layer import MemoryLayer, from_template

_EPSILON = 1e-6


@exportable
class EideticState(NamedTuple):
  """The eidetic tokens, and what the next ones are chosen by.

  Attributes:
    keys: rotated, [B, Hk, M, d]; the largest innovation first, of equal ones the older token.
    values: [B, Hk, M, d].
    score: their innovations, float32 [B, M].
    position: int32 [B, M], the place of each in its document; -1 in an empty slot.
    innovation: a ring of the innovations of the last tokens, float32 [B, w + 1].
    tail: the last inputs, from which the next is predicted, [B, predicted_from, D].
  """

  keys: jax.Array
  values: jax.Array
  score: jax.Array
  position: jax.Array
  innovation: jax.Array
  tail: jax.Array


@exportable
class BMojoState(NamedTuple):
  """State of `BMojo`.

  Attributes:
    memory: of the memory; () without fading tokens.
    context: a ring of the keys and values of the last w tokens, of w + 1 with eidetic slots.
    fading: a ring of those of the last 2 w fading tokens; () without them.
    eidetic: () without eidetic tokens.
  """

  memory: Any
  context: CacheState
  fading: CacheState | tuple[()]
  eidetic: EideticState | tuple[()]


class _Heads(NamedTuple):
  """What one attention reads, not yet rotated: q [B, T, H, d], k and v [B, T, Hk, d]."""

  q: jax.Array
  k: jax.Array
  v: jax.Array


class _View(NamedTuple):
  """What the queries of a call see. They are in columns, padding last, and these in N blocks of C.

  Attributes:
    order, back: int32 [B, T], the token of each column, and the reverse; `None` where the tokens are in order.
    context: bool [B, N, C, w + C], which of the w columns before a block, and of its own, a query sees.
    fading: the same for the fading tokens of the w columns before those, and as many as its own.
    stored: int32 [B, N, M], the eidetic tokens that a block starts from, -1 for none; `None` without eidetic slots. Eidetic
      tokens are numbered: first the M in the state, then the columns from -w on.
    eidetic: bool [B, N, C, M], which of these a query sees.
    last: int32 [B, M], the eidetic tokens after the call.
  """

  order: jax.Array | None
  back: jax.Array | None
  context: jax.Array
  fading: jax.Array
  stored: jax.Array | None = None
  eidetic: jax.Array | None = None
  last: jax.Array | None = None


_BY_ROW, _BY_HEAD, _SLOTS = P(ROWS), P(ROWS, None, HEADS), P(ROWS, HEADS)


class BMojo(Attention, kw_only=True):
  """B'MOJO (Zancato et al. 2024, arXiv:2407.06324); with `eidetic_slots=0`, the default, the published B'MOJO-F.

      o_i = softmax over j, l of [q_i . k_j d^{-1/2},  q^f_i . k^f_l d^{-1/2}] times [v_j; v^f_l],    f = memory(u)

  with j in the last w tokens or stored, and l in the w tokens before those; see the module. The other attributes, with `window`
  or `max_length` for w, are those of `Attention`.

  Attributes:
    memory: the layer that makes the fading tokens, with any fields; `None` for `Mamba2` of twice as many heads, of the same
      width.
    tied: whether fading tokens have the projections of the context; else they have their own, the queries too.
    fading: whether there are fading tokens.
    eidetic_slots: M, the number of eidetic tokens.
    predicted_from: the number of tokens whose mean predicts the next.
    width: width of u, which eidetic slots need; `None` in a model, which sets its own.
  """

  memory: MemoryLayer | None = None
  tied: bool = True
  fading: bool = True
  eidetic_slots: int = 0
  predicted_from: int = 4
  width: int | None = None

  @nn.nowrap
  def fading_layer(self) -> MemoryLayer:
    """The layer that makes the fading tokens, not bound to parameters."""
    default = Mamba2(num_heads=2 * self.num_heads, head_dim=self.head_dim, parent=None)
    return from_template(default if self.memory is None else self.memory, self.dtype, self.param_dtype, self.width)

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    self.fading_layer().check_settings()

  def initial_state(self, batch_size: int) -> BMojoState:
    """Empty caches, and a fresh memory."""
    memory = self.fading_layer().initial_state(batch_size) if self.fading else ()
    fading = self._empty(batch_size, 2 * self.slots) if self.fading else ()
    return BMojoState(memory, self._empty(batch_size, self._context_slots), fading, self._no_tokens(batch_size))

  @property
  def _context_slots(self) -> int:
    """w; or one more: the token that leaves the window, and may be stored, is still there when the next has been written."""
    return self.slots + (self.eidetic_slots > 0)

  @nn.nowrap
  def _empty(self, batch_size: int, slots: int) -> CacheState:
    shape = batch_size, self.key_heads, slots, self.head_dim
    keys, values = (jnp.zeros(shape, self.activation_dtype()) for _ in range(2))
    return CacheState(keys, values, jnp.zeros((batch_size,), jnp.int32))

  @nn.nowrap
  def _no_tokens(self, batch_size: int) -> EideticState | tuple[()]:
    if not self.eidetic_slots:
      return ()
    if self.width is None:
      raise ValueError("width=None; eidetic slots need the width of x, which only a model sets by itself.")
    keys, values, _ = self._empty(batch_size, self.eidetic_slots)
    wide = accumulator(self.activation_dtype())
    score, innovation = (jnp.zeros((batch_size, slots), wide) for slots in (self.eidetic_slots, self._context_slots))
    tail = jnp.zeros((batch_size, self.predicted_from, self.width), self.activation_dtype())
    return EideticState(keys, values, score, jnp.full(score.shape, -1, jnp.int32), innovation, tail)

  def matrices(self, state: BMojoState) -> dict[str, jax.Array]:
    """Those of the memory, as "fading_memory/" and their names."""
    own = self.fading_layer().matrices(state.memory) if self.fading else {}
    return {f"fading_memory/{name}": matrix for name, matrix in own.items()}

  @nn.compact
  def __call__(
    self, x: jax.Array, state: BMojoState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, BMojoState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    if self.eidetic_slots and x.shape[-1] != self.width:
      raise ValueError(f"width={self.width}; expected the width of x, {x.shape[-1]}.")
    u = x.astype(self.activation_dtype(x))
    query, key, value = self._projections("")
    context, fading, memory = _Heads(query(u), key(u), value(u)), None, ()
    if self.fading:
      layer = self.fading_layer().clone(parent=self, name="fading_memory")
      f, memory = layer(u, None if fresh else state.memory, segment_ids)
      own_query, key, value = (query, key, value) if self.tied else self._projections("fading_")
      fading = _Heads(context.q if self.tied else own_query(u), key(f.astype(u.dtype)), value(f.astype(u.dtype)))
    out, state = self.attend(u, context, fading, state._replace(memory=memory), segment_ids, fresh)
    return self._output(u, out, segment_ids), state

  @nn.nowrap
  def _projections(self, prefix: str) -> tuple[Any, Any, Any]:
    names = [f"{prefix}{name}" for name in ("query", "key", "value")]
    normed = self.qk_norm, self.qk_norm, False
    return tuple(map(self._heads, names, (self.num_heads, self.key_heads, self.key_heads), normed))

  @nn.nowrap
  def attend(
    self, u: jax.Array, context: _Heads, fading: _Heads | None, state: BMojoState, segment_ids: jax.Array | None, fresh: bool
  ) -> tuple[jax.Array, BMojoState]:
    """What the layer does between its projections, without parameters: attention [B, T, H, d], and the next state."""
    by_head, slots = (_BY_HEAD, _SLOTS) if self.key_heads > 1 else (_BY_ROW, _BY_ROW)  # a single head is whole on each device
    heads, ring = _Heads(_BY_HEAD, by_head, by_head), CacheState(slots, slots, _BY_ROW)
    where = locate(u.shape[1], segment_ids, state.context.length)
    scores = state.eidetic and state.eidetic._replace(keys=None, values=None)
    view, eidetic = partitioned(self._see, _BY_ROW, _BY_ROW)(u, scores, state.context.length, where, segment_ids)

    write = partitioned(self._rotate_and_write, (by_head, by_head, ring, _BY_ROW), (by_head, ring))
    k, after = write(context.k, context.v, state.context, where)
    context, after = context._replace(k=k), state._replace(context=after, eidetic=eidetic)
    if fading is not None:
      k, cache = write(fading.k, fading.v, state.fading, where)
      fading, after = fading._replace(k=k), after._replace(fading=cache)
    by_ring = u.shape[1] == 1 and not fresh  # the token lies in the rings, and sees nothing else: they are not copied
    numbered = None
    if self.eidetic_slots:
      cache = (after if by_ring else state).context._replace(length=state.context.length)
      pool = state.eidetic.keys, state.eidetic.values
      store = partitioned(self._store, (by_head, ring, slots, _BY_ROW), (by_head, slots))
      numbered, (keys, values) = store(context[1:], cache, pool, view)
      after = after._replace(eidetic=eidetic._replace(keys=keys, values=values))

    heads_too, ring_too = fading and heads, state.fading and ring  # or nothing
    if by_ring:
      pool = (after.eidetic.keys, after.eidetic.values) if self.eidetic_slots else None
      read, given, specs = self._read_rings, (after.context, after.fading, pool), (ring, ring_too, slots)
    else:
      rings = None if fresh else (state.context, state.fading)
      read, given, specs = self._read_blocks, (rings, numbered), (rings and (ring, ring_too), by_head)
    read = partitioned(read, (heads, heads_too, *specs, _BY_ROW, _BY_ROW), _BY_HEAD)
    return read(context, fading, *given, view, where[1]), after

  @nn.nowrap
  def _see(
    self, u: jax.Array, state: Any, length: jax.Array, where: tuple[Documents, jax.Array, jax.Array], segment_ids: Any
  ) -> tuple[_View, Any]:
    """What the queries see, and the next state of the eidetic tokens without keys and values; `length` before the call."""
    docs, position, after = where
    order, back = (None, None) if segment_ids is None or u.shape[1] == 1 else padding_last(docs)
    index = jnp.where(docs.is_token, docs.index, docs.index[:, -1:])  # padding will come last
    columns = take_tokens(Documents(index, docs.is_token), order)
    context, fading = (self._in_window(columns, length, windows_back) for windows_back in (1, 2))
    view = _View(order, back, context, fading)
    if not self.eidetic_slots:
      return view, ()
    innovation, tail = self._innovation(u, state.tail, position, segment_ids)
    ring = state.innovation[:, None, :, None]
    written = write_ring(ring, innovation[..., None, None], docs, position, after)
    earlier = before(written if u.shape[1] == 1 else ring, length, self.slots, block_size(u.shape[1], self.slots))[..., 0, 0]
    innovation = jnp.concatenate([earlier, take_tokens(innovation, order)], axis=1)
    view, held = self._choose(view, columns, innovation, state, length)
    place = jnp.concatenate([state.position, places_before(self.slots, length), take_tokens(position, order)], axis=1)
    place = jnp.where(held.index >= 0, take_tokens(place, jnp.maximum(held.index, 0)), -1)
    return view, state._replace(score=held.score, position=place, innovation=written[:, 0, :, 0], tail=tail)

  @nn.nowrap
  def _documents(self, columns: Documents, length: jax.Array, windows_back: int) -> jax.Array:
    """The documents of w + T columns, the first of them `windows_back` windows before the call; -1 for none."""
    earlier = jnp.where(places_before(windows_back * self.slots, length) >= 0, jnp.int32(0), -1)
    own = jnp.where(columns.is_token, columns.index, -1)
    return jnp.concatenate([earlier, own], axis=1)[:, : self.slots + own.shape[1]]

  @nn.nowrap
  def _in_window(self, columns: Documents, length: jax.Array, windows_back: int) -> jax.Array:
    """Which of the w + C columns that end `windows_back` - 1 windows before its block's end a query sees, [B, N, C, w + C]."""
    window, size = self.slots, block_size(columns.index.shape[1], self.slots)
    distance = jnp.arange(window + size, dtype=jnp.int32)[None] - jnp.arange(size, dtype=jnp.int32)[:, None]
    keys = windows(self._documents(columns, length, windows_back), window, fill=-1)
    same = blocks(columns.index, size)[..., None] == keys[:, :, None]
    return same & ((distance > 0) & (distance <= window))[None, None]

  @nn.nowrap
  def _choose(
    self, view: _View, columns: Documents, innovation: jax.Array, state: Any, length: jax.Array
  ) -> tuple[_View, Held]:
    """The view with the eidetic tokens in it, and those after the call; `innovation` of the columns from -w on.

    In column t, the token of column t - w is offered.
    """
    slots, tokens = self.eidetic_slots, columns.index.shape[1]
    size = block_size(tokens, self.slots)
    held = Held(state.score, jnp.where(state.position >= 0, jnp.arange(slots, dtype=jnp.int32)[None], -1))
    number = jnp.broadcast_to(slots + jnp.arange(tokens, dtype=jnp.int32)[None], columns.index.shape)
    offered = innovation, number, self._documents(columns, length, 1)
    more = missing(tokens, size)
    offered = Offered(*(pad_end(a[:, :tokens], more) for a in offered))
    steps = Documents(pad_end(columns.index, more, fill=None), pad_end(columns.is_token, more, fill=False))
    stored, mask, held = hold_highest(offered, steps, held, size)
    leaving = jnp.pad(mask[..., slots:], [(0, 0)] * 3 + [(0, self.slots)])  # the first C of a block's w + C columns
    return view._replace(context=view.context | leaving, stored=stored, eidetic=mask[..., :slots], last=held.index), held

  @nn.nowrap
  def _innovation(
    self, u: jax.Array, tail: jax.Array, position: jax.Array, segment_ids: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """The innovations [B, T], constants for the gradient, and the next tail."""
    wide = jax.lax.stop_gradient(u.astype(accumulator(u)))
    past = self.predicted_from
    weight = jnp.pad(jnp.ones((past, u.shape[-1]), wide.dtype), [(0, 1), (0, 0)])
    total, after = short_conv(wide, weight, initial_state=jax.lax.stop_gradient(tail), segment_ids=segment_ids)
    predicted = total / jnp.clip(position, 1, past)[..., None].astype(wide.dtype)
    error, size = (jnp.sum(jnp.square(a), axis=-1) for a in (wide - predicted, wide))
    return error / (size + _EPSILON), after.astype(tail.dtype)

  @nn.nowrap
  def _store(self, new: tuple, ring: CacheState, pool: tuple, view: _View) -> tuple[tuple, tuple]:
    """Keys and values of the eidetic tokens by their numbers, [B, M + T, Hk, d], and the stored ones after the call.

    The length of `ring` is that before the call.
    """
    tokens, window = new[0].shape[1], self.slots

    def numbered(new, cache, pool):
      leaving = before(cache, ring.length, window, block_size(tokens, window))
      parts = pool.swapaxes(1, 2), leaving, take_tokens(new, view.order)
      return jnp.concatenate([part.astype(new.dtype) for part in parts], axis=1)[:, : self.eidetic_slots + tokens]

    every = tuple(map(numbered, new, ring[:2], pool))
    is_full = (view.last >= 0)[..., None, None]
    last = (jnp.where(is_full, take_tokens(a, jnp.maximum(view.last, 0)), 0) for a in every)
    return every, tuple(a.swapaxes(1, 2).astype(old.dtype) for a, old in zip(last, pool, strict=True))

  @nn.nowrap
  def _read_rings(
    self, context: _Heads, fading: _Heads | None, ring: CacheState, faded: Any, pool: Any, view: _View, position: jax.Array
  ) -> jax.Array:
    """The output [B, 1, H, d] of one token, which is in the rings."""

    def in_last_window(ring):
      cached = in_ring(ring.keys, ring.length)
      return cached.document >= 0, ring.length[:, None] - cached.position <= self.slots

    exists, is_near = in_last_window(ring)
    found = [(context.q, ring.keys, ring.values, exists & is_near)]
    if fading is not None:
      exists, is_near = in_last_window(faded)
      found.append((fading.q, faded.keys, faded.values, exists & ~is_near))
    if pool is not None:
      found.append((context.q, *pool, view.last >= 0))
    return joint_attention(
      [Source(self._positioned(q, position), k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, None]) for q, k, v, mask in found]
    )

  @nn.nowrap
  def _read_blocks(
    self, context: _Heads, fading: _Heads | None, rings: Any, numbered: Any, view: _View, position: jax.Array
  ) -> jax.Array:
    """The output [B, T, H, d] of new tokens, before which come those of the rings, if any."""
    tokens, window = position.shape[1], self.slots
    size = block_size(tokens, window)

    def keys_in_windows(new, cache, length, slots):
      shape = new.shape[0], slots, *new.shape[2:]
      earlier = jnp.zeros(shape, new.dtype) if cache is None else before(cache, length, slots, slots).astype(new.dtype)
      return windows(jnp.concatenate([earlier, take_tokens(new, view.order)], axis=1)[:, : window + tokens], window)

    def source(heads, ring, slots, mask):
      q = blocks(take_tokens(self._positioned(heads.q, position), view.order), size)
      keys, values, length = (None, None, None) if ring is None else ring
      return Source(q, keys_in_windows(heads.k, keys, length, slots), keys_in_windows(heads.v, values, length, slots), mask)

    ring, faded = (None, None) if rings is None else rings
    sources = [source(context, ring, window, view.context)]
    if fading is not None:
      sources.append(source(fading, faded, 2 * window, view.fading))
    if numbered is not None:
      index = jnp.maximum(view.stored, 0)
      shape = *index.shape, *numbered[0].shape[2:]
      k, v = (take_tokens(a, index.reshape(index.shape[0], -1)).reshape(shape) for a in numbered)
      sources.append(Source(sources[0].q, k, v, view.eidetic))
    out = joint_attention([Source(*map(merge_blocks, source)) for source in sources])
    out = out.reshape(position.shape[0], -1, *out.shape[2:])[:, :tokens]
    return take_tokens(out, view.back)
