"""Memories that learn at test time: the form and the precision of programs for accelerators, computed on a CPU."""

import itertools
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import passes
import pytest
from inner_problems import CHOICES, assert_equal, problem, run, used
from memzoo.pallas_kernels import test_time_memory as ttm
from memzoo.pallas_kernels.test_time_memory import Gates, InitialWeights, Loss, Memory, Spec
from memzoo.pallas_kernels.test_time_memory.chunked import Affine

pytestmark = pytest.mark.slow

KEY_DIM, HEADS, TOKENS = 16, 2, 96
SPECS = {
  "Titans": Spec(Memory(KEY_DIM, KEY_DIM, residual=False), chunk_size=32, momentum=True, clip=10.0),
  "TTT": Spec(Memory(KEY_DIM, KEY_DIM, norm=True, biases=True), Loss(scale=0.5), chunk_size=16, average=True),
  "linear": Spec(Memory(KEY_DIM, KEY_DIM, depth=1, residual=False), chunk_size=32, momentum=True, anchor="token"),
}


@pytest.fixture
def for_accelerators(monkeypatch):
  """Programs for a CPU have the form that others have."""
  run.clear_cache()
  monkeypatch.setattr(ttm, "by_platform", lambda forms, *args: forms.others(*args))
  yield
  run.clear_cache()


@pytest.mark.usefixtures("float64", "for_accelerators")
@pytest.mark.parametrize(
  ("choice", "with_state"), [*itertools.product(["clipped", "average"], [True, False]), ("token anchor", True)]
)
def test_spans_of_chunks_are_the_oracle_in_values_and_all_gradients(monkeypatch, choice, with_state):
  module = sys.modules[Affine.__module__]
  monkeypatch.setattr(module, "_UNROLL", 2)
  if with_state:  # one row after the other
    monkeypatch.setattr(module, "_FAST_BYTES", 0)
  spec = CHOICES[choice]
  args = problem(spec, 47 if with_state else 48, decay=not spec.average)  # 12 chunks in spans of 2; with a state 13
  assert_equal(spec, args, used(spec) if with_state else None)


COSINE = 0.95  # between keys of different tokens


def trained_like(spec):
  """Arguments as trained layers make them, keys and queries in bfloat16: (initial, q, k, v, gates)."""
  rng = np.random.default_rng(0)

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  def keys():
    common = COSINE**0.5 * unit(rng.normal(size=(1, 1, HEADS, KEY_DIM)))
    return common + (1 - COSINE) ** 0.5 * unit(rng.normal(size=(1, TOKENS, HEADS, KEY_DIM)))

  def sigmoid(offset):
    return 1 / (1 + np.exp(-offset - rng.normal(size=(1, TOKENS, HEADS))))

  memory = spec.memory
  weights = {name: rng.normal(size=(HEADS, *shape)) * shape[0] ** -0.5 for name, shape in memory.shapes().items()}
  norm = (1 + 0.1 * rng.normal(size=(HEADS, KEY_DIM)), 0.1 * rng.normal(size=(HEADS, KEY_DIM))) if memory.norm else None
  average = 0.1 * rng.normal(size=(HEADS, spec.chunk_size)) if spec.average else None
  step = (0.1 / KEY_DIM if spec.average else 0.5 if spec.exact else 0.02) * sigmoid(0)
  gates = Gates(step) if spec.average else Gates(step, np.log(sigmoid(5)), np.log(sigmoid(0)))
  initial, gates = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (InitialWeights(weights, None, norm, average), gates))
  narrow = (jnp.asarray(x, jnp.bfloat16) for x in (keys(), keys(), rng.normal(size=(1, TOKENS, HEADS, KEY_DIM))))
  return initial, *narrow, gates


def output_and_gradients(spec, args, **options):
  def weighted(*args):
    initial, q, k, v, gates = args
    result = ttm.run(spec, initial, q, k, v, gates, **options)
    weights = np.random.default_rng(1).normal(size=result.y.shape)
    return jnp.sum(result.y.astype(gates.step.dtype) * jnp.asarray(weights, gates.step.dtype)), result

  (_, result), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2, 3, 4), has_aux=True))(*args)
  return result, gradients


def relative_error(actual, expected):
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
  return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


@pytest.mark.usefixtures("float64", "for_accelerators")
@pytest.mark.parametrize("name", ["Titans"])
def test_three_passes_keep_a_bfloat16_call_at_the_rounding_of_its_output(name):
  args = trained_like(SPECS[name])
  expected, by_expected = output_and_gradients(
    SPECS[name], jax.tree.map(lambda x: x.astype(jnp.float64), args), implementation="recurrent"
  )
  with passes.of_a_tpu():
    actual, by_actual = output_and_gradients(SPECS[name], args)
    full = jax.jit(partial(ttm.run, SPECS[name], precision="highest"))(*args)
  assert relative_error(actual.y, expected.y) < 2.5e-3
  errors = jax.tree.map(relative_error, by_actual, by_expected)
  assert max(jax.tree.leaves(errors)) < 5e-3, errors
  states = jax.tree.map(relative_error, actual.state.weights, expected.state.weights)
  exact = jax.tree.map(relative_error, full.state.weights, expected.state.weights)
  for matrix in states:
    assert exact[matrix] < 0.9 * states[matrix] < 5e-5


@pytest.mark.parametrize("precision", [None, "highest"])
def test_a_bfloat16_program_for_a_tpu_multiplies_in_six_passes_only_at_the_highest_precision(precision):
  spec = Spec(Memory(16, 16, expansion=3, residual=False), chunk_size=8, momentum=True)
  shape = (1, 64, 2, 16)
  q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  gate = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
  initial = InitialWeights({n: jax.ShapeDtypeStruct((2, *s), jnp.float32) for n, s in spec.memory.shapes().items()})

  def gradient(initial, q, k, v, gates, ct):
    return jax.vjp(lambda *args: ttm.run(spec, *args, precision=precision).y, initial, q, k, v, gates)[1](ct)

  traced = jax.jit(gradient).trace(initial, q, q, q, Gates(gate, gate, gate), q)
  program = traced.lower(lowering_platforms=("tpu",)).as_text()
  products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
  assert products
  six_passes = [line for line in products if "HIGHEST" in line]
  assert bool(six_passes) == (precision == "highest"), six_passes
