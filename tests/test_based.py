"""Based: the layer in NumPy, written from the paper, and what follows from its kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from memzoo.layers import Based
from memzoo.pallas_kernels.taylor_attention import count_features, taylor_attention, taylor_features
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("float64")


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def read(q, k, v, **options):
  return jax.jit(taylor_attention, static_argnames=("implementation",))(q, k, v, **options)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_inner_products_of_features_are_the_polynomial(width):
  q, k = normal(5, width), normal(7, width, seed=1)
  s = q @ k.T / width**0.5
  features = [taylor_features(x) for x in (q, k)]
  assert features[0].shape == (5, count_features(width))
  assert_close(features[0] @ features[1].T, 1 + s + s * s / 2)


def rotated(x, t):
  """x [H, d] at position t."""
  half = x.shape[-1] // 2
  angle = t * 10_000.0 ** -(np.arange(half) / half)
  a, b = x[:, :half], x[:, half:]
  return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


@pytest.mark.slow
def test_the_layer_is_its_papers_equation():
  """Token by token, for two documents: a fraction of weighted sums, and softmax over the last three tokens."""
  heads, features, width, window = 2, 3, 4, 3
  layer = Based(num_heads=heads, feature_dim=features, head_dim=width, window=window, param_dtype=jnp.float64)
  x, segments = normal(1, 11, 5), np.array([[1] * 5 + [2] * 6], np.int32)
  params = filled(layer, x)
  y, _ = jax.jit(layer.apply)(params, x, None, jnp.asarray(segments))
  p, x = jax.tree.map(np.asarray, params["params"]), np.asarray(x)[0]
  q, k, v = (x @ p[name]["kernel"] for name in ("query", "key", "value"))
  local = [x @ p["attention"][name]["kernel"] for name in ("query", "key", "value")]
  expected = []
  for t in range(11):
    start = 0 if t < 5 else 5
    both = []
    for h in range(heads):
      of = [slice(h * n, (h + 1) * n) for n in (features, width)]
      s = k[start : t + 1, of[0]] @ q[t, of[0]] / features**0.5
      weights = 1 + s + s * s / 2
      value = weights @ v[start : t + 1, of[1]] / weights.sum()
      first = max(start, t - window + 1)
      keys = np.concatenate([rotated(local[1][None, j, of[1]], j - start) for j in range(first, t + 1)])
      s = keys @ rotated(local[0][None, t, of[1]], t - start)[0] / width**0.5
      weights = np.exp(s - s.max())
      both.append((value, weights @ local[2][first : t + 1, of[1]] / weights.sum()))
    paths = (np.concatenate(x) for x in zip(*both, strict=True))
    expected.append(sum(x @ w["kernel"] for x, w in zip(paths, (p["output"], p["attention"]["output"]), strict=True)))
  assert_close(y[0], np.stack(expected))


def test_the_first_read_is_the_first_value():
  q, k, v = normal(2, 3, 2, 4), normal(2, 3, 2, 4, seed=1), normal(2, 3, 2, 5, seed=2)
  assert_close(read(q, k, v)[0][:, 0], v[:, 0])


@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
def test_reads_are_averages_with_positive_weights_however_large_the_queries_are(implementation):
  q, k = 30 * normal(1, 40, 2, 4), 30 * normal(1, 40, 2, 4, seed=1)
  v = jax.random.uniform(jax.random.key(0), (1, 40, 2, 3), jnp.float64)
  out, _ = read(q, k, v, implementation=implementation)
  assert np.all(out > v.min(axis=1, keepdims=True) * (1 - 1e-9))
  assert np.all(out < v.max(axis=1, keepdims=True) * (1 + 1e-9))


def test_for_long_queries_the_kernel_is_a_square():
  q, k, v = normal(1, 20, 1, 4), normal(1, 20, 1, 4, seed=1), normal(1, 20, 1, 3, seed=2)
  weights = np.tril(np.einsum("bthk,bshk->ts", q, k) ** 2)
  square = weights @ np.asarray(v[0, :, 0]) / weights.sum(axis=1, keepdims=True)
  assert np.max(np.abs(read(1e7 * q, k, v)[0][0, :, 0] - square)) < 1e-3


def test_a_layer_without_a_window_has_no_cache_and_an_odd_width_is_refused_with_one():
  layer = Based(num_heads=2, feature_dim=3, head_dim=5, window=None)
  assert layer.apply({}, 1, method="initial_state").cache is None
  with pytest.raises(ValueError, match=r"head_dim=5 is odd; expected an even width"):
    layer.clone(window=3).init(jax.random.key(0), jnp.zeros((1, 2, 8)))


def test_the_backward_pass_keeps_no_features():
  layer = Based(num_heads=4, feature_dim=16, head_dim=6, window=None)
  x = jnp.zeros((1, 64, 8), jnp.float32)
  params = jax.eval_shape(layer.init, jax.random.key(0), x)

  def kept(params, x):
    return jax.vjp(lambda params: layer.apply(params, x)[0], params)[1]

  shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(kept, params, x))]
  assert shapes
  assert not [shape for shape in shapes if 153 in shape and 64 in shape], shapes
