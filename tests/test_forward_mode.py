"""Forward-mode derivatives: the recurrent forms have them, and the fast forms say so."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import Variant
from memzoo.layers.law_trial import Trial
from memzoo.layers.swiglu import gated
from memzoo.layers.tolerances import tolerance
from memzoo.pallas_kernels import delta_rule
from memzoo.pallas_kernels.short_conv import short_conv
from memzoo.pallas_kernels.test_time_memory import Gates, InitialWeights, Memory, Spec
from memzoo.pallas_kernels.test_time_memory import run as run_memory
from subjects import WIDTH, module
from tolerances import assert_close

pytestmark = [pytest.mark.xdist_group("forward_mode"), pytest.mark.usefixtures("float64")]

RNG = np.random.default_rng(0)
X, WEIGHT = RNG.normal(size=(2, 5, 3)), RNG.normal(size=(3, 3))
IDS = np.array([[1, 1, 2, 2, 0], [3, 0, 3, 3, 3]], np.int32)


def conv(x, weight=WEIGHT, implementation="recurrent"):
  return short_conv(x, jnp.asarray(weight), segment_ids=IDS, implementation=implementation)


def normal_like(tree, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def dot(a, b):
  return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def assert_forward_equals_reverse(forward, reverse, args):
  """u . (J v) of `forward` by forward mode equals (J^T u) . v of `reverse` by reverse mode, for random u and v."""

  @jax.jit
  def both(args, v):
    out, pushed = jax.jvp(forward, (args,), (v,))
    u = normal_like(out, seed=2)
    (pulled,) = jax.vjp(reverse, args)[1](u)
    return dot(u, pushed), dot(pulled, v)

  by_forward, by_reverse = both(args, normal_like(args))
  np.testing.assert_allclose(by_forward, by_reverse, rtol=tolerance(jnp.float64, gradients=True))


@pytest.mark.slow
def test_forward_mode_of_the_delta_rules_equals_reverse_mode_of_the_fast_form():
  variant = Variant(delta_rule.erase_then_delta_rule, "channel")
  args = variant.inputs(5)

  def run(implementation, args):
    return variant.function(**args, implementation=implementation)

  assert_forward_equals_reverse(functools.partial(run, "recurrent"), functools.partial(run, "xla"), args)


def test_forward_mode_of_the_convolution_equals_reverse_mode_of_the_fast_form():
  args = {"x": jnp.asarray(X), "weight": jnp.asarray(WEIGHT)}
  assert_forward_equals_reverse(lambda args: conv(**args), lambda args: conv(**args, implementation="auto"), args)


def _delta(x):
  return delta_rule.linear_attention(x[:, :, None], x[:, :, None], x[:, :, None])[0]


def _memory(x, implementation="auto"):
  gates = Gates(jnp.full((*x.shape[:2], 1), 0.1, x.dtype))
  initial = InitialWeights({"0": jnp.ones((1, 3, 12), x.dtype), "1": jnp.ones((1, 12, 3), x.dtype)})
  return run_memory(Spec(Memory(3, 3), chunk_size=4), initial, *[x[:, :, None]] * 3, gates, implementation=implementation).y


@pytest.mark.slow
def test_forward_mode_of_a_test_time_memory_equals_reverse_mode_of_the_fast_form():
  assert_forward_equals_reverse(functools.partial(_memory, implementation="recurrent"), _memory, jnp.asarray(X))


def half_squares(x):
  y, state = conv(x)
  return 0.5 * jnp.sum(y**4) + jnp.sum(state**2)


def test_second_derivatives_of_all_orders_agree():
  x, v = jnp.asarray(X), normal_like(X)

  @jax.jit
  def products(x, v):
    gradient = jax.grad(half_squares)
    forward_over_reverse = jax.jvp(gradient, (x,), (v,))[1]
    reverse_over_reverse = jax.grad(lambda x: dot(gradient(x), v))(x)
    reverse_over_forward = jax.grad(lambda x: jax.jvp(half_squares, (x,), (v,))[1])(x)
    by_hessian = jnp.tensordot(jax.hessian(half_squares)(x), v, axes=3)
    step = 1e-5
    by_difference = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    return by_difference, [forward_over_reverse, reverse_over_reverse, reverse_over_forward, by_hessian]

  by_difference, found = products(x, v)
  for product in found:
    np.testing.assert_allclose(product, found[0], rtol=tolerance(jnp.float64, gradients=True))
    assert_close({"product": product}, {"product": by_difference}, jnp.float32, gradients=True)


FEW = "DeltaProduct", "KimiDeltaAttention", "GatedConv", "TitansMemory", "Memora", "Attention", "LanguageModel"


@pytest.mark.parametrize("name", FEW)
def test_no_part_of_a_recurrent_layer_lacks_forward_mode(name):
  trial = Trial(module(name, WIDTH, implementation="recurrent"), WIDTH, float64=True)
  x = trial.example(1, 2)

  def pushed(params, x):
    return jax.jvp(lambda params: trial.apply(params, x), (params,), (params,))

  text = str(jax.make_jaxpr(pushed)(trial.param_shapes, x))
  assert not re.search("reverse_only|custom_lin", text)


def fast(x):
  return conv(x, implementation="auto")[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_gradient_is_differentiated_where_the_program_has_no_kernels(dtype):
  """As `memzoo.zoo.inspect` does. A program for a TPU has kernels for the gradient, which JAX cannot differentiate."""
  q, beta = jnp.full((1, 64, 1, 8), 0.3, dtype), jnp.full((1, 64, 1), 0.5, jnp.float32)

  def norm_of_gradient(v):
    gradient = jax.grad(lambda v: jnp.sum(delta_rule.delta_rule(q, q, v, beta)[0].astype(jnp.float32) ** 2))(v)
    return jnp.sum(gradient.astype(jnp.float32) ** 2)

  traced = jax.jit(jax.grad(norm_of_gradient)).trace(q)
  traced.lower(lowering_platforms=("cpu",))
  with pytest.raises(TypeError, match="no derivatives of it; expected implementation='xla'"):
    traced.lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("operation", [_delta, _memory])
def test_every_operation_names_the_form_that_has_forward_mode(operation):
  x = jax.ShapeDtypeStruct(X.shape, jnp.float64)
  with pytest.raises(TypeError, match="expected implementation='recurrent'"):
    jax.jit(lambda x: jax.jvp(operation, (x,), (x,))).lower(x)


FORWARD = {
  "jvp": lambda x: jax.jvp(fast, (x,), (x,)),
  "jacfwd": lambda x: jax.jacfwd(fast)(x),
  "mapped": lambda x: jax.vmap(lambda x: jax.jvp(fast, (x,), (x,)))(x[None]),
  "hessian-vector product": lambda x: jax.jvp(jax.grad(lambda x: jnp.sum(fast(x) ** 2)), (x,), (x,)),
  "hessian": lambda x: jax.hessian(lambda x: jnp.sum(fast(x) ** 2))(x),
}
CASES = [(FORWARD["jvp"], False), *((function, True) for function in FORWARD.values())]


@pytest.mark.compat
@pytest.mark.parametrize(("differentiated", "compiled"), CASES, ids=["not compiled", *FORWARD])
def test_the_fast_form_names_the_form_that_has_forward_mode(differentiated, compiled):
  with pytest.raises(TypeError, match=r"no forward mode .*expected implementation='recurrent'"):
    (jax.jit(differentiated) if compiled else differentiated)(jnp.asarray(X))


@pytest.mark.compat
def test_reverse_mode_of_any_order_passes():
  x = jnp.asarray(X)

  def loss(x):
    return jnp.sum(jax.vmap(fast)(x[None]) ** 2)

  @jax.jit
  def gradients(x):
    def twice(x):
      return jax.lax.scan(jax.checkpoint(lambda x, _: (fast(x), None)), x, None, length=2)[0]

    gradient, again = jax.grad(loss)(x), jax.grad(lambda x: dot(jax.grad(loss)(x), x))(x)
    return gradient, again, jax.grad(lambda x: jnp.sum(twice(x) ** 2))(x), jax.grad(lambda x: jnp.sum(fast(fast(x)) ** 2))(x)

  gradient, again, scanned, unrolled = gradients(x)
  np.testing.assert_allclose(again, 2 * gradient, rtol=1e-9)  # the loss is quadratic
  np.testing.assert_allclose(scanned, unrolled, rtol=1e-9)


def test_both_gradients_of_a_gated_product_are_written_before_they_are_read():
  x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  gradients = jax.grad(lambda *args: jnp.sum(gated(*args)), (0, 1))
  texts = [jax.jit(f).lower(x, x).as_text() for f in (gated, gradients)]
  assert ["optimization_barrier" in text for text in texts] == [False, True]
