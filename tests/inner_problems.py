"""Specs of memories that learn at test time, arguments like those of the layers, and the comparison with the oracle.

Arguments and states are made in NumPy, and calls are compiled whole, because nearly all time is spent on compiling programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from memzoo.pallas_kernels import test_time_memory as ttm
from memzoo.pallas_kernels.test_time_memory import Gates, InitialWeights, Loss, Memory, Retention, Spec
from tolerances import assert_close

HEADS, WIDTH, BATCH = 2, 3, 2
MEMORIES = {
  "linear": Memory(WIDTH, WIDTH, depth=1, residual=False),
  "mlp": Memory(WIDTH, WIDTH, depth=2, expansion=2),
  "deep": Memory(WIDTH, WIDTH, depth=4, expansion=2, activation="silu"),
  "norm": Memory(WIDTH, WIDTH, depth=2, expansion=2, norm=True, biases=True),
  "swiglu": Memory(WIDTH, WIDTH, expansion=2, gated=True, residual=False),
}
OPTIMISERS = {"gradient": (False, False), "decay": (True, False), "momentum": (True, True)}
READS = ("after", "before", "chunk_start")
CHOICES = {
  "average": Spec(MEMORIES["norm"], Loss(scale=0.5), chunk_size=4, average=True),
  "average, read before": Spec(MEMORIES["linear"], Loss(scale=0.5), chunk_size=4, average=True, read="before"),
  "token anchor": Spec(MEMORIES["linear"], chunk_size=4, momentum=True, anchor="token"),
  "token anchor, residual, decay first": Spec(
    Memory(WIDTH, WIDTH, depth=1), chunk_size=4, momentum=True, anchor="token", order="decay_first", read="before"
  ),
  "dot": Spec(MEMORIES["swiglu"], Loss("dot"), chunk_size=4, momentum=True),
  "power, norm": Spec(MEMORIES["norm"], Loss("power", power=3), Retention("norm", norm=4), chunk_size=4),
  "huber": Spec(MEMORIES["mlp"], Loss("huber"), chunk_size=4),
  "huber_norm": Spec(MEMORIES["mlp"], Loss("huber_norm"), chunk_size=4),
  "mixture": Spec(MEMORIES["norm"], Loss("mixture"), chunk_size=4),
  "simplex": Spec(MEMORIES["norm"], retention=Retention("simplex"), chunk_size=4, read="chunk_start"),
  "clipped": Spec(MEMORIES["mlp"], chunk_size=4, momentum=True, clip=0.05),
  "decay to zero": Spec(MEMORIES["norm"], Loss("power", power=3), Retention("norm", norm=4), chunk_size=4, decay_to="zero"),
  "token anchor, decay to zero": Spec(MEMORIES["linear"], chunk_size=4, momentum=True, anchor="token", decay_to="zero"),
}  # fmt: skip


def problem(spec, tokens=17, seed=0, dtype=jnp.float64, decay=True):
  """(initial, q, k, v, gates) as the layers make them: unit keys, small steps."""
  rng = np.random.default_rng(seed)

  def array(x):
    return jnp.asarray(x, dtype)

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  shapes = spec.memory.shapes()
  weights = {name: 0.5 * rng.normal(size=(HEADS, *shape)) for name, shape in shapes.items()}
  gates = [1 / (1 + np.exp(-rng.normal(size=(BATCH, tokens, HEADS)))) for _ in range(4)]
  gates = Gates(
    0.2 * gates[0],
    np.log(gates[1]) / 4 if decay else None,
    np.log(gates[2]) if spec.momentum else None,
    gates[3] if spec.loss.has_threshold else None,
  )
  initial = InitialWeights(
    weights,
    {name: 0.1 * rng.normal(size=w.shape) for name, w in weights.items()} if spec.momentum else None,
    (1 + 0.1 * rng.normal(size=(HEADS, WIDTH)), 0.1 * rng.normal(size=(HEADS, WIDTH))) if spec.memory.norm else None,
    0.1 * rng.normal(size=(HEADS, spec.chunk_size)) if spec.average else None,
  )
  q, k, v = (rng.normal(size=(BATCH, tokens, HEADS, WIDTH)) for _ in range(3))
  return jax.tree.map(array, (initial, unit(q), unit(k), v, gates))


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def run(spec, args, state=None, ids=None, implementation="xla"):
  initial, q, k, v, gates = args
  options = {"initial_state": state, "segment_ids": ids, "implementation": implementation}
  return ttm.run(spec, initial, q, k, v, gates, **options)


def used(spec, dtype=jnp.float64, seed=9):
  """A state in the middle of a chunk, at another token in each row."""
  rng = np.random.default_rng(seed)
  fresh = jax.eval_shape(lambda: ttm.start(spec, BATCH, HEADS, dtype))
  state = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), fresh._replace(count=None))
  count = np.arange(BATCH) % max(1, spec.chunk_size - 1) + (spec.chunk_size > 1)
  return state._replace(count=jnp.asarray(count, jnp.int32))


def values_and_gradients(spec, args, state, ids, implementation):
  """The result, and the gradients of a weighted sum of all its parts with respect to every input."""

  def scalar(args, floats):
    result = run(spec, args, None if state is None else state._replace(**floats), ids, implementation)
    leaves = [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]
    weights = (jnp.asarray(np.random.default_rng(i).normal(size=x.shape), x.dtype) for i, x in enumerate(leaves))
    return sum(jnp.vdot(x, w) for x, w in zip(leaves, weights, strict=True)), result

  floats = {} if state is None else {name: getattr(state, name) for name in ("weights", "momentum", "anchor")}
  (_, result), gradient = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(args, floats)
  return result, gradient


def assert_equal(spec, args, state=None, ids=None):
  (actual, by_actual), (expected, by_expected) = (
    values_and_gradients(spec, args, state, ids, name) for name in ("xla", "recurrent")
  )
  assert_close(actual, expected, args[1].dtype)
  assert_close(by_actual, by_expected, args[1].dtype, gradients=True)
