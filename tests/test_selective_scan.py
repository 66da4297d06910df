"""The selective scan: NumPy's recurrence, blocks against it, and what it must not keep in memory."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from memzoo.pallas_kernels import hlo
from memzoo.pallas_kernels.delta_rule import linear_attention
from memzoo.pallas_kernels.documents import documents
from memzoo.pallas_kernels.selective_scan import call, explain, selective_scan, tpu
from memzoo.pallas_kernels.selective_scan.chunked import Plan
from memzoo.pallas_kernels.selective_scan.recurrent import recurrent
from tolerances import assert_close, assert_finite

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("selective_scan")]
IN_FLOAT64 = pytest.mark.usefixtures("float64")
IDS = np.stack([
  [0, 0, 1, 2, 2, 3, 3, 3, 0, 3, 4, 4, 4, 4, 4, 4, 0],
  [1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 0, 1, 0, 0, 0, 1, 5],
]).astype(np.int32)  # fmt: skip


def inputs(batch=2, tokens=17, channels=8, states=3, dtype=jnp.float64):
  rng = np.random.default_rng(tokens)
  of_tokens = (batch, tokens)
  args = {
    "x": rng.normal(size=(*of_tokens, channels)),
    "step": np.exp(rng.normal(size=(*of_tokens, channels)) - 1),
    "a": -np.exp(rng.normal(size=(states, channels))),
    "b": rng.normal(size=(*of_tokens, states)),
    "c": rng.normal(size=(*of_tokens, states)),
    "initial_state": rng.normal(size=(batch, states, channels)),
  }
  return {name: jnp.asarray(x, dtype) for name, x in args.items()}


@partial(jax.jit, static_argnums=(0, 3))
def values_and_gradients(implementation, args, ids=None, chunk_size=None):
  options = {"segment_ids": ids, "chunk_size": chunk_size, "implementation": implementation}
  out, pull_back = jax.vjp(lambda args: selective_scan(**args, **options), args)
  rng = np.random.default_rng(5)
  return out, pull_back(tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in out))[0]


def in_numpy(x, step, a, b, c, initial_state, ids):
  """Token by token, every channel and state on its own."""
  y, h = np.zeros(x.shape), np.array(initial_state)
  for row in range(len(x)):
    document = 0
    for t in np.flatnonzero(ids[row]):
      if document not in (0, ids[row, t]):
        h[row] = 0
      document = ids[row, t]
      for n, d in np.ndindex(*a.shape):
        h[row, n, d] = np.exp(step[row, t, d] * a[n, d]) * h[row, n, d] + step[row, t, d] * b[row, t, n] * x[row, t, d]
      y[row, t] = np.asarray(c)[row, t] @ h[row]
  return y, h


PLANS = {
  "one block": Plan(32),
  "blocks of 4": Plan(4),
  "3 chunks of 4 at once": Plan(4, 3, in_bulk=False),
  "5 chunks of 1 at once": Plan(1, 5, in_bulk=False),
}


@IN_FLOAT64
@pytest.mark.compat
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_blocks_are_the_recurrence_in_values_and_every_gradient(monkeypatch, plan, packed):
  """The plans of CPUs and of accelerators, with padding that holds large numbers and documents of one token and more."""
  monkeypatch.setattr(call, "_plans", lambda *_: (PLANS[plan], PLANS[plan]))
  args, ids = inputs(), jnp.asarray(IDS) if packed else None
  if packed:
    args |= {name: jnp.where(ids[..., None] == 0, 1e6, args[name]) for name in ("x", "step", "b", "c")}
  jax.clear_caches()
  actual, expected = (values_and_gradients(name, args, ids) for name in ("xla", "recurrent"))
  assert_close(actual[0], expected[0])
  assert_close(actual[1], expected[1], gradients=True)


@IN_FLOAT64
def test_the_recurrence_is_numpys():
  args = inputs()
  expected = in_numpy(**{name: np.asarray(x) for name, x in args.items()}, ids=IDS)
  assert_close(selective_scan(**args, segment_ids=jnp.asarray(IDS), implementation="recurrent"), expected)


@IN_FLOAT64
def test_without_steps_the_state_is_frozen_and_with_large_ones_forgotten():
  args = inputs()
  frozen = args | {"step": jnp.zeros_like(args["step"])}
  y, state = selective_scan(**frozen)
  assert_close(state, args["initial_state"])
  assert_close(y, jnp.einsum("btn,bnd->btd", args["c"], args["initial_state"]))
  forgotten = args | {"step": jnp.full_like(args["step"], 1e4)}
  y, _ = selective_scan(**forgotten)
  assert_close(y, 1e4 * args["x"] * jnp.sum(args["b"] * args["c"], axis=-1, keepdims=True))


@IN_FLOAT64
def test_with_one_decay_for_all_states_of_a_channel_it_is_linear_attention_with_heads_of_one_value():
  args = inputs()
  a = jnp.broadcast_to(args["a"][:1], args["a"].shape)
  steps, own = args["step"], args["a"][0]
  y, state = selective_scan(**args | {"a": a})
  out, memory = linear_attention(
    args["c"][:, :, None],
    args["b"][:, :, None],
    (steps * args["x"])[..., None],
    steps * own[None, None],
    scale=1.0,
    initial_state=jnp.swapaxes(args["initial_state"], 1, 2)[..., None],
  )
  assert_close(y, out[..., 0])
  assert_close(jnp.swapaxes(state, 1, 2), memory[..., 0])


@IN_FLOAT64
@pytest.mark.parametrize("cut", [1, 5, 16])
def test_any_split_is_one_pass(cut):
  args = inputs()
  tokens = {name: args.pop(name) for name in ("x", "step", "b", "c")}
  first, state = selective_scan(**args, **{name: x[:, :cut] for name, x in tokens.items()}, chunk_size=4)
  second, state = selective_scan(
    **args | {"initial_state": state}, **{name: x[:, cut:] for name, x in tokens.items()}, chunk_size=3
  )
  assert_close((jnp.concatenate([first, second], axis=1), state), selective_scan(**args, **tokens))


def test_float32_with_strong_and_weak_decays_is_the_float64_recurrence():
  """Steps from 1e-6 to 1e3: decays that underflow, and decays that are one but for rounding."""
  with jax.enable_x64(True):
    args = inputs(tokens=150, channels=16)
    rng = np.random.default_rng(0)
    args["step"] = jnp.asarray(10 ** rng.uniform(-6, 3, args["step"].shape))
    expected = values_and_gradients("recurrent", args)
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), args)
  for plan in (Plan(16), Plan(16, 4, in_bulk=False)):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(call, "_plans", lambda *_, plan=plan: (plan, plan))
      jax.clear_caches()
      actual = values_and_gradients("xla", narrow)
    assert_finite(actual)
    assert_close(actual[0], expected[0], jnp.float32)
    assert_close(actual[1], expected[1], jnp.float32, gradients=True)


def test_bfloat16_tokens_have_a_float32_state():
  args = inputs(dtype=jnp.float32)
  narrow = args | {name: args[name].astype(jnp.bfloat16) for name in ("x", "b", "c")}
  (y, state), gradients = values_and_gradients("xla", narrow)
  assert (y.dtype, state.dtype, gradients["x"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
  (wide, wide_state), wide_gradients = values_and_gradients("xla", args)
  assert_close((y.astype(jnp.float32), state), (wide, wide_state), jnp.bfloat16)
  assert_close(jax.tree.map(lambda x: x.astype(jnp.float32), gradients), wide_gradients, jnp.bfloat16, gradients=True)


def gradient(x, step, a, b, c):
  return jax.grad(lambda *args: jnp.sum(jnp.sin(selective_scan(*args)[0])), argnums=(0, 1, 2, 3, 4))(x, step, a, b, c)


@pytest.mark.parametrize("plan", [None, Plan(16, 4, in_bulk=False)])
def test_no_array_of_the_gradient_has_tokens_channels_and_states_and_memory_is_linear(monkeypatch, plan):
  if plan is not None:
    monkeypatch.setattr(call, "_plans", lambda *_: (plan, plan))
  channels, states, found = 64, 16, {}
  for tokens in (2048, 4096):
    shapes = [(1, tokens, channels)] * 2 + [(states, channels)] + [(1, tokens, states)] * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(lambda *args: gradient(*args)).lower(*arrays).compile()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", program.as_text())]
    assert max(sizes) <= tokens * channels * states / 8
    found[tokens] = program.memory_analysis().temp_size_in_bytes
  assert found[4096] < 2.1 * found[2048]


def test_each_device_computes_its_share_over_axes_that_nobody_declared():
  """Forward and gradient: nothing is gathered; gradients by a are summed over rows, those by b and c over channels."""
  args = inputs(batch=4, tokens=16, channels=64, dtype=jnp.float32)
  args = [args[name] for name in ("x", "step", "a", "b", "c")]

  def forward(*args):
    return selective_scan(*args)

  for function, allowed in (forward, set()), (gradient, {"all-reduce"}):
    whole = jax.jit(function).lower(*args).compile()
    mesh = jax.make_mesh((2, 2), ("width", "batch"), axis_types=(AxisType.Auto,) * 2)
    tokens, shared = P("batch", None, "width"), P("batch")
    specs = tokens, tokens, P(None, "width"), shared, shared
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(args, specs, strict=True)]
    program = jax.jit(function).lower(*placed).compile()
    assert {each.kind for each in hlo.parse(program.as_text()).collectives()} == allowed
    assert program.cost_analysis()["flops"] <= 0.27 * whole.cost_analysis()["flops"]
    assert_close(program(*placed), whole(*args), jnp.float32, gradients=function is gradient)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"x": jnp.zeros((2, 0, 8))}, "x is float32[2, 0, 8]; expected floats [batch, tokens, channels] with at least one token."),
    ({"a": jnp.zeros((3, 7))}, "a has shape [3, 7]; expected [states, 8], one column per channel of x."),
    ({"step": jnp.zeros((2, 17, 1))}, "step has shape [2, 17, 1]; expected [2, 17, 8] (batch, tokens, channels, like x)."),
    ({"c": jnp.zeros((2, 17, 4))}, "c has shape [2, 17, 4]; expected [2, 17, 3] (batch, tokens, states)."),
    ({"initial_state": jnp.zeros((2, 8, 3))}, "initial_state has shape [2, 8, 3]; expected [2, 3, 8] (batch, states, channels"),
    ({"chunk_size": 0}, "chunk_size=0; expected at least 1, or None."),
    ({"implementation": "cuda"}, "implementation='cuda' does not exist for selective_scan"),
  ],
)
def test_mistakes_are_named(wrong, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    selective_scan(**inputs(dtype=jnp.float32) | wrong)


@pytest.mark.parametrize(
  ("tokens", "channels", "platform", "expected"),
  [(1, 128, "tpu", "recurrent"), (2, 128, "tpu", "pallas"), (2, 128, "cpu", "xla"), (2, 96, "tpu", "xla")],
)
def test_one_token_is_the_recurrence_and_more_are_kernels_or_blocks(tokens, channels, platform, expected):
  args = inputs(tokens=tokens, channels=channels, states=8, dtype=jnp.float32)
  args["x"] = args["x"].astype(jnp.bfloat16)
  assert explain(selective_scan, platform=platform, **args).implementation == expected


@IN_FLOAT64
@pytest.mark.parametrize("packed", [True, False])
def test_kernels_are_the_recurrence_in_values_and_every_gradient(packed):
  """Run by Pallas' interpreter; of two chunks, the second of which is not whole."""
  args = inputs(tokens=150, channels=256, states=16, dtype=jnp.float32)
  rng = np.random.default_rng(0)
  docs = documents(jnp.asarray(rng.integers(0, 3, 30).repeat(10).reshape(2, 150), jnp.int32)) if packed else None
  args["step"], names = 0.1 * args["step"], tuple(args)
  wide = {name: x.astype(jnp.float64) for name, x in args.items()}
  expected, pull_back = jax.vjp(lambda *values: recurrent(*values, docs), *wide.values())
  weights = tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in expected)
  results, kept = tpu.forward(docs, *args.values(), interpret=True)
  inputs_of_tokens = [args[name] for name in names[:-1]]
  found = list(tpu.backward(docs, *inputs_of_tokens, kept, *weights, parts=2, interpret=True))
  for i, axis in ((2, 0), (3, 2), (4, 2)):
    found[i] = jnp.sum(found[i], axis=axis)
  by = pull_back(tuple(x.astype(jnp.float64) for x in weights))
  for name, x, y in zip(("y", "state", *names), (*results, *found), (*expected, *by), strict=True):
    error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(y)
    assert error < 1e-6, (name, error)


def test_programs_for_a_tpu_have_kernels():
  args = inputs(tokens=20, channels=128, states=8, dtype=jnp.float32)
  loss = jax.grad(lambda args: jnp.sum(selective_scan(**args, implementation="pallas")[0]))
  text = jax.jit(loss).trace(args).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("@tpu_custom_call") == 2
