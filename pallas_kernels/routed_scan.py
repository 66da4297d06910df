"""Several memories, each of which gets some of the tokens: a scan over the tokens, sorted by memory.

    state_m  <-  step(state_m, the tokens sent to memory m, in their order)        for each memory m
    y_t  =  the sum of what the memories that token t is sent to return for it

A token is copied for each memory that it is sent to. The copies of each row are sorted by memory into blocks of one memory
(`memzoo.pallas_kernels.grouped`), and a scan takes one block of each row at a time. So no token is dropped, shapes do not
depend on the routing, and the cost is that of one memory for each copy, and of less than one block more for each memory.

    copies = Copies.of(route, segment_ids, memories)
    y, states = copies.scan(step, parameters, states, x, copies.weigh(weights))

Each step of the scan reads the tokens of its block where they are and adds to y, so that no array of all copies is written.
JAX's derivative of such a loop would add whole arrays in each step; the one written here adds to the tokens of a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .derivatives import reverse_only
from .documents import documents, select_rows, undivided
from .grouped import blocks_of
from .numerics import accumulator
from .partition import varying_alike

_LARGEST = 128  # copies in a block: several chunks of an operation, and few empty places

# step(parameters, state [B, ...], block, tokens [B, P, ...], inputs [B, P, ...]) -> what each copy adds to y, [B, P, ...], and
# the next state. It obeys the laws of a layer, and closes over no arrays.
Step = Callable[[Any, Any, "Block", Any, Any], tuple[jax.Array, Any]]


class Block(NamedTuple):
  """P copies of each row, all for one memory.

  Attributes:
    memory: int32 [B].
    document: 1 + the index of each copy's document, 0 where there is no copy, int32 [B, P]: the segment ids of the block.
    token: the number of each copy's token, among those of all rows, int32 [B, P]; beyond all of them, and all different, where
      there is no copy.
  """

  memory: jax.Array
  document: jax.Array
  token: jax.Array


class Copies(NamedTuple):
  """Copies of tokens in n blocks of P copies for each of B rows, on one device.

  Attributes:
    blocks: arrays [n, B, ...].
    number: of each copy, among those of all rows, int32 [n, B, P]; beyond all of them where there is no copy.
    current: the index of the last document of each row, int32 [B]; `None` for one document.
  """

  blocks: Block
  number: jax.Array
  current: jax.Array | None

  @classmethod
  def of(cls, route: jax.Array, segment_ids: jax.Array | None, memories: int) -> "Copies":
    """Copies of T tokens for their memories `route`, int32 [B, T, C], without repetition, each below `memories`."""
    rows, tokens, copies = route.shape
    docs = undivided(rows, tokens) if segment_ids is None else documents(segment_ids)
    memory = jnp.where(docs.is_token[..., None], route, memories).reshape(rows, -1)
    blocks = jax.vmap(partial(blocks_of, groups=memories, largest=_LARGEST))(memory)
    is_copy = blocks.row < tokens * copies
    row = jnp.arange(rows, dtype=jnp.int32)[:, None, None]
    empty = jnp.arange(is_copy.size, dtype=jnp.int32).reshape(is_copy.shape)
    token = jnp.where(is_copy, row * tokens + blocks.row // copies, rows * tokens + empty)
    number = jnp.where(is_copy, row * tokens * copies + blocks.row, rows * tokens * copies)
    document = jnp.take_along_axis(docs.index[:, None], jnp.minimum(blocks.row // copies, tokens - 1), axis=2) + 1
    document = jnp.where(is_copy, document, 0)
    *block, number = (jnp.swapaxes(x, 0, 1) for x in (blocks.group, document, token, number))
    return cls(Block(*block), number, None if segment_ids is None else docs.index[:, -1])

  def gather(self, x: jax.Array) -> jax.Array:
    """x [B, T, ...] by block, [n, B, P, ...]. In places without a copy it is anything finite."""
    return _take(_all_rows(x), self.blocks.token)

  def weigh(self, weights: jax.Array) -> jax.Array:
    """Numbers [B, T, C] of all copies by block, [n, B, P]; 0 where there is no copy."""
    return weights.reshape(-1).at[self.number].get(mode="fill", fill_value=0)

  def scan(
    self, step: Step, parameters: Any, states: Any, tokens: Any, inputs: Any, plain: bool = False
  ) -> tuple[jax.Array, Any]:
    """Runs `step` on the blocks of each memory, in their order.

    Args:
      step: what a memory does with a block; see `Step`.
      parameters: a tree of floats.
      states: a tree of floats [B, N, ...], the state of each memory. A document begins with states of zeros.
      tokens: a tree of floats [B, T, ...].
      inputs: a tree of floats [n, B, P, ...], by block.
      plain: whether JAX differentiates the loop itself, slowly, and also in forward mode.

    Returns:
      y [B, T, ...], zeros at padding, and the next states.
    """
    rows, length = jax.tree.leaves(tokens)[0].shape[:2]
    run = _run if plain else _differentiable
    tokens = jax.tree.map(_all_rows, tokens)
    operands = parameters, states, tokens, inputs
    y, states, document = run(step, self.blocks, *(operands if plain else reverse_only(operands)))
    if self.current is not None:  # a memory may have got its last token before the document that is current began
      states = _select(document == self.current[:, None], states, jax.tree.map(jnp.zeros_like, states))
    return y.reshape(rows, length, *y.shape[1:]), states


class _Carry(NamedTuple):
  """Of the loop.

  Attributes:
    states: a tree [B, N, ...].
    document: the index of the document that each state belongs to, int32 [B, N].
    y: [B T, ...], in float32 or wider.
  """

  states: Any
  document: jax.Array
  y: jax.Array


class _Before(NamedTuple):
  """What a block starts from: the state of its memory, [B, ...], zeros where `begins`, [B], a document."""

  state: Any
  begins: jax.Array


def _run(step: Step, blocks: Block, *operands: Any) -> tuple[jax.Array, Any, jax.Array]:
  """The loop, with operands as for `Copies.scan`, but tokens [B T, ...]. Returns y, the states and their documents."""
  return _loop(step, blocks, *operands)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(step: Step, blocks: Block, *operands: Any) -> tuple[jax.Array, Any, jax.Array]:
  return _run(step, blocks, *operands)


def _forward(step: Step, blocks: Block, *operands: Any) -> tuple[tuple, tuple]:
  results, before = _loop(step, blocks, *operands, keep=True)
  return results, (blocks, operands, before)


def _backward(step: Step, residuals: tuple, cotangents: tuple) -> tuple:
  """The loop backwards: each block is computed again from what it started from."""
  blocks, (parameters, states, tokens, inputs), before = residuals
  dy, dstates, _ = cotangents

  def retreat(carry, each):
    dparameters, dstates, dtokens = carry
    block, (state, begins), inputs = each

    def of_block(parameters, state, tokens, inputs):
      return step(parameters, state, block, tokens, inputs)

    (added, _), pullback = jax.vjp(of_block, parameters, state, _take(tokens, block.token), inputs)
    dadded = dy.at[block.token].get(mode="fill", fill_value=0).astype(added.dtype)
    dmore, dstate, dtoken, dinputs = pullback((dadded, _entries(dstates, block.memory)))
    dparameters = jax.tree.map(lambda total, d: total + d.astype(total.dtype), dparameters, dmore)
    dstate = select_rows(begins, jax.tree.map(jnp.zeros_like, dstate), dstate)
    return (dparameters, _put(dstates, block.memory, dstate), _add(dtokens, block.token, dtoken)), dinputs

  zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, accumulator(x)))
  start = varying_alike(residuals, (zeros(parameters), dstates, zeros(tokens)))
  sums, dinputs = jax.lax.scan(retreat, start, (blocks, before, inputs), reverse=True)
  dparameters, dstates, dtokens = (
    jax.tree.map(lambda d, x: d.astype(x.dtype), *pair) for pair in zip(sums, (parameters, states, tokens), strict=True)
  )
  return None, dparameters, dstates, dtokens, dinputs


_differentiable.defvjp(_forward, _backward)


def _loop(
  step: Step, blocks: Block, parameters: Any, states: Any, tokens: Any, inputs: Any, keep: bool = False
) -> tuple[tuple[jax.Array, Any, jax.Array], _Before | None]:
  """The results of `_run`, and, if `keep`, what each block started from, arrays [n, B, ...]."""

  def advance(carry, each):
    block, inputs = each
    state, document = _entries((carry.states, carry.document), block.memory)
    begins = (block.document[:, 0] != document + 1) & (block.document[:, 0] != 0)
    state = select_rows(begins, jax.tree.map(jnp.zeros_like, state), state)
    added, after = step(parameters, state, block, _take(tokens, block.token), inputs)
    document = jnp.maximum(document, block.document.max(axis=1) - 1)
    states, document = _put((carry.states, carry.document), block.memory, (after, document))
    return _Carry(states, document, _add(carry.y, block.token, added)), _Before(state, begins) if keep else None

  def first():
    block, own = jax.tree.map(lambda x: x[0], (blocks, inputs))
    return step(parameters, _entries(states, block.memory), block, _take(tokens, block.token), own)[0]

  added, count = jax.eval_shape(first), jax.tree.leaves(tokens)[0].shape[0]
  y = jnp.zeros((count, *added.shape[2:]), accumulator(added))
  document = jnp.zeros(jax.tree.leaves(states)[0].shape[:2], jnp.int32)
  start = _Carry(states, varying_alike(blocks, document), varying_alike((parameters, states, tokens, inputs), y))
  carry, before = jax.lax.scan(advance, start, (blocks, inputs))
  return (carry.y.astype(added.dtype), carry.states, carry.document), before


def _all_rows(x: jax.Array) -> jax.Array:
  return x.reshape(-1, *x.shape[2:])


def _take(tree: Any, token: jax.Array) -> Any:
  """Of arrays [B T, ...] those of the tokens `token`, int32 [...]; those of the last token for numbers beyond."""
  return jax.tree.map(lambda x: x.at[token].get(mode="clip"), tree)


def _add(tree: Any, token: jax.Array, added: Any) -> Any:
  """Arrays [B T, ...] with more [B, P, ...] added at the tokens [B, P], which are different; none for numbers beyond."""
  return jax.tree.map(lambda x, d: x.at[token].add(d.astype(x.dtype), mode="drop", unique_indices=True), tree, added)


def _entries(tree: Any, index: jax.Array) -> Any:
  """Entries `index`, int32 [B], of arrays [B, N, ...], row by row."""
  return jax.tree.map(lambda leaf: jax.vmap(lambda x, i: x[i])(leaf, index), tree)


def _put(tree: Any, index: jax.Array, entries: Any) -> Any:
  """Arrays [B, N, ...] with others [B, ...] as entries `index`, int32 [B], row by row."""
  return jax.tree.map(lambda leaf, new: jax.vmap(lambda x, i, y: x.at[i].set(y))(leaf, index, new), tree, entries)


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
  """Selects from two trees of arrays [B, N, ...] by `condition` [B, N]."""
  return jax.vmap(select_rows, in_axes=1, out_axes=1)(condition, yes, no)
