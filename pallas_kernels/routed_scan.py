"""Several memories, each of which gets some of the tokens: a scan over the tokens, sorted by memory.

    state_m  <-  step(state_m, the tokens sent to memory m, in their order)        for each memory m

A token is copied for each memory that it is sent to. The copies of each row are sorted by memory into blocks of one memory
(`memzoo.pallas_kernels.grouped`). A scan over the blocks carries the state of one memory, which is replaced by that of the next
one where its blocks begin. So no token is dropped, shapes do not depend on the routing, and the cost is that of one memory for
each copy, and of less than one block more for each memory.

    copies = Copies.of(route, segment_ids, memories)
    reads, states = copies.scan(step, states, copies.gather(x))
    y = copies.scatter(reads).sum(axis=2)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .documents import documents, select_rows, undivided
from .grouped import blocks_of
from .partition import varying_alike

_LARGEST = 128  # copies in a block: several chunks of an operation, and few empty places

# From the state of a memory for each row, [B, ...], the memories, int32 [B], segment ids, int32 [B, P], and inputs [B, P, ...]
# to the outputs [B, P, ...] and the next state. It obeys the laws of a layer.
Step = Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Copies(NamedTuple):
  """Copies of tokens in n blocks of P copies for each of B rows, on one device.

  Attributes:
    memory: of each block, int32 [n, B].
    document: in each place of a block, int32 [n, B, P]; 1 + the index of the copy's document, 0 where there is no copy.
    token: the number of the token, among those of all rows, int32 [n, B, P].
    place: of each copy, among those of all blocks, int32 [B, T, C].
    current: the index of the last document of each row, int32 [B]; `None` for one document.
  """

  memory: jax.Array
  document: jax.Array
  token: jax.Array
  place: jax.Array
  current: jax.Array | None

  @classmethod
  def of(cls, route: jax.Array, segment_ids: jax.Array | None, memories: int) -> "Copies":
    """Copies of T tokens for their memories `route`, int32 [B, T, C], without repetition, each below `memories`."""
    rows, tokens, copies = route.shape
    docs = undivided(rows, tokens) if segment_ids is None else documents(segment_ids)
    memory = jnp.where(docs.is_token[..., None], route, memories).reshape(rows, -1)
    blocks = jax.vmap(partial(blocks_of, groups=memories, largest=_LARGEST))(memory)
    _, count, size = blocks.row.shape
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    column = jnp.minimum(blocks.row // copies, tokens - 1)
    place = jnp.minimum(blocks.place, count * size - 1)
    place = (place // size * rows + row) * size + place % size
    document = jnp.take_along_axis(docs.index[:, None], column, axis=2) + 1
    document = jnp.where(blocks.row < tokens * copies, document, 0)
    by_block = (jnp.swapaxes(x, 0, 1) for x in (blocks.group, document, row[..., None] * tokens + column))
    return cls(*by_block, place.reshape(route.shape), None if segment_ids is None else docs.index[:, -1])

  def gather(self, x: jax.Array) -> jax.Array:
    """x [B, T, ...] in blocks [n, B, P, ...], with the last token in places without a copy."""
    return x.reshape(-1, *x.shape[2:]).at[self.token].get(mode="clip")

  def scatter(self, y: jax.Array) -> jax.Array:
    """y [n, B, P, ...] by token and copy, [B, T, C, ...]. At padding it is anything."""
    return y.reshape(-1, *y.shape[3:]).at[self.place].get(mode="clip")

  def scan(self, step: Step, states: Any, inputs: Any) -> tuple[jax.Array, Any]:
    """Runs `step` on the blocks of each memory, in their order.

    Args:
      step: what a memory does with a block; see `Step`.
      states: a tree of arrays [B, N, ...], the state of each memory. A document begins with states of zeros.
      inputs: a tree of arrays [n, B, P, ...].

    Returns:
      The outputs [n, B, P, ...], and the next states.
    """
    memory, document = self.memory, self.document
    is_first = jnp.concatenate([jnp.ones_like(memory[:1], bool), memory[1:] != memory[:-1]])
    start = _Carry(jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:, 0]), states), jnp.zeros_like(memory[0]))
    start = _Carry(varying_alike(states, start.state), varying_alike(memory, start.document))
    _, (out, after) = jax.lax.scan(partial(_step, step, states), start, (memory, is_first, document, inputs))
    return out, self._last(states, after)

  def _last(self, states: Any, after: "_Carry") -> Any:
    """The state of each memory after its last token; zeros if another document has begun since.

    Args:
      states: before the call, [B, N, ...].
      after: after each block, arrays [n, B, ...].
    """
    rows, many = jnp.arange(self.memory.shape[1], dtype=jnp.int32)[None], jax.tree.leaves(states)[0].shape[1]
    is_last = jnp.concatenate([self.memory[1:] != self.memory[:-1], jnp.ones_like(self.memory[:1], bool)])
    memory = jnp.where(is_last, self.memory, many)  # out of bounds, and therefore dropped

    def put(leaf, new):
      return leaf.at[rows, memory].set(new, mode="drop")

    found = jax.tree.map(put, states, after.state)
    if self.current is None:
      return found
    document = put(jnp.zeros((*self.current.shape, many), jnp.int32), after.document)
    return _select(document == self.current[:, None], found, jax.tree.map(jnp.zeros_like, found))


class _Carry(NamedTuple):
  """The state of one memory, [B, ...], and the index of the document that it belongs to, int32 [B]."""

  state: Any
  document: jax.Array


def _step(step: Step, states: Any, carry: _Carry, block: tuple) -> tuple[_Carry, tuple[jax.Array, _Carry]]:
  """One block: from the state before it to (the state after it, (outputs [B, P, ...], the state after it)).

  Args:
    step, states: of the scan.
    carry: after the block before it.
    block: the memory and whether this is its first block, [B]; 1 + the index of each copy's document, 0 where there is none,
      [B, P]; and the inputs.
  """
  memory, is_first, document, inputs = block
  fresh = _Carry(_entries(states, memory), jnp.zeros_like(carry.document))
  state, current = select_rows(is_first, fresh, carry)
  begins = (document[:, 0] != current + 1) & (document[:, 0] != 0)
  state = select_rows(begins, jax.tree.map(jnp.zeros_like, state), state)
  out, state = step(state, memory, document, inputs)
  after = _Carry(state, jnp.maximum(current, document.max(axis=1) - 1))
  return after, (out, after)


def _entries(tree: Any, index: jax.Array) -> Any:
  """Entries `index`, int32 [B, ...], of arrays [B, N, ...], row by row."""
  return jax.tree.map(lambda leaf: jax.vmap(lambda x, i: x[i])(leaf, index), tree)


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
  """Selects from two trees of arrays [B, N, ...] by `condition` [B, N]."""
  return jax.vmap(select_rows, in_axes=1, out_axes=1)(condition, yes, no)
