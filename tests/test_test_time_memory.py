"""Memories that learn at test time: the chunked form equals the oracle, with and without documents, and mistakes are named."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inner_problems import (
  BATCH,
  CHOICES,
  HEADS,
  MEMORIES,
  OPTIMISERS,
  READS,
  assert_equal,
  problem,
  run,
  used,
  values_and_gradients,
)
from memzoo.pallas_kernels import test_time_memory as ttm
from memzoo.pallas_kernels.test_time_memory import Gates, InitialWeights, Loss, Memory, Retention, Spec
from tolerances import assert_close, assert_finite

pytestmark = pytest.mark.slow

IN_FLOAT64 = pytest.mark.usefixtures("float64")
IDS = np.array([
  [0, 1, 1, 1, 1, 1, 1, 0, 2, 3, 3, 3, 0, 0, 4, 4, 4],
  [1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 4, 0, 5, 5, 5, 5, 0],
], np.int32)  # fmt: skip


SETTINGS = tuple(MEMORIES), tuple(OPTIMISERS), READS, (1, 3, 17)
# 15 of the 135 combinations, which contain every pair of settings.
COMBINATIONS = [
  (memory, SETTINGS[1][(i + j) % 3], READS[(i + 2 * j) % 3], chunk_size)
  for i, memory in enumerate(MEMORIES)
  for j, chunk_size in enumerate(SETTINGS[3])
]


def test_the_combinations_contain_every_pair_of_settings():
  for i, j in itertools.combinations(range(4), 2):
    assert {(c[i], c[j]) for c in COMBINATIONS} == set(itertools.product(SETTINGS[i], SETTINGS[j]))


@IN_FLOAT64
@pytest.mark.parametrize(("memory", "optimiser", "read", "chunk_size"), COMBINATIONS)
def test_the_chunked_form_is_the_oracle_in_values_and_all_gradients(memory, optimiser, read, chunk_size):
  decay, momentum = OPTIMISERS[optimiser]
  spec = Spec(MEMORIES[memory], chunk_size=chunk_size, momentum=momentum, read=read)
  assert_equal(spec, problem(spec, decay=decay), used(spec))


@IN_FLOAT64
@pytest.mark.parametrize("choice", CHOICES)
def test_documents_on_the_grid_are_the_oracle_for_every_choice(choice):
  """Documents off the grid, padding everywhere, and an incoming state in the middle of a chunk."""
  spec = CHOICES[choice]
  args = problem(spec, decay=not spec.average)
  assert_equal(spec, args, used(spec), jnp.asarray(IDS))


@IN_FLOAT64
@pytest.mark.parametrize(
  ("choice", "tokens", "packed"),
  [("average", 17, False), ("token anchor", 16, False), ("clipped", 16, False), ("clipped", 17, True)],
)
def test_a_call_without_a_state_is_the_oracle(choice, tokens, packed):
  """As in training: without a state, and, for 16 tokens in one document, with chunks that are known to be whole."""
  spec = CHOICES[choice]
  args = problem(spec, tokens, decay=not spec.average)
  assert_equal(spec, args, ids=jnp.asarray(IDS[:, :tokens]) if packed else None)


@IN_FLOAT64
@pytest.mark.parametrize("choice", ["average", "token anchor", "power, norm", "clipped"])
def test_any_split_is_one_pass(choice):
  spec = CHOICES[choice]
  args = problem(spec, decay=not spec.average)
  state = used(spec)
  whole = run(spec, args, state)
  ys, losses, begin = [], [], 0
  for end in (1, 9, 17):  # two lengths, hence two programs
    piece = jax.tree.map(lambda x, part=slice(begin, end): x[:, part], args[1:])
    y, state, loss = run(spec, (args[0], *piece), state)
    ys, losses, begin = [*ys, y], [*losses, loss], end
  assert_close((jnp.concatenate(ys, 1), state, jnp.concatenate(losses, 1)), tuple(whole))


@IN_FLOAT64
@pytest.mark.parametrize("read", READS)
def test_causality_and_independence_of_rows_and_heads(read):
  spec = Spec(MEMORIES["mlp"], chunk_size=4, momentum=True, read=read)
  args = problem(spec)
  initial, q, k, v, gates = args
  y = run(spec, args).y
  other = problem(spec, seed=1)[1:]
  for t, row, head in ((0, 0, 0), (6, 1, 1), (16, 0, 1)):
    tokens = jax.tree.map(lambda a, b, at=(row, t, head): a.at[at].set(b[at]), (q, k, v, gates), other)
    changed = run(spec, (initial, *tokens)).y
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
  assert_equal(spec, args, used(spec))


@IN_FLOAT64
def test_only_rows_with_too_many_documents_are_nan():
  spec = Spec(MEMORIES["mlp"], chunk_size=16)
  initial, q, k, v, gates = problem(spec)
  ids = jnp.asarray(np.stack([np.arange(1, 18), np.ones(17)]).astype(np.int32))
  y, state, loss = ttm.run(spec, initial, q, k, v, gates, segment_ids=ids, max_documents=2)
  assert all(np.all(np.isnan(a[0])) for a in (y, loss, state.weights["0"]))
  assert_finite((y[1], loss[1], jax.tree.map(lambda x: x[1], state)))
  enough = ttm.run(spec, initial, q, k, v, gates, segment_ids=ids, max_documents=17)
  assert_close(enough, run(spec, (initial, q, k, v, gates), ids=ids, implementation="recurrent"))


@IN_FLOAT64
def test_a_row_begun_in_chunks_of_another_size_is_nan():
  long, short = (Spec(MEMORIES["mlp"], chunk_size=size) for size in (8, 4))
  args = problem(long, 7)
  y, state, _ = run(short, args, run(long, args).state)
  assert all(np.all(np.isnan(a)) for a in (y, state.weights["0"]))


@IN_FLOAT64
def test_padding_alone_changes_nothing():
  spec = CHOICES["clipped"]
  args = problem(spec)
  state = used(spec)
  y, after, loss = run(spec, args, state, jnp.zeros((BATCH, 17), jnp.int32))
  assert_close(after, state)
  assert not any(np.any(a) for a in (y, loss))


def test_equal_keys_converge_below_the_bound_of_the_step_and_diverge_above():
  """A chunk of C equal unit keys is one step of C theta: e <- (1 - 2 C theta) e, so |1 - 2 C theta| < 1 decides."""
  chunk, chunks = 16, 40
  spec = Spec(Memory(4, 4, depth=1, residual=False), chunk_size=chunk)
  k = jnp.broadcast_to(jnp.asarray([1.0, 0, 0, 0], jnp.float32), (1, chunk * chunks, 1, 4))
  v, initial = jnp.ones_like(k), InitialWeights({"0": jnp.zeros((1, 4, 4))})
  for share in (0.95, 1.05):
    step = jnp.full(k.shape[:3], share / chunk, jnp.float32)
    loss = run(spec, (initial, k, k, v, Gates(step))).loss[0, ::chunk, 0]
    ratio = abs(1 - 2 * share)
    assert_close(loss, 4 * ratio ** (2 * jnp.arange(chunks, dtype=jnp.float32)), jnp.float32)
    assert (loss[-1] < loss[0]) == (share < 1)


@pytest.mark.parametrize(("decay_to", "longest"), [("start", 0.01), ("zero", 0.1)])
def test_deep_memories_stay_finite_on_long_hostile_inputs(decay_to, longest):
  """Results for any step; gradients up to the `longest`. A memory that has decayed to zero has none, hence the longer step."""
  spec = Spec(Memory(8, 8, depth=4), chunk_size=64, momentum=True, clip=1.0, decay_to=decay_to)
  key = jax.random.key(0)
  initial = InitialWeights({n: jax.random.normal(key, (1, *s)) * s[0] ** -0.5 for n, s in spec.memory.shapes().items()})
  noise = 0.01 * jax.random.normal(key, (1, 4096, 1, 8))
  k = jnp.ones((1, 4096, 1, 8)) / 8**0.5 + noise
  v = 100 * jnp.sign(noise)
  ones = jnp.ones((1, 4096, 1))
  for step in (1e-3, longest, 10.0):  # the last of them far beyond what converges
    gates = Gates(step * ones, -0.01 * ones, -0.1 * ones)
    assert_finite(run(spec, (initial, k, k, v, gates)))
    if step <= longest:
      assert_finite(values_and_gradients(spec, (initial, k, k, v, gates), None, None, "xla"))


@pytest.mark.parametrize("memory", MEMORIES)
def test_bfloat16_inputs_keep_a_float32_state(memory):
  spec = Spec(MEMORIES[memory], chunk_size=4, momentum=True)
  initial, q, k, v, gates = problem(spec, dtype=jnp.float32)
  narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  result = run(spec, (initial, *narrow, gates))
  assert result.y.dtype == jnp.bfloat16
  assert {x.dtype.name for x in jax.tree.leaves((result.state, result.loss))} == {"float32", "int32"}
  wide = run(spec, (initial, *(x.astype(jnp.float32) for x in narrow), gates))
  assert_close(result.y, wide.y, jnp.bfloat16)
  assert_close(result.state, wide.state, jnp.float32)


def test_mistakes_are_named():
  spec = Spec(MEMORIES["mlp"], chunk_size=4, momentum=True)
  args = initial, q, k, v, gates = problem(spec, dtype=jnp.float32)
  wrong = {
    r"q has shape \[2, 17, 2\]; expected": (initial, q[..., 0], k, v, gates),
    r"q has shape \[2, 0, 2, 3\]; expected .* at least one token": (initial, q[:, :0], k[:, :0], v[:, :0], gates),
    r"k has shape \[2, 9, 2, 3\]; expected \[2, 17, 2, 3\]": (initial, q, k[:, :9], v, gates),
    r"gates.log_momentum is missing": (initial, q, k, v, gates._replace(log_momentum=None)),
    r"gates.threshold was given; expected None": (initial, q, k, v, gates._replace(threshold=gates.step)),
    r"gates.step has shape": (initial, q, k, v, gates._replace(step=gates.step[..., None])),
    r"initial.weights has shapes": (InitialWeights({"0": initial.weights["0"]}), q, k, v, gates),
    r"initial.norm is given": (initial._replace(norm=(q, q)), q, k, v, gates),
    r"k is int32; expected floats": (initial, q, k.astype(jnp.int32), v, gates),
    r"initial.momentum has shapes": (initial._replace(momentum={"0": initial.weights["0"]}), q, k, v, gates),
  }
  for message, bad in wrong.items():
    with pytest.raises(ValueError, match=message):
      run(spec, bad)
  for message, bad in {
    r"initial_state.weights\['0'\] has shape \[2, 1, 3, 6\]; expected \[2, 2, 3, 6\]": ttm.start(spec, BATCH, 1),
    r"initial_state.weights\['0'\] has shape \[3, 2, 3, 6\]; expected \[2, 2, 3, 6\]": ttm.start(spec, 3, HEADS),
    r"initial_state does not fit this spec": ttm.start(CHOICES["huber"], BATCH, HEADS),
  }.items():
    with pytest.raises(ValueError, match=message):
      run(spec, args, bad)
  read_args = initial, ttm.start(spec, BATCH, HEADS).weights, q
  with pytest.raises(ValueError, match=r"weights does not fit this spec"):
    ttm.read(spec, initial, ttm.start(spec, BATCH, HEADS), q)
  with pytest.raises(ValueError, match=r"initial_state.count is float32; expected int32"):
    run(spec, args, jax.tree.map(lambda a: a.astype(jnp.float32), ttm.start(spec, BATCH, HEADS)))
  normed = Spec(MEMORIES["norm"])
  initial, *rest = problem(normed, dtype=jnp.float32)
  with pytest.raises(ValueError, match=r"initial.norm has shapes .*expected a gain and a bias of \[2, 3\]"):
    run(normed, (initial._replace(norm=(initial.norm[0][:1], initial.norm[1])), *rest))
  with pytest.raises(ValueError, match="implementation='fast' does not exist"):
    run(spec, args, implementation="fast")
  for function, arguments in ((ttm.run, args), (ttm.read, read_args)):
    with pytest.raises(ValueError, match=r"precision='half'; expected None .* or 'highest'"):
      function(spec, *arguments, precision="half")
  initial = problem(CHOICES["average"], dtype=jnp.float32)[0]._replace(average=None)
  with pytest.raises(ValueError, match=r"initial.average does not fit; expected .*\[2, 4\]"):
    run(CHOICES["average"], (initial, q, k, v, Gates(gates.step)))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Memory(3, 4), "value_dim=4 differs"),
    (lambda: Memory(3, 3, depth=0), "depth=0"),
    (lambda: Memory(3, 3, activation="relu"), "activation='relu'; expected one of"),
    (lambda: Memory(3, 3, expansion=0.1), "expansion=0.1"),
    (lambda: Loss("cubic"), "Loss.kind='cubic'; expected one of"),
    (lambda: Loss(scale=0), "Loss.scale=0"),
    (lambda: Loss("power", power=0.5), "Loss.power=0.5"),
    (lambda: Memory(0, 3), "key_dim=0, value_dim=3"),
    (lambda: Spec(MEMORIES["mlp"], "squared"), "loss='squared'; expected a Loss"),
    (lambda: Retention("half"), "Retention.kind='half'"),
    (lambda: Retention("norm", norm=1), "Retention.norm=1"),
    (lambda: Spec(MEMORIES["mlp"], chunk_size=0), "chunk_size=0"),
    (lambda: Spec(MEMORIES["mlp"], anchor="token"), "anchor='token' is for linear memories .*chunk_size=1"),
    (lambda: Spec(MEMORIES["mlp"], order="decay_first"), "order='decay_first' is for anchor='token'"),
    (lambda: Spec(MEMORIES["mlp"], read="later"), "read='later'; expected one of"),
    (lambda: Spec(MEMORIES["linear"], anchor="token", read="chunk_start"), "read='chunk_start' with anchor"),
    (lambda: Spec(MEMORIES["linear"], anchor="token", clip=1.0), "clip=1.0 with anchor"),
    (lambda: Spec(MEMORIES["mlp"], average=True, momentum=True), "average=True with momentum=True"),
    (lambda: Spec(MEMORIES["mlp"], retention=Retention("simplex")), "expected 'chunk_start'"),
    (lambda: Spec(MEMORIES["mlp"], clip=0.0), "clip=0.0"),
  ],
)
def test_choices_that_exclude_each_other_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
