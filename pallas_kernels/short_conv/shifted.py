"""The short convolution as a weighted sum of W copies of its input, each shifted by one token more.

    y_t = sum_j w_{W-1-j} x_{t-j},      dx_s = sum_j w_{W-1-j} dy_{s+j},      dw_{W-1-j} = sum_s x_s dy_{s+j}

Tokens that padding separates from their predecessors are not in neighbouring columns. Packed rows are therefore gathered; on a
TPU, where gathers are slow, only if there are such tokens. The first W - 1 tokens also see the incoming state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..derivatives import reverse_only
from ..documents import documents, positions
from ..numerics import accumulator, einsum
from ..partition import aligned, partitioned, with_gradient
from ..sizes import as_array, known
from .recurrent import INPUTS, OF_ROWS, TOKENS


def shifted(
  x: jax.Array, weight: jax.Array, initial_state: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """The same function as `recurrent`, with `segment_ids` in place of the documents."""
  inputs = aligned((x, weight, initial_state, segment_ids), INPUTS)
  x, _, initial_state, segment_ids = inputs
  tail = partitioned(_tail, (TOKENS, TOKENS, OF_ROWS), TOKENS)(x, initial_state, segment_ids)
  return _convolve(None, *reverse_only(inputs)), tail


def _convolved(_, *inputs):
  return partitioned(_forward, INPUTS, TOKENS, differentiable=False)(*inputs)


def _convolve_forward(_, *inputs):
  return _convolved(_, *inputs), inputs


def _convolve_backward(_, inputs, dy):
  gradients = partitioned(_backward, (*INPUTS, TOKENS), (TOKENS, TOKENS, TOKENS), differentiable=False)
  dx, dweight, dstate = gradients(*inputs, dy)
  return dx, jnp.sum(dweight, axis=0).astype(inputs[1].dtype), dstate, None


_convolve = with_gradient(_convolved, _convolve_forward, _convolve_backward)


class _Places(NamedTuple):
  """Which tokens see which.

  Attributes:
    reach: int32 [B, T], the number of tokens before each token that it may see, the state's included; -1 at padding.
    rank: int32 [B, T], the number of tokens in the columns before each token; T at padding.
    count: int32 [B, T], the number of tokens up to each column.
  """

  reach: jax.Array
  rank: jax.Array
  count: jax.Array


def _places(segment_ids: jax.Array, width: int) -> _Places:
  docs = documents(segment_ids)
  of_state = jnp.full(segment_ids.shape[:1], width - 1, jnp.int32)
  reach = jnp.where(docs.is_token, positions(docs, of_state), -1)
  count = jnp.cumsum(docs.is_token, axis=1, dtype=jnp.int32)
  return _Places(reach, jnp.where(docs.is_token, count - 1, as_array(reach.shape[1])), count)


def _forward(x, weight, state, segment_ids):
  if segment_ids is None:
    return _forward_by_shifts(None, x, weight, state)
  return _on_columns(_forward_by_shifts, _forward_by_gathers, _places(segment_ids, weight.shape[0]), x, weight, state)


def _backward(x, weight, state, segment_ids, dy):
  """The gradients by x, by the weight for each row, [B, W, D], and by the state."""
  if segment_ids is None:
    return _backward_by_shifts(None, x, weight, state, dy)
  places = _places(segment_ids, weight.shape[0])
  return _on_columns(_backward_by_shifts, _backward_by_gathers, places, x, weight, state, dy)


def _on_columns(by_shifts: Callable, by_gathers: Callable, places: _Places, *arrays: jax.Array):
  """Gathers; on a TPU it shifts if all predecessors of tokens are in neighbouring columns."""

  def on_tpu(places, *arrays):
    apart = (places.reach[:, 1:] > 0) & (places.reach[:, :-1] < 0)
    return jax.lax.cond(_any(apart), by_gathers, by_shifts, places, *arrays)

  return jax.lax.platform_dependent(places, *arrays, tpu=on_tpu, default=by_gathers)


@jax.custom_batching.custom_vmap
def _any(condition: jax.Array) -> jax.Array:
  """`jnp.any`, also over axes that `jax.vmap` maps: a branch on the result stays a branch."""
  return jnp.any(condition)


@_any.def_vmap
def _(size, is_mapped, condition):
  return _any(condition), False


def _forward_by_shifts(places, x, weight, state):
  width = weight.shape[0]
  taps = [_where_seen(places, j, _later(x, j)) for j in range(width)]
  head = x[:, : state.shape[1]]
  window = jnp.concatenate([state, head], axis=1)
  near = [_where_seen(places, j, window[:, width - 1 - j :][:, : head.shape[1]]) for j in range(width)]
  return jax.lax.dynamic_update_slice_in_dim(_weighted_sum(taps, weight), _weighted_sum(near, weight), 0, axis=1)


def _forward_by_gathers(places, x, weight, state):
  kept = state.shape[1]
  of_state = jnp.broadcast_to(jnp.arange(kept, dtype=jnp.int32)[None], state.shape[:2])
  inputs, columns = (jnp.concatenate(pair, axis=1) for pair in ((state, x), (of_state, _order(places) + kept)))
  taps = [x, *(_take(inputs, _take(columns, places.rank + (kept - j))) for j in range(1, kept + 1))]
  return _weighted_sum([_where_seen(places, j, tap) for j, tap in enumerate(taps)], weight)


def _backward_by_shifts(places, x, weight, state, dy):
  width = weight.shape[0]
  after = [_where_seen(_earlier(places, j, width), j, _earlier(dy, j, width)) for j in range(width)]
  return _gradients(x, weight, state, after, [_where_seen(places, j, dy[:, : width - 1]) for j in range(width)])


def _backward_by_gathers(places, x, weight, state, dy):
  width, order = weight.shape[0], _order(places)
  tokens = as_array(x.shape[1])
  seen = [_where_seen(places, j, dy) for j in range(width)]
  after = [_take(d, _take(order, places.rank + j)) for j, d in enumerate(seen)]
  after = [seen[0], *(jnp.where((places.rank < tokens - j)[..., None], after[j], 0) for j in range(1, width))]
  return _gradients(x, weight, state, after, [_take(d, order[:, : width - 1]) for d in seen])


def _gradients(x, weight, state, after, first):
  """The results of `_backward`.

  Args:
    x, weight, state: of the call.
    after: for each j the cotangent at the j-th token after each token, where that sees it, else 0; [B, T, D].
    first: for each j the cotangents of the first W - 1 tokens that see a j-th token before them, else 0; [B, <W, D].
  """
  width, count = weight.shape[0], first[0].shape[1]
  after_state = [jax.lax.pad(d, jnp.zeros((), d.dtype), _along_tokens(width - 1 - j, j - count)) for j, d in enumerate(first)]
  by_rows = [einsum("btd,btd->bd", x, d) + einsum("btd,btd->bd", state, e) for d, e in zip(after, after_state, strict=True)]
  return _weighted_sum(after, weight), jnp.stack(by_rows[::-1], axis=1), _weighted_sum(after_state, weight)


def _tail(x, state, segment_ids):
  """The last W - 1 inputs of the last document."""
  tokens, kept = x.shape[1], state.shape[1]
  x = jax.lax.optimization_barrier(x)  # otherwise XLA copies all of x on a TPU, into the layout that suits its last tokens
  if segment_ids is None or not kept:
    if not known(tokens):
      return jnp.concatenate([state, x], axis=1)[:, tokens:]
    return jnp.concatenate([state[:, tokens:], x[:, max(tokens - kept, 0) :]], axis=1)
  places = _places(segment_ids, kept + 1)
  last = places.count[:, -1:] - 1
  rank = last + jnp.arange(1 - kept, 1, dtype=jnp.int32)[None]
  column = jnp.sum(places.count[:, None] <= rank[..., None], axis=-1, dtype=jnp.int32)
  inputs = jnp.where((rank < 0)[..., None], _take(state, jnp.clip(rank + kept, 0, kept - 1)), _take(x, column))
  reach = jnp.where(last < 0, kept, _take(places.reach, column[:, -1:]))
  return jnp.where((last - rank <= reach)[..., None], inputs, 0)


def _weighted_sum(taps: list[jax.Array], weight: jax.Array) -> jax.Array:
  """The sum of taps [B, T, D], the j-th times the j-th last row of the weight; rounded once."""
  wide = accumulator(taps[0])
  products = (tap.astype(wide) * w.astype(wide)[None, None] for tap, w in zip(taps, weight[::-1], strict=True))
  return sum(products).astype(taps[0].dtype)


def _where_seen(places: _Places | None, j: int, x: jax.Array) -> jax.Array:
  """x [B, <=T, D] at tokens that see a j-th token before them, else 0. Without `places` all do."""
  return x if places is None else jnp.where((places.reach[:, : x.shape[1]] >= j)[..., None], x, 0)


def _order(places: _Places) -> jax.Array:
  """The column of each row's k-th token, int32 [B, T]; columns of padding come last."""
  return jnp.argsort(places.reach < 0, axis=1, stable=True).astype(jnp.int32)


def _later(x: jax.Array, j: int) -> jax.Array:
  """x [B, T, D] moved by j tokens, with zeros before."""
  return jax.lax.pad(x, jnp.zeros((), x.dtype), _along_tokens(j, -j))


def _earlier(tree: Any, j: int, width: int) -> Any:
  """Arrays [B, T, ...] moved by -j tokens, -width < -j, with -1 behind integers and zeros behind other arrays."""

  def move(x):
    behind = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    padded = jnp.pad(x, [(0, 0), (0, width - 1), *[(0, 0)] * (x.ndim - 2)], constant_values=behind)
    return padded[:, j : j + x.shape[1]]

  return jax.tree.map(move, tree)


def _along_tokens(low: int, high: int) -> list[tuple[int, int, int]]:
  return [(0, 0, 0), (low, high, 0), (0, 0, 0)]


def _take(x: jax.Array, columns: jax.Array) -> jax.Array:
  """Gathers, row by row, `columns` [B, M] from x [B, T], where they may lie beyond T, or from x [B, T, D]."""
  columns, mode = (columns, "clip") if x.ndim == 2 else (columns[..., None], "promise_in_bounds")
  return jnp.take_along_axis(x, columns, axis=1, mode=mode)
