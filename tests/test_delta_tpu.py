"""The kernel for TPUs against the recurrence in float64, run by Pallas' interpreter. Its products are bfloat16 by their dtypes.

    python tests/test_delta_tpu.py        prints the errors of all cases
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import Variant
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # its verdict on races is not exported
from jax.experimental.pallas import tpu as pltpu
from memzoo.pallas_kernels import delta_rule as ops
from memzoo.pallas_kernels.delta_rule import tpu
from memzoo.pallas_kernels.delta_rule.terms import Plan, Update
from memzoo.pallas_kernels.documents import documents
from test_delta_accuracy import CASES, GATED, SEGMENTS, inputs, relative_error

# The rounding of a bfloat16 output alone is 1.7e-3.
LIMITS = {"output": 2e-3, "state": 5e-4}


@functools.partial(jax.jit, static_argnames="interpret")
def kernel(q, k, v, initial_state, beta=None, log_decay=None, segment_ids=None, interpret=True):
  heads, key_dim = initial_state.shape[1:3]
  plan = Plan(lambda q, k, v, s: (q, [Update(k, s, v)]), heads, key_dim**-0.5, jnp.float32, tpu.CHUNK)
  docs = None if segment_ids is None else documents(segment_ids)
  decay = None if log_decay is None else log_decay[..., None]
  return tpu.forward(plan, docs, (q, k, v, beta), decay, initial_state, interpret=interpret)


@functools.partial(jax.jit, static_argnums=0)
def exact(function, args, segments):
  args = jax.tree.map(lambda x: x.astype(jnp.float64), args)
  return function(**args, segment_ids=segments, implementation="recurrent")


def errors(function, args, segments):
  expected = exact(function, args, segments)
  return dict(zip(LIMITS, map(relative_error, kernel(**args, segment_ids=segments), expected), strict=True))


def of_case(case):
  segments = jnp.asarray(SEGMENTS if case == "documents" else np.ones_like(SEGMENTS))
  return errors(ops.gated_delta_rule, inputs(GATED, case, jnp.bfloat16), segments)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.xdist_group("delta_tpu")
@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_rounding_the_output(case):
  found = of_case(case)
  assert all(found[name] <= limit for name, limit in LIMITS.items()), found


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
  ],
  ids=str,
)
def test_any_number_of_rows_heads_and_tokens(variant, batch, key_heads, heads, tokens, packed):
  args = variant.inputs(tokens, dtype=jnp.float32, batch=batch, key_heads=key_heads, heads=heads, key_dim=16, value_dim=24)
  args = {name: x.astype(jnp.bfloat16) if name in "qkv" else x for name, x in args.items()}
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (batch, tokens)), jnp.int32)
  found = errors(variant.function, args, ids if packed else None)
  assert all(found[name] <= limit for name, limit in LIMITS.items()), found


@pytest.mark.slow
@pytest.mark.xdist_group("delta_tpu")
def test_it_reads_nothing_that_was_not_written_and_the_copies_of_its_steps_do_not_race():
  """Memories, copies between them and their order are simulated. Memory that nobody has written holds NaN."""
  args, segments = inputs(GATED, "documents", jnp.bfloat16), jnp.asarray(SEGMENTS)
  simulation = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
  simulated = kernel(**args, segment_ids=segments, interpret=simulation)
  assert jax.tree.all(jax.tree.map(np.array_equal, simulated, kernel(**args, segment_ids=segments)))
  assert not interpret_pallas_call.races.races_found


if __name__ == "__main__":
  jax.config.update("jax_enable_x64", True)
  for case in CASES:
    print(f"{case:30s}", {name: f"{error:.1e}" for name, error in of_case(case).items()}, flush=True)
