"""Two small layers that use the context of a stack: one reads notes of lower layers, one feeds later blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from memzoo.layers import Context, ContextLayer
from memzoo.layers.memory_layer import silence_padding
from memzoo.layers.projections import conv_weight, dense
from memzoo.pallas_kernels.short_conv import short_conv


class Published(NamedTuple):
  """What a `NoteReader` publishes in a call.

  Attributes:
    notes: notes of this call's tokens, [B, T, channels].
    tail: notes of the last tokens before this call, from the layer's state, [B, conv_width - 1, channels].
  """

  notes: jax.Array
  tail: jax.Array


class NoteState(NamedTuple):
  """The notes of the last tokens, [B, conv_width - 1, channels]."""

  tail: jax.Array


class NoteReader(ContextLayer, kw_only=True):
  """y_t = W_o sum_l sum_j w_j n^l_{t-j}, over the notes n = W_n x of all `NoteReader`s below and of this one.

  Notes are read from this call and, for its first tokens, from the states that the lower layers began the call with.
  """

  channels: int
  conv_width: int = 4

  def initial_state(self, batch_size: int) -> NoteState:
    return NoteState(jnp.zeros((batch_size, self.conv_width - 1, self.channels), self.activation_dtype()))

  def publishes(self, x: jax.ShapeDtypeStruct) -> dict[str, Any]:
    batch, tokens, _ = x.shape
    shapes = (batch, tokens, self.channels), (batch, self.conv_width - 1, self.channels)
    return {"notes": Published(*(jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes))}

  @nn.compact
  def in_stack(
    self, x: jax.Array, state: NoteState | None, segment_ids: jax.Array | None, context: Context
  ) -> tuple[jax.Array, NoteState, Context]:
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    weight = conv_weight(self, self.conv_width, self.channels)

    def read(notes: jax.Array, tail: jax.Array) -> tuple[jax.Array, jax.Array]:
      return short_conv(notes, weight, initial_state=tail, segment_ids=segment_ids)

    own = dense(self.channels, ("embed", "heads"), name="note", **types)(x)
    total, tail = read(own, state.tail)
    below = context.notes["notes"]
    for l, filled in enumerate(below.is_filled):
      notes, before = jax.tree.map(lambda a, l=l: a[l], below.values)
      total = total + jnp.where(filled, read(notes, before)[0], 0)
    context = context.publish("notes", Published(own, state.tail))
    y = dense(x.shape[-1], ("heads", "embed"), name="output", **types)(jnp.tanh(total))
    return silence_padding(y, segment_ids), NoteState(tail), context


class Feeder(ContextLayer, kw_only=True):
  """y = W_0 x, and adds W_j x to the input of the j-th next block, j = 1..3."""

  @property
  def features_ahead(self) -> int:
    return 3

  def initial_state(self, batch_size: int) -> tuple[()]:
    return ()

  @nn.compact
  def in_stack(
    self, x: jax.Array, state: tuple[()] | None, segment_ids: jax.Array | None, context: Context
  ) -> tuple[jax.Array, tuple[()], Context]:
    self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for ahead in (1, 2, 3):
      context = context.add_features(ahead, dense(x.shape[-1], ("embed", None), name=f"ahead_{ahead}", **types)(x))
    y = dense(x.shape[-1], ("embed", None), name="output", **types)(x)
    return silence_padding(y, segment_ids), (), context
