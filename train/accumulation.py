"""Several batches as one: their gradients are summed, and divided once by the sum of their weights.

    g = sum_i w_i g_i / sum_i w_i

`g_i` is the gradient of the mean loss of batch `i`, and `w_i` the sum of the weights of its targets. So `g` is the gradient of
one batch that holds them all, also if they have different numbers of targets.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..pallas_kernels.numerics import accumulator


class Accumulation(NamedTuple):
  """The state of `accumulate`.

  Attributes:
    batches: int32; batches in `gradients`.
    updates: int32; updates made.
    weight: `sum_i w_i` of these batches, in float64 if a parameter is, else in float32.
    nats: their summed loss, in the same dtype.
    gradients: `sum_i w_i g_i`, each leaf in float64 if its parameter is, else in float32.
    loss: the mean loss of the batches of the last update.
    inner: the state of the inner transform.
  """

  batches: jax.Array
  updates: jax.Array
  weight: jax.Array
  nats: jax.Array
  gradients: Any
  loss: jax.Array
  inner: Any


def accumulate(transform: optax.GradientTransformation, count: int) -> optax.GradientTransformationExtraArgs:
  """Passes to `transform` the gradient over `count` batches; in between the updates are zero.

  `update` takes further arguments, all optional: `weight` and `loss` of the batch; `finite`, or the batch is left out and not
  counted; and `last`, to make an update of the batches that are there.
  """

  def init(params: Any) -> Accumulation:
    zero, number = jnp.zeros((), jnp.int32), jnp.zeros((), accumulator(*jax.tree.leaves(params)))
    gradients = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), accumulator(leaf)), params)
    return Accumulation(zero, zero, number, number, gradients, number, transform.init(params))

  def update(gradients, state, params=None, *, weight=1.0, loss=0.0, finite=True, last=False):
    def add(total, value):
      return jnp.where(finite, total + jnp.asarray(weight, total.dtype) * jnp.asarray(value, total.dtype), total)

    sums, nats, weights = jax.tree.map(add, state.gradients, gradients), add(state.nats, loss), add(state.weight, 1.0)
    batches = state.batches + jnp.asarray(finite, jnp.int32)
    divisor = jnp.where(weights > 0, weights, 1)
    mean = jax.tree.map(lambda total, leaf: (total / divisor.astype(total.dtype)).astype(leaf.dtype), sums, gradients)
    updates, inner = transform.update(mean, state.inner, params)
    complete = (batches == count) | (jnp.asarray(last) & (batches > 0))
    made = Accumulation(jnp.zeros_like(batches), state.updates + 1, *_zeros((weights, nats, sums)), nats / divisor, inner)
    waiting = Accumulation(batches, state.updates, weights, nats, sums, state.loss, state.inner)
    return _choose(complete, (updates, made), (_zeros(updates), waiting))

  return optax.GradientTransformationExtraArgs(init, update)


def _zeros(tree: Any) -> Any:
  return jax.tree.map(jnp.zeros_like, tree)


def _choose(condition: jax.Array, one: Any, other: Any) -> Any:
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)
