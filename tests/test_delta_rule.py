"""The delta rule: the chunked form equals the recurrence, and the recurrence equals the papers' products of matrices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import Variant, by_hand, cotangents, values, values_and_gradients
from memzoo.pallas_kernels import delta_rule as ops
from tolerances import assert_close

IN_FLOAT64 = pytest.mark.usefixtures("float64")
# One variant for each path through the chunked form: erasing or not, each kind of decay, one update per token or several.
LINEAR = Variant(ops.linear_attention, "channel")
DELTA = Variant(ops.delta_rule)
GATED = Variant(ops.gated_delta_rule, "scalar")
KIMI = Variant(ops.kimi_delta_rule, "channel")
THREE = Variant(ops.delta_product, "scalar", 3)
ERASE = Variant(ops.erase_then_delta_rule, "channel")
SUMS = Variant(ops.linear_attention, "scalar")  # its heads share products
UNDECAYED = Variant(ops.linear_attention)
GATED_2 = Variant(ops.gated_delta_rule_2, "channel")  # reads along another vector than the key
COMBA = Variant(ops.comba_rule, "scalar")  # and before the decay
DISTINCT = LINEAR, DELTA, GATED, KIMI, THREE, ERASE, SUMS, GATED_2, COMBA


def cases(names, *rows, marks=()):
  """Parameters of a test, the first a variant. Tests of one variant share a process, and so its compiled programs."""
  rows = [row if isinstance(row, tuple) else (row,) for row in rows]
  group = pytest.mark.xdist_group
  return pytest.mark.parametrize(
    names, [pytest.param(*row, id="-".join(map(str, row)), marks=[group(f"delta-{row[0]}"), *marks]) for row in rows]
  )


# Two rows of 75 tokens: documents of 1 to 3 tokens and longer than a chunk, off every chunk grid; padding left, right and
# between, inside a document too; a document number that is reused.
SEGMENTS = np.stack([
  np.repeat([0, 1, 2, 3, 0, 3, 4, 5, 0, 6, 0], [2, 1, 2, 3, 1, 4, 1, 33, 5, 20, 3]),
  np.repeat([1, 2, 3, 1, 1, 0, 0, 7], [37, 1, 2, 14, 14, 3, 3, 1]),
]).astype(np.int32)  # fmt: skip
ONE_DOCUMENT = np.ones_like(SEGMENTS)
TOKENS = SEGMENTS.shape[1]


def inputs(variant, dtype=jnp.float64, cosine=0.5):
  """Inputs of one shape for all tests, so that each needs few programs."""
  return variant.inputs(TOKENS, dtype=dtype, key_dim=7, value_dim=5, cosine=cosine)


def oracle(variant, args, segments):
  """The recurrence in float64: values and gradients. One program per variant, whatever the segments are."""
  wide = jax.tree.map(lambda x: x.astype(jnp.float64), args)
  return values_and_gradients(variant, wide, jnp.asarray(segments), implementation="recurrent")


@functools.cache
def expected(variant):
  return oracle(variant, inputs(variant), SEGMENTS)


def equals_oracle(variant, **options):
  args = inputs(variant)
  out, gradients = values_and_gradients(variant, args, jnp.asarray(SEGMENTS), implementation="xla", **options)
  assert gradients.keys() == args.keys()
  assert_close(out, expected(variant)[0])
  assert_close(gradients, expected(variant)[1], gradients=True)


@IN_FLOAT64
@cases("variant", *DISTINCT, marks=[pytest.mark.compat])
def test_chunks_are_the_recurrence_in_values_and_every_gradient(variant):
  equals_oracle(variant, chunk_size=16)


@IN_FLOAT64
@cases("variant", *DISTINCT)
def test_the_recurrence_is_the_papers_product_of_matrices(variant):
  """With packed documents and padding, whose inputs do not matter."""
  assert_close(expected(variant)[0], by_hand(**inputs(variant), segment_ids=SEGMENTS))


@IN_FLOAT64
@pytest.mark.slow
@cases(("variant", "chunk_size"), (DELTA, 128), (KIMI, 64), (THREE, 8), (ERASE, 1))
def test_chunks_of_any_size_are_the_recurrence(variant, chunk_size):
  equals_oracle(variant, chunk_size=chunk_size)


@IN_FLOAT64
@pytest.mark.slow
@cases(
  ("variant", "platform", "matrices"),
  (GATED, "tpu", 8),
  (LINEAR, "tpu", 8),
  (THREE, "tpu", 256),
  (DELTA, "tpu", 256),
  (KIMI, "tpu", 8),
  (ERASE, "tpu", 256),
  (SUMS, "tpu", 8),
  (SUMS, "cuda", 256),
  (LINEAR, "cuda", 8),
  (GATED, "cuda", 256),
  (KIMI, "cuda", 8),
  (ERASE, "cuda", 256),
  (GATED_2, "tpu", 8),
  (GATED_2, "cuda", 256),
  (COMBA, "tpu", 256),
  (COMBA, "cuda", 8),
)
def test_blocks_of_chunks_are_the_recurrence(variant, platform, matrices):
  """As on a GPU or TPU: several chunks are prepared at once. Blocks of 8 matrices leave a last block with padding."""
  equals_oracle(variant, chunk_size=16, platform=platform, matrices=matrices)


@IN_FLOAT64
@pytest.mark.slow
@cases(("variant", "platform"), (LINEAR, "cpu"), (ERASE, "tpu"))
def test_a_bound_on_the_decays_changes_nothing(variant, platform):
  """For several updates per token, it lets an accelerator's rows be grouped by eight tokens."""
  equals_oracle(variant, chunk_size=32, decay_bound=-5.0, platform=platform)


@IN_FLOAT64
@pytest.mark.slow
@cases("variant", *DISTINCT[2:])
def test_what_padding_holds_does_not_matter(variant):
  def spoil(name, x):
    padding = np.expand_dims(SEGMENTS == 0, tuple(range(2, x.ndim)))
    return x if name == "initial_state" else jnp.asarray(np.where(padding, -1e6 if name == "log_decay" else 1e6, x))

  args = inputs(variant)
  spoilt = {name: spoil(name, x) for name, x in args.items()}
  chunks, plain = (
    values_and_gradients(variant, x, jnp.asarray(SEGMENTS), implementation="xla", chunk_size=16) for x in (spoilt, args)
  )
  assert_close(chunks, plain, gradients=True)
  assert_close(oracle(variant, spoilt, SEGMENTS), expected(variant), gradients=True)
  assert not np.any(np.asarray(chunks[0][0])[SEGMENTS == 0])


@IN_FLOAT64
@pytest.mark.parametrize(("tokens", "scale"), [(32, None), (3, 0.7)])
def test_a_call_without_a_state_documents_or_a_chunk_size_is_the_recurrence(tokens, scale):
  """The plainest call, on the chunk grid and shorter than a chunk; and the scale of the read."""
  args = KIMI.inputs(tokens, batch=1)
  del args["initial_state"]
  assert_close(values(KIMI, args, implementation="xla", scale=scale), by_hand(**args, scale=scale))


@IN_FLOAT64
@cases(("variant", "implementation"), (THREE, "xla"), (ERASE, "recurrent"))
def test_value_heads_share_key_heads_in_groups(variant, implementation):
  args = variant.inputs(9, key_heads=2, heads=4)
  assert_close(values(variant, args, implementation=implementation), by_hand(**args))


@IN_FLOAT64
@pytest.mark.slow
@cases(
  ("variant", "key_heads", "platform"),
  *((SUMS, 1, False), (SUMS, 2, False), (SUMS, 1, True), (SUMS, 2, True), (SUMS, 6, True)),
  *((UNDECAYED, 2, False), (UNDECAYED, 1, True), (UNDECAYED, 6, True)),
)
def test_six_value_heads_share_products_of_their_keys(variant, key_heads, platform):
  """In blocks of two chunks as on a GPU or TPU, or chunk by chunk as on a CPU."""
  args = variant.inputs(TOKENS, key_heads=key_heads, heads=6)
  options = {"platform": platform, "matrices": 24}
  found = values_and_gradients(variant, args, jnp.asarray(SEGMENTS), implementation="xla", chunk_size=16, **options)
  out, gradients = oracle(variant, args, SEGMENTS)
  assert_close(found[0], out)
  assert_close(found[1], gradients, gradients=True)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_heads_of_a_key_share_its_products(platform):
  """No array holds a key for each of its value heads."""
  args = SUMS.inputs(32, dtype=jnp.float32, batch=1, heads=6, key_dim=7, value_dim=3)
  run = functools.partial(values_and_gradients, SUMS, platform=platform, chunk_size=16)
  text = jax.jit(run).lower(args).as_text()
  assert "x1x16x7x" in text.replace("tensor<", "x") or "x16x7x" in text
  assert not re.search(r"6x16x7x|16x6x7x|32x6x7x", text)


@IN_FLOAT64
@pytest.mark.slow
@cases(
  ("variant", "implementation"),
  *((LINEAR, "xla"), (GATED, "xla"), (THREE, "xla"), (ERASE, "xla"), (ERASE, "recurrent"), (SUMS, "xla")),
)
def test_bfloat16_inputs_keep_a_float32_state(variant, implementation):
  args = inputs(variant, jnp.float32, cosine=0.9)
  state = args.pop("initial_state")
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), args)
  out, final = values(variant, narrow | {"initial_state": state}, jnp.asarray(ONE_DOCUMENT), implementation=implementation)
  assert out.dtype == jnp.bfloat16
  assert final.dtype == jnp.float32
  exact = oracle(variant, narrow | {"initial_state": state}, ONE_DOCUMENT)[0]
  assert_close((out.astype(jnp.float32), final), exact, jnp.bfloat16)


def hostile(kind: str, args: dict) -> dict:
  """Returns `args` changed to the difficult inputs that `kind` names."""
  args = {name: np.array(x) for name, x in args.items()}
  if kind in ("cosine 0.99", "equal keys"):
    common = args["k"][:1, :1]
    across = args["k"] - np.sum(args["k"] * common, axis=-1, keepdims=True) * common
    tangent = 0.0 if kind == "equal keys" else (0.99**-2 - 1) ** 0.5
    k = common + tangent * across / np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), 1e-6)
    args["k"] = k / np.linalg.norm(k, axis=-1, keepdims=True)
  if kind in ("cosine 0.99", "equal keys", "strong") and "beta" in args:
    args["beta"] = 1.99 + 0.005 * args["beta"]
  if kind == "zero keys":
    args["k"][:, 1::2] = 0
  if kind == "zeros":
    args = {name: x if name == "log_decay" else np.zeros_like(x) for name, x in args.items()}
  if kind == "large":
    args["v"] = 1e4 * args["v"]
  if "log_decay" in args:
    decay = args["log_decay"]
    every_third = (np.arange(decay.size) % 3 == 0).reshape(decay.shape)
    args["log_decay"] = {
      "to -50": np.where(every_third, 10 * decay, decay / 10),
      "-50": np.where(every_third, -50, decay),
      "-200": np.where(every_third, -200, decay),
      "-inf": np.where(every_third, -np.inf, decay),
      "-inf everywhere": np.full_like(decay, -np.inf),
      "no decay": np.zeros_like(decay),
    }.get(kind, decay)
  return {name: jnp.asarray(x, jnp.float32) for name, x in args.items()}


ANY_VARIANT = ("trained", "cosine 0.99", "equal keys", "strong", "zero keys", "zeros", "large")
WITH_DECAY = ("no decay", "to -50", "-50", "-200", "-inf", "-inf everywhere")


def in_float32_is_the_oracle(variant, args, **options):
  out, gradients = values_and_gradients(variant, args, implementation="xla", **options)
  assert {x.dtype for x in jax.tree.leaves((out, gradients))} == {jnp.dtype(jnp.float32)}
  exact, exact_gradients = oracle(variant, args, np.ones(args["v"].shape[:2], np.int32))
  assert_close(out, exact, jnp.float32)
  assert_close(gradients, exact_gradients, jnp.float32, gradients=True)


@IN_FLOAT64
@pytest.mark.slow
@cases(("variant", "kind"), *((v, kind) for v in DISTINCT for kind in ANY_VARIANT + WITH_DECAY * (v.decay != "none")))
def test_float32_chunks_are_the_float64_recurrence_however_hostile_the_inputs(variant, kind):
  in_float32_is_the_oracle(variant, hostile(kind, inputs(variant, jnp.float32, cosine=0.9)))


@IN_FLOAT64
@pytest.mark.slow
@cases(
  ("variant", "chunk_size", "kind"),
  *((v, c, kind) for v, c in ((KIMI, 32), (ERASE, 64)) for kind in ("trained", "cosine 0.99", "runs at -5", "all at -5")),
  (LINEAR, 32, "all at -5"),
)
def test_float32_with_a_bound_on_the_decays_is_the_float64_recurrence(variant, chunk_size, kind):
  args = hostile(kind, inputs(variant, jnp.float32, cosine=0.9))
  if kind == "runs at -5":  # runs of the strongest decay, and of almost none
    strong = (jnp.arange(args["log_decay"].size) // 48 % 2 == 0).reshape(args["log_decay"].shape)
    args["log_decay"] = jnp.where(strong, -5.0, -1e-3).astype(jnp.float32)
  if kind == "all at -5":
    args["log_decay"] = jnp.full_like(args["log_decay"], -5)
  in_float32_is_the_oracle(variant, args, chunk_size=chunk_size, decay_bound=-5.0)


@IN_FLOAT64
@pytest.mark.slow
@cases("variant", GATED, LINEAR)
def test_long_inputs_with_strong_decays_are_right(variant):
  args = variant.inputs(4096, dtype=jnp.float32, batch=1, key_dim=8, value_dim=8, cosine=0.9)
  rng = np.random.default_rng(3)
  decay = rng.uniform(-5, 0, args["log_decay"].shape)
  args["log_decay"] = jnp.asarray(np.where(rng.uniform(size=decay.shape) < 0.05, -200, decay), jnp.float32)
  in_float32_is_the_oracle(variant, args, chunk_size=64)


@IN_FLOAT64
@pytest.mark.slow
def test_second_gradients_are_those_of_the_recurrence():
  args, direction = (DELTA.inputs(3, batch=1, key_dim=3, value_dim=2, seed=seed) for seed in (0, 1))

  def second(args, implementation):
    def loss(args):
      out, state = DELTA.function(**args, implementation=implementation, chunk_size=2)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.square(state))

    def slope(args):
      return sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (jax.grad(loss)(args), direction)), strict=True))

    return jax.grad(slope)(args)

  actual, exact = (jax.jit(second, static_argnums=1)(args, name) for name in ("xla", "recurrent"))
  assert_close(actual, exact, gradients=True)


@IN_FLOAT64
@pytest.mark.slow
def test_vmap_and_remat_change_nothing():
  options = {"implementation": "xla", "chunk_size": 4}
  rows = [GATED.inputs(6, batch=1, seed=seed) for seed in range(3)]
  together = jax.tree.map(lambda *x: np.stack(x), *rows)
  each = [values_and_gradients(GATED, args, **options) for args in rows]
  vmapped = jax.vmap(lambda args: values_and_gradients(GATED, args, **options))(together)
  assert_close(vmapped, jax.tree.map(lambda *x: np.stack(x), *each), gradients=True)

  def loss(args):
    found = jax.checkpoint(lambda args: GATED.function(**args, **options))(args)
    return sum(jnp.sum(a * b) for a, b in zip(found, cotangents(args), strict=True))

  assert_close(jax.jit(jax.grad(loss))(rows[0]), each[0][1], gradients=True)


def test_a_policy_that_saves_the_named_results_does_not_run_the_forward_again():
  args = GATED.inputs(6, dtype=jnp.float32, batch=1)

  def runs(policy):
    def loss(args):
      out, _ = jax.checkpoint(lambda args: GATED.function(**args), policy=policy)(args)
      return jnp.sum(jnp.sin(out))

    return str(jax.make_jaxpr(jax.grad(loss))(args)).count("form_for_platform[")

  policies = jax.checkpoint_policies
  saved = runs(policies.save_only_these_names(ops.OUTPUT, ops.KEPT))
  assert saved == runs(policies.everything_saveable) < runs(policies.nothing_saveable)


def test_equal_shapes_compile_once():
  run = jax.jit(lambda args, ids: GATED.function(**args, segment_ids=ids))
  for seed, ids in enumerate(SEGMENTS):
    run(GATED.inputs(TOKENS, dtype=jnp.float32, batch=1, seed=seed), jnp.asarray(ids)[None])
  assert run._cache_size() == 1


def program(variant, args, implementation):
  return str(jax.make_jaxpr(lambda args: variant.function(**args, implementation=implementation))(args))


@IN_FLOAT64
@cases("variant", GATED, ERASE)
def test_by_default_a_single_token_is_the_recurrence(variant):
  args = variant.inputs(1)
  assert program(variant, args, "auto") == program(variant, args, "recurrent") != program(variant, args, "xla")
  assert_close(values(variant, args, implementation="xla"), values(variant, args, implementation="recurrent"))


def test_by_default_several_tokens_are_chunks():
  args = GATED.inputs(2, dtype=jnp.float32)
  assert program(GATED, args, "auto") == program(GATED, args, "xla") != program(GATED, args, "recurrent")


def test_explain_says_which_implementation_runs_and_why_the_others_do_not():
  def explain(tokens=64, **options):
    q, beta = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.bfloat16), jax.ShapeDtypeStruct((1, tokens, 2), jnp.float32)
    return ops.explain(ops.gated_delta_rule, q, q, q, beta, beta, **options)

  many, one, requested = explain(), explain(1), explain(implementation="recurrent", scale=1.0)
  assert (many.implementation, one.implementation, requested.implementation) == ("xla", "recurrent", "recurrent")
  assert "one dependent step per token" in many.passed_over["recurrent"]
  assert "a single token" in one.passed_over["xla"]
  assert "implementation='recurrent' was requested" in requested.passed_over["xla"]
  why = many.passed_over
  assert str(many) == f"xla\n  not pallas: {why['pallas']}\n  not recurrent: {why['recurrent']}"
  with pytest.raises(ValueError, match=r"implementation='cuda' .*gated_delta_rule.*'pallas', 'xla', 'recurrent'"):
    explain(implementation="cuda")


QUERY, STRENGTH = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.bfloat16), jax.ShapeDtypeStruct((1, 64, 2), jnp.float32)


@pytest.mark.parametrize(
  ("function", "arguments", "options", "why"),
  [
    (ops.delta_rule, [QUERY] * 3, {"platform": "cpu"}, "there are no kernels for a cpu"),
    (ops.delta_rule, [QUERY] * 3, {"platform": "gpu"}, "the kernels for GPUs have not been measured"),
    (ops.delta_rule, [QUERY.update(dtype=jnp.float16)] * 3, {}, "take bfloat16 or float32 and compute in float32, not float16"),
    (ops.delta_rule, [QUERY, QUERY, QUERY.update(dtype=jnp.float32)], {}, "take q, k and v in bfloat16, and not float32"),
    (ops.delta_rule, [QUERY.update(shape=(1, 64, 2, 512))] * 3, {}, "at most 256 channels, not 512"),
    (ops.delta_rule, [QUERY] * 3, {"chunk_size": 32}, "chunk_size=32 was asked for"),
    (ops.delta_product, [QUERY, *[QUERY.update(shape=(1, 64, 3, 2, 8))] * 2], {}, "at most 2 updates per token, not 3"),
    (ops.delta_rule, [QUERY.update(shape=(1, 1, 2, 8))] * 3, {}, "a single token"),
    (ops.comba_rule, [QUERY] * 3, {"feedback_key": QUERY}, "read the state along the key of each update"),
  ],
)
def test_explain_says_why_there_is_no_kernel(function, arguments, options, why):
  strength = STRENGTH.update(shape=arguments[1].shape[:-1])
  options = {"platform": "tpu"} | options
  choice = ops.explain(function, *arguments, strength, **options)
  assert choice.implementation != "pallas"
  assert why in choice.passed_over["pallas"]
  assert ops.explain(ops.delta_rule, QUERY, QUERY, QUERY, STRENGTH, platform="tpu").implementation == "pallas"


def test_a_kernel_that_does_not_exist_is_refused_with_the_reason():
  args = GATED.inputs(4, dtype=jnp.float32)
  with pytest.raises(ValueError, match=r"implementation='pallas' .* gated_delta_rule: chunk_size=4 was asked for"):
    values(GATED, args, implementation="pallas", chunk_size=4)


def floats(*shape):
  return jnp.zeros(shape, jnp.float32)


# Names and shapes of arguments that replace good ones, and parts of the message: the name, the value, what is expected.
MISTAKES = [
  ("gated_delta_rule", {"q": floats(2, 9, 5)}, r"q is float32\[2, 9, 5\]; expected floats \[batch, tokens, heads, width\]"),
  ("gated_delta_rule", {"q": jnp.zeros((2, 9, 1, 5), jnp.int32)}, r"q is int32\[2, 9, 1, 5\]; expected floats"),
  ("linear_attention", {"k": floats(2, 9, 1)}, r"k is float32\[2, 9, 1\]; expected floats"),
  ("delta_rule", {"v": floats(2, 9, 3)}, r"v is float32\[2, 9, 3\]; expected floats"),
  ("delta_rule", {"k": floats(2, 9, 1, 4)}, r"k has shape \[2, 9, 1, 4\]; expected \[2, 9, 1, 5\]"),
  ("kimi_delta_rule", {"v": floats(2, 8, 2, 3)}, r"v has shape \[2, 8, 2, 3\]; expected \[2, 9\]"),
  ("delta_rule", {"q": floats(2, 9, 2, 5), "k": floats(2, 9, 2, 5), "v": floats(2, 9, 3, 3)}, r"v has 3 heads; .* k's 2"),
  ("linear_attention", {"q": floats(2, 0, 1, 5)}, r"q has no tokens; expected at least one"),
  *((name, {"beta": floats(2, 9, 1)}, r"beta has shape \[2, 9, 1\]; expected \[2, 9, 2\]")
    for name in ("delta_rule", "gated_delta_rule", "kimi_delta_rule", "erase_then_delta_rule")),
  ("delta_product", {"beta": floats(2, 9, 2)}, r"beta has shape \[2, 9, 2\]; expected \[2, 9, 2, 2\]"),
  ("delta_product", {"k": floats(2, 9, 1, 5)}, r"k has shape \[2, 9, 1, 5\] and v \[2, 9, 2, 2, 3\]; expected .*r"),
  ("delta_product", {"k": floats(2, 9, 3, 1, 5)}, r"k has shape \[2, 9, 3, 1, 5\] and v .* equal r"),
  ("delta_product", {"k": floats(2, 9, 2, 1, 4)}, r"k has shape \[2, 9, 1, 4\]; expected \[2, 9, 1, 5\]"),
  ("linear_attention", {"log_decay": floats(2, 9, 1)}, r"log_decay has shape \[2, 9, 1\]; expected .*\[2, 9, 2, 5\]"),
  ("gated_delta_rule", {"log_decay": floats(2, 9, 2, 3)}, r"log_decay has shape \[2, 9, 2, 3\]; expected .*\[2, 9, 2, 5\]"),
  ("kimi_delta_rule", {"log_decay": floats(2, 9, 2)}, r"log_decay has shape \[2, 9, 2\]; expected \[2, 9, 2, 5\]"),
  ("erase_then_delta_rule", {"erase_key": floats(2, 9, 2, 5)}, r"erase_key has shape .*; expected \[2, 9, 1, 5\]"),
  ("erase_then_delta_rule", {"erase_strength": floats(2, 9, 1)}, r"erase_strength has shape .*; expected \[2, 9, 2\]"),
  ("gated_delta_rule_2", {"erase_gate": floats(2, 9, 2, 5)}, r"erase_gate has shape .*; expected \[2, 9, 1, 5\]"),
  ("gated_delta_rule_2", {"write_gate": floats(2, 9, 2)}, r"write_gate has shape .*; expected \[2, 9, 2, 3\]"),
  ("comba_rule", {"feedback_key": floats(2, 9, 5)}, r"feedback_key has shape .*; expected \[2, 9, 1, 5\]"),
  ("comba_rule", {"log_decay": floats(2, 9, 2, 5)}, r"log_decay has shape \[2, 9, 2, 5\]; expected \[2, 9, 2\]"),
  ("delta_rule", {"initial_state": floats(2, 2, 3, 5)}, r"initial_state has shape \[2, 2, 3, 5\]; expected \[2, 2, 5, 3\]"),
  ("delta_rule", {"segment_ids": jnp.ones((2, 8), jnp.int32)}, r"segment_ids is int32\[2, 8\]; expected integers .*\[2, 9\]"),
  ("delta_rule", {"segment_ids": floats(2, 9)}, r"segment_ids is float32\[2, 9\]; expected integers"),
  ("delta_rule", {"chunk_size": 24}, r"chunk_size=24; expected a power of two"),
  ("delta_rule", {"chunk_size": 0}, r"chunk_size=0; expected a power of two"),
  ("delta_rule", {"implementation": "cuda"}, r"implementation='cuda' does not exist for delta_rule; expected .*'xla'"),
  ("delta_rule", {"implementation": "fast"}, r"implementation='fast' does not exist for delta_rule; expected .*'auto'"),
]  # fmt: skip


# Keyword arguments of each function that fit together.
GOOD = {name: Variant(getattr(ops, name), *rest) for name, *rest in (
  ("linear_attention",), ("delta_rule",), ("gated_delta_rule",), ("kimi_delta_rule", "channel"),
  ("delta_product", "none", 2), ("erase_then_delta_rule",), ("gated_delta_rule_2",), ("comba_rule", "scalar"),
)}  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "message"), MISTAKES, ids=[f"{m[0]}-{'-'.join(m[1])}" for m in MISTAKES])
def test_mistakes_are_named(name, wrong, message):
  with pytest.raises(ValueError, match=message):
    GOOD[name].function(**GOOD[name].inputs(9, dtype=jnp.float32) | wrong)


@pytest.mark.parametrize("name", GOOD)
def test_an_unknown_option_is_named(name):
  args = GOOD[name].inputs(9, dtype=jnp.float32)
  jax.eval_shape(lambda: GOOD[name].function(**args))
  message = rf"{name}\(\) got an unexpected option 'chunk_sise'; expected some of scale, .*, precision, implementation\."
  with pytest.raises(TypeError, match=message):
    GOOD[name].function(**args, chunk_sise=16)
