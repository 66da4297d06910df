"""Softmax attention: its blocks, its ring and its fast form are the equation, token against token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from memzoo.layers.attention import Attention, reference_attention, softmax_attention
from tolerances import assert_close, assert_finite

pytestmark = pytest.mark.slow

IN_FLOAT64 = pytest.mark.usefixtures("float64")
WIDTH, WINDOW = 8, 5
PACKED = np.array([1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6], np.int32)
PADDED = np.array([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0, 2, 2, 2, 3, 0], np.int32)


def layer(dtype=jnp.float64, **fields):
  sizes = {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "window": WINDOW}
  return Attention(**sizes | {"dtype": dtype, "param_dtype": dtype} | fields)


def inputs(tokens, dtype=jnp.float64, batch=2, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, tokens, WIDTH)), dtype)


def params(module, scale=8.0):
  """Fresh parameters, `scale` times as large, so that attention is far from uniform."""
  fresh = module.init(jax.random.key(0), inputs(2, module.dtype))
  return jax.tree.map(lambda p: p * jnp.asarray(scale, p.dtype), nn.meta.unbox(fresh))


def run(module, params, x, state=None, segment_ids=None):
  return jax.jit(module.apply)(params, x, state, segment_ids)


def plain(module, params, x, ids=None):
  """The equation without blocks or caches: every token against every other, the mask and positions from a loop."""
  batch, tokens, _ = x.shape
  ids = np.ones((batch, tokens), np.int32) if ids is None else ids
  position, mask = np.zeros((batch, tokens), np.int32), np.zeros((batch, tokens, tokens), bool)
  for b in range(batch):
    document = []
    for t in np.flatnonzero(ids[b]):
      document = [*document, t] if document and ids[b, document[-1]] == ids[b, t] else [t]
      position[b, t] = len(document) - 1
      mask[b, t, document[-module.slots :]] = True
  weights = params["params"]
  q, k, v = ((x @ weights[name]["kernel"]).reshape(batch, tokens, -1, module.head_dim) for name in ("query", "key", "value"))
  if module.rope_base is not None:
    half = module.head_dim // 2
    angle = position[..., None] * module.rope_base ** (-np.arange(half) / half)
    turn = jnp.asarray(np.exp(1j * angle))[:, :, None]

    def rotate(a):
      turned = jax.lax.complex(a[..., :half], a[..., half:]) * turn
      return jnp.concatenate([turned.real, turned.imag], axis=-1)

    q, k = rotate(q), rotate(k)
  k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
  logits = jnp.einsum("bthd,bshd->bhts", q, k) * module.head_dim**-0.5
  logits = jnp.where(jnp.asarray(mask | ~mask.any(-1, keepdims=True))[:, None], logits, -jnp.inf)
  out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v).reshape(batch, tokens, -1) @ weights["output"]["kernel"]
  return jnp.where(jnp.asarray(ids != 0)[..., None], out, 0)


@IN_FLOAT64
@pytest.mark.compat
@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 23])
@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_it_is_the_equation_within_and_beyond_the_window(tokens, rope_base):
  module, x = layer(rope_base=rope_base), inputs(tokens)
  weights = params(module)
  assert_close(run(module, weights, x)[0], jax.jit(lambda *args: plain(module, *args))(weights, x))


@IN_FLOAT64
@pytest.mark.parametrize("window", [WINDOW, 23], ids=["blocked", "whole"])
def test_documents_and_padding_in_values_and_gradients(window):
  module, x, ids = layer(window=window), inputs(23), np.stack([PACKED, PADDED])
  weights, cotangent = params(module), inputs(23, seed=1)

  def values_and_gradients(apply):
    return jax.jit(lambda *args: jax.vjp(apply, *args)[1](cotangent))(weights, x), jax.jit(apply)(weights, x)

  actual = values_and_gradients(lambda params, x: module.apply(params, x, None, jnp.asarray(ids))[0])
  expected = values_and_gradients(lambda params, x: plain(module, params, x, ids))
  assert_close(actual[1], expected[1])
  assert_close(actual[0], expected[0], gradients=True)


@IN_FLOAT64
@pytest.mark.parametrize("pieces", [(1,) * 23, (3,) * 7 + (2,), (7, 12, 4), (4, 19)], ids=["ones", "threes", "blocks", "late"])
def test_the_ring_remembers_what_the_window_sees(pieces):
  """Any way of cutting a sequence, far past the window, is the parallel form."""
  module, x = layer(), inputs(23)
  weights, parts, state = params(module), [], None
  for piece in jnp.split(x, np.cumsum(pieces)[:-1], axis=1):
    y, state = run(module, weights, piece, state)
    parts.append(y)
  assert_close(jnp.concatenate(parts, axis=1), jax.jit(lambda *args: plain(module, *args))(weights, x))
  assert state.keys.shape == (2, WINDOW, 2, 6)
  np.testing.assert_array_equal(state.length, [23, 23])


@IN_FLOAT64
def test_what_fell_out_of_the_window_is_forgotten():
  module, x = layer(), inputs(23)
  weights = params(module)
  other = x.at[:, :10].set(inputs(10, seed=1))
  actual, expected = (run(module, weights, x)[0] for x in (other, x))
  assert_close(actual[:, 10 + WINDOW - 1 :], expected[:, 10 + WINDOW - 1 :])
  assert not np.allclose(actual[:, 10 + WINDOW - 2], expected[:, 10 + WINDOW - 2])


@IN_FLOAT64
def test_only_distances_matter():
  """A window far into a document reads like the same tokens at its start."""
  module, x = layer(), inputs(40)
  weights = params(module)
  late, early = run(module, weights, x)[0][:, -6:], run(module, weights, x[:, -6 - WINDOW + 1 :])[0][:, -6:]
  assert_close(late, early)


@IN_FLOAT64
@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_rotary_positions_tell_the_order(rope_base):
  module, x = layer(rope_base=rope_base), inputs(WINDOW)
  weights = params(module)
  swapped = x[:, np.array([1, 0, *range(2, WINDOW)])]
  actual, expected = (run(module, weights, x)[0][:, -1] for x in (swapped, x))
  assert np.allclose(actual, expected) == (rope_base is None)


@IN_FLOAT64
@pytest.mark.parametrize("window", [WINDOW, 23], ids=["blocked", "whole"])
def test_positions_restart_with_every_document(window):
  """Seen in the keys left behind: they are rotated by their position in the last document."""
  module, x = layer(window=window), inputs(23, batch=1)
  ids = np.repeat(np.array([1, 2], np.int32), (19, 4))
  weights = params(module)
  y, state = run(module, weights, x, None, jnp.asarray(ids)[None])
  alone, expected = run(module, weights, x[:, 19:])
  assert_close(y[:, 19:], alone)
  np.testing.assert_array_equal(state.length, expected.length)
  assert_close((state.keys[:, :4], state.values[:, :4]), (expected.keys[:, :4], expected.values[:, :4]))


@IN_FLOAT64
def test_the_window_is_what_counts_and_max_length_stands_in_for_it():
  x, weights = inputs(23), params(layer())
  expected = run(layer(), weights, x)
  for module in (layer(window=None, max_length=WINDOW), layer(max_length=3), layer(max_length=100)):
    assert_close(run(module, weights, x), expected)
  assert layer(window=None).slots == Attention.max_length
  assert not np.allclose(run(layer(window=WINDOW - 1), weights, x)[0], expected[0])


@IN_FLOAT64
def test_a_fresh_state_is_no_state():
  module, x = layer(), inputs(7)
  weights = params(module)
  fresh = module.apply(weights, 2, method="initial_state")
  assert_close(run(module, weights, x, fresh), run(module, weights, x))


@IN_FLOAT64
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(
  ("dtype", "promotion"), [(jnp.float32, "strict"), (jnp.bfloat16, "strict"), (jnp.bfloat16, "standard")]
)
def test_the_fast_form_is_the_reference_in_values_and_gradients(dtype, promotion, key_heads):
  rng = np.random.default_rng(0)
  shapes = (2, 7, 4, 16), (2, 11, key_heads, 16), (2, 11, key_heads, 16)
  q, k, v = (jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes)
  cotangent = jnp.asarray(rng.normal(size=q.shape), dtype)
  mask = rng.uniform(size=(2, 7, 11)) < 0.4
  mask[..., 3] = True

  def values_and_gradients(attend, *qkv, cotangent):
    out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, jnp.asarray(mask)), *qkv)
    return out, pull_back(cotangent)

  with jax.numpy_dtype_promotion(promotion):
    out, gradients = jax.jit(lambda: values_and_gradients(softmax_attention, q, k, v, cotangent=cotangent))()
  assert {a.dtype for a in jax.tree.leaves((out, gradients))} == {jnp.dtype(dtype)}
  wide, wide_cotangent = ([a.astype(jnp.float64) for a in arrays] for arrays in ((q, k, v), (cotangent,)))
  expected = jax.jit(lambda: values_and_gradients(reference_attention, *wide, cotangent=wide_cotangent[0]))()
  assert_close(out, expected[0], dtype)
  assert_close(gradients, expected[1], dtype, gradients=True)


@IN_FLOAT64
def test_the_reference_is_the_equation():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(1, 3, 4, 6)), rng.normal(size=(1, 5, 2, 6)), rng.normal(size=(1, 5, 2, 6))
  mask = np.tril(np.ones((1, 3, 5), bool), 2)
  expected = np.zeros_like(q)
  for t, h in np.ndindex(3, 4):
    weight = np.exp(k[0, :, h // 2] @ q[0, t, h] / 6**0.5) * mask[0, t]
    expected[0, t, h] = weight @ v[0, :, h // 2] / weight.sum()
  assert_close(reference_attention(*map(jnp.asarray, (q, k, v, mask))), expected)


@IN_FLOAT64
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_activations_and_their_cache(dtype):
  module, exact = layer(dtype), layer()
  x = inputs(23).astype(dtype)
  weights = jax.tree.map(lambda p: p.astype(dtype), params(exact, scale=4.0))
  wide = jax.tree.map(lambda p: p.astype(jnp.float64), weights)
  ids = jnp.asarray(np.stack([PACKED, PADDED]))
  y, state = run(module, weights, x, None, ids)
  assert {y.dtype, state.keys.dtype, state.values.dtype} == {jnp.dtype(dtype)}
  assert_close(y, run(exact, wide, x.astype(jnp.float64), None, ids)[0], dtype)


def test_rows_that_see_nothing_have_finite_gradients():
  """Padding before the first token, a row of nothing else, and logits of a thousand."""
  module, x = layer(jnp.float32), 30 * inputs(23, jnp.float32)
  weights, ids = params(module, scale=30.0), jnp.asarray(np.stack([PADDED, np.zeros_like(PADDED)]))

  def loss(params, x):
    y, state = module.apply(params, x, None, ids)
    return jnp.sum(y), (y, state)

  (gradients, by_input), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(weights, x)
  assert_finite((gradients, by_input, out))
  assert np.any(np.asarray(by_input[0]))
  assert not np.any(np.asarray(by_input[1]))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_key_heads": 3}, r"num_heads=4 .*num_key_heads=3"),
    ({"window": 0}, r"window=0.*want at least one token"),
    ({"window": -1}, r"window=-1.*want at least one token"),
    ({"window": None, "max_length": 0}, r"max_length=0.*want at least one token"),
    ({"head_dim": 5}, r"head_dim=5.*even"),
  ],
)
def test_mistakes_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    layer(jnp.float32, **fields).init(jax.random.key(0), inputs(3, jnp.float32))
