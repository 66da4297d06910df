"""Local linear attention: its definition, the identities of its papers, and the blockwise form against the dense one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.pallas_kernels import local_linear as ops
from memzoo.pallas_kernels.local_linear import (
  Allowed,
  blockwise,
  causal,
  local_linear_attention,
  parallax_attention,
  squared_distance,
)
from tolerances import assert_close, assert_finite


def inputs(batch=2, tokens=22, heads=4, key_heads=2, width=6, values=5, seed=0, dtype=np.float64):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape).astype(dtype))

  q, k = normal(batch, tokens, heads, width), normal(batch, tokens, key_heads, width)
  ridge = jnp.asarray(rng.uniform(0.05, 2, (batch, tokens, heads)).astype(dtype))
  return q, k, normal(batch, tokens, key_heads, values), ridge


SEGMENTS = np.stack([np.repeat([1, 2, 0, 3], [7, 6, 3, 6]), np.repeat([0, 5, 4, 4], [2, 9, 1, 10])]).astype(np.int32)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]
dense = partial(local_linear_attention, implementation="dense")


@pytest.fixture
def small_blocks(monkeypatch):
  """Several blocks of queries and of keys, none of which divides the length."""
  monkeypatch.setattr(blockwise, "QUERIES", 4)
  monkeypatch.setattr(blockwise, "KEYS", 6)


def fitted(q, k, v, ridge, scale):
  """The value at q of the linear model that is fitted to k [S, d] and v [S, V], by the definition: slope and intercept."""
  p = np.exp(scale * (k @ q - (k @ q).max()))
  p /= p.sum()
  z = np.concatenate([np.ones((len(k), 1)), k - q], axis=1)
  penalty = ridge * np.diag([0.0] + [1.0] * len(q))
  return np.linalg.solve(z.T @ (p[:, None] * z) + penalty, z.T @ (p[:, None] * v))[0]


def test_each_query_reads_the_model_that_is_fitted_to_its_past():
  q, k, v, ridge = map(np.asarray, inputs())
  y = np.asarray(dense(*inputs(), segment_ids=jnp.asarray(SEGMENTS), window=5))
  for b, t, h in np.ndindex(*ridge.shape):
    past = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t] != 0][-5:]
    expected = fitted(q[b, t, h], k[b, past, h // 2], v[b, past, h // 2], ridge[b, t, h], 6**-0.5) if past else np.zeros(5)
    np.testing.assert_allclose(y[b, t, h], expected, atol=1e-12)


def test_it_is_the_published_form_without_its_denominator():
  """s_ij = w_ij (1 - z_ij . rho_i) / (omega_i - mu_i . rho_i), with the ridge times omega_i."""
  q, k, v, ridge = (np.asarray(x)[0, :, 0] for x in inputs(heads=1, key_heads=1))
  y = np.asarray(dense(*inputs(heads=1, key_heads=1)))[0, :, 0]
  for t in range(len(q)):
    z = k[: t + 1] - q[t]
    w = np.exp(6**-0.5 * (k[: t + 1] @ q[t]))
    sigma = z.T @ (w[:, None] * z) + ridge[t] * w.sum() * np.eye(6)
    rho = np.linalg.solve(sigma, w @ z)
    s = w * (1 - z @ rho) / (w.sum() - w @ z @ rho)
    np.testing.assert_allclose(y[t], s @ v[: t + 1], atol=1e-12)


CASES = {
  "causal": {},
  "documents": {"segment_ids": SEGMENTS},
  "window": {"segment_ids": SEGMENTS, "window": 5},
  "diagonal blocks": {"segment_ids": SEGMENTS, "blocks": 3},
  "scale": {"scale": 1.5},
}


@pytest.mark.parametrize("solver", ["direct", pytest.param("cg", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.compat] * (name == "documents")) for name in CASES])
def test_blocks_are_the_dense_form_in_values_and_all_gradients(case, solver, small_blocks):
  options = {name: jnp.asarray(x) if name == "segment_ids" else x for name, x in CASES[case].items()}
  iterative = {"solver": solver, "iterations": 40, "tolerance": 1e-14}

  def loss(run, *arrays):
    y = run(*arrays, **options)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

  found, expected = (
    jax.jit(jax.value_and_grad(partial(loss, run), argnums=(0, 1, 2, 3), has_aux=True))(*inputs())
    for run in (partial(local_linear_attention, **iterative), dense)
  )
  assert_close(found, expected)


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences():
  arrays = inputs(batch=1, tokens=9, heads=2, key_heads=1, width=4, values=3)

  def loss(*arrays):
    return jnp.sum(jnp.sin(dense(*arrays)))

  gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)
  rng = np.random.default_rng(1)
  for i, gradient in enumerate(gradients):
    direction = jnp.asarray(rng.standard_normal(arrays[i].shape))
    values = [loss(*(x + step * direction if i == j else x for j, x in enumerate(arrays))) for step in (-1e-5, 1e-5)]
    np.testing.assert_allclose((values[1] - values[0]) / 2e-5, jnp.sum(gradient * direction), rtol=1e-7)
  assert_close(gradients[0][:, 0], jnp.zeros_like(gradients[0][:, 0]))


def errors_of_published_gradients(ridge: float) -> list[float]:
  """Largest errors of the gradients by q, k and v, relative to the largest gradient, without the sum of weights in the ridge.

  The published kernels have a ridge of lambda times the sum of weights, and differentiate as if it were constant.
  """
  q, k, v, _ = inputs(batch=1, tokens=24, heads=1, key_heads=1, width=6, values=6)

  def loss(q, k, v, published):
    weights = jnp.exp(6**-0.5 * jnp.einsum("bthd,bshd->bths", q, k))
    total = jnp.sum(jnp.where(jnp.tril(jnp.ones((24, 24), bool))[None, :, None], weights, 0), axis=-1)
    lam = ridge * jax.lax.stop_gradient(total) / total if published else jnp.full_like(total, ridge)
    return jnp.sum(jnp.sin(local_linear_attention(q, k, v, lam)))

  exact, published = (jax.grad(loss, argnums=(0, 1, 2))(q, k, v, published) for published in (False, True))
  return [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for a, b in zip(exact, published, strict=True)]


@pytest.mark.slow
def test_the_published_gradient_is_wrong_at_small_ridges():
  by_q, by_k, by_v = errors_of_published_gradients(0.05)
  assert by_q > 0.05
  assert by_k > 0.01
  assert by_v < 1e-10


@pytest.mark.slow
def test_the_distance_of_a_query_bounds_what_is_added_to_softmax_attention(small_blocks):
  q, k, v, ridge = inputs()
  options = {"segment_ids": jnp.asarray(SEGMENTS), "window": 5}
  found = np.asarray(squared_distance(q, k, ridge, **options))
  for b, t, h in np.ndindex(*found.shape):
    past = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t] != 0][-5:]
    if not past:
      assert found[b, t, h] == 0
      continue
    keys, query = np.asarray(k[b, past, h // 2]), np.asarray(q[b, t, h])
    p = np.exp(6**-0.5 * keys @ query)
    p /= p.sum()
    shift = query - p @ keys
    covariance = (p[:, None] * (keys - p @ keys)).T @ (keys - p @ keys) + ridge[b, t, h] * np.eye(6)
    np.testing.assert_allclose(found[b, t, h], shift @ np.linalg.solve(covariance, shift), rtol=1e-10)
  mean, square = (local_linear_attention(q, k, x, ridge, **options, solver="cg", iterations=0) for x in (v, v**2))
  added, variance = local_linear_attention(q, k, v, ridge, **options) - mean, square - mean**2
  assert jnp.all(added**2 <= (1 + 1e-9) * found[..., None] * variance + 1e-12)


def test_keys_from_a_cache_in_any_order(small_blocks):
  """The last 7 queries see all keys, the first 15 of which are shuffled."""
  q, k, v, ridge = inputs()
  order = np.concatenate([np.random.default_rng(2).permutation(15), np.arange(15, 22)])
  whole = causal(2, 22, jnp.asarray(SEGMENTS))
  allowed = Allowed(*(x[:, 15:] for x in whole[:2]), *(x[:, order] for x in whole[2:]))
  part = local_linear_attention(q[:, 15:], k[:, order], v[:, order], ridge[:, 15:], allowed=allowed, window=9)
  assert_close(part, dense(q, k, v, ridge, segment_ids=jnp.asarray(SEGMENTS), window=9)[:, 15:])


def softmax(q, k, v, _ridge=None):
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
  logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None], logits, -jnp.inf)
  return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(logits, axis=-1), v)


def test_a_large_ridge_or_no_iteration_is_softmax_attention(small_blocks):
  q, k, v, _ = inputs()
  found = [local_linear_attention(q, k, v, jnp.full(4, ridge)) for ridge in (1e2, 1e3, 1e4)]
  errors = [float(jnp.max(jnp.abs(y - softmax(q, k, v)))) for y in found]
  assert errors[0] < 0.1
  np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 10, rtol=0.1)
  assert_close(local_linear_attention(q, k, v, jnp.ones(4), solver="cg", iterations=0), softmax(q, k, v))


def test_weights_sum_to_one_and_reproduce_keys_up_to_the_ridge(small_blocks):
  q, k, v, ridge = inputs(heads=2)
  ones = local_linear_attention(q, k, jnp.ones_like(v), ridge)
  assert_close(ones, jnp.ones_like(ones))
  shift = local_linear_attention(q, k, v + 3, ridge) - local_linear_attention(q, k, v, ridge)
  assert_close(shift, jnp.full_like(shift, 3))
  allowed, spec = causal(2, 22), ops.Spec(6**-0.5)
  _, (_, _, x) = blockwise._forward(spec, q, k, v, ridge[..., None], allowed)
  assert_close(local_linear_attention(q, k, k, ridge), q - ridge[..., None] * x)


@pytest.mark.slow
def test_a_small_ridge_reproduces_affine_values():
  q, k, _, _ = inputs(heads=2)
  rng = np.random.default_rng(3)
  slope, constant = jnp.asarray(rng.standard_normal((6, 5))), jnp.asarray(rng.standard_normal(5))
  v, expected = k @ slope + constant[None, None, None], q @ slope + constant[None, None, None]
  errors = [
    float(jnp.max(jnp.abs((local_linear_attention(q, k, v, jnp.full(2, ridge)) - expected)[:, 12:]))) for ridge in (1e-5, 1e-7)
  ]
  assert errors[1] < 1e-4
  np.testing.assert_allclose(errors[0] / errors[1], 100, rtol=0.05)


def test_equal_weights_are_a_ridge_regression_with_an_intercept():
  q, k, v, ridge = (np.asarray(x) for x in inputs(heads=1, key_heads=1))
  y = np.asarray(local_linear_attention(*inputs(heads=1, key_heads=1), scale=0.0))
  for t in (3, 12, 21):
    past_k, past_v = k[0, : t + 1, 0], v[0, : t + 1, 0]
    centred = past_k - past_k.mean(0)
    covariance = centred.T @ centred / (t + 1) + ridge[0, t, 0] * np.eye(6)
    slope = np.linalg.solve(covariance, centred.T @ past_v / (t + 1))
    np.testing.assert_allclose(y[0, t, 0], past_v.mean(0) + (q[0, t, 0] - past_k.mean(0)) @ slope, atol=1e-10)


def test_the_first_token_reads_its_own_value_and_equal_keys_are_softmax():
  q, k, v, ridge = inputs()
  assert_close(local_linear_attention(q, k, v, ridge)[:, 0], jnp.repeat(v[:, 0], 2, axis=1))
  same = jnp.broadcast_to(k[:, :1], k.shape)
  assert_close(local_linear_attention(q, same, v, ridge), softmax(q, same, v))


def test_rotations_of_queries_and_keys_change_nothing():
  q, k, v, ridge = inputs()
  rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(4).standard_normal((6, 6)))[0])
  assert_close(local_linear_attention(q @ rotation, k @ rotation, v, ridge), local_linear_attention(q, k, v, ridge))


# Relative errors of the output in float32 after so many iterations, for 512 tokens of 64 channels, by ridge and scale. At scale
# 8, queries and keys have unit length. A preconditioner by the diagonal misses nearly all of them.
CONVERGENCE = {
  (10.0, 1 / 8): {8: 5e-7},
  (1.0, 1 / 8): {16: 1e-6},
  (0.1, 1 / 8): {16: 8e-3, 32: 4e-5},
  (0.01, 1 / 8): {32: 3e-2, 64: 5e-4},
  (0.1, 8.0): {8: 8e-7},
  (0.01, 8.0): {16: 9e-6},
  (0.001, 8.0): {32: 2e-4},
}


def errors_of_conjugate_gradients(ridge, scale, iterations):
  q, k, v, _ = inputs(batch=1, tokens=512, heads=1, key_heads=1, width=64, values=64)
  if scale == 8.0:
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  exact = np.asarray(local_linear_attention(q, k, v, jnp.full(1, ridge), scale=scale, solver="direct"))
  narrow = [x.astype(jnp.float32) for x in (q, k, v, jnp.full(1, ridge))]
  for count in iterations:
    y = local_linear_attention(*narrow, scale=scale, solver="cg", iterations=count, tolerance=0.0)
    yield np.linalg.norm(np.asarray(y) - exact) / np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize(("ridge", "scale"), [(0.1, 1 / 8), (0.01, 8.0)])  # `python tests/test_local_linear.py` prints all
def test_conjugate_gradients_converge_as_fast_as_they_should(ridge, scale):
  expected = CONVERGENCE[ridge, scale]
  for most, found in zip(expected.values(), errors_of_conjugate_gradients(ridge, scale, expected), strict=True):
    assert found < 2 * most


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_hostile_keys_stay_finite(solver):
  """A row each of unit, equal, nearly collinear, distant and long keys."""
  q, k, v, _ = inputs(batch=5, tokens=64, width=16, dtype=np.float32)
  unit = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
  first = jnp.broadcast_to(unit[:, :1], k.shape)
  k = jnp.stack([unit[0], first[1], first[2] + 1e-3 * unit[2], 100 + unit[3], 30 * k[4]])

  @jax.jit
  def loss(*arrays):
    return jnp.sum(local_linear_attention(*arrays, jnp.full(4, 1e-2), solver=solver) ** 2)

  assert_finite(jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v))


@pytest.mark.slow
def test_narrow_inputs_give_narrow_outputs_close_to_wide_ones():
  arrays = [x.astype(jnp.bfloat16) for x in inputs(tokens=64, width=16, dtype=np.float32)[:3]]
  ridge = jnp.ones(4)
  found = local_linear_attention(*arrays, ridge)
  assert found.dtype == jnp.bfloat16
  assert_close(found, dense(*(x.astype(jnp.float64) for x in arrays), ridge), jnp.bfloat16)


@pytest.mark.parametrize("case", ["documents", pytest.param("window", marks=pytest.mark.slow)])
def test_with_a_given_solution_blocks_are_the_dense_form(case, small_blocks):
  options = {name: jnp.asarray(x) if name == "segment_ids" else x for name, x in CASES[case].items()}
  q, k, v, _ = inputs()
  r = 0.3 * inputs(seed=5)[0]

  def loss(implementation, *arrays):
    y = parallax_attention(*arrays, **options, implementation=implementation)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

  found, expected = (
    jax.jit(jax.value_and_grad(partial(loss, run), argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, r) for run in ("xla", "dense")
  )
  assert_close(found, expected)


def test_a_given_solution_is_softmax_at_zero_and_local_linear_attention_at_its_solution(small_blocks):
  q, k, v, ridge = inputs(heads=2)
  assert_close(parallax_attention(q, k, v, jnp.zeros_like(q)), softmax(q, k, v))
  _, (_, _, x) = blockwise._forward(ops.Spec(6**-0.5), q, k, v, ridge[..., None], causal(2, 22))
  assert_close(parallax_attention(q, k, v, -x), local_linear_attention(q, k, v, ridge))
  ones = parallax_attention(q, k, jnp.ones_like(v), inputs(seed=6, heads=2)[0])
  assert_close(ones, jnp.ones_like(ones))
  with pytest.raises(ValueError, match=r"r has shape \[2, 22, 2, 5\]; expected \[2, 22, 2, 6\]"):
    parallax_attention(q, k, v, q[..., :5])


def test_explain_says_what_runs_and_why():
  choice = ops.explain(local_linear_attention, *inputs(), platform="tpu")
  assert choice.implementation == "xla"
  assert "reference" in choice.passed_over["dense"]
  assert ops.explain_solver(32).implementation == ops.explain_solver(128, blocks=4).implementation == "direct"
  assert ops.explain_solver(64).implementation == "cg"
  assert "64 products for each pair" in str(ops.explain_solver(64))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"q": jnp.zeros((2, 22, 4))}, r"q has shape \[2, 22, 4\]; expected \[batch, tokens, heads, width\]"),
    ({"k": jnp.zeros((2, 22, 2, 5))}, r"k has shape .*; expected \[2, tokens, key heads, 6\]"),
    ({"k": jnp.zeros((2, 22, 3, 6))}, r"k has 3 heads; expected a divisor of the 4 heads of q"),
    ({"v": jnp.zeros((2, 21, 2, 5))}, r"v has shape .*; expected \[2, 22, 2\] and a width"),
    ({"ridge": jnp.ones(3)}, r"ridge has shape \[3\]; expected \[4\], one a head, or \[2, 22, 4\]"),
    ({"blocks": 4}, r"blocks=4; expected a divisor of the width 6"),
    ({"window": 0}, r"window=0; expected at least 1"),
    ({"solver": "lu"}, r"implementation='lu' does not exist"),
    ({"implementation": "triton"}, r"implementation='triton' does not exist"),
    ({"implementation": "pallas"}, r"implementation='pallas' does not do .* the kernels take bfloat16 or float32"),
    ({"precision": "low"}, r"precision='low'; expected None"),
  ],
)
def test_what_does_not_fit_is_refused(change, words):
  arrays = dict(zip(("q", "k", "v", "ridge"), inputs(), strict=True))
  with pytest.raises(ValueError, match=words):
    local_linear_attention(**arrays | change)


if __name__ == "__main__":
  with jax.enable_x64(True):
    print("ridge  errors of the published gradient by q, k, v")
    for ridge in (0.05, 0.5, 10.0):
      print(f"{ridge:5g}  " + "  ".join(f"{error:.0e}" for error in errors_of_published_gradients(ridge)))
    print("ridge  scale  iterations  error of conjugate gradients (expected)")
    for (ridge, scale), expected in CONVERGENCE.items():
      counts = (8, 16, 32, 64)
      for count, error in zip(counts, errors_of_conjugate_gradients(ridge, scale, counts), strict=True):
        print(f"{ridge:5g}  {scale:5g}  {count:10d}  {error:.0e}" + (f" ({expected[count]:.0e})" if count in expected else ""))
