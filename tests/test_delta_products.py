"""What the equations of several updates a token imply, of the chunked form in float64: products, and erase-then-write."""

import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import Variant, both, by_hand, differ, per_token, run, same, transition, without
from memzoo.pallas_kernels import delta_rule as ops
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]

DELTA, GATED = Variant(ops.delta_rule), Variant(ops.gated_delta_rule, "scalar")
KIMI = Variant(ops.kimi_delta_rule, "channel")
SINGLE, GATED_SINGLE = (Variant(ops.delta_product, decay, 1) for decay in ("none", "scalar"))
PRODUCT, GATED_PRODUCT = (Variant(ops.delta_product, decay, 2) for decay in ("none", "scalar"))
THREE = Variant(ops.delta_product, "scalar", 3)
ERASE_UNGATED, ERASE_SCALAR, ERASE = (Variant(ops.erase_then_delta_rule, decay) for decay in ("none", "scalar", "channel"))
TOKENS = 21


@pytest.mark.parametrize(("product", "variant"), [(SINGLE, DELTA), (GATED_SINGLE, GATED)], ids=str)
def test_one_update_a_token_is_the_delta_rule(product, variant):
  args = variant.inputs(TOKENS)
  inner = {name: args[name][:, :, None] for name in ("k", "v", "beta")}
  out, gradients = both(product, args | inner)
  same((out, gradients | {name: gradients[name][:, :, 0] for name in inner}), both(variant, args))


@pytest.mark.parametrize("absent", [0, 1])
def test_an_update_of_strength_0_is_not_there(absent):
  args = GATED_PRODUCT.inputs(TOKENS)
  args["beta"] = args["beta"].at[:, :, absent].set(0)
  single = args | {name: args[name][:, :, 1 - absent] for name in ("k", "v", "beta")}
  assert_close(run(GATED_PRODUCT, args), run(GATED, single))


@pytest.mark.parametrize("variant", [PRODUCT, GATED_PRODUCT, THREE, ERASE_UNGATED, ERASE_SCALAR, ERASE], ids=str)
def test_no_transition_expands(variant):
  """For strengths up to 2, unit keys and decays: neither a token's nor that of several."""
  args = variant.inputs(1, batch=64)
  for some in (args, {name: x.reshape(8, 8, *x.shape[2:]) if name != "initial_state" else x[:8] for name, x in args.items()}):
    norms = np.linalg.norm(transition(variant, some), 2, axis=(2, 3))
    assert_close(np.maximum(norms, 1), np.ones_like(norms))
    assert np.any(norms > 0.1)


def test_two_reflections_are_a_rotation_by_twice_the_angle():
  angle = 0.4
  args = PRODUCT.inputs(1, batch=1, heads=1)
  k = np.zeros((1, 1, 2, 1, 5))
  k[0, 0, 0, 0, :2] = 1, 0
  k[0, 0, 1, 0, :2] = np.cos(angle), np.sin(angle)
  args |= {"k": jnp.asarray(k), "beta": jnp.full_like(args["beta"], 2)}
  expected = np.eye(5)
  expected[:2, :2] = [[np.cos(2 * angle), -np.sin(2 * angle)], [np.sin(2 * angle), np.cos(2 * angle)]]
  assert_close(transition(PRODUCT, args)[0, 0], expected)


def test_the_order_of_updates_matters_unless_their_keys_are_orthogonal():
  args = PRODUCT.inputs(TOKENS)
  first, second = np.asarray(args["k"][:, :, 0]), np.asarray(args["k"][:, :, 1])
  second = second - np.sum(first * second, axis=-1, keepdims=True) * first
  orthogonal = np.stack([first, second / np.linalg.norm(second, axis=-1, keepdims=True)], axis=2)

  def swapped(args):
    return args | {name: args[name][:, :, ::-1] for name in ("k", "v", "beta")}

  assert differ(run(PRODUCT, swapped(args))[0], run(PRODUCT, args)[0])
  args["k"] = jnp.asarray(orthogonal)
  assert_close(run(PRODUCT, swapped(args)), run(PRODUCT, args))


# Erase, then write.


@pytest.mark.parametrize(("variant", "plain"), [(ERASE, KIMI), (ERASE_SCALAR, GATED), (ERASE_UNGATED, DELTA)], ids=str)
def test_erasing_nothing_is_the_rule_without_an_erase(variant, plain):
  args = variant.inputs(TOKENS)
  args["erase_strength"] = per_token(0, args)
  same(both(variant, args), both(plain, without(args, "erase_key", "erase_strength")))


def test_erasing_where_it_writes_is_one_stronger_erase():
  """(1 - beta)(1 - gamma) is left of what was there, and beta v is written."""
  args = ERASE.inputs(TOKENS)
  args["erase_key"] = args["k"]
  beta, gamma = args["beta"], args["erase_strength"]
  strength = 1 - (1 - beta) * (1 - gamma)
  merged = args | {"beta": strength, "v": (beta / strength)[..., None] * args["v"]}
  assert_close(run(ERASE, args), run(KIMI, without(merged, "erase_key", "erase_strength")))


def test_an_erase_orthogonal_to_the_key_commutes_with_the_write():
  args = ERASE_SCALAR.inputs(TOKENS)
  k, e = np.asarray(args["k"]), np.asarray(args["erase_key"])
  e = e - np.sum(e * k, axis=-1, keepdims=True) * k
  args["erase_key"] = jnp.asarray(e / np.linalg.norm(e, axis=-1, keepdims=True))
  expected = run(ERASE_SCALAR, args)
  assert_close(run(GATED_PRODUCT, as_product(args, erase_first=False)), expected)
  fresh = {name: x[:, :1] for name, x in without(args, "initial_state").items()}
  written = run(ERASE_SCALAR, fresh)
  assert_close(written, run(GATED, without(fresh, "erase_key", "erase_strength")))


def as_product(args, erase_first=True):
  """The arguments of `delta_product` that erase and write, in this order or the other."""
  pairs = {"k": ("erase_key", "k"), "v": (None, "v"), "beta": ("erase_strength", "beta")}
  order = 1 if erase_first else -1
  stacked = {
    name: jnp.stack([args.get(first, jnp.zeros_like(args[second])), args[second]][::order], axis=2)
    for name, (first, second) in pairs.items()
  }
  return without(args, "erase_key", "erase_strength") | stacked


@pytest.mark.parametrize(("variant", "product"), [(ERASE_SCALAR, GATED_PRODUCT), (ERASE_UNGATED, PRODUCT)], ids=str)
def test_erase_then_write_is_a_product_whose_first_value_is_zero(variant, product):
  args = variant.inputs(TOKENS)
  (out, gradients), (expected, expected_gradients) = both(product, as_product(args)), both(variant, args)
  names = {"k": ("erase_key", "k"), "beta": ("erase_strength", "beta")}
  split = {name: gradients[of][:, :, m] for of, pair in names.items() for m, name in enumerate(pair)}
  same((out, gradients | split | {"v": gradients["v"][:, :, 1]}), (expected, expected_gradients))


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_an_erase_leaves_1_minus_its_strength_along_its_key(gamma):
  args = ERASE.inputs(1)
  args |= {"beta": per_token(0, args), "q": args["erase_key"]}
  before, _ = run(ERASE, args | {"erase_strength": per_token(0, args)})
  after, _ = run(ERASE, args | {"erase_strength": per_token(gamma, args)})
  assert_close(jnp.stack([before, after]), jnp.stack([before, (1 - gamma) * before]))


def test_an_erase_is_not_seen_by_an_orthogonal_read():
  args = ERASE.inputs(1)
  q, e = args["q"], args["erase_key"]
  args |= {"beta": per_token(0, args), "q": q - jnp.sum(q * e, axis=-1, keepdims=True) * e}
  gamma, zero = (run(ERASE, args | {"erase_strength": per_token(x, args)}) for x in (0.9, 0))
  assert_close(gamma[0], zero[0])
  assert differ(gamma[1], zero[1])


def test_what_writes_nothing_leaves_an_empty_memory_empty():
  args = without(ERASE.inputs(TOKENS), "initial_state")
  args["beta"] = per_token(0, args)
  assert not any(np.any(np.asarray(x)) for x in run(ERASE, args))


def test_writing_before_erasing_is_another_rule():
  """From an empty memory it differs by -gamma beta (e . k) e v^T."""
  args = without(ERASE_SCALAR.inputs(1), "initial_state")
  _, proper = run(ERASE_SCALAR, args)
  _, reverse = run(GATED_PRODUCT, as_product(args, erase_first=False))
  e, k = args["erase_key"][:, 0, 0], args["k"][:, 0, 0]
  factor = args["erase_strength"][:, 0] * args["beta"][:, 0] * jnp.sum(e * k, axis=-1)[:, None]
  expected = -factor[..., None, None] * e[:, None, :, None] * args["v"][:, 0, :, None, :]
  assert differ(reverse, proper)
  assert_close(reverse - proper, expected)


@pytest.mark.parametrize("constant", [True, False], ids=["constant on the erase key", "not constant"])
def test_decay_and_erase_commute_only_where_the_decay_is_constant_on_the_erase_key(constant):
  args = ERASE.inputs(1)
  e = args["erase_key"].at[..., :2].set(0)
  args["erase_key"] = e / jnp.linalg.norm(e, axis=-1, keepdims=True)
  if constant:
    args["log_decay"] = args["log_decay"].at[..., 2:].set(-0.7)
  # Over two tokens: the erase without a decay, then the decay, and the write, without an erase.
  later = {name: jnp.repeat(x, 2, axis=1) if name != "initial_state" else x for name, x in args.items()}
  later["log_decay"] = later["log_decay"].at[:, 0].set(0)
  later["beta"] = later["beta"].at[:, 0].set(0)
  later["erase_strength"] = later["erase_strength"].at[:, 1].set(0)
  actual, expected = run(ERASE, later)[1], run(ERASE, args)[1]
  if constant:
    assert_close(actual, expected)
  else:
    assert differ(actual, expected)


def test_the_chunked_form_is_the_papers_product_of_matrices():
  args = ERASE.inputs(TOKENS, key_heads=2, heads=4)
  assert_close(run(ERASE, args), by_hand(**args))
