"""The kernels of local linear attention for TPUs against all pairs at once in float64, run by Pallas' interpreter.

    python tests/test_local_linear_tpu.py        prints the errors of all cases
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # its verdict on races is not exported
from jax.experimental.pallas import tpu as pltpu
from memzoo.layers import LocalLinearAttention, Parallax
from memzoo.pallas_kernels.dispatch import Kernels
from memzoo.pallas_kernels.local_linear import causal, explain, local_linear_attention, tpu
from memzoo.pallas_kernels.local_linear.blockwise import by_blocks
from memzoo.pallas_kernels.local_linear.dense import dense
from memzoo.pallas_kernels.local_linear.spec import Spec

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("local_linear_tpu")]

NAMES = "output", "by q", "by k", "by v", "by ridge"
SOLVER = {"iterations": 32, "tolerance": 1e-6}
CASES = {
  "random": {},
  "equal keys": {"spread": 0.0},
  "keys far from zero": {"distance": 10.0},
  "keys very far from zero": {"distance": 200.0},
  "weights of one key": {"sharpness": 8.0},
  "wider than a register": {"width": 144, "values": 24, "tokens": 130, "window": None},
  "given": {"given": True},
}


def of_case(
  dtype, tokens=300, width=64, values=64, window=50, spread=1.0, distance=0.0, sharpness=1.0, given=False
):
  """The settings of a call with documents, padding, a window and two heads of one key head; its arrays; a cotangent."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  origin = distance * normal(1, 1, 1, width)
  k = origin + normal(1, 1, 1, width) + spread * normal(1, tokens, 1, width)
  q, v = sharpness * (normal(1, tokens, 2, width) + origin), normal(1, tokens, 1, values)
  q, k, v, dy = (jnp.asarray(x).astype(dtype) for x in (q, k, v, normal(1, tokens, 2, values)))
  last = -0.2 * normal(*q.shape) if given else 1 + np.exp(normal(1, tokens, 2, 1))
  segment_ids = jnp.asarray(np.repeat([1, 2, 0, 2], [tokens // 2, 20, 10, tokens - tokens // 2 - 30])[None], jnp.int32)
  spec = Spec(width**-0.5, window=window, causal=True, **({"given": True} if given else SOLVER))
  return spec, (q, k, v, jnp.asarray(last), causal(1, tokens, segment_ids)), dy


@partial(jax.jit, static_argnums=0, static_argnames="interpret")
def kernels(spec, inputs, dy, interpret=True):
  y, sums = tpu.forward(spec, *inputs, interpret=interpret)
  return dict(zip(NAMES, (y, *tpu.backward(spec, *inputs, sums, dy, interpret=interpret)), strict=True))


@partial(jax.jit, static_argnums=(0, 1))
def by_rule(function, spec, inputs, dy):
  *arrays, allowed = inputs
  y, pull_back = jax.vjp(lambda *arrays: function(spec, *arrays, allowed), *arrays)
  return dict(zip(NAMES, (y, *pull_back(dy)), strict=True))


def errors(case, dtype):
  spec, inputs, dy = of_case(dtype, **CASES[case])
  found = kernels(spec, inputs, dy)
  wide = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.float64), (inputs, dy))
  expected = by_rule(dense, replace(spec, iterations=None), *wide)
  size = {name: float(jnp.max(jnp.abs(x))) for name, x in expected.items()}
  # With equal keys, gradients by keys sum to zero, and those by queries and ridges are nothing but rounding.
  size |= {name: max(size[name], size["by k"]) for name in ("by q", "by ridge")}
  return {name: float(jnp.max(jnp.abs(x.astype(jnp.float64) - expected[name]))) / size[name] for name, x in found.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_rounding_the_results(case):
  found = errors(case, jnp.bfloat16)  # the rounding of a bfloat16 array alone is 2e-3 of its largest elements
  limit = 0.1 if case == "keys very far from zero" else 5e-3
  assert all(error < limit for error in found.values()), found


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", ["random"])
def test_with_float32_operands_errors_are_those_of_float32(case):
  found = errors(case, jnp.float32)
  assert all(error < 5e-5 for error in found.values()), found


def test_it_reads_nothing_that_was_not_written_and_the_copies_of_its_steps_do_not_race():
  """Memories, copies between them and their order are simulated. Memory that nobody has written holds NaN."""
  simulation = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
  case = of_case(jnp.bfloat16)
  jax.tree.map(np.testing.assert_array_equal, kernels(*case, interpret=simulation), kernels(*case))
  assert not interpret_pallas_call.races.races_found


def test_the_operation_has_the_values_and_gradients_of_its_kernels():
  spec, *arrays = of_case(jnp.bfloat16)
  with pltpu.force_tpu_interpret_mode():
    found = by_rule(by_blocks, replace(spec, kernels=Kernels.ALWAYS), *arrays)
  jax.tree.map(np.testing.assert_array_equal, found, kernels(spec, *arrays))


@pytest.mark.parametrize(
  ("tokens", "width", "options", "why"),
  [
    (4096, 64, {}, None),
    (4096, 64, {"blocks": 2, "solver": "cg"}, "with one block"),
    (4096, 64, {"solver": "direct"}, "conjugate gradients"),
    (4096, 64, {"precision": "highest"}, "weights in two parts"),
    (4096, 20, {"solver": "cg"}, "widths up to 256 by 8, not 20"),
    (65536, 64, {}, "of fast memory, of 54 MiB"),
  ],
)
def test_programs_for_a_tpu_have_kernels_where_these_compute_the_call(tokens, width, options, why):
  x, ridge = jax.ShapeDtypeStruct((1, tokens, 2, width), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.float32)
  choice = explain(local_linear_attention, x, x, x, ridge, platform="tpu", **options)
  assert choice.implementation == ("xla" if why else "pallas")
  assert why is None or why in choice.passed_over["pallas"]
  loss = lambda x, ridge: jnp.sum(local_linear_attention(x, x, x, ridge, **options).astype(jnp.float32))  # noqa: E731
  if tokens == 4096:
    text = jax.jit(jax.grad(loss)).trace(x, ridge).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == (0 if why else 2)


@pytest.mark.parametrize("layer", [LocalLinearAttention, Parallax])
def test_layers_have_kernels_in_a_call_without_a_state(layer):
  layer = layer(2, 64, window=100, dtype=jnp.bfloat16)
  x, ids = jax.ShapeDtypeStruct((1, 300, 32), jnp.bfloat16), jax.ShapeDtypeStruct((1, 300), jnp.int32)
  params = jax.eval_shape(layer.init, jax.random.key(0), x)
  loss = lambda params, x, ids: jnp.sum(layer.apply(params, x, segment_ids=ids)[0].astype(jnp.float32))  # noqa: E731
  text = jax.jit(jax.grad(loss)).trace(params, x, ids).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("@tpu_custom_call") == 2


def test_blocks_of_queries_become_smaller_where_that_fits():
  inputs = (jax.ShapeDtypeStruct((1, 18432, 1, 64), jnp.bfloat16),) * 2
  needed = [tpu._fast_memory(*inputs, n) for n in tpu._QUERIES]
  assert needed[1] < tpu._capacity() < needed[0]


if __name__ == "__main__":
  jax.config.update("jax_enable_x64", True)
  for dtype in (jnp.bfloat16, jnp.float32):
    for case in CASES:
      named = (f"{name} {error:.1e} " for name, error in errors(case, dtype).items())
      print(f"{dtype.__name__:8s} {case:24s}", *named, flush=True)
