"""The short convolution: shifted copies equal the token-by-token form equals NumPy's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.pallas_kernels import short_conv as ops
from memzoo.pallas_kernels.short_conv import short_conv
from tolerances import assert_close

pytestmark = pytest.mark.slow

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


def values(implementation, args, ids=None):
  return jax.jit(lambda args, ids: short_conv(**args, segment_ids=ids, implementation=implementation))(args, ids)


def values_and_gradients(implementation, args, ids=None):
  def run(args, ids):
    out, pull_back = jax.vjp(lambda args: short_conv(**args, segment_ids=ids, implementation=implementation), args)
    rng = np.random.default_rng(5)
    return out, pull_back(tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in out))[0]

  return jax.jit(run)(args, ids)


@IN_FLOAT64
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_the_oracle_is_a_convolution(width):
  args = inputs(9, width)
  y, state = values("recurrent", args)
  whole = np.concatenate([args["initial_state"], args["x"]], axis=1)
  for b, d in np.ndindex(2, CHANNELS):
    assert_close(y[b, :, d], np.convolve(whole[b, :, d], np.asarray(args["weight"])[::-1, d], mode="valid"))
  np.testing.assert_array_equal(state, whole[:, 9:])


@IN_FLOAT64
@pytest.mark.compat
@pytest.mark.parametrize("segmented", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_shifted_copies_are_the_oracle_in_values_and_every_gradient(width, tokens, segmented):
  args = inputs(tokens, width)
  ids = jnp.asarray(IDS[:, -tokens:]) if segmented else None
  actual, expected = (values_and_gradients(name, args, ids) for name in ("xla", "recurrent"))
  assert_close(actual[0], expected[0])
  assert_close(actual[1], expected[1], gradients=True)


@IN_FLOAT64
@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
def test_packed_documents_are_separate_documents(implementation):
  args, lengths = inputs(14, 4, batch=1), (2, 1, 3, 8)
  ids = jnp.asarray(np.repeat(np.arange(1, 5, dtype=np.int32), lengths))[None]
  y, state = values(implementation, args, ids)
  for i, end in enumerate(np.cumsum(lengths)):
    before = args["initial_state"] if i == 0 else jnp.zeros_like(args["initial_state"])
    alone, last = values(implementation, args | {"x": args["x"][:, end - lengths[i] : end], "initial_state": before})
    assert_close(y[:, end - lengths[i] : end], alone)
  assert_close(state, last)


@IN_FLOAT64
@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
def test_padding_is_not_there(implementation):
  args = inputs(17, 4)
  for row in range(2):
    kept, one = np.flatnonzero(IDS[row]), {name: x if name == "weight" else x[row : row + 1] for name, x in args.items()}
    spoilt = one | {"x": jnp.where(jnp.asarray(IDS[row] == 0)[None, :, None], 1e6, one["x"])}
    y, state = values(implementation, spoilt, jnp.asarray(IDS[row])[None])
    expected = values(implementation, one | {"x": one["x"][:, kept]}, jnp.asarray(IDS[row, kept])[None])
    assert_close((y[:, kept], state), expected)
    assert not np.any(np.asarray(y)[:, IDS[row] == 0])


@IN_FLOAT64
@pytest.mark.parametrize("ids", [None, IDS], ids=["plain", "documents"])
@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
@pytest.mark.parametrize("pieces", [(9, 8), (1, 2, 1, 13)], ids=str)
def test_any_split_is_one_pass(implementation, pieces, ids):
  if ids is not None:  # neighbours tell documents apart, and a call does not see the one before it: cut inside documents
    ids = np.concatenate([np.full((2, 13), 1, np.int32), IDS[:, -4:]], axis=1)
  args = inputs(17, 4)
  parts, state, start = [], args["initial_state"], 0
  for piece in pieces:
    now = slice(start, start + piece)
    y, state = values(
      implementation, args | {"x": args["x"][:, now], "initial_state": state}, None if ids is None else jnp.asarray(ids[:, now])
    )
    parts.append(y)
    start += piece
  expected = values(implementation, args, None if ids is None else jnp.asarray(ids))
  assert_close((jnp.concatenate(parts, axis=1), state), expected)


@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_sums_are_float32(implementation, param_dtype):
  """256 + 1 + 1 - 256 is 2 in float32, and nothing like it in bfloat16, where 256 + 1 = 256."""
  x = jnp.asarray([256.0, 1, 1, -256], jnp.bfloat16)[None, :, None]
  weight = jnp.ones((4, 1), param_dtype)
  y, state = jax.jit(lambda x: short_conv(x, weight, implementation=implementation))(x)
  assert y.dtype == state.dtype == jnp.bfloat16
  assert float(y[0, -1, 0]) == 2
  args = inputs(17, 4, jnp.bfloat16)
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), args)
  narrow = values(implementation, args | {"weight": args["weight"].astype(param_dtype)}, jnp.asarray(IDS))
  expected = values("recurrent", wide, jnp.asarray(IDS))
  assert_close(jax.tree.map(lambda a: a.astype(jnp.float32), narrow), expected, jnp.bfloat16)
  # One rounding of the whole sum, and nothing else.
  np.testing.assert_array_equal(narrow[0], values(implementation, wide, jnp.asarray(IDS))[0].astype(jnp.bfloat16))


@IN_FLOAT64
def test_no_state_is_a_state_of_zeros():
  args = inputs(6, 3)
  zeros = args | {"initial_state": jnp.zeros_like(args["initial_state"])}
  del args["initial_state"]
  assert_close(values("xla", args), values("xla", zeros))


def test_explain_says_which_and_why_not_the_others():
  auto, asked = ops.explain(), ops.explain(implementation="recurrent")
  assert (auto.implementation, asked.implementation) == ("xla", "recurrent")
  assert "oracle" in auto.passed_over["recurrent"]
  assert "was asked for" in asked.passed_over["xla"]
  args = inputs(6, 3, jnp.float32)

  def program(name):
    return str(jax.make_jaxpr(lambda args: short_conv(**args, implementation=name))(args))

  assert program("auto") == program("xla") != program("recurrent")


def floats(*shape):
  return jnp.zeros(shape, jnp.float32)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"x": floats(9, 5)}, r"x has shape \[9, 5\]; want \[batch, tokens, channels\]"),
    ({"x": floats(2, 0, 5)}, r"x has shape \[2, 0, 5\]; want .* at least one token"),
    ({"weight": floats(4)}, r"weight has shape \[4\]; want \[width, 5\]"),
    ({"weight": floats(4, 6)}, r"weight has shape \[4, 6\]; want \[width, 5\]"),
    ({"weight": floats(0, 5), "initial_state": None}, r"weight has shape \[0, 5\]; want"),
    ({"initial_state": floats(2, 4, 5)}, r"initial_state has shape \[2, 4, 5\]; want \[2, 3, 5\]"),
    ({"segment_ids": jnp.ones((2, 8), jnp.int32)}, r"segment_ids is int32\[2, 8\]; want integers .*\[2, 9\]"),
    ({"implementation": "pallas"}, r"implementation='pallas' does not exist for short_conv; want .*'xla'"),
  ],
)
def test_mistakes_are_named(wrong, message):
  args = inputs(9, 4, jnp.float32)
  with pytest.raises(ValueError, match=message):
    short_conv(**args | wrong)
