"""Softmax attention: its blocks, its ring of slots and its fast form equal the equation, token against token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from memzoo.layers.attention import Attention, _write_by_selection, _write_slots, reference_attention, softmax_attention
from memzoo.layers.latent_attention import LatentAttention
from memzoo.layers.local_linear_attention import LocalLinearAttention, Parallax
from memzoo.layers.rotary import rotate
from tolerances import assert_close, assert_finite

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("attention")]

IN_FLOAT64 = pytest.mark.usefixtures("float64")
WIDTH, WINDOW = 8, 5
PACKED = np.array([1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6], np.int32)
PADDED = np.array([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0, 2, 2, 2, 3, 0], np.int32)


def layer(dtype=jnp.float64, **fields):
  sizes = {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "window": WINDOW}
  return Attention(**sizes | {"dtype": dtype, "param_dtype": dtype} | fields)


def inputs(tokens, dtype=jnp.float64, batch=2, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, tokens, WIDTH)), dtype)


@functools.cache
def _shapes(module):
  return nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), inputs(2, module.dtype)))


def params(module, scale=8.0):
  """Parameters `scale` times as large as fresh ones, so that attention is far from uniform."""
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda p: jnp.asarray(0.02 * scale * rng.normal(size=p.shape), p.dtype), _shapes(module))


@functools.cache
def _compiled(module):
  return jax.jit(module.apply)


def run(module, params, x, state=None, segment_ids=None):
  return _compiled(module)(params, x, state, segment_ids)


def plain(module, params, x, ids=None):
  """The equation without blocks or caches: every token against every other, the mask and positions from a loop."""
  ids = np.ones(x.shape[:2], np.int32) if ids is None else ids
  position, mask = positions_and_mask(module, ids)
  frequency = (module.rope_base or 1.0) ** (-np.arange(module.head_dim // 2) / (module.head_dim // 2))
  return _plain(module, params, x, ids, mask, np.exp(1j * position[..., None] * frequency))


def positions_and_mask(module, ids):
  batch, tokens = ids.shape
  position, mask = np.zeros((batch, tokens), np.int32), np.zeros((batch, tokens, tokens), bool)
  for b in range(batch):
    document = []
    for t in np.flatnonzero(ids[b]):
      document = [*document, t] if document and ids[b, document[-1]] == ids[b, t] else [t]
      position[b, t] = len(document) - 1
      mask[b, t, document[-module.slots :]] = True
  return position, mask


@functools.partial(jax.jit, static_argnums=0)
def _plain(module, params, x, ids, mask, turn):
  batch, tokens, _ = x.shape
  weights = params["params"]
  q, k, v = ((x @ weights[name]["kernel"]).reshape(batch, tokens, -1, module.head_dim) for name in ("query", "key", "value"))
  if module.rope_base is not None:
    half = module.head_dim // 2

    def rotate(a):
      turned = jax.lax.complex(a[..., :half], a[..., half:]) * turn[:, :, None]
      return jnp.concatenate([turned.real, turned.imag], axis=-1)

    q, k = rotate(q), rotate(k)
  k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
  logits = jnp.einsum("bthd,bshd->bhts", q, k) * module.head_dim**-0.5
  logits = jnp.where((mask | ~mask.any(-1, keepdims=True))[:, None], logits, -jnp.inf)
  out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v).reshape(batch, tokens, -1) @ weights["output"]["kernel"]
  return jnp.where((ids != 0)[..., None], out, 0)


@IN_FLOAT64
@pytest.mark.compat
@pytest.mark.parametrize(("tokens", "rope_base"), [(1, 100.0), (5, 100.0), (6, 100.0), (23, 100.0), (23, None)])
def test_attention_equals_the_equation_within_and_beyond_the_window(tokens, rope_base):
  module, x = layer(rope_base=rope_base), inputs(tokens)
  weights = params(module)
  assert_close(run(module, weights, x)[0], plain(module, weights, x))


@IN_FLOAT64
@pytest.mark.parametrize("window", [WINDOW, 23], ids=["blocked", "whole"])
def test_documents_and_padding_equal_the_equation_in_values_and_gradients(window):
  module, x, ids = layer(window=window), inputs(23), np.stack([PACKED, PADDED])
  weights, cotangent = params(module), inputs(23, seed=1)

  def values_and_gradients(apply):
    out, pull_back = jax.vjp(apply, weights, x)
    return out, pull_back(cotangent)

  ring = jax.jit(lambda: values_and_gradients(lambda params, x: module.apply(params, x, None, jnp.asarray(ids))[0]))
  actual, expected = ring(), values_and_gradients(lambda params, x: plain(module, params, x, ids))
  assert_close(actual[0], expected[0])
  assert_close(actual[1], expected[1], gradients=True)


@IN_FLOAT64
@pytest.mark.parametrize("pieces", [(1,) * 23, (3, 12, 4, *(1,) * 4)], ids=["ones", "shorter and longer than the window"])
def test_the_ring_holds_what_the_window_sees(pieces):
  """Any split of a sequence, far longer than the window, gives the outputs of one pass."""
  module, x = layer(), inputs(23)
  weights, parts, state = params(module), [], module.apply({}, 2, method="initial_state")
  for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
    y, state = run(module, weights, jnp.asarray(piece), state)
    parts.append(y)
  assert_close(jnp.concatenate(parts, axis=1), plain(module, weights, x))
  assert state.keys.shape == (2, 2, WINDOW, 6)
  np.testing.assert_array_equal(state.length, [23, 23])


@pytest.mark.parametrize(("batch", "key_heads", "prefix"), [(1, 4, None), (2, 2, None), (1, 2, np.ones((3, WIDTH)))])
def test_one_token_reads_the_cache_where_it_lies(batch, key_heads, prefix):
  """Neither joined with the token nor transposed, nor written anew: a copy of the cache takes longer than to read it."""
  module, x = layer(jnp.float32, window=1024, head_dim=32, num_key_heads=key_heads), inputs(1, jnp.float32, batch)
  state = module.apply({}, batch, method="initial_state")
  step = jax.jit(module.apply, donate_argnums=2).lower(params(module), x, state, None, prefix).compile()
  assert step.memory_analysis().temp_size_in_bytes < state.keys.nbytes


@pytest.mark.parametrize("kind", [LocalLinearAttention, Parallax])
@pytest.mark.parametrize(("tokens", "continues"), [(3, False), (3, True), (1, False), (1, True)])
def test_only_attention_takes_a_prefix(kind, tokens, continues):
  module, x = kind(num_heads=2, head_dim=4, window=WINDOW), inputs(tokens, jnp.float32)
  state = module.apply({}, 2, method="initial_state") if continues else None
  with pytest.raises(ValueError, match=f"{kind.__name__} was given a prefix"):
    jax.eval_shape(module.init, jax.random.key(0), x, state, None, np.ones((3, WIDTH), np.float32))


@IN_FLOAT64
def test_tokens_outside_the_window_are_forgotten():
  module, x = layer(), inputs(23)
  weights = params(module)
  other = x.at[:, :10].set(inputs(10, seed=1))
  actual, expected = (run(module, weights, x)[0] for x in (other, x))
  assert_close(actual[:, 10 + WINDOW - 1 :], expected[:, 10 + WINDOW - 1 :])
  assert not np.allclose(actual[:, 10 + WINDOW - 2], expected[:, 10 + WINDOW - 2])


@IN_FLOAT64
def test_outputs_depend_only_on_distances_between_tokens():
  """A window far into a document reads like the same tokens at its start."""
  module, x = layer(), inputs(23)
  weights = params(module)
  shifted = jnp.concatenate([x[:, 10:], x[:, :10]], axis=1)
  late, early = run(module, weights, x)[0][:, 10 + WINDOW - 1 :], run(module, weights, shifted)[0][:, WINDOW - 1 : 13]
  assert_close(late, early)


@IN_FLOAT64
@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_rotary_positions_tell_the_order(rope_base):
  module, x = layer(rope_base=rope_base), inputs(23)
  weights = params(module)
  swapped = x.at[:, :2].set(x[:, 1::-1])
  actual, expected = (run(module, weights, x)[0][:, WINDOW - 1] for x in (swapped, x))
  assert np.allclose(actual, expected) == (rope_base is None)


@IN_FLOAT64
@pytest.mark.parametrize("window", [WINDOW, 23], ids=["blocked", "whole"])
def test_positions_restart_with_every_document(window):
  """Also if the first document continues an earlier call. The cached keys show the positions, which rotate them."""
  module, x = layer(window=window), inputs(23)
  weights, rows = params(module), np.ones((2, 23), np.int32)
  rows[0, 19:] = 2
  rows[1, :19] = 0
  fresh = module.apply({}, 2, method="initial_state")
  used = fresh._replace(keys=fresh.keys.at[0].set(1.0), values=fresh.values.at[0].set(1.0), length=fresh.length.at[0].set(3))
  y, state = run(module, weights, x.at[1].set(x[0]), used, jnp.asarray(rows))
  assert_close(y[0, 19:], y[1, 19:])
  np.testing.assert_array_equal(state.length, [4, 4])
  assert_close((state.keys[0, :, :4], state.values[0, :, :4]), (state.keys[1, :, :4], state.values[1, :, :4]))


@IN_FLOAT64
def test_max_length_is_the_window_where_none_is_set():
  x, weights = inputs(23), params(layer())
  expected = run(layer(), weights, x)
  assert_close(run(layer(window=None, max_length=WINDOW), weights, x), expected)
  assert layer(max_length=3).slots == layer(max_length=100).slots == WINDOW
  assert layer(window=None).slots == Attention.max_length
  assert layer(window=WINDOW - 1).slots == WINDOW - 1


@IN_FLOAT64
def test_no_state_equals_a_fresh_state():
  module, x = layer(), inputs(12)
  weights = params(module)
  fresh = module.apply(weights, 2, method="initial_state")
  assert_close(run(module, weights, x, fresh), run(module, weights, x))


@IN_FLOAT64
@pytest.mark.parametrize(
  ("dtype", "promotion", "key_heads"),
  [(jnp.float32, "strict", 2), (jnp.float32, "strict", 1), (jnp.bfloat16, "strict", 4), (jnp.bfloat16, "standard", 2)],
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
def test_narrow_activations_have_a_narrow_cache_and_the_outputs_of_float64(dtype):
  module, exact = layer(dtype), layer()
  x = inputs(23).astype(dtype)
  weights = jax.tree.map(lambda p: p.astype(dtype), params(exact, scale=4.0))
  wide = jax.tree.map(lambda p: p.astype(jnp.float64), weights)
  ids = jnp.asarray(np.stack([PACKED, PADDED]))
  y, state = run(module, weights, x, None, ids)
  assert {y.dtype, state.keys.dtype, state.values.dtype} == {jnp.dtype(dtype)}
  assert_close(y, run(exact, wide, x.astype(jnp.float64), None, ids)[0], dtype)


def test_rows_without_visible_tokens_have_finite_gradients():
  """Padding before the first token, a row of padding alone, and logits of a thousand."""
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
    ({"window": 0}, r"window=0; expected at least 1"),
    ({"window": -1}, r"window=-1; expected at least 1"),
    ({"window": None, "max_length": 0}, r"max_length=0; expected at least 1"),
    ({"head_dim": 5}, r"head_dim=5.*even"),
  ],
)
def test_mistakes_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(layer(jnp.float32, **fields).init, jax.random.key(0), inputs(3, jnp.float32))


def test_a_write_by_selection_is_a_write_of_one_token():
  """As in programs for TPUs. A token of padding has a slot that does not exist."""
  cache, new = jnp.arange(2.0 * 3 * 5 * 4).reshape(2, 3, 5, 4), -jnp.ones((2, 3, 1, 4))
  slot = jnp.array([[3], [5]], jnp.int32)
  found = _write_by_selection(cache, slot, new)
  np.testing.assert_array_equal(found, _write_slots(cache, slot, new))
  assert int((found == -1).sum()) == 3 * 4


@IN_FLOAT64
@pytest.mark.parametrize("base", [None, 100.0])
def test_latent_attention_equals_attention_with_the_keys_and_values_of_every_head(base):
  """The equation as it is written: W_k c and W_v c of every token and head, and softmax attention to them."""
  heads, own, shared, latent, value = 4, 6, 4, 7, 5
  sizes = {"num_heads": heads, "head_dim": own, "shared_dim": shared, "latent_dim": latent, "value_dim": value}
  module = LatentAttention(**sizes, window=WINDOW, rope_base=base, dtype=jnp.float64, param_dtype=jnp.float64)
  x, weights = inputs(23), params(module)
  p = {name: kernel.get("kernel") if isinstance(kernel, dict) else kernel for name, kernel in weights["params"].items()}

  position, mask = positions_and_mask(module.core, np.ones((2, 23), np.int32))
  c = x @ p["latent"]
  c *= weights["params"]["latent_norm"]["scale"][None, None] * (jnp.mean(c**2, axis=-1, keepdims=True) + 1e-6) ** -0.5
  parts = [(x @ p["shared_key"])[:, :, None], (x @ p["shared_query"]).reshape(2, 23, heads, shared)]
  if base is not None:
    parts = [rotate(part, jnp.asarray(position), base) for part in parts]
  k = jnp.concatenate([jnp.einsum("btc,hcd->bthd", c, p["latent_key"]), jnp.repeat(parts[0], heads, axis=2)], axis=-1)
  q = jnp.concatenate([(x @ p["query"]).reshape(2, 23, heads, own), parts[1]], axis=-1)
  out = reference_attention(q, k, jnp.einsum("btc,hcd->bthd", c, p["latent_value"]), jnp.asarray(mask))
  assert_close(run(module, weights, x)[0], out.reshape(2, 23, -1) @ p["output"])
