"""Routing: which few of many parts, such as experts or memories, each token is sent to, and how evenly.

    L = M sum_m f_m p_m         f_m = choices of part m / tokens          p_m = mean probability of part m

L is the loss of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961), summed over the C choices of a token as in MoM (Du
et al. 2025, arXiv:2502.13685): C if all parts are chosen equally often, more if parts that are chosen often also have large
probabilities. Means are over the real tokens of all rows and of all layers with as many parts. Only p has a gradient.

A layer that routes publishes counts for each row through the `Context` of its stack (`publish_routing`). `balance_loss` adds
them up, and `memzoo.train.step` adds the loss, times the layers' coefficient, to what is minimised.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.numerics import Dtype
from ..pallas_kernels.partition import ROWS, partitioned
from .context import Context, Notes

_NAME = "routing"


class Routing(NamedTuple):
  """What a layer that routes publishes, for each row.

  Attributes:
    choices: how often each part was chosen, [B, M].
    probabilities: the sum of the tokens' probabilities, [B, M].
    tokens: the number of tokens, [B], without padding.
    coefficient: the coefficient of the layer, [B].
  """

  choices: jax.Array
  probabilities: jax.Array
  tokens: jax.Array
  coefficient: jax.Array


def publishes_routing(rows: int, parts: int, dtype: Dtype) -> dict[str, Routing]:
  """The entry of `ContextLayer.publishes` for a layer that sends tokens to `parts` parts."""
  counts, numbers = jax.ShapeDtypeStruct((rows, parts), dtype), jax.ShapeDtypeStruct((rows,), dtype)
  return {f"{_NAME}_{parts}": Routing(counts, counts, numbers, numbers)}


def publish_routing(
  context: Context, coefficient: float, chosen: jax.Array, scores: jax.Array, segment_ids: jax.Array | None
) -> Context:
  """The context with what `balance_loss` needs of a layer: its choices, int32 [B, T, C], and positive scores [B, T, M]."""
  parts = scores.shape[-1]
  is_token = jnp.ones_like(scores[..., :1]) if segment_ids is None else (segment_ids != 0)[..., None].astype(scores.dtype)
  choices = jax.nn.one_hot(chosen, parts, dtype=scores.dtype).sum(axis=2)
  probabilities = scores / scores.sum(axis=-1, keepdims=True)
  sums = ((is_token * each).sum(axis=1) for each in (choices, probabilities))
  tokens = is_token.sum(axis=(1, 2))
  return context.publish(f"{_NAME}_{parts}", Routing(*sums, tokens, jnp.full_like(tokens, coefficient)))


def balance_loss(notes: dict[str, Notes]) -> tuple[jax.Array, jax.Array] | None:
  """The loss L of all layers that published, and L times their coefficient; `None` if there are no such layers.

  Layers with different numbers of parts have losses of their own: the first result is their mean, the second their sum.
  """
  pools = [published.values for name, published in notes.items() if name.startswith(f"{_NAME}_")]
  if not pools:
    return None
  losses = jnp.stack([_balance(pool) for pool in pools])
  coefficients = jnp.stack([pool.coefficient.mean() for pool in pools])
  return losses.mean(), (coefficients * losses).sum()


def _balance(routing: Routing) -> jax.Array:
  """L of the notes [N, B, ...] of layers with as many parts."""
  tokens = jnp.maximum(routing.tokens.sum(), 1)
  shares, probabilities = (each.sum(axis=(0, 1)) / tokens for each in routing[:2])
  return shares.size * jnp.sum(shares * probabilities)


def choose(
  scores: jax.Array, count: int, bias: jax.Array | None = None, groups: int = 1, kept_groups: int = 1
) -> tuple[jax.Array, jax.Array]:
  """The `count` parts with the largest scores [B, T, E] + bias [E], int32 [B, T, count], and their scores.

  With `groups` of equal size, the parts of a token are in some of them only: the `kept_groups` in which the sum of the two
  largest is largest. The choice has no gradient.
  """
  bias = jnp.zeros(scores.shape[-1:], scores.dtype) if bias is None else bias
  return partitioned(partial(_choose, count, groups, kept_groups), (P(ROWS), P()), P(ROWS))(scores, bias)


def _choose(count: int, groups: int, kept_groups: int, scores: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
  choice = jax.lax.stop_gradient(scores + bias[None, None])
  if kept_groups < groups:
    apart = choice.reshape(*choice.shape[:-1], groups, -1)
    of_groups = jax.lax.top_k(apart, 2)[0].sum(axis=-1)
    kept = jax.nn.one_hot(jax.lax.top_k(of_groups, kept_groups)[1], groups, dtype=bool).any(axis=-2)
    choice = jnp.where(kept[..., None], apart, -jnp.inf).reshape(choice.shape)
  chosen = jax.lax.top_k(choice, count)[1]
  return chosen, jnp.take_along_axis(scores, chosen, axis=-1)
