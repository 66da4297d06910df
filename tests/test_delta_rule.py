"""The delta rule: chunks equal the recurrence equals the papers' matrices, in every precision, variant and corner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import VARIANTS, Variant, by_hand, values, values_and_gradients
from memzoo.pallas_kernels import delta_rule as ops
from tolerances import assert_close

IN_FLOAT64 = pytest.mark.usefixtures("float64")
every_variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
# One variant for each way through the chunked form: erasing or not, each kind of decay, one update or several.
DISTINCT = (
  Variant(ops.linear_attention, "channel"),
  Variant(ops.delta_rule),
  Variant(ops.gated_delta_rule, "scalar"),
  Variant(ops.kimi_delta_rule, "channel"),
  Variant(ops.delta_product, "scalar", 3),
  Variant(ops.erase_then_delta_rule, "channel"),
)
distinct_variants = pytest.mark.parametrize("variant", DISTINCT, ids=str)

# Two rows of 75 tokens: documents of 1 to 3 tokens and longer than a chunk, off every chunk grid; padding left, right and
# between, inside a document too; a document number that comes back.
SEGMENTS = np.stack([
  np.repeat([0, 1, 2, 3, 0, 3, 4, 5, 0, 6, 0], [2, 1, 2, 3, 1, 4, 1, 33, 5, 20, 3]),
  np.repeat([1, 2, 3, 1, 1, 0, 0, 7], [37, 1, 2, 14, 14, 3, 3, 1]),
]).astype(np.int32)  # fmt: skip
TOKENS = SEGMENTS.shape[1]


@functools.cache
def oracle(variant: Variant, segmented: bool):
  ids = jnp.asarray(SEGMENTS) if segmented else None
  return values_and_gradients(variant, variant.inputs(TOKENS), ids, implementation="recurrent")


def equals_oracle(variant, chunk_size, segmented):
  ids = jnp.asarray(SEGMENTS) if segmented else None
  args = variant.inputs(TOKENS)
  out, gradients = values_and_gradients(variant, args, ids, implementation="xla", chunk_size=chunk_size)
  expected, expected_gradients = oracle(variant, segmented)
  assert_close(out, expected)
  assert gradients.keys() == args.keys()
  assert_close(gradients, expected_gradients, gradients=True)


@IN_FLOAT64
@pytest.mark.parametrize("variant", [
  pytest.param(f, marks=pytest.mark.compat if f in DISTINCT else pytest.mark.slow, id=str(f)) for f in VARIANTS
])
def test_chunks_are_the_recurrence_in_values_and_every_gradient(variant):
  equals_oracle(variant, 16, segmented=True)


@IN_FLOAT64
@pytest.mark.slow
@distinct_variants
@pytest.mark.parametrize(
  ("chunk_size", "segmented"), [(1, True), (8, True), (32, True), (64, True), (8, False), (64, False), (128, False)]
)
def test_chunks_of_any_size_are_the_recurrence(variant, chunk_size, segmented):
  equals_oracle(variant, chunk_size, segmented)


@pytest.mark.slow
@IN_FLOAT64
@distinct_variants
@pytest.mark.parametrize("block", [2, 64])
def test_chunks_in_blocks_are_the_recurrence(variant, block, monkeypatch):
  """As on a GPU or TPU: several chunks prepared at once, and the last block filled up."""
  monkeypatch.setattr(ops, "chunked", functools.partial(ops.chunked, block=block))
  equals_oracle(variant, 16, segmented=True)


@IN_FLOAT64
@pytest.mark.parametrize("tokens", [16, 3])
def test_without_a_state_documents_or_a_chunk_size(tokens):
  """The plainest call, on the chunk grid and shorter than a chunk."""
  variant = DISTINCT[3]
  args = variant.inputs(tokens, batch=1)
  del args["initial_state"]
  actual, expected = (values_and_gradients(variant, args, implementation=name) for name in ("xla", "recurrent"))
  assert_close(actual[0], expected[0])
  assert_close(actual[1], expected[1], gradients=True)


@IN_FLOAT64
@every_variants
def test_the_recurrence_is_the_papers_product_of_matrices(variant):
  args = variant.inputs(9, key_heads=2, heads=4)
  assert_close(values(variant, args, implementation="recurrent"), by_hand(**args))


@IN_FLOAT64
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_read_is_scaled(scale):
  args = DISTINCT[2].inputs(9)
  assert_close(values(DISTINCT[2], args, implementation="xla", scale=scale), by_hand(**args, scale=scale))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("variant", "implementation"), [*((variant, "xla") for variant in DISTINCT), (DISTINCT[-1], "recurrent")], ids=str
)
def test_bfloat16_inputs_keep_a_float32_state(variant, implementation):
  args = variant.inputs(70, dtype=jnp.float32, key_dim=32, value_dim=24, cosine=0.9)
  state = args.pop("initial_state")
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), args)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
  out, final = values(variant, narrow | {"initial_state": state}, implementation=implementation)
  assert out.dtype == jnp.bfloat16
  assert final.dtype == jnp.float32
  expected = values(variant, wide | {"initial_state": state}, implementation="recurrent")
  assert_close((out.astype(jnp.float32), final), expected, jnp.bfloat16)


def hostile(kind: str, args: dict) -> dict:
  """`args` made as unkind as `kind` says."""
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


@pytest.mark.slow
@IN_FLOAT64
@pytest.mark.parametrize(
  ("variant", "kind"), [(f, kind) for f in DISTINCT for kind in ANY_VARIANT + WITH_DECAY * (f.decay != "none")], ids=str
)
def test_float32_chunks_are_the_float64_recurrence_however_hostile_the_inputs(variant, kind):
  args = hostile(kind, variant.inputs(70, dtype=jnp.float32, key_dim=16, value_dim=12, cosine=0.9))
  out, gradients = values_and_gradients(variant, args, implementation="xla")
  assert {x.dtype for x in jax.tree.leaves((out, gradients))} == {jnp.dtype(jnp.float32)}
  wide = jax.tree.map(lambda x: x.astype(jnp.float64), args)
  expected, expected_gradients = values_and_gradients(variant, wide, implementation="recurrent")
  assert_close(out, expected, jnp.float32)
  assert_close(gradients, expected_gradients, jnp.float32, gradients=True)


BY_CHANNEL = [variant for variant in DISTINCT if variant.decay == "channel"]


@pytest.mark.slow
@IN_FLOAT64
@pytest.mark.parametrize("variant", BY_CHANNEL, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 8, 16, 64])
def test_a_bound_on_the_decays_changes_nothing(variant, chunk_size):
  ids = jnp.asarray(SEGMENTS)
  options = {"implementation": "xla", "chunk_size": chunk_size, "decay_bound": -5.0}
  out, gradients = values_and_gradients(variant, variant.inputs(TOKENS), ids, **options)
  expected, expected_gradients = oracle(variant, segmented=True)
  assert_close(out, expected)
  assert_close(gradients, expected_gradients, gradients=True)


@pytest.mark.slow
@IN_FLOAT64
@pytest.mark.parametrize("variant", BY_CHANNEL, ids=str)
@pytest.mark.parametrize("kind", ["trained", "cosine 0.99", "equal keys", "no decay", "at the bound", "zero keys"])
def test_float32_at_the_bound_is_the_float64_recurrence(variant, kind):
  args = hostile(kind, variant.inputs(70, dtype=jnp.float32, key_dim=16, value_dim=12, cosine=0.9))
  if kind == "at the bound":  # runs of the strongest decay, and of next to none
    strong = (jnp.arange(args["log_decay"].size) // 48 % 2 == 0).reshape(args["log_decay"].shape)
    args["log_decay"] = jnp.where(strong, -5.0, -1e-3).astype(jnp.float32)
  out, gradients = values_and_gradients(variant, args, implementation="xla", decay_bound=-5.0)
  wide = jax.tree.map(lambda x: x.astype(jnp.float64), args)
  expected, expected_gradients = values_and_gradients(variant, wide, implementation="recurrent")
  assert_close(out, expected, jnp.float32)
  assert_close(gradients, expected_gradients, jnp.float32, gradients=True)


@IN_FLOAT64
@pytest.mark.slow
@pytest.mark.parametrize("variant", [variant for variant in DISTINCT if variant.decay != "none"], ids=str)
def test_long_inputs_that_forget_hard_are_right(variant):
  args = variant.inputs(4096, dtype=jnp.float32, batch=1, key_dim=8, value_dim=8, cosine=0.9)
  rng = np.random.default_rng(3)
  decay = rng.uniform(-5, 0, args["log_decay"].shape)
  args["log_decay"] = jnp.asarray(np.where(rng.uniform(size=decay.shape) < 0.05, -200, decay), jnp.float32)
  out, gradients = values_and_gradients(variant, args, implementation="xla", chunk_size=64)
  wide = jax.tree.map(lambda x: x.astype(jnp.float64), args)
  expected, expected_gradients = values_and_gradients(variant, wide, implementation="recurrent")
  assert_close(out, expected, jnp.float32)
  assert_close(gradients, expected_gradients, jnp.float32, gradients=True)


@pytest.mark.slow
@IN_FLOAT64
@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
@pytest.mark.parametrize("variant", DISTINCT[2:], ids=str)
def test_what_padding_holds_does_not_matter(variant, implementation):
  ids, args = jnp.asarray(SEGMENTS), variant.inputs(TOKENS)

  def spoil(name, x):
    padding = np.expand_dims(SEGMENTS == 0, tuple(range(2, x.ndim)))
    return x if name == "initial_state" else jnp.asarray(np.where(padding, -1e6 if name == "log_decay" else 1e6, x))

  spoilt = {name: spoil(name, x) for name, x in args.items()}
  options = {"implementation": implementation, "chunk_size": 16}
  actual, expected = (values_and_gradients(variant, x, ids, **options) for x in (spoilt, args))
  assert_close(actual, expected, gradients=True)
  assert not np.any(np.asarray(actual[0][0])[SEGMENTS == 0])


@pytest.mark.slow
@IN_FLOAT64
def test_the_gradient_of_the_gradient_is_the_recurrences():
  variant = DISTINCT[-1]
  args, direction = (variant.inputs(3, batch=1, key_dim=3, value_dim=2, seed=seed) for seed in (0, 1))

  def second(args, implementation):
    def loss(args):
      out, state = variant.function(**args, implementation=implementation, chunk_size=2)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.square(state))

    def slope(args):
      return sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (jax.grad(loss)(args), direction)), strict=True))

    return jax.grad(slope)(args)

  actual, expected = (jax.jit(second, static_argnums=1)(args, name) for name in ("xla", "recurrent"))
  assert_close(actual, expected, gradients=True)


@pytest.mark.slow
@IN_FLOAT64
def test_transformations_compose():
  variant = DISTINCT[2]
  rows = [variant.inputs(6, batch=1, seed=seed) for seed in range(3)]
  together = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  vmapped = jax.vmap(lambda args: values_and_gradients(variant, args, implementation="xla", chunk_size=4))(together)
  each = [values_and_gradients(variant, args, implementation="xla", chunk_size=4) for args in rows]
  assert_close(vmapped, jax.tree.map(lambda *x: jnp.stack(x), *each), gradients=True)

  def loss(args, wrap):
    out, state = wrap(lambda args: variant.function(**args, implementation="xla", chunk_size=4))(args)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

  remat, expected = (jax.jit(jax.grad(loss), static_argnums=1)(rows[0], wrap) for wrap in (jax.checkpoint, jax.jit))
  assert_close(remat, expected, gradients=True)


def test_equal_shapes_compile_once():
  variant = DISTINCT[2]
  run = jax.jit(lambda args, ids: variant.function(**args, segment_ids=ids))
  for seed, ids in enumerate(SEGMENTS):
    run(variant.inputs(75, dtype=jnp.float32, batch=1, seed=seed), jnp.asarray(ids)[None])
  assert run._cache_size() == 1


@IN_FLOAT64
@pytest.mark.parametrize("variant", [DISTINCT[2], DISTINCT[-1]], ids=str)
def test_a_single_token_is_the_recurrence(variant):
  args = variant.inputs(1)

  def program(implementation):
    return str(jax.make_jaxpr(lambda args: variant.function(**args, implementation=implementation))(args))

  assert program("auto") == program("recurrent") != program("xla")
  actual, expected = (values_and_gradients(variant, args, implementation=name) for name in ("xla", "recurrent"))
  assert_close(actual, expected, gradients=True)


def test_several_tokens_are_chunks():
  args = DISTINCT[2].inputs(2, dtype=jnp.float32)

  def program(implementation):
    return str(jax.make_jaxpr(lambda args: DISTINCT[2].function(**args, implementation=implementation))(args))

  assert program("auto") == program("xla") != program("recurrent")


def test_explain_says_which_and_why_not_the_others():
  many, one, asked = ops.explain(64), ops.explain(1), ops.explain(64, implementation="recurrent")
  assert (many.implementation, one.implementation, asked.implementation) == ("xla", "recurrent", "recurrent")
  assert "one dependent step a token" in many.passed_over["recurrent"]
  assert "a single token" in one.passed_over["xla"]
  assert "implementation='recurrent' was asked for" in asked.passed_over["xla"]
  assert str(many) == f"xla\n  not recurrent: {many.passed_over['recurrent']}"
  with pytest.raises(ValueError, match=r"implementation='pallas' .*delta_rule.*'xla', 'recurrent'"):
    ops.explain(64, implementation="pallas")


def floats(*shape):
  return jnp.zeros(shape, jnp.float32)


# Names and shapes of arguments that replace good ones, and what the message says: the name, what it got, what would do.
MISTAKES = [
  ("gated_delta_rule", {"q": floats(2, 9, 5)}, r"q is float32\[2, 9, 5\]; want floats \[batch, tokens, heads, width\]"),
  ("gated_delta_rule", {"q": jnp.zeros((2, 9, 1, 5), jnp.int32)}, r"q is int32\[2, 9, 1, 5\]; want floats"),
  ("linear_attention", {"k": floats(2, 9, 1)}, r"k is float32\[2, 9, 1\]; want floats"),
  ("delta_rule", {"v": floats(2, 9, 3)}, r"v is float32\[2, 9, 3\]; want floats"),
  ("delta_rule", {"k": floats(2, 9, 1, 4)}, r"k has shape \[2, 9, 1, 4\]; want \[2, 9, 1, 5\]"),
  ("kimi_delta_rule", {"v": floats(2, 8, 2, 3)}, r"v has shape \[2, 8, 2, 3\]; want \[2, 9\]"),
  ("delta_rule", {"q": floats(2, 9, 2, 5), "k": floats(2, 9, 2, 5), "v": floats(2, 9, 3, 3)}, r"v has 3 heads; .* k's 2"),
  ("linear_attention", {"q": floats(2, 0, 1, 5)}, r"q has no tokens; want at least one"),
  *((name, {"beta": floats(2, 9, 1)}, r"beta has shape \[2, 9, 1\]; want \[2, 9, 2\]")
    for name in ("delta_rule", "gated_delta_rule", "kimi_delta_rule", "erase_then_delta_rule")),
  ("delta_product", {"beta": floats(2, 9, 2)}, r"beta has shape \[2, 9, 2\]; want \[2, 9, 2, 2\]"),
  ("delta_product", {"k": floats(2, 9, 1, 5)}, r"k has shape \[2, 9, 1, 5\] and v \[2, 9, 2, 2, 3\]; want .*r"),
  ("delta_product", {"k": floats(2, 9, 3, 1, 5)}, r"k has shape \[2, 9, 3, 1, 5\] and v .* equal r"),
  ("delta_product", {"k": floats(2, 9, 2, 1, 4)}, r"k has shape \[2, 9, 1, 4\]; want \[2, 9, 1, 5\]"),
  ("linear_attention", {"log_decay": floats(2, 9, 1)}, r"log_decay has shape \[2, 9, 1\]; want \[2, 9, 2\].*\[2, 9, 2, 5\]"),
  ("gated_delta_rule", {"log_decay": floats(2, 9, 2, 3)}, r"log_decay has shape \[2, 9, 2, 3\]; want .*\[2, 9, 2, 5\]"),
  ("kimi_delta_rule", {"log_decay": floats(2, 9, 2)}, r"log_decay has shape \[2, 9, 2\]; want \[2, 9, 2, 5\]"),
  ("erase_then_delta_rule", {"erase_key": floats(2, 9, 2, 5)}, r"erase_key has shape .*; want \[2, 9, 1, 5\]"),
  ("erase_then_delta_rule", {"erase_strength": floats(2, 9, 1)}, r"erase_strength has shape .*; want \[2, 9, 2\]"),
  ("delta_rule", {"initial_state": floats(2, 2, 3, 5)}, r"initial_state has shape \[2, 2, 3, 5\]; want \[2, 2, 5, 3\]"),
  ("delta_rule", {"segment_ids": jnp.ones((2, 8), jnp.int32)}, r"segment_ids is int32\[2, 8\]; want integers .*\[2, 9\]"),
  ("delta_rule", {"segment_ids": floats(2, 9)}, r"segment_ids is float32\[2, 9\]; want integers"),
  ("delta_rule", {"chunk_size": 24}, r"chunk_size=24; want a power of two"),
  ("delta_rule", {"chunk_size": 0}, r"chunk_size=0; want a power of two"),
  ("delta_rule", {"implementation": "pallas"}, r"implementation='pallas' does not exist for delta_rule; want .*'xla'"),
  ("delta_rule", {"implementation": "fast"}, r"implementation='fast' does not exist for delta_rule; want .*'auto'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "message"), MISTAKES, ids=[f"{m[0]}-{'-'.join(m[1])}" for m in MISTAKES])
def test_mistakes_are_named(name, wrong, message):
  function = getattr(ops, name)
  variant = Variant(function, "channel" if name == "kimi_delta_rule" else "none", 2 if name == "delta_product" else 0)
  args = variant.inputs(9, dtype=jnp.float32)
  jax.eval_shape(lambda: function(**args))
  with pytest.raises(ValueError, match=message):
    function(**args | wrong)
