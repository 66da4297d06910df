"""The selective scan in blocks of tokens, with a gradient of its own. No array has tokens, channels and states at once.

    h_t = e^{step_t a} h_{t-1} + w_t        w_t = step_t x_t b_t        y_t = sum_n c_t h_t

for every channel and every state n (indices that are written out in the code). With g_t the cotangent of y_t and l_t that of
h_t, which runs in reverse, l_t = c_t g_t + e^{step_{t+1} a} l_{t+1}, and since e^{step_t a} h_{t-1} = h_t - w_t,

    dx_t = step_t sum_n b_t l_t        dstep_t = x_t sum_n b_t l_t + sum_n a l_t (h_t - w_t)
    db_t = sum_channels step_t x_t l_t        dc_t = sum_channels g_t h_t        da = sum_t step_t l_t (h_t - w_t)

A block is n chunks of C tokens. The states that its chunks begin with follow from sums over each chunk,

    h_C = e^{a sum_j step_j} h_0 + sum_j e^{a sum_{i>j} step_i} w_j

whose exponents are sums of terms of one sign: nothing overflows or cancels. Then all chunks of a block advance at once, token
by token. The forward pass keeps the states at the starts of blocks; the backward pass computes those within a block again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..documents import Documents
from ..numerics import einsum
from ..sizes import pad_end, pieces


class Plan(NamedTuple):
  """The static arguments of the form.

  Attributes:
    chunk_size: C.
    chunks: n, the chunks of a block that advance at once.
    in_bulk: whether to compute decays and sums for all tokens of a block at once, which suits CPUs, or in every step.
  """

  chunk_size: int
  chunks: int = 1
  in_bulk: bool = True


class Tokens(NamedTuple):
  """Tokens, of one step [M, ...] or of a block [C, M, ...], where M counts chunks times rows.

  Attributes:
    x, step: [..., D].
    b, c: [..., N].
    starts: bool [...], where a document starts; `None` if none does.
  """

  x: jax.Array
  step: jax.Array
  b: jax.Array
  c: jax.Array
  starts: jax.Array | None


class Gradients(NamedTuple):
  """Cotangents of tokens. Those of b and c are [..., parts, N]: sums over the channels of each part."""

  x: jax.Array
  step: jax.Array
  b: jax.Array
  c: jax.Array


def forward(
  plan: Plan,
  docs: Documents | None,
  x: jax.Array,
  step: jax.Array,
  a: jax.Array,
  b: jax.Array,
  c: jax.Array,
  state: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
  """(y [B, T, D] in x's dtype, the final state [B, N, D]), and the states at the starts of blocks, [blocks, B, N, D].

  Args:
    plan: static arguments.
    docs: document boundaries and padding; `None` for one document without padding.
    x, step: [B, T, D]; a: [N, D]; b, c: [B, T, N]; state: [B, N, D], in the dtype of the arithmetic.
  """
  tokens = _arrange(plan, _tokens(docs, x, step, b, c, state.dtype))
  a = a.astype(state.dtype)

  def block(state, tokens):
    h = _entering(plan, a, tokens, state)
    if plan.in_bulk:
      h, states = _states(plan, a, tokens, h)
      y = _read(tokens.c, states)
    else:
      h, y = jax.lax.scan(partial(_advance_and_read, a), h, tokens)
    return _chunk(plan, h, -1), (y, state)

  state, (y, kept) = jax.lax.scan(block, state, tokens)
  y = _arrange_back(plan, y, x)
  return (at_tokens(docs, y).astype(x.dtype), state), kept


def backward(
  plan: Plan,
  docs: Documents | None,
  x: jax.Array,
  step: jax.Array,
  a: jax.Array,
  b: jax.Array,
  c: jax.Array,
  kept: jax.Array,
  dy: jax.Array,
  d_state: jax.Array,
  parts: int,
) -> tuple[jax.Array, ...]:
  """The gradients by x, step, a (for each row, [B, N, D]), b and c (for each part of the channels, [B, T, parts, N]), state."""
  dtype = d_state.dtype
  tokens = _arrange(plan, _tokens(docs, x, step, b, c, dtype))
  dy = _arrange(plan, at_tokens(docs, dy).astype(dtype))
  a = a.astype(dtype)

  def block(carry, xs):
    d_state, d_a = carry
    tokens, dy, state = xs
    _, states = _states(plan, a, tokens, _entering(plan, a, tokens, state))
    d_h = _leaving(plan, a, tokens, dy, d_state)
    carry = d_h, jnp.zeros_like(d_h)
    if plan.in_bulk:
      (d_h, d_rates), found = jax.lax.scan(_retreat, carry, _coefficients_back(a, tokens, dy, states), reverse=True)
      gradients = _gradients(parts, a, tokens, dy, states, *found)
    else:
      step = partial(_retreat_and_differentiate, parts, a)
      (d_h, d_rates), gradients = jax.lax.scan(step, carry, (tokens, dy, states), reverse=True)
    return (_chunk(plan, d_h, 0), d_a + jnp.sum(d_rates.reshape(plan.chunks, *d_a.shape), axis=0)), gradients

  (d_state, d_a), gradients = jax.lax.scan(block, (d_state, jnp.zeros_like(d_state)), (tokens, dy, kept), reverse=True)
  dx, dstep, db, dc = (at_tokens(docs, _arrange_back(plan, d, x)) for d in gradients)
  return dx.astype(x.dtype), dstep.astype(step.dtype), d_a, db, dc, d_state


# One token of every chunk.


def _advance(h, coefficients):
  """h_t from h_{t-1}, twice."""
  decay, write = coefficients
  h = decay * h + write
  return h, h


def _advance_and_read(a, h, token):
  """(h_t, y_t) from h_{t-1}."""
  h, _ = _advance(h, _coefficients(a, token))
  return h, _read(token.c, h)


def _retreat(carry, coefficients):
  """To e^{step_t a} l_t and the sum for da up to token t, from those of token t + 1; and l_t and l_t (h_t - w_t)."""
  d_h, d_a = carry
  decay, write, by_read, h, step = coefficients
  d_h = d_h + by_read
  by_decay = d_h * (h - write)
  return (decay * d_h, d_a + step[..., None, :] * by_decay), (d_h, by_decay)


def _retreat_and_differentiate(parts, a, carry, xs):
  """The same carry, and the cotangents of the token."""
  carry, found = _retreat(carry, _coefficients_back(a, *xs))
  return carry, _gradients(parts, a, *xs, *found)


# Of tokens with any axes before channels and states.


def _coefficients(a: jax.Array, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
  """e^{step a}, which is 0 where a document starts, and w, [..., N, D] each."""
  decay = jnp.exp(tokens.step[..., None, :] * jnp.expand_dims(a, range(tokens.step.ndim - 1)))
  if tokens.starts is not None:
    decay = jnp.where(tokens.starts[..., None, None], 0, decay)
  return decay, _outer(tokens.b, tokens.step * tokens.x)


def _coefficients_back(a: jax.Array, tokens: Tokens, dy: jax.Array, h: jax.Array) -> tuple[jax.Array, ...]:
  """What `_retreat` needs, for the cotangents dy [..., D] and the states h [..., N, D]."""
  return *_coefficients(a, tokens), _outer(tokens.c, dy), h, tokens.step


def _gradients(
  parts: int, a: jax.Array, tokens: Tokens, dy: jax.Array, h: jax.Array, d_h: jax.Array, by_decay: jax.Array
) -> Gradients:
  """The cotangents of tokens from dy, h_t, l_t and l_t (h_t - w_t)."""
  by_write = _read(tokens.b, d_h)
  by_steps = by_decay * jnp.expand_dims(a, range(by_decay.ndim - 2))
  d_step = tokens.x * by_write + _read(jnp.ones_like(tokens.b), by_steps)
  return Gradients(
    tokens.step * by_write,
    d_step,
    _sum_channels(parts, d_h, tokens.step * tokens.x),
    _sum_channels(parts, h, dy),
  )


def _outer(by_state: jax.Array, by_channel: jax.Array) -> jax.Array:
  """[..., N] and [..., D] to [..., N, D]."""
  return by_state[..., None] * by_channel[..., None, :]


def _read(c: jax.Array, h: jax.Array) -> jax.Array:
  """sum_n c h, for c [..., N] and h [..., N, D]; an einsum, because XLA on a CPU is slow at sums over products."""
  return einsum("...n,...nd->...d", c, h)


def _sum_channels(parts: int, h: jax.Array, y: jax.Array) -> jax.Array:
  """Sums of h y over the channels of each part, [..., parts, N], for h [..., N, D] and y [..., D]."""
  h, y = (z.reshape(*z.shape[:-1], parts, -1) for z in (h, y))
  return einsum("...npd,...pd->...pn", h, y)


# Chunks of a block.


def _entering(plan: Plan, a: jax.Array, tokens: Tokens, state: jax.Array) -> jax.Array:
  """The states that the chunks of a block begin with, [M, N, D], from that of the block, [B, N, D]."""
  if plan.chunks == 1:
    return state
  after = jnp.flip(jnp.cumsum(jnp.flip(tokens.step, 0), axis=0), 0) - tokens.step
  return _over_chunks(plan, a, tokens, after, (tokens.b, tokens.step * tokens.x), state, reverse=False)


def _leaving(plan: Plan, a: jax.Array, tokens: Tokens, dy: jax.Array, d_state: jax.Array) -> jax.Array:
  """The cotangents of the states that the chunks of a block end with, [M, N, D], from that of the block, [B, N, D]."""
  if plan.chunks == 1:
    return d_state
  return _over_chunks(plan, a, tokens, jnp.cumsum(tokens.step, axis=0), (tokens.c, dy), d_state, reverse=True)


def _over_chunks(plan, a, tokens, steps, factors, state, reverse):
  """States at one end of each chunk, from the state at that end of the block: `steps` [C, M, D] are those to the other end."""
  rates = jnp.expand_dims(a, (0, 1))
  sums = jnp.exp(steps[..., None, :] * rates) * _outer(*factors)
  keep = jnp.exp(jnp.sum(tokens.step, axis=0)[:, None] * rates[0])
  if tokens.starts is not None:
    count = jnp.cumsum(tokens.starts, axis=0, dtype=jnp.int32)
    sums = jnp.where((count == (0 if reverse else count[-1:]))[..., None, None], sums, 0)
    keep = jnp.where((count[-1] == 0)[:, None, None], keep, 0)
  own, keep = (z.reshape(plan.chunks, *state.shape) for z in (jnp.sum(sums, axis=0), keep))
  _, states = jax.lax.scan(lambda h, xs: (xs[0] * h + xs[1], h), state, (keep, own), reverse=reverse)
  return states.reshape(-1, *state.shape[1:])


def _states(plan: Plan, a: jax.Array, tokens: Tokens, h: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The states [M, N, D] after the last token of each chunk, and after every token, [C, M, N, D], from those before."""
  if plan.in_bulk:
    return jax.lax.scan(_advance, h, _coefficients(a, tokens))
  return jax.lax.scan(lambda h, token: _advance(h, _coefficients(a, token)), h, tokens)


def _chunk(plan: Plan, h: jax.Array, i: int) -> jax.Array:
  """The state of chunk i of a block, [B, N, D], of those of all its chunks, [M, N, D]."""
  return h.reshape(plan.chunks, -1, *h.shape[1:])[i]


# Between [B, T, ...] and blocks.


def _tokens(docs: Documents | None, x: jax.Array, step: jax.Array, b: jax.Array, c: jax.Array, dtype: Any) -> Tokens:
  """The arguments in `dtype`. Padding has steps of zero, which change nothing, whatever its inputs are."""
  starts = None if docs is None else docs.starts
  return Tokens(*(at_tokens(docs, z).astype(dtype) for z in (x, step, b, c)), starts)


def at_tokens(docs: Documents | None, x: jax.Array) -> jax.Array:
  """x [B, T, ...] with zeros at padding."""
  return x if docs is None else jnp.where(jnp.expand_dims(docs.is_token, range(2, x.ndim)), x, 0)


def _arrange(plan: Plan, tree: Any) -> Any:
  """Arrays [B, T, ...] to [blocks, C, n * B, ...], with padding that completes the last block."""

  def arrange(x):
    block = plan.chunks * plan.chunk_size
    blocks = pieces(x.shape[1], block)
    x = pad_end(x, blocks * block - x.shape[1])
    x = x.reshape(x.shape[0], blocks, plan.chunks, plan.chunk_size, *x.shape[2:])
    x = x.transpose(1, 3, 2, 0, *range(4, x.ndim))
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])

  return jax.tree.map(arrange, tree)


def _arrange_back(plan: Plan, blocks: jax.Array, like: jax.Array) -> jax.Array:
  """[blocks, C, n * B, ...] to [B, T, ...], as `like` [B, T, ...] is."""
  x = blocks.reshape(*blocks.shape[:2], plan.chunks, -1, *blocks.shape[3:])
  x = x.transpose(3, 0, 2, 1, *range(4, x.ndim))
  return x.reshape(like.shape[0], -1, *x.shape[4:])[:, : like.shape[1]]
