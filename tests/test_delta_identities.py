"""What the delta rules' equations imply: special cases, symmetries and geometry, of the chunked form in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import Variant, both, differ, per_token, run, same, transition, without
from memzoo.pallas_kernels import delta_rule as ops
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]

LINEAR, LINEAR_SCALAR, LINEAR_CHANNEL = (Variant(ops.linear_attention, decay) for decay in ("none", "scalar", "channel"))
DELTA, GATED = Variant(ops.delta_rule), Variant(ops.gated_delta_rule, "scalar")
KIMI, GATED_BY_CHANNEL = Variant(ops.kimi_delta_rule, "channel"), Variant(ops.gated_delta_rule, "channel")
GATED_PRODUCT = Variant(ops.delta_product, "scalar", 2)
ERASE_SCALAR, ERASE = (Variant(ops.erase_then_delta_rule, decay) for decay in ("scalar", "channel"))
MANY = (LINEAR_SCALAR, GATED, KIMI, GATED_PRODUCT, ERASE)
FORGETTING = (LINEAR_CHANNEL, *MANY)
TOKENS = 21


@pytest.mark.parametrize("variant", [GATED_PRODUCT, ERASE], ids=str)
@pytest.mark.parametrize("pieces", [(13, 8), (1, 1, 16, 3)], ids=str)
def test_any_split_is_one_pass(variant, pieces):
  args = variant.inputs(TOKENS)
  parts, state = [], args["initial_state"]
  cuts = np.cumsum(pieces)[:-1]
  tokens = {name: jnp.split(x, cuts, axis=1) for name, x in without(args, "initial_state").items()}
  for i in range(len(pieces)):
    out, state = run(variant, {name: x[i] for name, x in tokens.items()} | {"initial_state": state})
    parts.append(out)
  assert_close((jnp.concatenate(parts, axis=1), state), run(variant, args))


@pytest.mark.compat
@pytest.mark.parametrize("variant", [GATED_PRODUCT, ERASE], ids=str)
def test_packed_documents_are_separate_documents(variant):
  args, lengths = variant.inputs(TOKENS, batch=1), (1, 3, 2, 9, 6)
  ids = jnp.asarray(np.repeat(np.arange(1, 6, dtype=np.int32), lengths))[None]
  weight = jnp.asarray(np.random.default_rng(1).normal(size=(1, TOKENS, 2, 3)))

  def packed(args):
    return variant.function(**args, segment_ids=ids, chunk_size=8, implementation="xla")

  def separate(args):
    outs = []
    for i, start in enumerate(np.cumsum((0, *lengths[:-1]))):
      piece = {name: x[:, start : start + lengths[i]] for name, x in without(args, "initial_state").items()}
      state = args["initial_state"] if i == 0 else jnp.zeros_like(args["initial_state"])
      out, state = variant.function(**piece, initial_state=state, implementation="recurrent")
      outs.append(out)
    return jnp.concatenate(outs, axis=1), state

  def loss(args, run):
    out, state = run(args)
    return jnp.sum(out * weight) + jnp.sum(jnp.sin(state)), (out, state)

  (gradients, out), (expected_gradients, expected) = (
    jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(args, run) for run in (packed, separate)
  )
  assert_close(out, expected)
  assert_close(gradients, expected_gradients, gradients=True)


@pytest.mark.parametrize("variant", [GATED_PRODUCT, ERASE], ids=str)
def test_padding_is_not_there(variant):
  args = variant.inputs(TOKENS)
  ids = np.array([0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 2, 0, 2, 3, 3, 3, 0, 0], np.int32)
  kept = np.flatnonzero(ids)
  fewer = {name: x if name == "initial_state" else x[:, kept] for name, x in args.items()}
  rows = jnp.asarray(np.stack([ids, ids]))
  out, state = run(variant, args, segment_ids=rows)
  assert_close((out[:, kept], state), run(variant, fewer, segment_ids=rows[:, kept]))


@pytest.mark.parametrize("variant", FORGETTING, ids=str)
def test_a_decay_of_50_starts_afresh(variant):
  args, at = variant.inputs(TOKENS), 11
  args["log_decay"] = args["log_decay"].at[:, at].set(-50)
  out, state = run(variant, args)
  fresh = {name: x[:, at:] for name, x in without(args, "initial_state").items()}
  assert_close((out[:, at:], state), run(variant, fresh))


@pytest.mark.parametrize("variant", MANY, ids=str)
def test_outputs_are_linear_in_values_and_state(variant):
  args, other = variant.inputs(TOKENS), variant.inputs(TOKENS, seed=1)
  more = args | {name: other[name] for name in ("v", "initial_state")}
  mixed = args | {name: 3 * args[name] - 2 * other[name] for name in ("v", "initial_state")}
  expected = jax.tree.map(lambda a, b: 3 * a - 2 * b, run(variant, args), run(variant, more))
  assert_close(run(variant, mixed), expected)


ADDRESSES = ("q", "k", "erase_key")


@pytest.mark.parametrize("variant", [DELTA, GATED, GATED_PRODUCT, ERASE_SCALAR, KIMI], ids=str)
def test_a_rotation_of_the_keys_space_is_seen_only_by_channel_decays(variant):
  args = variant.inputs(TOKENS)
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
  args, order, signs = variant.inputs(TOKENS), np.array([3, 0, 4, 1, 2]), np.array([1.0, -1, -1, 1, -1])
  moved = {name: _scaled(x, signs, -1)[..., order] if name in ADDRESSES else x for name, x in args.items()}
  moved["log_decay"] = args["log_decay"][..., order]
  moved["initial_state"] = _scaled(args["initial_state"], signs, -2)[..., order, :]
  out, state = run(variant, args)
  assert_close(run(variant, moved), (out, _scaled(state, signs, -2)[..., order, :]))


def _scaled(x, factors, axis):
  return x * jnp.asarray(factors).reshape([-1 if i == axis else 1 for i in range(-x.ndim, 0)])


# Linear attention.


def test_linear_attention_is_attention_without_softmax():
  args = without(LINEAR.inputs(TOKENS, heads=1), "initial_state")
  scores = np.tril(np.einsum("bthk,bshk->bhts", args["q"], args["k"])) * 5**-0.5
  out, state = run(LINEAR, args)
  assert_close(out, np.einsum("bhts,bshv->bthv", scores, args["v"]))
  assert_close(state, np.einsum("bthk,bthv->bhkv", args["k"], args["v"]))


def test_linear_attention_with_a_decay_weighs_by_what_lies_between():
  args = without(LINEAR_SCALAR.inputs(TOKENS, heads=1), "initial_state")
  total = np.cumsum(args["log_decay"], axis=1)[:, :, 0]
  between = np.tril(np.exp(np.minimum(total[:, :, None] - total[:, None, :], 0)))
  scores = between[:, None] * np.einsum("bthk,bshk->bhts", args["q"], args["k"]) * 5**-0.5
  assert_close(run(LINEAR_SCALAR, args)[0], np.einsum("bhts,bshv->bthv", scores, args["v"]))


# The delta rule.


def test_strength_0_leaves_the_state_alone():
  args = DELTA.inputs(TOKENS)
  args["beta"] = per_token(0, args)
  out, state = run(DELTA, args)
  assert_close(state, args["initial_state"])
  assert_close(out, jnp.einsum("bhkv,btk->bthv", args["initial_state"], args["q"][:, :, 0]) * 5**-0.5)


def test_strength_1_overwrites():
  """Asked for what was just written, the memory answers exactly that."""
  args = DELTA.inputs(TOKENS)
  args |= {"beta": per_token(1, args), "q": args["k"]}
  assert_close(run(DELTA, args, scale=1.0)[0], args["v"])


def test_strength_1_and_orthonormal_keys_are_linear_attention():
  args = without(DELTA.inputs(5), "initial_state")
  k = np.stack([np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 5)))[0] for seed in range(2)])
  args |= {"beta": per_token(1, args), "k": jnp.asarray(k)[:, :, None]}
  assert_close(run(DELTA, args), run(LINEAR, without(args, "beta")))


def test_the_second_value_of_a_key_replaces_the_first():
  args = DELTA.inputs(2)
  args |= {"beta": per_token(1, args), "k": args["k"].at[:, 0].set(args["k"][:, 1])}
  second = {name: x if name == "initial_state" else x[:, 1:] for name, x in args.items()}
  assert_close(run(DELTA, args)[1], run(DELTA, second)[1])


def test_the_transition_contracts_up_to_strength_2_over_the_square_of_the_key():
  strengths = np.array([0.0, 0.3, 1.0, 1.7, 2.0, 2.1, -0.1])
  args = DELTA.inputs(1, batch=len(strengths), heads=1)
  length = 1.7
  args |= {"k": length * args["k"], "beta": jnp.asarray(strengths / length**2)[:, None, None]}
  matrices = transition(DELTA, args)[:, 0]
  along = jnp.einsum("bij,bj->bi", matrices, args["k"][:, 0, 0])
  assert_close(along, jnp.asarray(1 - strengths)[:, None] * args["k"][:, 0, 0])
  assert_close(jnp.linalg.norm(matrices, 2, axis=(1, 2)), np.maximum(1, np.abs(1 - strengths)))


def test_strength_2_reflects():
  args = DELTA.inputs(TOKENS)
  args |= {"beta": per_token(2, args), "v": jnp.zeros_like(args["v"])}
  _, state = run(DELTA, args)
  assert_close(jnp.linalg.norm(state, axis=2), jnp.linalg.norm(args["initial_state"], axis=2))
  assert differ(state, args["initial_state"])


# Gated.


@pytest.mark.parametrize("variant", [GATED, GATED_BY_CHANNEL], ids=str)
def test_no_decay_is_the_delta_rule(variant):
  args = variant.inputs(TOKENS)
  args["log_decay"] = jnp.zeros_like(args["log_decay"])
  same(both(variant, args), both(DELTA, without(args, "log_decay")))


@pytest.mark.parametrize("variant", [GATED, KIMI], ids=str)
def test_strength_0_is_decay_alone(variant):
  args = variant.inputs(TOKENS)
  args["beta"] = per_token(0, args)
  kept = np.exp(np.sum(args["log_decay"], axis=1))
  assert_close(run(variant, args)[1], args["initial_state"] * (kept[..., None] if kept.ndim == 3 else kept[..., None, None]))


@pytest.mark.parametrize("variant", [GATED, KIMI], ids=str)
def test_total_decay_knows_only_the_current_token(variant):
  args = variant.inputs(TOKENS)
  args["log_decay"] = jnp.full_like(args["log_decay"], -jnp.inf)
  out, state = run(variant, args)
  written = jnp.einsum("btk,bthv->bthkv", args["k"][:, :, 0], args["beta"][..., None] * args["v"])
  assert_close(state, written[:, -1])
  assert_close(out, jnp.einsum("bthkv,btk->bthv", written, args["q"][:, :, 0]) * 5**-0.5)


def test_one_decay_for_all_channels_is_the_gated_delta_rule():
  args = GATED.inputs(TOKENS)
  wide = args | {"log_decay": jnp.repeat(args["log_decay"][..., None], 5, axis=-1)}
  actual, expected = both(KIMI, wide), both(GATED, args)
  actual[1]["log_decay"] = jnp.sum(actual[1]["log_decay"], axis=-1)
  same(actual, expected)


def test_gated_delta_rule_with_channel_decays_is_kimi_delta_rule():
  args = KIMI.inputs(TOKENS)
  same(both(GATED_BY_CHANNEL, args), both(KIMI, args))


def test_constant_gates_of_gated_delta_net_2_are_the_kimi_rule():
  """S_t = (I - k (b . k)^T) Diag(exp g) S_{t-1} + k (w . v)^T, with b = w = beta in every channel."""
  args = KIMI.inputs(TOKENS, batch=1, heads=1)
  k, v, g = (np.asarray(args[name][0, :, 0]) for name in ("k", "v", "log_decay"))
  state = np.asarray(args["initial_state"][0, 0])
  for t, beta in enumerate(np.asarray(args["beta"][0, :, 0])):
    b, w = np.full(5, beta), np.full(3, beta)
    state = np.exp(g[t])[:, None] * state
    state = state - np.outer(k[t], state.T @ (b * k[t])) + np.outer(k[t], w * v[t])
  assert_close(run(KIMI, args)[1][0, 0], state)


@pytest.mark.parametrize("variant", [KIMI, ERASE], ids=str)
def test_a_channel_that_forgets_everything_holds_nothing(variant):
  args = variant.inputs(TOKENS)
  args["log_decay"] = args["log_decay"].at[:, -1, :, 2].set(-jnp.inf)
  args["beta"] = args["beta"].at[:, -1].set(0)
  if variant.erases:
    args["erase_strength"] = args["erase_strength"].at[:, -1].set(0)
  _, state = run(variant, args)
  assert not np.any(np.asarray(state[:, :, 2]))
  assert np.all(np.asarray(state[:, :, [0, 1, 3, 4]]))
