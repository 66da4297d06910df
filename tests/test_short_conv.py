"""The short convolution: shifted copies equal the token-by-token form, and that equals NumPy's convolution."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from memzoo.pallas_kernels import short_conv as ops
from memzoo.pallas_kernels.short_conv import short_conv
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("short_conv")]

IN_FLOAT64 = pytest.mark.usefixtures("float64")
CHANNELS = 5
IDS = np.stack([
  [0, 0, 1, 2, 2, 3, 3, 3, 0, 3, 4, 4, 4, 4, 4, 4, 0],
  [1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 0, 1, 0, 0, 0, 1, 5],
]).astype(np.int32)  # fmt: skip


def inputs(tokens, width, dtype=jnp.float64, batch=2):
  rng = np.random.default_rng(tokens * 10 + width)
  shapes = {"x": (batch, tokens, CHANNELS), "weight": (width, CHANNELS), "initial_state": (batch, width - 1, CHANNELS)}
  return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


@partial(jax.jit, static_argnums=0)
def values(implementation, args, ids=None):
  return short_conv(**args, segment_ids=ids, implementation=implementation)


@partial(jax.jit, static_argnums=0)
def values_and_gradients(implementation, args, ids=None):
  out, pull_back = jax.vjp(lambda args: short_conv(**args, segment_ids=ids, implementation=implementation), args)
  rng = np.random.default_rng(5)
  return out, pull_back(tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in out))[0]


def compile_for_tpu(*args, tpu, default):
  """In place of `jax.lax.platform_dependent`: what a TPU runs."""
  del default
  return tpu(*args)


def in_numpy(x, weight, initial_state, ids):
  """Every document convolved on its own, without padding."""
  y, state = np.zeros(x.shape), np.zeros(initial_state.shape)
  for b in range(len(x)):
    tokens = np.flatnonzero(ids[b])
    starts = np.flatnonzero(np.diff(ids[b, tokens])) + 1
    before = np.asarray(initial_state[b])
    for document in np.split(tokens, starts):
      whole = np.concatenate([before, x[b, document]])
      for d in range(CHANNELS):
        y[b, document, d] = np.convolve(whole[:, d], np.asarray(weight)[::-1, d], mode="valid")
      state[b], before = whole[len(document) :], np.zeros_like(before)
  return y, state


@IN_FLOAT64
@pytest.mark.compat
@pytest.mark.parametrize(
  ("width", "tokens", "packed"),
  [(1, 17, True), (2, 17, True), (4, 17, True), (4, 2, True), (1, 17, False), (4, 17, False), (4, 2, False)],
)
def test_shifted_copies_are_the_recurrence_and_numpy_in_values_and_every_gradient(width, tokens, packed):
  """With padding that holds large numbers, documents shorter than the filter, and calls shorter than it."""
  args, ids = inputs(tokens, width), IDS[:, -tokens:] if packed else np.ones((2, tokens), np.int32)
  args["x"] = jnp.where(jnp.asarray(ids == 0)[..., None], 1e6, args["x"])
  actual, expected = (values_and_gradients(name, args, jnp.asarray(ids) if packed else None) for name in ("xla", "recurrent"))
  assert_close(expected[0], in_numpy(**args, ids=ids))
  assert_close(actual[0], expected[0])
  assert_close(actual[1], expected[1], gradients=True)
  assert not np.any(np.asarray(actual[0][0])[ids == 0])


@IN_FLOAT64
@pytest.mark.parametrize("apart", [False, True])
def test_what_a_tpu_runs_is_the_recurrence(monkeypatch, apart):
  """On a TPU, columns are shifted unless padding separates a token from its predecessor; both branches run here on the CPU."""
  ids = IDS if apart else np.stack([np.repeat([1, 2, 0, 3, 4, 0], [5, 1, 2, 6, 2, 1]), np.repeat([0, 5], [17, 0])])
  args, taken = inputs(17, 4), []

  def branch(condition, yes, no, *args):
    taken.append(condition)
    return lax_cond(condition, yes, no, *args)

  lax_cond = jax.lax.cond
  monkeypatch.setattr(jax.lax, "platform_dependent", compile_for_tpu)
  monkeypatch.setattr(jax.lax, "cond", branch)
  ids = jnp.asarray(ids, jnp.int32)
  (y, state), pull_back = jax.vjp(lambda args: short_conv(**args, segment_ids=ids), args)
  assert [bool(condition) for condition in taken] == [apart]
  expected = values_and_gradients("recurrent", args, ids)
  rng = np.random.default_rng(5)
  gradients = pull_back(tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in (y, state)))[0]
  assert_close((y, state), expected[0])
  assert_close(gradients, expected[1], gradients=True)


def test_each_device_computes_its_share_over_axes_that_nobody_declared():
  """Forward and gradient: nothing is gathered, and only the gradient by the weight is summed over the rows."""
  rng = np.random.default_rng(3)
  x, weight, state = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 17, 512), (4, 512), (4, 3, 512)))
  args = x, weight, state, jnp.asarray(np.concatenate([IDS, IDS[::-1]]))

  def forward(x, weight, state, ids):
    return short_conv(x, weight, initial_state=state, segment_ids=ids)

  def gradient(x, weight, state, ids):
    out, pull_back = jax.vjp(lambda *floats: forward(*floats, ids), x, weight, state)
    return pull_back(out)

  for function, allowed in (forward, []), (gradient, ["all-reduce"]):
    whole = jax.jit(function).lower(*args).compile()
    mesh = jax.make_mesh((2, 2), ("width", "batch"), axis_types=(AxisType.Auto,) * 2)
    specs = P("batch", None, "width"), P(None, "width"), P("batch", None, "width"), P("batch")
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(args, specs, strict=True)]
    program = jax.jit(function).lower(*placed).compile()
    assert program.cost_analysis()["flops"] <= 0.27 * whole.cost_analysis()["flops"]
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf" = f32\[4,256\]\S* ({kinds})\(", program.as_text())
    assert found == re.findall(rf"({kinds})(?:-start)?\(", program.as_text()) == allowed
    assert_close(program(*placed), whole(*args), jnp.float32, gradients=function is gradient)


def test_a_tpu_still_branches_under_vmap(monkeypatch):
  """Otherwise it would compute both branches for each of the mapped calls, and select one."""
  monkeypatch.setattr(jax.lax, "platform_dependent", compile_for_tpu)
  mapped = jax.vmap(lambda args, ids: short_conv(**args, segment_ids=ids), (None, 0))
  assert "cond[" in str(jax.make_jaxpr(mapped)(inputs(17, 4, jnp.float32), jnp.asarray(IDS)[None]))


@IN_FLOAT64
@pytest.mark.parametrize("cut", range(1, 13))
def test_any_split_is_one_pass(cut):
  """Each of the two calls has the other's tokens as padding, so that one program serves them all."""
  args = inputs(17, 4)
  ids = np.concatenate([np.full((2, 13), 1, np.int32), IDS[:, -4:]], axis=1)
  early = jnp.arange(17)[None] < cut
  first, state = values("xla", args, jnp.where(early, ids, 0))
  second, state = values("xla", args | {"initial_state": state}, jnp.where(early, 0, ids))
  assert_close((first + second, state), values("xla", args, jnp.asarray(ids)))


@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
def test_bfloat16_sums_are_float32(implementation):
  """256 + 1 + 1 - 256 is 2 in float32, and 0 in bfloat16, where 256 + 1 = 256."""
  args = inputs(17, 4, jnp.bfloat16)
  x = args["x"].at[:, -4:].set(jnp.asarray([256.0, 1, 1, -256], jnp.bfloat16)[None, :, None])
  ones = args | {"x": x, "weight": jnp.ones_like(args["weight"])}
  ids = jnp.ones((2, 17), jnp.int32)
  y, state = values(implementation, ones, ids)
  assert y.dtype == state.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y[:, -1].astype(jnp.float32), 2)
  narrow = values(implementation, args, jnp.asarray(IDS))
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), args)
  exact = values("recurrent", wide, jnp.asarray(IDS))
  assert_close(jax.tree.map(lambda a: a.astype(jnp.float32), narrow), exact, jnp.bfloat16)
  # Only the whole sum is rounded, once.
  np.testing.assert_array_equal(narrow[0], values(implementation, wide, jnp.asarray(IDS))[0].astype(jnp.bfloat16))


def test_float32_weights_keep_bfloat16_activations():
  args = inputs(17, 4, jnp.bfloat16)
  for implementation in ("xla", "recurrent"):
    mixed = args | {"weight": args["weight"].astype(jnp.float32)}
    shapes = jax.eval_shape(lambda mixed, name=implementation: short_conv(**mixed, implementation=name), mixed)
    assert {x.dtype for x in shapes} == {jnp.dtype(jnp.bfloat16)}


@IN_FLOAT64
def test_no_state_is_a_state_of_zeros():
  args = inputs(6, 3)
  zeros = args | {"initial_state": jnp.zeros_like(args["initial_state"])}
  del args["initial_state"]
  assert_close(values("xla", args), values("xla", zeros))


def test_explain_says_which_implementation_runs_and_why_the_others_do_not():
  auto, requested = ops.explain(), ops.explain(implementation="recurrent")
  assert (auto.implementation, requested.implementation) == ("xla", "recurrent")
  assert "oracle" in auto.passed_over["recurrent"]
  assert "was requested" in requested.passed_over["xla"]
  args = inputs(6, 3, jnp.float32)

  def program(name):
    return str(jax.make_jaxpr(lambda args: short_conv(**args, implementation=name))(args))

  assert program("auto") == program("xla") != program("recurrent")


def floats(*shape):
  return jnp.zeros(shape, jnp.float32)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"x": floats(9, 5)}, r"x has shape \[9, 5\]; expected \[batch, tokens, channels\]"),
    ({"x": floats(2, 0, 5)}, r"x has shape \[2, 0, 5\]; expected .* at least one token"),
    ({"weight": floats(4)}, r"weight has shape \[4\]; expected \[width, 5\]"),
    ({"weight": floats(4, 6)}, r"weight has shape \[4, 6\]; expected \[width, 5\]"),
    ({"weight": floats(0, 5), "initial_state": None}, r"weight has shape \[0, 5\]; expected"),
    ({"initial_state": floats(2, 4, 5)}, r"initial_state has shape \[2, 4, 5\]; expected \[2, 3, 5\]"),
    ({"segment_ids": jnp.ones((2, 8), jnp.int32)}, r"segment_ids is int32\[2, 8\]; expected integers .*\[2, 9\]"),
    ({"implementation": "pallas"}, r"implementation='pallas' does not exist for short_conv; expected .*'xla'"),
  ],
)
def test_mistakes_are_named(wrong, message):
  args = inputs(9, 4, jnp.float32)
  with pytest.raises(ValueError, match=message):
    short_conv(**args | wrong)
