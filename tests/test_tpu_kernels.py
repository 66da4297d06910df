"""Kernels for TPUs are compiled by libtpu, for every generation, forward and backward; of two heads, which compile fast."""

import jax
import jax.numpy as jnp
import pytest
from machine import needs_libtpu
from memzoo.pallas_kernels.tpu_cost import CHIPS, measure
from memzoo.pallas_kernels.workloads import Shape, flat, function, make_inputs

HARDEST = "erase_then_delta_rule_unbounded"  # two updates per token, and a decay per channel


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
  ("operation", "dtype", "chip"),
  [
    *((HARDEST, jnp.bfloat16, chip) for chip in CHIPS),
    ("gated_delta_rule_packed", jnp.bfloat16, "v5e"),
    ("gated_delta_rule", jnp.float32, "v5e"),
    ("selective_scan", jnp.bfloat16, "v5e"),
    ("local_linear_attention", jnp.bfloat16, "v5e"),
  ],
)
def test_a_program_with_its_kernels_compiles(operation, dtype, chip):
  inputs = jax.eval_shape(lambda: make_inputs(operation, Shape(1, 128, 2), dtype=dtype))
  call, flat_inputs = flat(function(operation, "gradient", "pallas"), inputs)
  cost = measure(call, *flat_inputs, chip=chip)
  assert cost.custom_calls["tpu_custom_call"] == 2
