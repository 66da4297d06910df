"""The kernels for TPUs against the recurrence in float64, run by Pallas' interpreter. Products are bfloat16 by their dtypes.

    python tests/test_delta_tpu.py        prints the errors of all cases
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import Variant, cotangents
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # its verdict on races is not exported
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from memzoo.pallas_kernels import delta_rule as ops
from memzoo.pallas_kernels.delta_rule import tpu, tpu_step
from memzoo.pallas_kernels.delta_rule.terms import Plan
from memzoo.pallas_kernels.delta_rule.tpu_tiles import CHUNK
from memzoo.pallas_kernels.documents import documents
from memzoo.pallas_kernels.partition import split_over
from test_delta_accuracy import CASES, ERASE, GATED, GATED_2, KIMI, PRODUCT, SEGMENTS, inputs, relative_error

# The rounding of a bfloat16 array alone is 1.7e-3.
LIMITS = {jnp.dtype(jnp.bfloat16): 2e-3, jnp.dtype(jnp.float32): 5e-4}

NARROW = "q", "k", "v", "erase_key"
OPERANDS = "q", "k", "v", "beta", "erase_key", "erase_strength", "erase_gate", "write_gate"
UPDATES = {
  ops.linear_attention: ops._additive_update,
  ops.delta_product: ops._delta_updates,
  ops.erase_then_delta_rule: ops._erase_and_delta_updates,
  ops.gated_delta_rule_2: ops._gated_update,
}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("interpret", "decay_bound"))
def kernels(variant, args, segment_ids, weights, interpret=True, decay_bound=None):
  """Output, final state and the gradients by argument."""
  heads, key_dim = args["initial_state"].shape[1:3]
  updates = UPDATES.get(variant.function, ops._delta_update)
  plan = Plan(updates, heads, key_dim**-0.5, jnp.float32, args["v"].dtype, CHUNK, decay_bound=decay_bound)
  docs = None if segment_ids is None else documents(segment_ids)
  names = [name for name in OPERANDS if name in args]
  operands = tuple(args[name] for name in names)
  decay = args.get("log_decay")
  if decay is not None and decay.ndim == 3:
    decay = decay[..., None]
  results, kept = tpu.forward(plan, docs, operands, decay, args["initial_state"], interpret=interpret)
  d_operands, d_decay, d_state = tpu.backward(plan, docs, operands, decay, kept, *weights, interpret=interpret)
  gradients = dict(zip(names, d_operands, strict=True)) | {"initial_state": d_state}
  if decay is not None:
    gradients["log_decay"] = d_decay.reshape(args["log_decay"].shape)
  return dict(zip(("output", "state"), results, strict=True)), {name: gradients[name] for name in args}


@functools.partial(jax.jit, static_argnums=0)
def exact(variant, args, segments, weights):
  args, weights = jax.tree.map(lambda x: x.astype(jnp.float64), (args, weights))
  results, pull_back = jax.vjp(lambda args: variant.function(**args, segment_ids=segments, implementation="recurrent"), args)
  return dict(zip(("output", "state"), results, strict=True)), pull_back(weights)[0]


def errors(variant, args, segments, decay_bound=None):
  """The relative error of every result and gradient, and its limit."""
  weights = cotangents(args)
  found, by_found = kernels(variant, args, segments, weights, decay_bound=decay_bound)
  expected, by_expected = exact(variant, args, segments, weights)
  found |= {f"by {name}": x for name, x in by_found.items()}
  expected |= {f"by {name}": x for name, x in by_expected.items()}
  found = {name: (relative_error(x, expected[name]), LIMITS[x.dtype]) for name, x in found.items()}
  if "log_decay" in args:
    found["1 - cosine"] = 1 - cosine_of_gates(args["log_decay"], by_found["log_decay"], by_expected["log_decay"]), 1e-3
  return found


def cosine_of_gates(log_decay, *gradients):
  """The cosine of two gradients by A and b of log-decays -exp(A) softplus(u + b), sums over all tokens, for A = 0."""
  log_decay, *gradients = (x.astype(jnp.float64) for x in (log_decay, *gradients))
  by_weights = log_decay, jnp.expm1(log_decay)  # the derivative of -softplus(x) is -sigmoid(x) = e^-softplus(x) - 1
  x, y = (jnp.concatenate([jnp.sum(d * w, axis=(0, 1)).ravel() for w in by_weights]) for d in gradients)
  return float(jnp.vdot(x, y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y)))


def too_large(found):
  return {name: error for name, (error, limit) in found.items() if not error <= limit}


BOUND = -5.0  # of decays by channel


def of_case(variant, case, bound=None):
  """With a bound, log-decays are at least that."""
  segments = jnp.asarray(SEGMENTS if case == "documents" else np.ones_like(SEGMENTS))
  args = inputs(variant, case, jnp.bfloat16)
  if bound is not None:
    args["log_decay"] = jnp.maximum(args["log_decay"], bound)
  return errors(variant, args, segments, bound)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.xdist_group("delta_tpu")
@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_rounding_the_output(case):
  assert not too_large(of_case(GATED, case))


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.xdist_group("delta_tpu_channels")
@pytest.mark.parametrize(
  ("variant", "case", "bound"),
  [
    (KIMI, "equal keys, strength 1.9", None),
    (KIMI, "decays -8 to -16", None),
    (KIMI, "decays 0 or -20 to -60", None),
    (KIMI, "random", BOUND),
    (KIMI, "decays -8 to -16", BOUND),  # all are at the bound
    (ERASE, "equal keys, strength 1.9", BOUND),
    (ERASE, "decays -8 to -16", None),
    (GATED_2, "cosine 0.99, strength 1.9", None),
    (GATED_2, "documents", BOUND),
    (PRODUCT, "cosine 0.99, strength 1.9", None),
    (PRODUCT, "decays -8 to -16", None),
  ],
  ids=str,
)
def test_errors_by_channel_and_with_two_updates_are_those_of_rounding_the_output(variant, case, bound):
  assert not too_large(of_case(variant, case, bound))


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.parametrize(
  ("variant", "batch", "key_heads", "heads", "tokens", "packed"),
  [
    (GATED, 2, 1, 3, 70, True),
    (Variant(ops.delta_rule), 1, 2, 2, 64, False),
    (GATED, 3, 1, 1, 5, True),
    (Variant(ops.linear_attention, "scalar"), 2, 1, 3, 70, True),
    (Variant(ops.linear_attention), 1, 2, 2, 64, False),
    (KIMI, 1, 1, 2, 35, True),
    (Variant(ops.linear_attention, "channel"), 1, 1, 2, 64, False),
    (PRODUCT, 1, 1, 2, 35, True),
    (ERASE, 1, 1, 2, 35, True),
  ],
  ids=str,
)
def test_any_number_of_rows_heads_and_tokens(variant, batch, key_heads, heads, tokens, packed):
  args = variant.inputs(tokens, dtype=jnp.float32, batch=batch, key_heads=key_heads, heads=heads, key_dim=16, value_dim=24)
  args = {name: x.astype(jnp.bfloat16) if name in NARROW else x for name, x in args.items()}
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (batch, tokens)), jnp.int32)
  assert not too_large(errors(variant, args, ids if packed else None))


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.xdist_group("delta_tpu")
def test_heads_of_one_key_in_several_steps(monkeypatch):
  monkeypatch.setattr(tpu_step, "STATES", 2)
  monkeypatch.setattr(tpu_step, "STATES_BACKWARDS", 2)
  args = GATED.inputs(64, dtype=jnp.float32, batch=1, key_heads=1, heads=4, key_dim=128, value_dim=64)
  args = {name: x.astype(jnp.bfloat16) if name in "qkv" else x for name, x in args.items()}
  assert not too_large(errors(GATED, args, None))


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.xdist_group("delta_tpu_channels")
@pytest.mark.parametrize(("variant", "case"), [(GATED, "equal keys, strength 1.9"), (ERASE, "documents")], ids=str)
def test_with_float32_activations_errors_are_those_of_float32(variant, case):
  segments = jnp.asarray(SEGMENTS if case == "documents" else np.ones_like(SEGMENTS))
  found = errors(variant, inputs(variant, case, jnp.float32), segments)
  assert all(error < 1e-5 for error, _ in found.values()), found


@pytest.mark.slow
@pytest.mark.xdist_group("delta_tpu")
def test_it_reads_nothing_that_was_not_written_and_the_copies_of_its_steps_do_not_race():
  """Memories, copies between them and their order are simulated. Memory that nobody has written holds NaN."""
  args, segments = inputs(GATED, "documents", jnp.bfloat16), jnp.asarray(SEGMENTS)
  simulation = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
  simulated = kernels(GATED, args, segments, cotangents(args), interpret=simulation)
  assert jax.tree.all(jax.tree.map(np.array_equal, simulated, kernels(GATED, args, segments, cotangents(args))))
  assert not interpret_pallas_call.races.races_found


def lowered(loss, args, platform="tpu"):
  return jax.jit(jax.grad(loss)).trace(args).lower(lowering_platforms=(platform,)).as_text()


WITHOUT = {"implementation": "xla"}


@pytest.mark.parametrize(
  ("variant", "platform", "options", "kernels"),
  [(GATED, "tpu", {}, 2), (GATED, "tpu", WITHOUT, 0), (GATED, "cpu", {}, 0), (KIMI, "tpu", {}, 2), (PRODUCT, "tpu", {}, 2)],
)
def test_programs_for_a_tpu_have_kernels(variant, platform, options, kernels):
  args = inputs(variant, "random", jnp.bfloat16)
  loss = lambda args: jnp.sum(variant.function(**args, **options)[0].astype(jnp.float32))  # noqa: E731
  assert lowered(loss, args, platform).count("@tpu_custom_call") == kernels


def test_without_a_gradient_no_states_of_chunks_are_kept():
  args = inputs(GATED, "random", jnp.bfloat16)
  call = jax.jit(lambda args: ops.gated_delta_rule(**args))
  (kernel,) = re.findall(r"@tpu_custom_call.*", call.trace(args).lower(lowering_platforms=("tpu",)).as_text())
  assert len(re.findall("tensor<", kernel.rpartition("->")[2])) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.xdist_group("delta_tpu")
def test_the_operation_has_the_values_and_gradients_of_its_kernels():
  """Of the kernels, by the operation's own gradient rule, and of kernels that are mapped."""
  args, segments = inputs(GATED, "documents", jnp.bfloat16), jnp.asarray(SEGMENTS)
  weights = cotangents(args)

  def run(args, weights, segments):
    results, pull_back = jax.vjp(lambda args: ops.gated_delta_rule(**args, segment_ids=segments, implementation="pallas"), args)
    return dict(zip(("output", "state"), results, strict=True)), pull_back(weights)[0]

  with pltpu.force_tpu_interpret_mode():
    found = jax.jit(run)(args, weights, segments)
  jax.tree.map(np.testing.assert_array_equal, found, kernels(GATED, args, segments, weights))
  mapped = jax.vmap(functools.partial(kernels, GATED))(*jax.tree.map(lambda x: x[:, None], (args, segments, weights)))
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:, 0], y), mapped, found)


@pytest.mark.parametrize(("kind", "declared", "kernels"), [("Explicit", False, 2), ("Auto", True, 2), ("Auto", False, 0)])
def test_each_device_has_kernels_for_its_rows_and_heads_where_their_split_is_known(kind, declared, kernels):
  mesh = jax.make_mesh((2, 2), ("row", "head"), axis_types=(AxisType[kind],) * 2)
  args = GATED.inputs(64, dtype=jnp.float32, batch=4, key_heads=2, heads=4, key_dim=16, value_dim=16)
  args = {name: x.astype(jnp.bfloat16) if name in "qkv" else x for name, x in args.items()}
  places = {name: P("row", "head") if name == "initial_state" else P("row", None, "head") for name in args}
  args = {name: jax.device_put(x, NamedSharding(mesh, places[name])) for name, x in args.items()}

  def loss(args):
    with split_over(mesh, rows="row", heads="head") if declared else contextlib.nullcontext():
      return jnp.sum(ops.gated_delta_rule(**args)[0].astype(jnp.float32))

  text = lowered(loss, args)
  assert text.count("@tpu_custom_call") == kernels
  of_one_device = "tensor<2x64x16xbf16>"  # keys: two rows, and one head of 16 channels
  assert (of_one_device in text) == (kernels > 0)


if __name__ == "__main__":
  jax.config.update("jax_enable_x64", True)
  for variant, bound in ((GATED, None), (KIMI, None), (KIMI, BOUND), (PRODUCT, None), (ERASE, None), (ERASE, BOUND)):
    for case in CASES:
      found = of_case(variant, case, bound)
      named = (f"{name} {error:.1e} " for name, (error, _) in found.items())
      print(f"{variant!s} {bound or '':4} {case:30s}", *named, flush=True)
