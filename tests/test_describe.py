"""Counting: FLOPs in a jaxpr, parameters and bytes in a model."""

import io

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl
from memzoo.layers import Attention, GatedDeltaNet
from memzoo.zoo.config import build
from memzoo.zoo.describe import count_flops, describe, flops_by_scope, forward_flops, render, thousands
from memzoo.zoo.language_model import LanguageModel

A = jax.ShapeDtypeStruct((3, 5), jnp.float32)
B = jax.ShapeDtypeStruct((5, 7), jnp.float32)
PRODUCT = 2 * 3 * 5 * 7


@pytest.fixture
def model():
  mixers = (GatedDeltaNet(num_heads=2, key_dim=8, value_dim=8), Attention(num_heads=2, head_dim=8, window=16))
  return LanguageModel(vocab_size=64, width=32, depth=3, mixers=mixers)


@pytest.mark.compat
def test_a_product_counts_two_per_multiply_add():
  assert count_flops(jnp.dot, A, B) == PRODUCT
  assert count_flops(lambda a, b: jnp.einsum("...ij,...jk->...ik", a, b), batched(A), batched(B)) == 4 * PRODUCT
  assert count_flops(lambda a: a + a, A) == 0


def batched(x):
  return jax.ShapeDtypeStruct((4, *x.shape), x.dtype)


def test_a_scan_counts_every_iteration():
  def scanned(a, b):
    return jax.lax.scan(lambda carry, _: (carry + jnp.dot(a, b).sum(), None), jnp.float32(0), None, length=11)

  assert count_flops(scanned, A, B) == 11 * PRODUCT
  assert count_flops(lambda a, b: jax.lax.map(lambda _: scanned(a, b), jnp.arange(3)), A, B) == 33 * PRODUCT


def test_a_cond_counts_its_dearest_branch():
  def either(a, b):
    return jax.lax.cond(a.sum() > 0, lambda: jnp.dot(a, b) + jnp.dot(a, b), lambda: jnp.dot(a, b))

  assert count_flops(either, A, B) == 2 * PRODUCT


def test_jit_remat_and_custom_gradients_are_looked_into():
  @jax.custom_vjp
  def product(a, b):
    return jnp.dot(a, b)

  product.defvjp(lambda a, b: (jnp.dot(a, b), None), lambda _, g: (g @ g.T @ g, g))
  assert count_flops(product, A, B) == PRODUCT
  assert count_flops(jax.jit(jax.checkpoint(product)), A, B) == PRODUCT


def test_a_pallas_kernel_counts_every_grid_point():
  def kernel(a, b, out):
    out[...] = jnp.dot(a[...], b[...])

  def call(a, b):
    whole = [pl.BlockSpec(x.shape, lambda i: (0, 0)) for x in (a, b)]
    specs = {"in_specs": whole, "out_specs": pl.BlockSpec((3, 7), lambda i: (i, 0))}
    return pl.pallas_call(kernel, jax.ShapeDtypeStruct((24, 7), jnp.float32), grid=(8,), **specs)(a, b)

  assert count_flops(call, A, B) == 8 * PRODUCT


def test_work_is_told_apart_by_scope():
  def scoped(a, b):
    with jax.named_scope("outer"):
      return jax.jit(lambda: jnp.dot(a, b))() + jnp.dot(a, b)

  assert sum(flops_by_scope(scoped, A, B).values()) == 2 * PRODUCT
  assert all(scope.startswith("outer") for scope in flops_by_scope(scoped, A, B))


@pytest.mark.compat
def test_the_parts_add_up_to_the_model(model):
  length = 64
  description = describe(model, length)
  params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
  assert description.parameters == sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params)))
  assert description.flops * length == pytest.approx(forward_flops(model, 1, length))
  assert description.state_bytes == model.state_bytes(1, length)
  assert set(description.state_bytes_by_kind()) == {"GatedDeltaNet", "Attention"}
  assert all(row.flops > 0 for row in description.rows if row.kind)


def test_a_model_far_too_large_for_this_machine_can_be_described():
  mixer = GatedDeltaNet(num_heads=128, key_dim=128, value_dim=128)
  huge = LanguageModel(vocab_size=128_000, width=65536, depth=8, mixers=(mixer,))
  assert describe(huge, 64).parameters > 1e11


def test_a_description_is_shown_with_its_sums():
  from rich.console import Console

  experiment = build("quickstart")
  console = Console(width=140, record=True, file=io.StringIO())
  for part in render(experiment, describe(experiment.model, 512)):
    console.print(part)
  shown = console.export_text()
  assert "EraseThenDelta" in shown
  assert f"{describe(experiment.model, 512).parameters:,}" in shown


def test_numbers_are_shown_with_three_digits_and_a_unit():
  assert [thousands(n) for n in (999, 1234, 1_340_000, 2.5e13)] == ["999 ", "1.23 k", "1.34 M", "25 T"]
