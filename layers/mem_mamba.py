"""Mamba with a pool of notes, which later tokens and higher layers read.

    s_t = sigmoid(w . relu(W_1 u_t))        n_t = RMSNorm(W_n u_t), kept in the layer's pool if s_t > note_threshold
    y_t = Mamba(u)_t + F(c_t) + F'(c'_t)        F(c) = sigmoid(W_g [u_t, c]) * c
    c_t = attention of u_t to this layer's pool, if sigmoid(w_z . u_{t-1} + b_z) > read_threshold, else 0
    c'_t = attention of u_t to the pools of the `reads_below` layers below, in layers with `reads_below` > 0

All pools are those before token t. Source: MemMamba (Wang et al. 2025, arXiv:2510.03279), whose code is not published. u is the
normalised residual stream, so the reads are added to the input of the next layer, as in the paper. The pools are in
`memzoo.pallas_kernels.note_pool`.

The paper gives the rules and sizes, and leaves the rest open -> we do (inferred): the scorer, norm and gate above · thresholds
0.5 and 0.3 · log s_t is added to a note's logit, so that the scorer learns · the read threshold has the gradient of its gate ·
values start at zero, so that the layer starts as Mamba · every document begins with an empty pool. Other implementations rank
the notes of all tokens, later ones too, and so leak the future; here token t sees what earlier tokens wrote.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels.note_pool import RULES, Notes, Pool, empty_pool, read_notes
from ..pallas_kernels.numerics import einsum
from ..pallas_kernels.short_conv import short_conv
from ..pallas_kernels.states import exportable
from .axes import named
from .context import Context, ContextLayer
from .mamba import UNIFORM, Mamba, ScanState
from .memory_layer import silence_padding
from .norms import RMSNorm, beside
from .projections import LowRank, dense, gate_types

PUBLISHED = "mem_mamba"  # the name of what a layer publishes to those above


@exportable
class MemMambaState(NamedTuple):
  """State of `MemMamba`.

  Attributes:
    scan: of Mamba.
    pool: notes of earlier tokens.
    trigger: w_z . u of the last token, [B, 1, 1], float32; 0 before the first.
  """

  scan: ScanState
  pool: Pool
  trigger: jax.Array


class Published(NamedTuple):
  """What a layer publishes: the notes of the call's tokens, its pool before the call, and whether its rule is "fifo", [B]."""

  notes: Notes
  pool: Pool
  fifo: jax.Array


class MemMamba(ContextLayer, kw_only=True):
  """MemMamba (Wang et al. 2025, arXiv:2510.03279): Mamba, and attention to a limited number of notes.

      y_t = Mamba(u)_t + sigmoid(W_g [u_t, c_t]) * c_t,        c_t = sum_j softmax_j(q_t . W_k n_j + log s_j) W_v n_j

  over the notes n_j of earlier tokens in the layer's pool; see the module for the rest.

  Attributes:
    channels, state_dim, step_rank, conv_width, chunk_size, precision: of `Mamba`.
    slots: number of notes that a pool holds.
    rule: what a new note replaces in a full pool: "fifo", the oldest note, or "priority", that of the lowest score.
    note_dim: width of a note.
    read_heads: number of heads that read, a divisor of `note_dim` and of the layer's width.
    note_threshold: a token leaves a note if its score is higher; below 0 all do, from 1 on none.
    read_threshold: a token reads its layer's pool if a gate of the token before it is higher; below 0 all do, from 1 on none.
    reads_below: the layer also reads the pools of so many `MemMamba` layers below it; 0 for none. The paper's period p is a
      pattern of p layers, the last of which has `reads_below` = p.
    gate_rank: rank of W_g; `None` for full rank.
    implementation: of the operations: "auto", "xla" or "recurrent" (the oracle: slow, but with derivatives of every mode).
  """

  channels: int
  state_dim: int = 16
  step_rank: int | None = None
  conv_width: int = 4
  chunk_size: int | None = None
  precision: str | None = None
  slots: int = 50
  rule: str = "fifo"
  note_dim: int = 64
  read_heads: int = 4
  note_threshold: float = 0.5
  read_threshold: float = 0.3
  reads_below: int = 0
  gate_rank: int | None = 64
  implementation: str = "auto"

  @property
  def types(self) -> dict[str, Any]:
    """The dtype arguments of submodules."""
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  @property
  def mamba(self) -> dict[str, Any]:
    """The fields of the Mamba inside."""
    shared = "channels", "state_dim", "step_rank", "conv_width", "chunk_size", "precision", "implementation"
    return {name: getattr(self, name) for name in shared} | self.types

  def initial_state(self, batch_size: int) -> MemMambaState:
    """That of Mamba, and an empty pool."""
    scan = Mamba(**self.mamba, parent=None).initial_state(batch_size)
    pool = empty_pool((batch_size,), self.slots, self.note_dim, self.activation_dtype())
    return MemMambaState(scan, pool, jnp.zeros((batch_size, 1, 1), scan.memory.dtype))

  def matrices(self, state: MemMambaState) -> dict[str, jax.Array]:
    """Returns the states of Mamba under the name "memory", as one head."""
    return {"memory": state.scan.memory[:, None]}

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    if self.rule not in RULES:
      raise ValueError(f"rule={self.rule!r}; expected one of {list(RULES)}.")
    if self.note_dim % self.read_heads:
      raise ValueError(f"read_heads={self.read_heads}; expected a divisor of note_dim={self.note_dim}.")

  def publishes(self, x: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """The notes of a call, and the pool before it."""

    def published():
      state = self.initial_state(x.shape[0])
      score = jnp.zeros(x.shape[:2], state.trigger.dtype)
      notes = jnp.zeros((*x.shape[:2], self.note_dim), state.pool.notes.dtype)
      return Published(Notes(notes, score, score > 0), state.pool, self._is_fifo(x))

    return {PUBLISHED: jax.eval_shape(published)}

  @nn.compact
  def in_stack(
    self, x: jax.Array, state: MemMambaState | None, segment_ids: jax.Array | None, context: Context
  ) -> tuple[jax.Array, MemMambaState, Context]:
    """See `ContextLayer`."""
    state = self.begin(x, state, segment_ids)
    if x.shape[-1] % self.read_heads:
      raise ValueError(f"read_heads={self.read_heads}; expected a divisor of the width of x, {x.shape[-1]}.")
    u = x.astype(self.activation_dtype(x))
    y, scan = Mamba(**self.mamba, name="mamba")(u, state.scan, segment_ids)
    own = Published(self._write(u), state.pool, self._is_fifo(x))
    is_open, trigger = self._open(u, state.trigger, segment_ids)
    read, pool = self._read("token", u, jax.tree.map(lambda leaf: leaf[None], own), segment_ids)
    y += self._gated("token", u, read * is_open.astype(read.dtype))
    if self.reads_below:
      read, _ = self._read("layer", u, self._below(context), segment_ids)
      y += self._gated("layer", u, read)
    context = context.publish(PUBLISHED, own)
    return silence_padding(y, segment_ids), MemMambaState(scan, jax.tree.map(lambda leaf: leaf[0], pool), trigger), context

  def _write(self, u: jax.Array) -> Notes:
    """The notes of all tokens, [B, T, ...]."""
    note = dense(self.note_dim, ("embed", None), kernel=UNIFORM, name="note", **self.types)(u)
    note = RMSNorm(param_dtype=self.param_dtype, axis=None, name="note_norm")(note)
    hidden = nn.relu(dense((u.shape[-1] + 3) // 4, ("embed", None), kernel=UNIFORM, name="score_in", **self.types)(u))
    types = gate_types(u, self.param_dtype, self.precision)
    score = dense(1, (None, None), kernel=UNIFORM, name="score_out", **types)(hidden)[..., 0]
    return Notes(note, nn.log_sigmoid(score), nn.sigmoid(score) > self.note_threshold)

  def _open(self, u: jax.Array, before: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Whether tokens read, 0 or 1 in [B, T, 1] with the gradient of the gate, and the last token's part of the next gate."""
    types = gate_types(u, self.param_dtype, self.precision)
    logit = dense(1, ("embed", None), kernel=UNIFORM, name="trigger", **types)(u)
    last = jnp.asarray([[1], [0]], logit.dtype)  # a convolution that moves tokens by one, within documents
    logit, after = short_conv(logit, last, initial_state=before, segment_ids=segment_ids, implementation=self.implementation)
    bias = self.param("trigger_bias", named(nn.initializers.zeros, None), (1,), self.param_dtype)
    gate = nn.sigmoid(logit + beside(logit, bias))
    return (gate > self.read_threshold).astype(gate.dtype) + (gate - jax.lax.stop_gradient(gate)), after

  def _read(
    self, name: str, u: jax.Array, published: Published, segment_ids: jax.Array | None
  ) -> tuple[jax.Array, Pool]:
    """The read of L pools together, [B, T, D], and the pools after it, from what L layers published, [L, B, ...].

    Keys W_k n_j are not computed: W_k is applied to the queries. Values are computed from the mixed notes of each head.
    """
    heads, width = self.read_heads, self.note_dim // self.read_heads
    q = dense(self.note_dim, ("embed", None), kernel=UNIFORM, name=f"{name}_query", **self.types)(u)
    key = self._by_head(f"{name}_key", UNIFORM, width, u)
    value = self._by_head(f"{name}_value", nn.initializers.zeros, u.shape[-1] // heads, u)
    q = einsum("bthe,mhe->bthm", q.reshape(*u.shape[:2], heads, width), key).astype(u.dtype)
    options = {"rule": published.fifo, "segment_ids": segment_ids, "implementation": self.implementation}
    mixed, pool = read_notes(q, published.notes, published.pool, scale=width**-0.5, **options)
    return einsum("bthm,mhd->bthd", mixed, value).astype(u.dtype).reshape(u.shape), pool

  def _by_head(self, name: str, init: Any, width: int, u: jax.Array) -> jax.Array:
    """A matrix from notes to `width` numbers for each head, [M, H, width]."""
    shape = self.note_dim, self.read_heads * width
    return self.param(name, named(init, None, None), shape, self.param_dtype).astype(u.dtype).reshape(shape[0], -1, width)

  def _gated(self, name: str, u: jax.Array, c: jax.Array) -> jax.Array:
    gate = LowRank(u.shape[-1], self.gate_rank, axis="embed", name=f"{name}_gate", **self.types)
    return nn.sigmoid(gate(jnp.concatenate([u, c], axis=-1))) * c

  def _below(self, context: Context) -> Published:
    """What the layers below that are read published, [L, B, ...]; the pools of those that do not exist are empty."""
    published = context.notes[PUBLISHED]
    many = min(self.reads_below, len(published.is_filled))
    first = jnp.maximum(published.count - many, 0)
    notes, pool, fifo = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, many), published.values)
    filled = (first + jnp.arange(many, dtype=jnp.int32) < published.count)[:, None, None]
    pool = pool._replace(position=jnp.where(filled, pool.position, -1))
    return Published(notes._replace(is_note=notes.is_note & filled), pool, fifo)

  def _is_fifo(self, x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.full(x.shape[:1], self.rule == "fifo")
