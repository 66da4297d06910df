"""The laws of a memory layer (`memzoo.layers.laws`), for every layer of the registry and for models of them.

A layer added to `memzoo.zoo.registry.LAYERS` is tested against all of them without a line here; its kind, in `subjects.py`,
sets the budget.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from memzoo.layers.laws import TRACED
from memzoo.zoo.registry import LAYERS
from subjects import METER, MODELS, QUICK, SUBJECTS, checks, kind, layer, trial
from tolerances import assert_close

# Checks that also run on the newest JAX, and the layers that they are run for. Others use the same code, or their operation has
# tests marked `compat` of its own.
COMPAT = ("splits", "documents", "padding", "oracle", "transformations", "nnx_shapes")
TRIED = {"Attention": COMPAT, "TitansMemory": ("documents", "transformations")}


def marks(name, check):
  chosen = [pytest.mark.xdist_group(name)]
  if name in MODELS or (name != QUICK and check.cost != TRACED):
    chosen.append(pytest.mark.slow)
  newest = check.name in TRIED.get(name, ())
  return [*chosen, pytest.mark.compat] if newest else chosen


CASES = [
  pytest.param(
    name,
    check,
    id=f"{name}-{check}",
    marks=marks(name, check),
  )
  for name in SUBJECTS
  for check in checks(name)
]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_law(name, check, record_property):
  with METER.measured(name):
    violations = check(trial(name))
  record_property("law_cost", [name, METER.seconds[name], METER.programs[name], kind(name).seconds, kind(name).programs])
  assert not violations, "\n".join(map(str, violations))


@pytest.mark.parametrize("name", [pytest.param(name, id=name, marks=pytest.mark.xdist_group(name)) for name in SUBJECTS])
def test_laws_compile_no_more_programs_than_a_layer_of_its_kind_may(name):
  assert METER.programs[name] <= kind(name).programs


@pytest.mark.parametrize("name", list(LAYERS))
def test_leaves_of_a_fresh_state_are_separate_arrays_counted_in_their_dtypes(name):
  """Each leaf can then be donated, as generation does."""
  module = layer(name, dtype=jnp.bfloat16)
  state = module.apply({}, 2, method="initial_state")
  places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
  assert len(places) == len(set(places))
  assert module.state_bytes(2, 17) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SUBJECTS])
def test_a_fresh_state_varies_over_devices_like_the_input(name):
  """In a `shard_map` with its default checks, the carry of a scan over tokens must."""
  t, mesh = trial(name), jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
  run = jax.shard_map(
    lambda params, x, ids: t.apply(params, x, None, ids), mesh=mesh, in_specs=(P(), P("x"), P("x")), out_specs=P("x")
  )
  with jax.enable_x64(True):
    jax.eval_shape(run, t.param_shapes, t.example(2, 5), jax.ShapeDtypeStruct((2, 5), jnp.int32))


@pytest.mark.xdist_group("GatedConv")
@pytest.mark.slow
def test_a_numpy_state_goes_into_a_call_that_is_not_compiled():
  t = trial("GatedConv")
  with jax.enable_x64(True):
    _, state = t.apply(t.params, t.x[:, :2], t.fresh)
    more, _ = t.apply(t.params, t.x[:, 2:4], jax.device_get(state))
    assert_close({"y": more}, {"y": t.run(t.params, t.x[:, :4])[0][:, 2:]})
