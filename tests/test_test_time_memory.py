"""Memories that learn at test time: the dual form equals the oracle, and both equal what is known on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.pallas_kernels import test_time_memory as ttm
from memzoo.pallas_kernels.delta_rule import gated_delta_rule, linear_attention
from memzoo.pallas_kernels.test_time_memory import Gates, Loss, Memory, Retention, Slow, Spec
from memzoo.pallas_kernels.test_time_memory.chunked import errors
from tolerances import assert_close, assert_finite

pytestmark = pytest.mark.slow

IN_FLOAT64 = pytest.mark.usefixtures("float64")
HEADS, WIDTH, BATCH = 2, 3, 2
IDS = np.array([
  [0, 1, 1, 1, 1, 1, 1, 0, 2, 3, 3, 3, 0, 0, 4, 4, 4],
  [1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 4, 0, 5, 5, 5, 5, 0],
], np.int32)  # fmt: skip

MEMORIES = {
  "linear": Memory(WIDTH, WIDTH, depth=1, residual=False),
  "mlp": Memory(WIDTH, WIDTH, depth=2, expansion=2),
  "deep": Memory(WIDTH, WIDTH, depth=4, expansion=2, activation="silu"),
  "norm": Memory(WIDTH, WIDTH, depth=2, expansion=2, norm=True, biases=True),
  "swiglu": Memory(WIDTH, WIDTH, expansion=2, gated=True, residual=False),
}
OPTIMISERS = {"gradient": (False, False), "decay": (True, False), "momentum": (True, True)}
READS = ("after", "before", "chunk_start")


def problem(spec, tokens=17, seed=0, dtype=jnp.float64, decay=True):
  """(slow, q, k, v, gates) as the layers make them: unit keys, small steps."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  shapes = spec.memory.shapes()
  weights = {name: 0.5 * normal(HEADS, *shape) for name, shape in shapes.items()}
  gates = [jax.nn.sigmoid(normal(BATCH, tokens, HEADS)) for _ in range(4)]
  gates = Gates(
    0.2 * gates[0],
    jnp.log(gates[1]) / 4 if decay else None,
    jnp.log(gates[2]) if spec.momentum else None,
    gates[3] if spec.loss.has_threshold else None,
  )
  slow = Slow(
    weights,
    {name: 0.1 * normal(*w.shape) for name, w in weights.items()} if spec.momentum else None,
    (1 + 0.1 * normal(HEADS, WIDTH), 0.1 * normal(HEADS, WIDTH)) if spec.memory.norm else None,
    0.1 * normal(HEADS, spec.chunk_size) if spec.average else None,
  )
  q, k, v = (normal(BATCH, tokens, HEADS, WIDTH) for _ in range(3))
  return slow, unit(q), unit(k), v, gates


def run(spec, args, state=None, ids=None, implementation="xla"):
  slow, q, k, v, gates = args
  options = {"initial_state": state, "segment_ids": ids, "implementation": implementation}
  return ttm.run(spec, slow, q, k, v, gates, **options)


def used(spec, args, seed=9):
  """A state in the middle of a chunk."""
  tokens = 3 + 2 * spec.chunk_size // 3
  before = problem(spec, tokens, seed, args[1].dtype, args[4].log_keep is not None)[1:]
  return run(spec, (args[0], *before)).state


def values_and_gradients(spec, args, state, ids, implementation):
  """The result, and the gradient of a weighted sum of all of it by everything that goes in."""

  def scalar(args, floats):
    result = run(spec, args, None if state is None else state._replace(**floats), ids, implementation)
    leaves = [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]
    weights = (jnp.asarray(np.random.default_rng(i).normal(size=x.shape), x.dtype) for i, x in enumerate(leaves))
    return sum(jnp.vdot(x, w) for x, w in zip(leaves, weights, strict=True)), result

  floats = {} if state is None else {name: getattr(state, name) for name in ("weights", "momentum", "anchor")}
  (_, result), gradient = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(args, floats)
  return result, gradient


def assert_equal(spec, args, state=None, ids=None):
  (actual, by_actual), (expected, by_expected) = (
    values_and_gradients(spec, args, state, ids, name) for name in ("xla", "recurrent")
  )
  assert_close(actual, expected, args[1].dtype)
  assert_close(by_actual, by_expected, args[1].dtype, gradients=True)


@IN_FLOAT64
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 17])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_dual_form_is_the_oracle_in_values_and_all_gradients(memory, optimiser, read, chunk_size):
  decay, momentum = OPTIMISERS[optimiser]
  spec = Spec(MEMORIES[memory], chunk_size=chunk_size, momentum=momentum, read=read)
  args = problem(spec, decay=decay)
  assert_equal(spec, args, used(spec, args))


CHOICES = {
  "average": Spec(MEMORIES["norm"], Loss(scale=0.5), chunk_size=4, average=True),
  "average, read before": Spec(MEMORIES["linear"], Loss(scale=0.5), chunk_size=4, average=True, read="before"),
  "token anchor": Spec(MEMORIES["linear"], chunk_size=4, momentum=True, anchor="token"),
  "token anchor, residual, decay first": Spec(
    Memory(WIDTH, WIDTH, depth=1), chunk_size=4, momentum=True, anchor="token", order="decay_first", read="before"
  ),
  "dot": Spec(MEMORIES["swiglu"], Loss("dot"), chunk_size=4, momentum=True),
  "power, norm": Spec(MEMORIES["norm"], Loss("power", power=3), Retention("norm", norm=4), chunk_size=4),
  "huber": Spec(MEMORIES["mlp"], Loss("huber"), chunk_size=4),
  "huber_norm": Spec(MEMORIES["mlp"], Loss("huber_norm"), chunk_size=4),
  "mixture": Spec(MEMORIES["norm"], Loss("mixture"), chunk_size=4),
  "simplex": Spec(MEMORIES["norm"], retention=Retention("simplex"), chunk_size=4, read="chunk_start"),
  "clipped": Spec(MEMORIES["mlp"], chunk_size=4, momentum=True, clip=0.05),
}  # fmt: skip


@IN_FLOAT64
@pytest.mark.parametrize("choice", CHOICES)
def test_documents_on_the_grid_are_the_oracle_for_every_choice(choice):
  """Documents off the grid, padding everywhere, a state that comes in in the middle of a chunk."""
  spec = CHOICES[choice]
  args = problem(spec, decay=not spec.average)
  assert_equal(spec, args, used(spec, args), jnp.asarray(IDS))


@IN_FLOAT64
@pytest.mark.parametrize("tokens", [16, 17])
@pytest.mark.parametrize("choice", ["average", "token anchor", "clipped"])
def test_what_begins_fresh_is_the_oracle_too(choice, tokens):
  """As in training: no state comes in, and chunks that are known to be whole are gone about in a shorter way."""
  spec = CHOICES[choice]
  args = problem(spec, tokens, decay=not spec.average)
  assert_equal(spec, args)
  assert_equal(spec, args, ids=jnp.asarray(IDS[:, :tokens]))


@IN_FLOAT64
@pytest.mark.parametrize("choice", ["average", "token anchor", "power, norm", "clipped"])
def test_any_split_is_one_pass(choice):
  spec = CHOICES[choice]
  args = problem(spec, decay=not spec.average)
  state = used(spec, args)
  whole = run(spec, args, state)
  ys, losses, begin = [], [], 0
  for end in (1, 2, 9, 12, 17):
    piece = jax.tree.map(lambda x, part=slice(begin, end): x[:, part], args[1:])
    y, state, loss = run(spec, (args[0], *piece), state)
    ys, losses, begin = [*ys, y], [*losses, loss], end
  assert_close((jnp.concatenate(ys, 1), state, jnp.concatenate(losses, 1)), tuple(whole))


# Identities on paper. c is 2 for the squared loss |e|^2.


def linear_problem(**fields):
  spec = Spec(MEMORIES["linear"], **fields)
  return spec, problem(spec)


@IN_FLOAT64
def test_decay_first_without_momentum_is_the_gated_delta_rule():
  spec, args = linear_problem(anchor="token", order="decay_first", chunk_size=5)
  slow, q, k, v, gates = args
  y, state, _ = run(spec, args)
  first = jnp.broadcast_to(slow.weights["0"], (BATCH, HEADS, WIDTH, WIDTH))
  o, last = gated_delta_rule(q, k, v, 2 * gates.step, gates.log_keep, scale=1.0, initial_state=first)
  assert_close((y, state.weights["0"] + first), (o, last))


@IN_FLOAT64
@pytest.mark.parametrize("anchor", ["token", "chunk"])
def test_gradient_first_erases_more_than_it_writes(anchor):
  """W_t = a (I - (c theta / a) k k^T) W_{t-1} + c theta k v^T: a gated delta rule of other strengths and values."""
  spec, args = linear_problem(anchor=anchor, chunk_size=1)
  slow, q, k, v, gates = args
  y, state, _ = run(spec, args)
  first, keep = jnp.broadcast_to(slow.weights["0"], (BATCH, HEADS, WIDTH, WIDTH)), jnp.exp(gates.log_keep)
  beta, values = 2 * gates.step / keep, v * keep[..., None]
  o, last = gated_delta_rule(q, k, values, beta, gates.log_keep, scale=1.0, initial_state=first)
  assert_close((y, state.weights["0"] + first), (o, last))


@IN_FLOAT64
def test_with_the_token_anchor_chunks_mean_nothing():
  expected = None
  for chunk_size in (1, 3, 16, 17, 64):
    spec = Spec(MEMORIES["linear"], chunk_size=chunk_size, momentum=True, anchor="token")
    y, state, loss = run(spec, problem(spec))
    expected = expected or (y, state.weights, state.momentum, loss)
    assert_close((y, state.weights, state.momentum, loss), expected)


@IN_FLOAT64
def test_one_chunk_of_an_empty_linear_memory_is_linear_attention():
  spec = Spec(MEMORIES["linear"], Loss(scale=0.5), chunk_size=17)
  slow, q, k, v, gates = problem(spec, decay=False)
  slow = Slow(jax.tree.map(jnp.zeros_like, slow.weights))
  o, _ = linear_attention(q, k, gates.step[..., None] * v, scale=1.0)
  assert_close(run(spec, (slow, q, k, v, gates)).y, o)


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
  slow, q, k, v, gates = problem(spec)
  share, of_weights, of_momentum = shares(gates)
  empty = Slow(jax.tree.map(jnp.zeros_like, slow.weights))
  o = np.einsum("bthk,bihk,btih,bih,bihv->bthv", q, k, share, gates.step, v)
  assert_close(run(spec, (empty, q, k, v, gates)).y, o)
  # Without steps it is what decay and momentum make of the beginning, in chunks of any size.
  still = gates._replace(step=jnp.zeros_like(gates.step))
  o = sum(
    np.einsum("bthk,hkv,bth->bthv", q, matrices["0"], left)
    for matrices, left in ((slow.weights, of_weights), (slow.momentum, of_momentum))
  )
  for chunk_size in (3, 17):
    assert_close(run(Spec(MEMORIES["linear"], chunk_size=chunk_size, momentum=True), (slow, q, k, v, still)).y, o)


@IN_FLOAT64
@pytest.mark.parametrize("memory", [*MEMORIES, "simplex"])
def test_without_steps_and_decay_it_is_the_network_that_it_began_as(memory):
  spec = CHOICES["simplex"] if memory == "simplex" else Spec(MEMORIES[memory], chunk_size=4, momentum=True)
  slow, q, k, v, gates = problem(spec, decay=False)
  slow, gates = slow._replace(momentum=None), gates._replace(step=jnp.zeros_like(gates.step))
  y, state, _ = run(spec, (slow, q, k, v, gates))
  assert_close(y, ttm.read(spec, slow, state.weights, q))
  assert not any(np.any(x) for x in jax.tree.leaves(state[:3]))


@IN_FLOAT64
def test_the_order_within_a_chunk_means_nothing_without_decay_and_momentum():
  spec = Spec(MEMORIES["mlp"], chunk_size=17, read="chunk_start")
  slow, *tokens = problem(spec, decay=False)
  order = np.random.default_rng(0).permutation(17)
  shuffled = run(spec, (slow, *jax.tree.map(lambda x: x[:, order], tokens)))
  plain = run(spec, (slow, *tokens))
  assert_close((shuffled.y, shuffled.state), (plain.y[:, order], plain.state))


@IN_FLOAT64
@pytest.mark.parametrize("read", READS)
def test_causality_and_independence_of_rows_and_heads(read):
  spec = Spec(MEMORIES["mlp"], chunk_size=4, momentum=True, read=read)
  args = problem(spec)
  slow, q, k, v, gates = args
  y = run(spec, args).y
  other = problem(spec, seed=1)[1:]
  for t, row, head in ((0, 0, 0), (6, 1, 1), (16, 0, 1)):
    changed = run(spec, (slow, *jax.tree.map(lambda a, b, at=(row, t, head): a.at[at].set(b[at]), (q, k, v, gates), other))).y
    assert_close(changed[row, :t], y[row, :t])
    assert_close(changed[1 - row], y[1 - row])
    assert_close(changed[:, :, 1 - head], y[:, :, 1 - head])
    assert not np.allclose(changed[row, t:, head], y[row, t:, head])


@IN_FLOAT64
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gates_may_be_shut_and_wide_open(value):
  spec = Spec(MEMORIES["mlp"], chunk_size=4, momentum=True)
  *rest, gates = problem(spec)
  shut = jnp.full_like(gates.log_keep, jnp.log(value))
  some = jnp.arange(17)[None, :, None] % 3 == 1
  gates = gates._replace(**{n: jnp.where(some, shut, getattr(gates, n)) for n in ("log_keep", "log_momentum")})
  args = (*rest, gates)
  assert_equal(spec, args, used(spec, problem(spec)))


# The closed forms: what autodiff gives must be what is on paper.


@IN_FLOAT64
@pytest.mark.parametrize("memory", ["mlp", "norm", "swiglu"])
def test_factors_of_the_gradient_have_their_closed_form(memory):
  spec = Spec(MEMORIES[memory])
  slow, _, k, v, _ = problem(spec)
  w = {name: x[0] for name, x in slow.weights.items()}
  norm, k, v = None if slow.norm is None else [a[0:1] for a in slow.norm], k[0, :, 0], v[0, :, 0]
  x, delta, loss = errors(spec, w, norm and [a[0] for a in norm], k, v, None)
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
  assert_close((x, delta, loss), (inputs, expected, jnp.sum((psi / 2) ** 2, axis=1)))


@IN_FLOAT64
def test_losses_have_the_slopes_they_are_known_for():
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
    if kind == "huber_norm":  # where both branches meet, |e| with and without its epsilon may differ in which is taken
      keep = np.abs(np.asarray(size[:, 0]) - delta) > 1e-3
      found, slope = found[keep], slope[keep]
    assert_close(found, slope)


@IN_FLOAT64
@pytest.mark.parametrize("shape", [(5, 3), (64, 256), (256, 64)])
def test_views_and_their_starts(shape):
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
def test_moneta_of_twos_and_yaad_of_no_threshold_are_plain_descent():
  plain = Spec(MEMORIES["norm"], chunk_size=4)
  slow, q, k, v, gates = problem(plain)
  expected = run(plain, (slow, q, k, v, gates))
  norm = Spec(MEMORIES["norm"], retention=Retention("norm", norm=2.0), chunk_size=4)
  assert_close(run(norm, (slow, q, k, v, gates)), expected)
  mixture = Spec(MEMORIES["norm"], Loss("mixture"), chunk_size=4)
  assert_close(run(mixture, (slow, q, k, v, gates._replace(threshold=jnp.full_like(gates.step, 1e9)))), expected)


# Documents, bounds, mistakes, numbers.


@IN_FLOAT64
def test_a_row_with_more_documents_than_there_is_room_for_is_nan_and_no_other():
  spec = Spec(MEMORIES["mlp"], chunk_size=16)
  slow, q, k, v, gates = problem(spec)
  ids = jnp.asarray(np.stack([np.arange(1, 18), np.ones(17)]).astype(np.int32))
  y, state, loss = ttm.run(spec, slow, q, k, v, gates, segment_ids=ids, max_documents=2)
  assert all(np.all(np.isnan(a[0])) for a in (y, loss, state.weights["0"]))
  assert_finite((y[1], loss[1], jax.tree.map(lambda x: x[1], state)))
  enough = ttm.run(spec, slow, q, k, v, gates, segment_ids=ids, max_documents=17)
  assert_close(enough, run(spec, (slow, q, k, v, gates), ids=ids, implementation="recurrent"))


@IN_FLOAT64
def test_a_row_begun_in_chunks_of_another_size_is_nan():
  long, short = (Spec(MEMORIES["mlp"], chunk_size=size) for size in (8, 4))
  args = problem(long, 7)
  y, state, _ = run(short, args, run(long, args).state)
  assert all(np.all(np.isnan(a)) for a in (y, state.weights["0"]))


@IN_FLOAT64
def test_nothing_but_padding_changes_nothing():
  spec = CHOICES["clipped"]
  args = problem(spec)
  state = used(spec, args)
  y, after, loss = run(spec, args, state, jnp.zeros((BATCH, 17), jnp.int32))
  assert_close(after, state)
  assert not any(np.any(a) for a in (y, loss))


def test_equal_keys_converge_below_the_bound_of_the_step_and_diverge_above():
  """A chunk of C equal unit keys is one step of C theta: e <- (1 - 2 C theta) e, so |1 - 2 C theta| < 1 decides."""
  chunk, chunks = 16, 40
  spec = Spec(Memory(4, 4, depth=1, residual=False), chunk_size=chunk)
  k = jnp.broadcast_to(jnp.asarray([1.0, 0, 0, 0], jnp.float32), (1, chunk * chunks, 1, 4))
  v, slow = jnp.ones_like(k), Slow({"0": jnp.zeros((1, 4, 4))})
  for share in (0.95, 1.05):
    step = jnp.full(k.shape[:3], share / chunk, jnp.float32)
    loss = run(spec, (slow, k, k, v, Gates(step))).loss[0, ::chunk, 0]
    ratio = abs(1 - 2 * share)
    assert_close(loss, 4 * ratio ** (2 * jnp.arange(chunks, dtype=jnp.float32)), jnp.float32)
    assert (loss[-1] < loss[0]) == (share < 1)


def test_deep_memories_stay_finite_over_a_long_hostile_text():
  spec = Spec(Memory(8, 8, depth=4), chunk_size=64, momentum=True, clip=1.0)
  key = jax.random.key(0)
  slow = Slow({n: jax.random.normal(key, (1, *s)) * s[0] ** -0.5 for n, s in spec.memory.shapes().items()})
  noise = 0.01 * jax.random.normal(key, (1, 4096, 1, 8))
  k = jnp.ones((1, 4096, 1, 8)) / 8**0.5 + noise
  v = 100 * jnp.sign(noise)
  ones = jnp.ones((1, 4096, 1))
  for step in (1e-3, 0.1, 10.0):  # the last of them far beyond what converges
    gates = Gates(step * ones, -0.01 * ones, -0.1 * ones)
    assert_finite(run(spec, (slow, k, k, v, gates)))
    if step <= 0.1:
      assert_finite(values_and_gradients(spec, (slow, k, k, v, gates), None, None, "xla"))


@pytest.mark.parametrize("memory", MEMORIES)
def test_bfloat16_goes_in_and_float32_is_kept(memory):
  spec = Spec(MEMORIES[memory], chunk_size=4, momentum=True)
  slow, q, k, v, gates = problem(spec, dtype=jnp.float32)
  narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  result = run(spec, (slow, *narrow, gates))
  assert result.y.dtype == jnp.bfloat16
  assert {x.dtype.name for x in jax.tree.leaves((result.state, result.loss))} == {"float32", "int32"}
  wide = run(spec, (slow, *(x.astype(jnp.float32) for x in narrow), gates))
  assert_close(result.y, wide.y, jnp.bfloat16)
  assert_close(result.state, wide.state, jnp.float32)


def test_mistakes_are_named():
  spec = Spec(MEMORIES["mlp"], chunk_size=4, momentum=True)
  args = slow, q, k, v, gates = problem(spec, dtype=jnp.float32)
  wrong = {
    r"q has shape \[2, 17, 2\]; want": (slow, q[..., 0], k, v, gates),
    r"q has shape \[2, 0, 2, 3\]; want .* at least one token": (slow, q[:, :0], k[:, :0], v[:, :0], gates),
    r"k has shape \[2, 9, 2, 3\]; want \[2, 17, 2, 3\]": (slow, q, k[:, :9], v, gates),
    r"gates.log_momentum is missing": (slow, q, k, v, gates._replace(log_momentum=None)),
    r"gates.threshold was given; want None": (slow, q, k, v, gates._replace(threshold=gates.step)),
    r"gates.step has shape": (slow, q, k, v, gates._replace(step=gates.step[..., None])),
    r"slow.weights has shapes": (Slow({"0": slow.weights["0"]}), q, k, v, gates),
    r"slow.norm is given": (slow._replace(norm=(q, q)), q, k, v, gates),
    r"k is int32; want floats": (slow, q, k.astype(jnp.int32), v, gates),
    r"slow.momentum has shapes": (slow._replace(momentum={"0": slow.weights["0"]}), q, k, v, gates),
  }
  for message, bad in wrong.items():
    with pytest.raises(ValueError, match=message):
      run(spec, bad)
  for message, bad in {
    r"initial_state.weights\['0'\] has shape \[2, 1, 3, 6\]; want \[2, 2, 3, 6\]": ttm.start(spec, BATCH, 1),
    r"initial_state.weights\['0'\] has shape \[3, 2, 3, 6\]; want \[2, 2, 3, 6\]": ttm.start(spec, 3, HEADS),
    r"initial_state is not one of this spec's": ttm.start(CHOICES["huber"], BATCH, HEADS),
  }.items():
    with pytest.raises(ValueError, match=message):
      run(spec, args, bad)
  with pytest.raises(ValueError, match=r"weights is not one of this spec's"):
    ttm.read(spec, slow, ttm.start(spec, BATCH, HEADS), q)
  with pytest.raises(ValueError, match=r"initial_state.count is float32; want int32"):
    run(spec, args, jax.tree.map(lambda a: a.astype(jnp.float32), ttm.start(spec, BATCH, HEADS)))
  normed = Spec(MEMORIES["norm"])
  slow, *rest = problem(normed, dtype=jnp.float32)
  with pytest.raises(ValueError, match=r"slow.norm has shapes .*want a gain and a bias of \[2, 3\]"):
    run(normed, (slow._replace(norm=(slow.norm[0][:1], slow.norm[1])), *rest))
  with pytest.raises(ValueError, match="implementation='fast' does not exist"):
    run(spec, args, implementation="fast")
  slow = problem(CHOICES["average"], dtype=jnp.float32)[0]._replace(average=None)
  with pytest.raises(ValueError, match=r"slow.average does not fit; want .*\[2, 4\]"):
    run(CHOICES["average"], (slow, q, k, v, Gates(gates.step)))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Memory(3, 4), "value_dim=4 differs"),
    (lambda: Memory(3, 3, depth=0), "depth=0"),
    (lambda: Memory(3, 3, activation="relu"), "activation='relu'; want one of"),
    (lambda: Memory(3, 3, expansion=0.1), "expansion=0.1"),
    (lambda: Loss("cubic"), "loss='cubic'; want one of"),
    (lambda: Loss(scale=0), "loss's scale=0"),
    (lambda: Loss("power", power=0.5), "loss's power=0.5"),
    (lambda: Memory(0, 3), "key_dim=0, value_dim=3"),
    (lambda: Spec(MEMORIES["mlp"], "squared"), "loss='squared'; want a Loss"),
    (lambda: Retention("half"), "retention='half'"),
    (lambda: Retention("norm", norm=1), "norm=1"),
    (lambda: Spec(MEMORIES["mlp"], chunk_size=0), "chunk_size=0"),
    (lambda: Spec(MEMORIES["mlp"], anchor="token"), "anchor='token' is of linear memories .*chunk_size=1"),
    (lambda: Spec(MEMORIES["mlp"], order="decay_first"), "order='decay_first' is of anchor='token'"),
    (lambda: Spec(MEMORIES["mlp"], read="later"), "read='later'; want one of"),
    (lambda: Spec(MEMORIES["linear"], anchor="token", read="chunk_start"), "read='chunk_start' with anchor"),
    (lambda: Spec(MEMORIES["linear"], anchor="token", clip=1.0), "clip=1.0 with anchor"),
    (lambda: Spec(MEMORIES["mlp"], average=True, momentum=True), "exclude each other"),
    (lambda: Spec(MEMORIES["mlp"], retention=Retention("simplex")), "want 'chunk_start'"),
    (lambda: Spec(MEMORIES["mlp"], clip=0.0), "clip=0.0"),
  ],
)
def test_choices_that_exclude_each_other_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
