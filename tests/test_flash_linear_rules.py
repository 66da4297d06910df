"""Rules against numbers of flash-linear-attention: outputs, states and all gradients of its PyTorch references, in float64.

`compare_flash_linear_rules.py --write` made them; it also compares longer inputs and more references.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.pallas_kernels import delta_rule
from memzoo.pallas_kernels.taylor_attention import taylor_attention
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("float64")

FUNCTIONS = {
  "gated_delta_rule_2": delta_rule.gated_delta_rule_2,
  "comba_rule": delta_rule.comba_rule,
  "taylor_attention": taylor_attention,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_states_and_gradients_are_those_of_flash_linear_attention(name):
  with np.load(Path(__file__).with_name("flash_linear_rules.npz")) as file:
    saved = {key.removeprefix(f"{name}/"): jnp.asarray(file[key]) for key in file.files if key.startswith(f"{name}/")}
  inputs, gradients = (
    {key.removeprefix(kind): x for key, x in saved.items() if key.startswith(kind)} for kind in ("input/", "gradient/")
  )
  expected = tuple(saved[key] for key in ("output", "state") if key in saved)

  @jax.jit
  def run(inputs):
    out, pull_back = jax.vjp(lambda inputs: FUNCTIONS[name](**inputs)[: len(expected)], inputs)
    cotangents = tuple(jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in out)
    return out, pull_back(cotangents)[0]

  out, found = run(inputs)
  assert_close(out, expected)
  assert_close(found, gradients, gradients=True)
