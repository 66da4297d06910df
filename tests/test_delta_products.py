"""Consequences of several updates per token, of the chunked form in float64: DeltaProduct, and erase-then-write."""

import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import (
  Variant,
  assert_same,
  differ,
  empty,
  inputs,
  only_token,
  per_token,
  run,
  run_with_gradients,
  transition,
  without,
)
from memzoo.pallas_kernels import delta_rule as ops
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64"), pytest.mark.xdist_group("delta-identities")]

GATED, KIMI = Variant(ops.gated_delta_rule, "scalar"), Variant(ops.kimi_delta_rule, "channel")
SINGLE, PRODUCT, THREE = (Variant(ops.delta_product, "scalar", r) for r in (1, 2, 3))
ERASE_SCALAR, ERASE = (Variant(ops.erase_then_delta_rule, decay) for decay in ("scalar", "channel"))


def test_one_update_per_token_is_the_delta_rule():
  args = inputs(GATED)
  inner = {name: args[name][:, :, None] for name in ("k", "v", "beta")}
  assert_close(run(SINGLE, args | inner), run(GATED, args))


@pytest.mark.parametrize("absent", [0, 1])
def test_an_update_of_strength_0_changes_nothing(absent):
  args = inputs(PRODUCT)
  args["beta"] = args["beta"].at[:, :, absent].set(0)
  single = args | {name: args[name][:, :, 1 - absent] for name in ("k", "v", "beta")}
  assert_close(run(PRODUCT, args), run(GATED, single))


@pytest.mark.parametrize("variant", [PRODUCT, THREE, ERASE_SCALAR, ERASE], ids=str)
def test_no_transition_expands(variant):
  """The transition of one token or several, for strengths up to 2, unit keys and decays."""
  for seed in range(8):
    args = inputs(variant, seed)
    for some in (args, only_token(args)):
      norms = np.linalg.norm(transition(variant, some), 2, axis=(2, 3))
      assert_close(np.maximum(norms, 1), np.ones_like(norms))
    assert np.any(norms > 0.1)


def test_two_reflections_are_a_rotation_by_twice_the_angle():
  angle, args = 0.4, inputs(PRODUCT)
  k = np.zeros(args["k"].shape)
  k[:, :, 0, :, :2] = 1, 0
  k[:, :, 1, :, :2] = np.cos(angle), np.sin(angle)
  args |= {"k": jnp.asarray(k), "beta": jnp.full_like(args["beta"], 2), "log_decay": jnp.zeros_like(args["log_decay"])}
  expected = np.eye(5)
  expected[:2, :2] = [[np.cos(2 * angle), -np.sin(2 * angle)], [np.sin(2 * angle), np.cos(2 * angle)]]
  assert_close(transition(PRODUCT, only_token(args)), np.broadcast_to(expected, (2, 2, 5, 5)))


def test_the_order_of_updates_matters_unless_their_keys_are_orthogonal():
  args = inputs(PRODUCT)
  first, second = np.asarray(args["k"][:, :, 0]), np.asarray(args["k"][:, :, 1])
  second = second - np.sum(first * second, axis=-1, keepdims=True) * first
  orthogonal = np.stack([first, second / np.linalg.norm(second, axis=-1, keepdims=True)], axis=2)

  def swapped(args):
    return args | {name: args[name][:, :, ::-1] for name in ("k", "v", "beta")}

  assert differ(run(PRODUCT, swapped(args))[0], run(PRODUCT, args)[0])
  args["k"] = jnp.asarray(orthogonal)
  assert_close(run(PRODUCT, swapped(args)), run(PRODUCT, args))


# Erase, then write.


@pytest.mark.parametrize(("variant", "plain"), [(ERASE, KIMI), (ERASE_SCALAR, GATED)], ids=str)
def test_erasing_nothing_is_the_rule_without_an_erase(variant, plain):
  args = inputs(variant)
  args["erase_strength"] = per_token(0, args)
  actual, expected = run_with_gradients(variant, args), run_with_gradients(plain, without(args, "erase_key", "erase_strength"))
  assert_same(actual, expected)


def test_erasing_where_it_writes_is_one_stronger_erase():
  """What was stored is scaled by (1 - beta)(1 - gamma), and beta v is added."""
  args = inputs(ERASE)
  args["erase_key"] = args["k"]
  beta, gamma = args["beta"], args["erase_strength"]
  strength = 1 - (1 - beta) * (1 - gamma)
  merged = args | {"beta": strength, "v": (beta / strength)[..., None] * args["v"]}
  assert_close(run(ERASE, args), run(KIMI, without(merged, "erase_key", "erase_strength")))


def test_an_erase_orthogonal_to_the_key_commutes_with_the_write():
  args = inputs(ERASE_SCALAR)
  k, e = np.asarray(args["k"]), np.asarray(args["erase_key"])
  e = e - np.sum(e * k, axis=-1, keepdims=True) * k
  args["erase_key"] = jnp.asarray(e / np.linalg.norm(e, axis=-1, keepdims=True))
  assert_close(run(PRODUCT, as_product(args, erase_first=False)), run(ERASE_SCALAR, args))
  fresh = only_token(empty(args))
  assert_close(run(ERASE_SCALAR, fresh), run(GATED, without(fresh, "erase_key", "erase_strength")))


def as_product(args, erase_first=True):
  """The arguments of `delta_product` that erase and write, in this order or the other."""
  pairs = {"k": ("erase_key", "k"), "v": (None, "v"), "beta": ("erase_strength", "beta")}
  order = 1 if erase_first else -1
  stacked = {
    name: jnp.stack([args.get(first, jnp.zeros_like(args[second])), args[second]][::order], axis=2)
    for name, (first, second) in pairs.items()
  }
  return without(args, "erase_key", "erase_strength") | stacked


def test_erase_then_write_is_a_product_whose_first_value_is_zero():
  args = inputs(ERASE_SCALAR)
  actual, (out, gradients) = run_with_gradients(ERASE_SCALAR, args), run_with_gradients(PRODUCT, as_product(args))
  names = {"k": ("erase_key", "k"), "beta": ("erase_strength", "beta")}
  split = {name: gradients[of][:, :, m] for of, pair in names.items() for m, name in enumerate(pair)}
  assert_same(actual, (out, gradients | split | {"v": gradients["v"][:, :, 1]}))


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_an_erase_leaves_1_minus_its_strength_along_its_key(gamma):
  args = inputs(ERASE)
  args |= {"beta": per_token(0, args), "q": args["erase_key"]}
  before, after = (run(ERASE, args | {"erase_strength": per_token(x, args)})[0][:, 0] for x in (0, gamma))
  assert_close(jnp.stack([before, after]), jnp.stack([before, (1 - gamma) * before]))


def test_an_erase_does_not_change_an_orthogonal_read():
  args = inputs(ERASE)
  q, e = args["q"], args["erase_key"]
  args |= {"beta": per_token(0, args), "q": q - jnp.sum(q * e, axis=-1, keepdims=True) * e}
  gamma, zero = (run(ERASE, only_token(args | {"erase_strength": per_token(x, args)})) for x in (0.9, 0))
  assert_close(gamma[0][:, 0], zero[0][:, 0])
  assert differ(gamma[1], zero[1])


def test_an_erase_leaves_an_empty_memory_empty():
  args = empty(inputs(ERASE))
  args["beta"] = per_token(0, args)
  assert not any(np.any(np.asarray(x)) for x in run(ERASE, args))


def test_writing_before_erasing_is_another_rule():
  """From an empty memory it differs by -gamma beta (e . k) e v^T."""
  args = only_token(empty(inputs(ERASE_SCALAR)))
  _, proper = run(ERASE_SCALAR, args)
  _, reverse = run(PRODUCT, as_product(args, erase_first=False))
  e, k, v, gamma, beta = (np.asarray(args[name][:, 0]) for name in ("erase_key", "k", "v", "erase_strength", "beta"))
  expected = np.einsum("bh,bhv,bk->bhkv", -gamma * beta * np.sum(e * k, axis=-1), v, e[:, 0])
  assert differ(reverse, proper)
  assert_close(reverse - proper, expected)


@pytest.mark.parametrize("constant", [True, False], ids=["constant on the erase key", "not constant"])
def test_decay_and_erase_commute_only_where_the_decay_is_constant_on_the_erase_key(constant):
  args = inputs(ERASE)
  e = args["erase_key"].at[..., :2].set(0)
  args["erase_key"] = e / jnp.linalg.norm(e, axis=-1, keepdims=True)
  if constant:
    args["log_decay"] = args["log_decay"].at[..., 2:].set(-0.7)
  # Over two tokens: the first erases, the second decays and writes.
  later = {name: x if name == "initial_state" else x.at[:, 1].set(x[:, 0]) for name, x in args.items()}
  erase = only_token(later, 0)["erase_strength"]
  later = only_token(later, 1) | {"erase_strength": erase}
  actual, expected = run(ERASE, later)[1], run(ERASE, only_token(args))[1]
  if constant:
    assert_close(actual, expected)
  else:
    assert differ(actual, expected)
