"""What the sublayers of a stack pass to each other beside the residual stream: a pure value that travels upwards.

A layer that needs the token ids, reads what lower layers published, or adds to the input of later blocks inherits from
`ContextLayer` and defines one method:

    y, state, context = self.in_stack(x, state, segment_ids, context)

All shapes are fixed before the first sublayer runs, from what each layer declares, so the same context passes through an
unrolled stack and through a `scan` over its repeats.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.partition import ROWS, aligned, varying_alike
from .memory_layer import MemoryLayer


class Notes(NamedTuple):
  """What earlier sublayers published under one name.

  Attributes:
    values: a tree of arrays [N, B, ...], lowest publisher first. N counts all publishers of the stack; the entries of those
      that have not run yet are zero.
    count: int32 [], the number of entries that are filled.
  """

  values: Any
  count: jax.Array

  @property
  def is_filled(self) -> jax.Array:
    """bool [N]: which entries are filled."""
    return jnp.arange(len(jax.tree.leaves(self.values)[0]), dtype=jnp.int32) < self.count


class Context(NamedTuple):
  """The value that a stack passes to each sublayer, which returns it updated.

  Attributes:
    tokens: token ids, int32 [B, T]; `None` in a stack that reads vectors.
    notes: `Notes` by name.
    features: [K, B, T, D]; `features[j]` is added to the residual stream before the block j + 1 blocks ahead. `None` where no
      layer of the stack adds features.
  """

  tokens: jax.Array | None
  notes: dict[str, Notes]
  features: jax.Array | None

  @classmethod
  def start(cls, layers: Sequence[nn.Module], x: jax.Array, tokens: jax.Array | None = None) -> "Context":
    """The context before the first of `layers`, all sublayers of a stack in order; x [B, T, D] is its input."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    published = [layer.publishes(shape) for layer in layers if isinstance(layer, ContextLayer)]
    notes = {}
    for name in dict.fromkeys(name for own in published for name in own):
      first, *others = (own[name] for own in published if name in own)
      notes[name] = Notes(_zeros(1 + len(others), first), jnp.zeros((), jnp.int32))
    ahead = max((layer.features_ahead for layer in layers if isinstance(layer, ContextLayer)), default=0)
    features = jnp.zeros((ahead, *x.shape), x.dtype) if ahead else None
    by_row = P(None, ROWS)
    notes, features, _ = aligned((notes, features, x), (dict.fromkeys(notes, Notes(by_row, P())), by_row, P(ROWS)))
    return varying_alike(x, cls(tokens, notes, features))

  def publish(self, name: str, values: Any) -> "Context":
    """The context with `values`, a tree of arrays [B, ...] as declared by `ContextLayer.publishes`, added under `name`.

    Raises:
      ValueError: if no layer declares `name`, or `values` has another structure or shape than declared.
    """
    if name not in self.notes:
      raise ValueError(f"publish({name!r}): no layer of the stack declares this name; expected one of {sorted(self.notes)}.")
    notes = self.notes[name]
    values, _ = aligned((values, notes), (P(ROWS), Notes(P(None, ROWS), P())))
    declared = jax.tree.map(lambda leaf: leaf.shape[1:], notes.values)
    if declared != jax.tree.map(jnp.shape, values):
      raise ValueError(f"publish({name!r}): shapes {jax.tree.map(jnp.shape, values)}; `publishes` declares {declared}.")
    filled = jax.tree.map(
      lambda all_, own: jax.lax.dynamic_update_index_in_dim(all_, own.astype(all_.dtype), notes.count, 0), notes.values, values
    )
    return self._replace(notes=self.notes | {name: Notes(filled, notes.count + 1)})

  def add_features(self, ahead: int, features: jax.Array) -> "Context":
    """The context with `features` [B, T, D] added to the residual stream before the block `ahead` blocks further up.

    Raises:
      ValueError: if `ahead` is not between 1 and the largest `features_ahead` of the stack's layers.
    """
    most = 0 if self.features is None else len(self.features)
    if not 1 <= ahead <= most:
      raise ValueError(f"add_features(ahead={ahead}); expected 1 to {most}, the largest `features_ahead` in the stack.")
    return self._replace(features=self.features.at[ahead - 1].add(features.astype(self.features.dtype)))

  def next_block(self, x: jax.Array) -> tuple[jax.Array, "Context"]:
    """Adds the features for this block to the residual stream x [B, T, D], and moves the others one block closer."""
    if self.features is None:
      return x, self
    due, rest = self.features[0], self.features[1:]
    return x + due, self._replace(features=jnp.concatenate([rest, jnp.zeros_like(due)[None]]))


def _zeros(count: int, shapes: Any) -> Any:
  """Zeros of these shapes, with a leading axis of `count`."""
  return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), shapes)


class ContextLayer(MemoryLayer, kw_only=True):
  """A memory layer that reads or writes the `Context` of the stack around it.

  It defines `in_stack` in place of `__call__`, declares what it publishes and how far ahead it adds features, and obeys the
  same contract: causal, independent of the split, and so on, for the stack as a whole. Called outside a stack it sees the
  context of a stack of this one layer.
  """

  @property
  def features_ahead(self) -> int:
    """The largest `ahead` that the layer passes to `Context.add_features`; 0 if it adds none."""
    return 0

  def publishes(self, x: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """What the layer publishes for x [B, T, D]: by name, a tree of `jax.ShapeDtypeStruct` [B, ...]."""
    del x
    return {}

  def in_stack(
    self, x: jax.Array, state: Any, segment_ids: jax.Array | None, context: Context
  ) -> tuple[jax.Array, Any, Context]:
    """Maps x [B, T, D] to (y [B, T, D], state, context); `state` and `segment_ids` as in `__call__`."""
    raise NotImplementedError(f"{type(self).__name__} must define in_stack(x, state, segment_ids, context)")

  def __call__(
    self, x: jax.Array, state: Any | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, Any]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    y, state, _ = self.in_stack(x, state, segment_ids, Context.start((self,), x))
    return y, state
