"""Consequences of the delta rules' equations: special cases, symmetries and geometry, of the chunked form in float64."""

import jax
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

LINEAR, LINEAR_SCALAR, LINEAR_CHANNEL = (Variant(ops.linear_attention, decay) for decay in ("none", "scalar", "channel"))
DELTA, GATED, KIMI = Variant(ops.delta_rule), Variant(ops.gated_delta_rule, "scalar"), Variant(ops.kimi_delta_rule, "channel")
GATED_PRODUCT = Variant(ops.delta_product, "scalar", 2)
ERASE_SCALAR, ERASE = (Variant(ops.erase_then_delta_rule, decay) for decay in ("scalar", "channel"))
GATED_2, COMBA = Variant(ops.gated_delta_rule_2, "channel"), Variant(ops.comba_rule, "scalar")
MANY = (LINEAR_SCALAR, GATED, KIMI, GATED_PRODUCT, ERASE)
FORGETTING = (LINEAR_CHANNEL, *MANY)


@pytest.mark.parametrize("variant", FORGETTING, ids=str)
def test_a_decay_of_50_starts_afresh(variant):
  args, other, at = inputs(variant), inputs(variant, seed=1), 11
  args["log_decay"] = args["log_decay"].at[:, at].set(-50)
  changed = {name: jnp.concatenate([other[name][:, :at], x[:, at:]], axis=1) for name, x in args.items()}
  changed["initial_state"] = other["initial_state"]
  (out, state), (expected, expected_state) = run(variant, changed), run(variant, args)
  assert differ(out[:, :at], expected[:, :at])
  assert_close((out[:, at:], state), (expected[:, at:], expected_state))


@pytest.mark.parametrize("variant", [*MANY, GATED_2, COMBA], ids=str)
def test_outputs_are_linear_in_values_and_state(variant):
  args, other = inputs(variant), inputs(variant, seed=1)
  more = args | {name: other[name] for name in ("v", "initial_state")}
  mixed = args | {name: 3 * args[name] - 2 * other[name] for name in ("v", "initial_state")}
  expected = jax.tree.map(lambda a, b: 3 * a - 2 * b, run(variant, args), run(variant, more))
  assert_close(run(variant, mixed), expected)


ADDRESSES = ("q", "k", "erase_key")


@pytest.mark.parametrize("variant", [DELTA, GATED, GATED_PRODUCT, ERASE_SCALAR, KIMI], ids=str)
def test_only_channel_decays_are_affected_by_a_rotation_of_the_key_space(variant):
  args = inputs(variant)
  rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0])
  turned = {name: x @ rotation.T if name in ADDRESSES else x for name, x in args.items()}
  turned["initial_state"] = rotation @ args["initial_state"]
  out, state = run(variant, turned)
  expected, expected_state = run(variant, args)
  if variant.decay == "channel":
    assert differ(out, expected)
  else:
    assert_close((out, state), (expected, rotation @ expected_state))


@pytest.mark.parametrize("variant", [KIMI, ERASE], ids=str)
def test_the_order_and_signs_of_key_channels_do_not_matter(variant):
  args, order, signs = inputs(variant), np.array([3, 0, 4, 1, 2]), np.array([1.0, -1, -1, 1, -1])
  moved = {name: _scaled(x, signs, -1)[..., order] if name in ADDRESSES else x for name, x in args.items()}
  moved["log_decay"] = args["log_decay"][..., order]
  moved["initial_state"] = _scaled(args["initial_state"], signs, -2)[..., order, :]
  out, state = run(variant, args)
  assert_close(run(variant, moved), (out, _scaled(state, signs, -2)[..., order, :]))


def _scaled(x, factors, axis):
  return x * jnp.asarray(factors).reshape([-1 if i == axis else 1 for i in range(-x.ndim, 0)])


# Linear attention.


def test_linear_attention_is_attention_without_softmax():
  args = empty(inputs(LINEAR))
  q, k, v = (np.asarray(args[name]) for name in ("q", "k", "v"))
  scores = np.tril(np.einsum("btk,bsk->bts", q[:, :, 0], k[:, :, 0])) * 5**-0.5
  out, state = run(LINEAR, args)
  assert_close(out, np.einsum("bts,bshv->bthv", scores, v))
  assert_close(state, np.einsum("btk,bthv->bhkv", k[:, :, 0], v))


def test_linear_attention_with_a_decay_weighs_by_the_decay_in_between():
  args = empty(inputs(LINEAR_SCALAR))
  q, k, v, log_decay = (np.asarray(args[name]) for name in ("q", "k", "v", "log_decay"))
  total = np.cumsum(log_decay, axis=1).swapaxes(1, 2)
  between = np.tril(np.exp(np.minimum(total[:, :, :, None] - total[:, :, None, :], 0)))
  scores = between * np.einsum("btk,bsk->bts", q[:, :, 0], k[:, :, 0])[:, None] * 5**-0.5
  assert_close(run(LINEAR_SCALAR, args)[0], np.einsum("bhts,bshv->bthv", scores, v))


# The delta rule.


def test_strength_0_leaves_the_state_alone():
  args = inputs(DELTA)
  args["beta"] = per_token(0, args)
  out, state = run(DELTA, args)
  assert_close(state, args["initial_state"])
  assert_close(out, np.einsum("bhkv,btk->bthv", args["initial_state"], args["q"][:, :, 0]) * 5**-0.5)


def test_strength_1_overwrites():
  """A read by the key that was just written returns exactly its value."""
  args = inputs(DELTA)
  args |= {"beta": per_token(1, args), "q": args["k"]}
  assert_close(run(DELTA, args)[0] * 5**0.5, args["v"])


def test_strength_1_and_orthonormal_keys_are_linear_attention():
  args, k = empty(inputs(DELTA)), np.zeros((2, 21, 1, 5))
  k[:, :5, 0] = [np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 5)))[0] for seed in range(2)]
  args |= {"beta": per_token(1, args), "k": jnp.asarray(k)}
  assert_close(run(DELTA, args), run(LINEAR, without(args, "beta")))


def test_the_second_value_of_a_key_replaces_the_first():
  args = inputs(DELTA)
  args |= {"beta": per_token(1, args), "k": args["k"].at[:, 11].set(args["k"][:, 12])}
  other = args | {"v": args["v"].at[:, 11].set(7.0)}
  (out, state), (expected, expected_state) = run(DELTA, other), run(DELTA, args)
  assert differ(out[:, 11], expected[:, 11])
  assert_close((out[:, 12:], state), (expected[:, 12:], expected_state))


def test_the_transition_contracts_up_to_strength_2_over_the_square_of_the_key():
  args, length = inputs(DELTA), 1.7
  args["k"] = length * args["k"]
  strengths = np.array([0.0, 0.3, 1.0, 1.7, 2.0, 2.1, -0.1])
  tokens = [only_token(args | {"beta": per_token(strength / length**2, args)}) for strength in strengths]
  matrices, k = np.stack([transition(DELTA, token) for token in tokens]), np.asarray(args["k"][:, 0, 0])
  assert_close(np.einsum("sbhij,bj->sbhi", matrices, k), np.multiply.outer(1 - strengths, np.stack([k, k], axis=1)))
  norms = np.linalg.norm(matrices, 2, axis=(3, 4))
  assert_close(norms, np.broadcast_to(np.maximum(1, np.abs(1 - strengths))[:, None, None], norms.shape))


def test_strength_2_reflects():
  args = inputs(DELTA)
  args |= {"beta": per_token(2, args), "v": jnp.zeros_like(args["v"])}
  _, state = run(DELTA, args)
  assert_close(np.linalg.norm(state, axis=2), np.linalg.norm(args["initial_state"], axis=2))
  assert differ(state, args["initial_state"])


# Gated.


def test_no_decay_is_the_delta_rule():
  args = inputs(GATED)
  args["log_decay"] = jnp.zeros_like(args["log_decay"])
  assert_same(run_with_gradients(GATED, args), run_with_gradients(DELTA, without(args, "log_decay")))


@pytest.mark.parametrize("variant", [GATED, KIMI], ids=str)
def test_strength_0_is_decay_alone(variant):
  args = inputs(variant)
  args["beta"] = per_token(0, args)
  kept = np.exp(np.sum(args["log_decay"], axis=1)).reshape(2, 2, -1, 1)
  assert_close(run(variant, args)[1], kept * np.asarray(args["initial_state"]))


@pytest.mark.parametrize("variant", [GATED, KIMI], ids=str)
def test_total_decay_leaves_only_the_current_token(variant):
  args = inputs(variant)
  args["log_decay"] = jnp.full_like(args["log_decay"], -jnp.inf)
  out, state = run(variant, args)
  written = np.einsum("btk,bthv->bthkv", args["k"][:, :, 0], args["beta"][..., None] * args["v"])
  assert_close(state, written[:, -1])
  assert_close(out, np.einsum("bthkv,btk->bthv", written, args["q"][:, :, 0]) * 5**-0.5)


def test_one_decay_for_all_channels_is_the_gated_delta_rule():
  args = inputs(GATED)
  wide = args | {"log_decay": jnp.repeat(args["log_decay"][..., None], 5, axis=-1)}
  actual, expected = run_with_gradients(KIMI, wide), run_with_gradients(GATED, args)
  actual[1]["log_decay"] = jnp.sum(actual[1]["log_decay"], axis=-1)
  assert_same(actual, expected)


def test_gated_delta_rule_with_channel_decays_is_kimi_delta_rule():
  gated, kimi = (str(jax.make_jaxpr(lambda args, f=f: f(**args))(inputs(KIMI))) for f in (ops.gated_delta_rule, KIMI.function))
  assert gated == kimi


def test_constant_gates_of_the_gated_delta_rule_2_are_the_kimi_rule():
  """b = w = beta in every channel."""
  args = inputs(GATED_2)
  beta = jax.random.uniform(jax.random.key(3), args["k"].shape[:3], jnp.float64)
  gates = {"erase_gate": beta[..., None] * jnp.ones_like(args["k"]), "write_gate": beta[..., None] * jnp.ones_like(args["v"])}
  plain = without(args, "erase_gate", "write_gate") | {"beta": jnp.repeat(beta, args["v"].shape[2] // beta.shape[2], axis=2)}
  assert_same(run_with_gradients(GATED_2, args | gates), run_with_gradients(KIMI, plain))


def test_feedback_along_the_decayed_key_is_the_gated_delta_rule():
  """alpha (I - beta k k^T) = alpha - beta k (alpha k)^T."""
  args = inputs(GATED)
  decay = jnp.exp(args["log_decay"][:, :, :1])  # of one head for all, as feedback belongs to key heads
  args["log_decay"] = jnp.broadcast_to(args["log_decay"][:, :, :1], args["log_decay"].shape)
  assert_close(run(COMBA, args | {"feedback_key": decay[..., None] * args["k"]}), run(GATED, args))


def test_without_feedback_comba_only_decays_and_adds():
  args = inputs(COMBA)
  plain = without(args, "beta", "feedback_key") | {"v": args["beta"][..., None] * args["v"]}
  nothing = args | {"feedback_key": jnp.zeros_like(args["k"])}
  assert_close(run(COMBA, nothing), run(Variant(ops.linear_attention, "scalar"), plain))


@pytest.mark.parametrize("variant", [KIMI, ERASE], ids=str)
def test_a_channel_that_forgets_everything_holds_nothing(variant):
  args = inputs(variant)
  args["log_decay"] = args["log_decay"].at[:, -1, :, 2].set(-jnp.inf)
  args["beta"] = args["beta"].at[:, -1].set(0)
  if variant.erases:
    args["erase_strength"] = args["erase_strength"].at[:, -1].set(0)
  state = np.asarray(run(variant, args)[1])
  assert not np.any(state[:, :, 2])
  assert np.all(state[:, :, [0, 1, 3, 4]])
