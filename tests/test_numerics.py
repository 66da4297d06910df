"""The precision of products, and the choice of code by platform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.pallas_kernels.dispatch import Forms, by_platform
from memzoo.pallas_kernels.numerics import FULL, SPLIT, exact_product, intermediate_precision, matmul

NARROW, WIDE = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.float32)


def product(x, y, precision=FULL):
  """The one product in `matmul(x, y)`: dtypes of its operands, its precision, and the dtype of the result."""
  (equation,) = (
    e for e in jax.make_jaxpr(lambda x, y: matmul(x, y, precision))(x, y).eqns if e.primitive.name == "dot_general"
  )
  how = equation.params["precision"]
  return [v.aval.dtype for v in equation.invars], how[0] if isinstance(how, tuple) else how, equation.outvars[0].aval.dtype


def test_two_16_bit_operands_take_one_pass_as_they_are():
  dtypes, how, result = product(NARROW, WIDE.astype(jnp.bfloat16), SPLIT)
  assert (dtypes, how, result) == ([jnp.bfloat16] * 2, jax.lax.Precision.DEFAULT, jnp.float32)


@pytest.mark.parametrize("precision", [FULL, SPLIT], ids=["full", "split"])
def test_a_16_bit_operand_is_widened_for_an_intermediate(precision):
  assert product(NARROW, WIDE, precision) == ([jnp.float32] * 2, precision, jnp.float32)


@pytest.mark.usefixtures("float64")
def test_float64_is_multiplied_at_full_precision():
  x = jnp.ones((2, 2), jnp.float64)
  assert product(x, x, SPLIT) == ([jnp.float64] * 2, FULL, jnp.float64)


def test_intermediates_take_three_passes_only_if_all_operands_are_16_bit():
  assert intermediate_precision(None, NARROW, NARROW) is SPLIT
  assert intermediate_precision(None, NARROW, WIDE) is FULL
  assert intermediate_precision("highest", NARROW) is FULL
  with pytest.raises(ValueError, match=r"precision='high'; expected None \(by the operands\) or 'highest'"):
    intermediate_precision("high", NARROW)


def test_a_product_with_zeros_and_ones_is_exact_and_so_is_its_gradient():
  weights = jnp.asarray(np.tri(64), jnp.float32)
  x, d = (jnp.asarray(np.random.default_rng(i).normal(size=(64, 8)), jnp.float32) for i in range(2))
  y, pull_back = jax.vjp(exact_product, weights, x)
  for actual, matrix, operand in ((y, np.tri(64), x), (pull_back(d)[1], np.tri(64).T, d)):
    np.testing.assert_allclose(actual, matrix @ np.asarray(operand, np.float64), rtol=0, atol=5e-6)


def test_the_platform_is_that_of_the_program_and_not_of_this_machine():
  def f(x):
    return by_platform(Forms(jnp.sin, jnp.cos), x)

  lowered = {platform: jax.jit(f).trace(WIDE).lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
  assert "sine" in lowered["cpu"]
  assert "cosine" not in lowered["cpu"]
  assert "cosine" in lowered["tpu"]
  assert "sine" not in lowered["tpu"].replace("cosine", "")


def test_a_program_traces_the_form_of_its_platform_and_that_of_the_cpu():
  traced = []

  def form(name):
    def run(x):
      traced.append(name)
      return {"cpu": jnp.sin, "gpu": jnp.tan}.get(name, jnp.cos)(x)

    return run

  traceable = jax.jit(partial(by_platform, Forms(*map(form, ("cpu", "others", "tpu", "gpu"))))).trace(WIDE)
  assert traced == ["cpu"]
  text = traceable.lower(lowering_platforms=("cpu",)).as_text()
  assert traced == ["cpu"]
  text = traceable.lower(lowering_platforms=("cuda", "tpu")).as_text()
  assert traced == ["cpu", "gpu", "tpu"]
  assert "tan" in text
  assert "cosine" in text


def test_the_forms_of_platforms_are_mapped_differentiated_and_run_without_compilation():
  f = partial(by_platform, Forms(lambda x, n: (jnp.sin(x) * n, x), lambda x, n: (jnp.cos(x) * n, x)))
  x, n = jnp.linspace(0, 1, 5), jnp.asarray(3)
  for got, expected in ((f(x, n)[0], 3 * jnp.sin(x)), (jax.vmap(f, in_axes=(0, None))(x, n)[0], 3 * jnp.sin(x))):
    np.testing.assert_allclose(got, expected, rtol=1e-6)
  gradient = jax.vmap(jax.grad(lambda x: f(x, n)[0]))(x)
  np.testing.assert_allclose(gradient, 3 * jnp.cos(x), rtol=1e-6)
