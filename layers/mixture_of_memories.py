"""A mixture of memories: many matrix memories, of which each token reads and writes a few.

    s = softmax(W_r x)         C = the `memories_per_token` memories with the largest s          w_m = s_m / sum_{c in C} s_c
    m in C:     S^m_t = alpha^m_t (I - beta^m_t k^m_t k^m_t^T) S^m_{t-1} + beta^m_t k^m_t v^m_t^T,      else   S^m_t = S^m_{t-1}
    o_t = (sum_{m in C} w_m S^m_t^T q^m_t + S^s_t^T q^s_t) K^{-1/2}        y = W_o (RMSNorm(o) * gate(W_g x))

Source: MoM (Du et al. 2025, arXiv:2502.13685), with the gated delta rule as the update. S^s is a shared memory, which every
token reads and writes. Each memory has its own maps to keys, values, strengths and decays. The map to queries, the short
convolutions and the decay rates A are common to all.

The paper leaves open, or its code disagrees -> we do: a convolution runs over the tokens that a memory gets, within a document;
the released code convolves tokens of several memories and samples together · no token is dropped, whatever the routing · the
step bias of the decays is each memory's own, in the code it is common · initial A as in `delta_net.py`.

The shared memory is the last of all memories, to which every token is sent with weight 1. `memzoo.pallas_kernels.routed_scan`
sorts the tokens by memory and runs the operation over those of each.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.delta_rule import gated_delta_rule
from ..pallas_kernels.grouped import grouped_matmul
from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.partition import HEADS, ROWS, partitioned
from ..pallas_kernels.routed_scan import Copies
from ..pallas_kernels.states import exportable
from .axes import named
from .context import Context, ContextLayer
from .delta_net import GatedDeltaNet
from .linear_attention import FEATURES
from .memory_layer import silence_padding
from .norms import l2_normalise
from .projections import INIT, LogDecay, ShortConv, dense, for_tokens, gate_types
from .routing import choose, publish_routing, publishes_routing

STREAMS = "query", "key", "value"


@exportable
class MemoriesState(NamedTuple):
  """State of `MixtureOfMemories`. The axis N has the memories that tokens are sent to, and then the shared one, if any.

  Attributes:
    memory: S, float32 [B, N, H, K, V], key rows and value columns.
    query_tail, key_tail, value_tail: the last conv_width - 1 inputs of the short convolutions among the tokens that each
      memory got, [B, N, conv_width - 1, channels].
  """

  memory: jax.Array
  query_tail: jax.Array
  key_tail: jax.Array
  value_tail: jax.Array


class MixtureOfMemories(ContextLayer, GatedDeltaNet, kw_only=True):
  """MoM, a mixture of memories (Du et al. 2025, arXiv:2502.13685): a router sends each token to a few of many memories.

      o_t = sum_{m in C} w_m S^m_t^T q_t + S^s_t^T q_t,        S^m changes by tokens that are sent to it only

  Attributes:
    num_memories: number of memories that tokens are sent to, M.
    memories_per_token: number of them that each token is sent to.
    shared_memory: whether there is one more memory, which all tokens read and write.
    separate_maps: whether each memory has its own maps to keys, values, strengths and decays; else there is one set for all.
    balance: coefficient of the loss that balances the memories in training, L of `routing.py`; 0 for none. It is 0.01 in the
      paper's settings.

  The other attributes are those of `GatedDeltaNet`; the router is float32.
  """

  num_memories: int = 4
  memories_per_token: int = 2
  shared_memory: bool = True
  separate_maps: bool = True
  balance: float = 0.01

  @property
  def all_memories(self) -> int:
    """The number of memories, the shared one included."""
    return self.num_memories + self.shared_memory

  @property
  def map_sets(self) -> int:
    """The number of sets of maps to keys, values, strengths and decays."""
    return self.all_memories if self.separate_maps else 1

  def initial_state(self, batch_size: int) -> MemoriesState:
    """Memories of zeros, and zeros as the earlier inputs of the convolutions."""
    one, many = super().initial_state(batch_size), self.all_memories
    return MemoriesState(*(jnp.zeros((batch_size, many, *leaf.shape[1:]), leaf.dtype) for leaf in one))

  def matrices(self, state: MemoriesState) -> dict[str, jax.Array]:
    """Returns each S under the names "memory_0", "memory_1" and so on, and that of the shared memory under "shared"."""
    names = [f"memory_{m}" for m in range(self.num_memories)] + ["shared"] * self.shared_memory
    return {name: state.memory[:, m] for m, name in enumerate(names)}

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    if self.memories_per_token > self.num_memories:
      raise ValueError(f"memories_per_token={self.memories_per_token}; expected at most num_memories={self.num_memories}.")

  @property
  def heads(self) -> dict[str, tuple[int, int]]:
    """The number and the width of the heads of queries, keys and values."""
    keys = self.key_heads, self.key_dim
    return {"query": keys, "key": keys, "value": (self.num_heads, self.value_dim)}

  def publishes(self, x: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Its routing, if `balance` is not 0."""
    return publishes_routing(x.shape[0], self.num_memories, accumulator(x)) if self.balance else {}

  @nn.compact
  def in_stack(
    self, x: jax.Array, state: MemoriesState | None, segment_ids: jax.Array | None, context: Context
  ) -> tuple[jax.Array, MemoriesState, Context]:
    """See `ContextLayer`."""
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    scores = self._scores(x)
    chosen, shares = self.route(scores)
    if self.balance:
      context = publish_routing(context, self.balance, chosen[..., : self.memories_per_token], scores, segment_ids)
    feature_map = FEATURES[self.feature_map]
    convolve = {name: self.convolution(name, nn.silu if name == "value" else feature_map) for name in STREAMS}
    gates = self.strength(x, self.map_sets).reshape(*x.shape[:2], self.num_heads, self.map_sets), self._log_decay(x)
    tokens = Tokens(x, chosen, shares, segment_ids, self._query(x), *gates)
    maps = Maps(*(self._maps(name, x.shape[-1]) for name in ("key", "value")), self._convolutions(convolve))
    options = {"chunk_size": self.chunk_size, "precision": self.precision}
    rule = partial(gated_delta_rule, implementation=for_tokens(self.implementation, x), **options)
    local = partial(_run, rule, convolve, self.implementation == "recurrent")
    run = partitioned(local, (TOKENS, MAPS, STATE), (P(ROWS, None, HEADS), STATE))
    out, after = run(tokens, maps, _map_tails(self._by_head, state))
    return silence_padding(self.read_out(x, out), segment_ids), _map_tails(_flat, after), context

  def _scores(self, x: jax.Array) -> jax.Array:
    """The router's probabilities, [B, T, M]."""
    types = gate_types(x, self.param_dtype, self.precision)
    return nn.softmax(dense(self.num_memories, ("embed", None), name="router", **types)(x))

  def route(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The memories of each token, int32 [B, T, C], and their weights; the shared memory comes last, with weight 1."""
    chosen, weights = choose(scores, self.memories_per_token)
    weights /= weights.sum(axis=-1, keepdims=True)
    if self.shared_memory:
      chosen, weights = (_appended(*each) for each in ((chosen, self.num_memories), (weights, 1)))
    return chosen, weights

  def _query(self, x: jax.Array) -> jax.Array:
    count, width = self.heads["query"]
    return self._by_head("query", dense(count * width, ("embed", "heads"), name="query", **self.types)(x))

  def _log_decay(self, x: jax.Array) -> jax.Array:
    """The log-decays by each set of maps, [B, T, H, sets]."""
    return LogDecay(self.num_heads, self.map_sets, name="decay", **self.gate_types)(x)

  def _maps(self, name: str, width: int) -> jax.Array:
    """The linear maps of all sets, [sets, width, heads, channels]."""
    shape = self.map_sets, width, math.prod(self.heads[name])
    return self._by_head(name, self.param(name, named(INIT, None, "embed", "heads"), shape, self.param_dtype))

  def _convolutions(self, convolve: dict[str, ShortConv]) -> dict[str, Any]:
    """The weight and the bias of each convolution, [W, heads, channels] and [heads, channels] or `None`."""
    weights = {name: each.weights(math.prod(self.heads[name])) for name, each in convolve.items()}
    return {name: jax.tree.map(partial(self._by_head, name), each) for name, each in weights.items()}

  def _by_head(self, name: str, x: jax.Array) -> jax.Array:
    """Channels of queries, keys or values, by head: [..., features] -> [..., heads, channels]."""
    return x.reshape(*x.shape[:-1], *self.heads[name])


class Tokens(NamedTuple):
  """What the layer computes for each token, whatever its memories are.

  Attributes:
    x: [B, T, D].
    memory: the memories of each token, int32 [B, T, C].
    weight: their weights, [B, T, C].
    segment_ids: int32 [B, T], or `None`.
    query: before the convolution, [B, T, Hk, K].
    beta, log_decay: by each set of maps, [B, T, H, sets].
  """

  x: jax.Array
  memory: jax.Array
  weight: jax.Array
  segment_ids: jax.Array | None
  query: jax.Array
  beta: jax.Array
  log_decay: jax.Array


class Maps(NamedTuple):
  """Parameters.

  Attributes:
    key, value: linear maps of each set, [sets, D, Hk, K] and [sets, D, H, V].
    convolutions: by name the weight [W, heads, channels] of a convolution, and its bias [heads, channels] or `None`.
  """

  key: jax.Array
  value: jax.Array
  convolutions: dict[str, tuple[jax.Array, jax.Array | None]]


TOKENS = Tokens(*[P(ROWS)] * 4, *[P(ROWS, None, HEADS)] * 3)
MAPS = Maps(*[P(None, None, HEADS)] * 2, dict.fromkeys(STREAMS, (P(None, HEADS), P(HEADS))))
STATE = MemoriesState(P(ROWS, None, HEADS), *[P(ROWS, None, None, HEADS)] * 3)


def _run(
  rule: Callable, convolve: dict[str, ShortConv], plain: bool, tokens: Tokens, maps: Maps, states: MemoriesState
) -> tuple[jax.Array, MemoriesState]:
  """The weighted sum of a token's reads, [B, T, H, V], and the next states, for one device's rows and heads.

  Args:
    rule: the update, called like `gated_delta_rule`.
    convolve: the convolutions.
    plain: whether JAX differentiates the scan itself.
    tokens, maps: see there.
    states: with the tails' channels by head, [B, N, W - 1, heads, channels].
  """
  copies = Copies.of(tokens.memory, tokens.segment_ids, states.memory.shape[1])
  x = copies.gather(tokens.x)
  keys, values = (_project(x, copies.blocks.memory, each) for each in (maps.key, maps.value))

  def step(convolutions, state, block, tokens, inputs):
    (query, beta, log_decay), (key, value, weight) = tokens, inputs
    streams = zip(STREAMS, (query, key, value), state[1:], strict=True)
    (q, k, v), tails = zip(*(convolved(convolutions, block.document, *each) for each in streams), strict=True)
    gates = _of_set(beta, block.memory), _of_set(log_decay, block.memory)
    options = {"initial_state": state.memory, "segment_ids": block.document}
    read, memory = rule(l2_normalise(q), l2_normalise(k), v, *gates, **options)
    return weight[..., None, None] * read.astype(weight.dtype), MemoriesState(memory, *tails)

  def convolved(convolutions, document, name, x, tail):
    weights = jax.tree.map(partial(_flat, name), convolutions[name])
    y, after = convolve[name].convolve(*weights, _flat(name, x), _flat(name, tail), document)
    return y.reshape(x.shape), after.reshape(tail.shape)

  by_token, by_copy = (tokens.query, tokens.beta, tokens.log_decay), (keys, values, copies.weigh(tokens.weight))
  y, states = copies.scan(step, maps.convolutions, states, by_token, by_copy, plain)
  return y.astype(tokens.query.dtype), states


def _project(x: jax.Array, memory: jax.Array, maps: jax.Array) -> jax.Array:
  """Blocks x [n, B, P, D] by the maps [sets, D, heads, channels] of their memories [n, B]: [n, B, P, heads, channels]."""
  sets = memory.reshape(-1) if len(maps) > 1 else jnp.zeros_like(memory.reshape(-1))
  y = grouped_matmul(x.reshape(-1, *x.shape[2:]), maps.reshape(*maps.shape[:2], -1), sets)
  return y.reshape(*x.shape[:3], *maps.shape[2:])


def _of_set(gate: jax.Array, memory: jax.Array) -> jax.Array:
  """A gate [B, P, H, sets] by the maps of each row's memory [B]: [B, P, H]."""
  return gate[..., 0] if gate.shape[-1] == 1 else jax.vmap(lambda g, m: g[..., m])(gate, memory)


def _map_tails(function: Callable[[str, jax.Array], jax.Array], state: MemoriesState) -> MemoriesState:
  return MemoriesState(state[0], *map(function, STREAMS, state[1:]))


def _flat(_: str, x: jax.Array) -> jax.Array:
  """The inverse of `_by_head`."""
  return x.reshape(*x.shape[:-2], -1)


def _appended(x: jax.Array, last: int) -> jax.Array:
  """x [..., C] with one more entry `last`."""
  return jnp.concatenate([x, jnp.full_like(x[..., :1], last)], axis=-1)
