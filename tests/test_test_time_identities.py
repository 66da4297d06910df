"""Memories that learn at test time against known results: other operations, closed forms, fixed points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inner_problems import BATCH, CHOICES, HEADS, MEMORIES, WIDTH, problem, run
from memzoo.pallas_kernels import test_time_memory as ttm
from memzoo.pallas_kernels.delta_rule import gated_delta_rule, linear_attention
from memzoo.pallas_kernels.test_time_memory import InitialWeights, Loss, Retention, Spec
from memzoo.pallas_kernels.test_time_memory.chunked import Affine, errors
from tolerances import assert_close

pytestmark = pytest.mark.slow

IN_FLOAT64 = pytest.mark.usefixtures("float64")


# Other operations, and fixed points. The papers' constant c is 2 for the squared loss |e|^2.


def linear_problem(**fields):
  spec = Spec(MEMORIES["linear"], **fields)
  return spec, problem(spec)


@IN_FLOAT64
def test_decay_first_without_momentum_is_the_gated_delta_rule():
  spec, args = linear_problem(anchor="token", order="decay_first", chunk_size=5, decay_to="zero")
  initial, q, k, v, gates = args
  y, state, _ = run(spec, args)
  first = jnp.broadcast_to(initial.weights["0"], (BATCH, HEADS, WIDTH, WIDTH))
  o, last = gated_delta_rule(q, k, v, 2 * gates.step, gates.log_keep, scale=1.0, initial_state=first)
  assert_close((y, state.weights["0"] + first), (o, last))


@IN_FLOAT64
@pytest.mark.parametrize("anchor", ["token", "chunk"])
def test_gradient_first_erases_more_than_it_writes(anchor):
  """W_t = a (I - (c theta / a) k k^T) W_{t-1} + c theta k v^T: a gated delta rule of other strengths and values."""
  spec, args = linear_problem(anchor=anchor, chunk_size=1, decay_to="zero")
  initial, q, k, v, gates = args
  y, state, _ = run(spec, args)
  first, keep = jnp.broadcast_to(initial.weights["0"], (BATCH, HEADS, WIDTH, WIDTH)), jnp.exp(gates.log_keep)
  beta, values = 2 * gates.step / keep, v * keep[..., None]
  o, last = gated_delta_rule(q, k, values, beta, gates.log_keep, scale=1.0, initial_state=first)
  assert_close((y, state.weights["0"] + first), (o, last))


@IN_FLOAT64
def test_with_the_token_anchor_the_chunk_size_changes_nothing():
  expected = None
  for chunk_size in (1, 3, 16, 17, 64):
    spec = Spec(MEMORIES["linear"], chunk_size=chunk_size, momentum=True, anchor="token")
    y, state, loss = run(spec, problem(spec))
    expected = expected or (y, state.weights, state.momentum, loss)
    assert_close((y, state.weights, state.momentum, loss), expected)


@IN_FLOAT64
def test_one_chunk_of_an_empty_linear_memory_is_linear_attention():
  spec = Spec(MEMORIES["linear"], Loss(scale=0.5), chunk_size=17)
  initial, q, k, v, gates = problem(spec, decay=False)
  initial = InitialWeights(jax.tree.map(jnp.zeros_like, initial.weights))
  o, _ = linear_attention(q, k, gates.step[..., None] * v, scale=1.0)
  assert_close(run(spec, (initial, q, k, v, gates)).y, o)


def shares(gates):
  """f_ti, the share of a step at i that is in the weights at t, a product of [keep, eta; 0, eta] for each token in between,
  and what is left of W_0 and of S_0: [B, T, T, H], [B, T, H] twice."""
  keep, eta = (np.exp(np.asarray(g)) for g in (gates.log_keep, gates.log_momentum))
  batch, tokens, heads = keep.shape
  share, of_weights, of_momentum = np.zeros((batch, tokens, tokens, heads)), np.zeros(keep.shape), np.zeros(keep.shape)
  for b, h in np.ndindex(batch, heads):
    maps = [np.array([[keep[b, t, h], eta[b, t, h]], [0, eta[b, t, h]]]) for t in range(tokens)]
    for i in range(-1, tokens):
      through = np.eye(2) if i < 0 else np.ones((2, 1))
      for t in range(max(i, 0), tokens):
        through = through if t == i else maps[t] @ through
        if i < 0:
          of_weights[b, t, h], of_momentum[b, t, h] = through[0]
        else:
          share[b, t, i, h] = through[0, 0]
  return share, of_weights, of_momentum


@IN_FLOAT64
def test_with_decay_and_momentum_one_chunk_is_linear_attention_of_two_poles():
  spec = Spec(MEMORIES["linear"], Loss(scale=0.5), chunk_size=17, momentum=True)
  initial, q, k, v, gates = problem(spec)
  share, of_weights, of_momentum = shares(gates)
  empty = InitialWeights(jax.tree.map(jnp.zeros_like, initial.weights))
  o = np.einsum("bthk,bihk,btih,bih,bihv->bthv", q, k, share, gates.step, v)
  assert_close(run(spec, (empty, q, k, v, gates)).y, o)
  # Without steps, decay and momentum act on the initial values alone, in chunks of any size.
  still = gates._replace(step=jnp.zeros_like(gates.step))
  o = sum(
    np.einsum("bthk,hkv,bth->bthv", q, matrices["0"], left)
    for matrices, left in ((initial.weights, of_weights), (initial.momentum, of_momentum))
  )
  for chunk_size in (3, 17):
    spec = Spec(MEMORIES["linear"], chunk_size=chunk_size, momentum=True, decay_to="zero")
    assert_close(run(spec, (initial, q, k, v, still)).y, o)


@IN_FLOAT64
@pytest.mark.parametrize("memory", [*MEMORIES, "simplex"])
def test_without_steps_and_decay_it_stays_the_initial_network(memory):
  spec = CHOICES["simplex"] if memory == "simplex" else Spec(MEMORIES[memory], chunk_size=4, momentum=True)
  initial, q, k, v, gates = problem(spec, decay=False)
  initial, gates = initial._replace(momentum=None), gates._replace(step=jnp.zeros_like(gates.step))
  y, state, _ = run(spec, (initial, q, k, v, gates))
  assert_close(y, ttm.read(spec, initial, state.weights, q))
  assert not any(np.any(x) for x in jax.tree.leaves(state[:3]))


@IN_FLOAT64
def test_without_decay_and_momentum_the_order_within_a_chunk_changes_nothing():
  spec = Spec(MEMORIES["mlp"], chunk_size=17, read="chunk_start")
  initial, *tokens = problem(spec, decay=False)
  order = np.random.default_rng(0).permutation(17)
  shuffled = run(spec, (initial, *jax.tree.map(lambda x: x[:, order], tokens)))
  plain = run(spec, (initial, *tokens))
  assert_close((shuffled.y, shuffled.state), (plain.y[:, order], plain.state))


# Closed forms of what autodiff computes.


@IN_FLOAT64
@pytest.mark.parametrize("memory", ["mlp", "norm", "swiglu"])
def test_factors_of_the_gradient_have_their_closed_form(memory):
  spec = Spec(MEMORIES[memory])
  initial, _, k, v, _ = problem(spec)
  w = {name: x[0] for name, x in initial.weights.items()}
  norm, k, v = None if initial.norm is None else [a[0:1] for a in initial.norm], k[0, :, 0], v[0, :, 0]
  parts = {name: Affine.split(a, spec.memory.biases) for name, a in w.items()}
  x, delta, loss = errors(spec, parts, norm and [a[0] for a in norm], k, v, None)
  if memory == "swiglu":
    gate, up = k @ w["gate"], k @ w["up"]
    hidden, s = jax.nn.silu(gate) * up, jax.nn.sigmoid(gate)
    psi = 2 * (hidden @ w["down"] - v)
    back = psi @ w["down"].T
    expected = {"gate": back * up * s * (1 + gate * (1 - s)), "up": back * jax.nn.silu(gate), "down": psi}
    inputs = {"gate": k, "up": k, "down": hidden}
  else:
    one = jnp.ones((len(k), 1))
    first = jnp.concatenate([k, one], 1) if spec.memory.biases else k
    z = first @ w["0"]
    u = 0.79788456080286535588 * z * (1 + 0.044715 * z * z)
    tau = jnp.tanh(u)
    slope = 0.5 * (1 + tau) + 0.5 * z * (1 - tau * tau) * 0.79788456080286535588 * (1 + 3 * 0.044715 * z * z)
    hidden = 0.5 * z * (1 + tau)
    second = jnp.concatenate([hidden, one], 1) if spec.memory.biases else hidden
    out = second @ w["1"]
    if spec.memory.norm:
      s = jnp.sqrt(out.var(axis=1, keepdims=True) + 1e-6)
      normed = (out - out.mean(axis=1, keepdims=True)) / s
      psi = 2 * (k + normed * norm[0] + norm[1] - v)
      g = psi * norm[0]
      last = (g - g.mean(axis=1, keepdims=True) - normed * (g * normed).mean(axis=1, keepdims=True)) / s
    else:
      psi = last = 2 * (k + out - v)
    rows = w["1"][:-1] if spec.memory.biases else w["1"]
    expected, inputs = {"0": (last @ rows.T) * slope, "1": last}, {"0": first, "1": second}
  if spec.memory.biases:
    inputs = {name: a[:, :-1] for name, a in inputs.items()}
  assert_close((x, delta, loss), (inputs, expected, jnp.sum((psi / 2) ** 2, axis=1)))


@IN_FLOAT64
def test_losses_have_their_known_gradients():
  rng = np.random.default_rng(3)
  e = jnp.asarray(rng.normal(size=(50, 4)))
  size, delta = jnp.linalg.norm(e, axis=1, keepdims=True), 1.5
  sign = e / jnp.sqrt(e * e + 1e-6)
  slopes = {
    "squared": 2 * e,
    "dot": -jnp.ones_like(e),
    "power": 3 * sign * (e * e + 1e-6),
    "huber": 2 * jnp.clip(e, -delta, delta),
    "huber_norm": 2 * e * jnp.minimum(1, delta / jnp.sqrt(size**2 + 1e-6)),
    "mixture": jnp.where(size <= delta, 2 * e, 2 * delta * sign),
  }
  for kind, slope in slopes.items():
    v = jnp.ones_like(e)
    found = jax.grad(lambda out, kind=kind, v=v: Loss(kind)(out, v, jnp.full(50, delta)).sum())(e + v)
    if kind == "huber_norm":  # where the branches meet, the epsilon in |e| may decide which is taken
      keep = np.abs(np.asarray(size[:, 0]) - delta) > 1e-3
      found, slope = found[keep], slope[keep]
    assert_close(found, slope)


@IN_FLOAT64
@pytest.mark.parametrize("shape", [(5, 3), (64, 256), (256, 64)])
def test_views_have_their_closed_form_and_undo_start(shape):
  w = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)))
  for q in (2.0, 2.8, 4.0):
    retention = Retention("norm", norm=q)
    assert_close(retention.view(retention.start(w)), w)
    norm = jnp.sum(jnp.abs(w) ** q, axis=(1, 2), keepdims=True) ** (1 / q)
    assert_close(retention.view(w), w / norm ** (q - 2))
  assert_close(Retention("norm", norm=3.0).view(7 * w), Retention("norm", norm=3.0).view(w))
  assert not np.any(Retention("norm").view(0 * w))
  simplex = Retention("simplex")
  assert_close(simplex.view(w).sum(axis=1), jnp.full((2, shape[1]), shape[0] ** 0.5))
  assert_close(simplex.view(w + 3.0), simplex.view(w))


@IN_FLOAT64
def test_moneta_with_norm_2_and_yaad_with_a_huge_threshold_are_gradient_descent():
  plain = Spec(MEMORIES["norm"], chunk_size=4)
  initial, q, k, v, gates = problem(plain)
  expected = run(plain, (initial, q, k, v, gates))
  norm = Spec(MEMORIES["norm"], retention=Retention("norm", norm=2.0), chunk_size=4)
  assert_close(run(norm, (initial, q, k, v, gates)), expected)
  mixture = Spec(MEMORIES["norm"], Loss("mixture"), chunk_size=4)
  assert_close(run(mixture, (initial, q, k, v, gates._replace(threshold=jnp.full_like(gates.step, 1e9)))), expected)
