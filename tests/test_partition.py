"""Operations under meshes of four devices: values, shares of the FLOPs, and collectives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from memzoo.layers.attention import Attention, CacheState, softmax_attention
from memzoo.layers.gated_conv import GatedConv
from memzoo.layers.law_trial import Trial
from memzoo.pallas_kernels.delta_rule import delta_product, gated_delta_rule
from memzoo.pallas_kernels.hlo import parse
from memzoo.pallas_kernels.partition import HEADS, ROWS, partitioned, split_over, varying_alike
from memzoo.pallas_kernels.short_conv import short_conv
from memzoo.pallas_kernels.test_time_memory import Gates, InitialWeights, Memory, Spec, State
from memzoo.pallas_kernels.test_time_memory import run as run_memory
from memzoo.zoo.language_model import LanguageModel
from subjects import module
from tolerances import assert_close

pytestmark = pytest.mark.xdist_group("partition")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ROW, HEAD, TOKEN, STATE = P(ROWS), P(HEADS), P(ROWS, None, HEADS), P(ROWS, HEADS)
BATCH, TOKENS, WIDTH, WIDE = 4, 11, 8, 32
IDS = np.array([[1] * 11, [1, 1, 1, 2, 2, 3, 0, 0, 3, 3, 3], [0, 0, 0, 4, 4, 4, 4, 4, 4, 5, 0], [7] * 6 + [8] * 5], np.int32)


def normal(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def gate(*shape):
  return 1 / (1 + np.exp(-normal(*shape)))


def keys(*shape, seed=0):
  x = normal(*shape, seed=seed)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _delta(q, k, v, beta, log_decay, state, ids):
  return gated_delta_rule(q, k, v, beta, log_decay, initial_state=state, segment_ids=ids, chunk_size=4)


def _product(q, k, v, beta, ids):
  return delta_product(q, k, v, beta, segment_ids=ids, chunk_size=4)


def _conv(x, tail, weight, ids):
  return short_conv(x, weight, initial_state=tail, segment_ids=ids)


def _memory(q, k, v, step, log_keep, first, second, changes, more, count, ids):
  """A memory with two matrices, from a state."""
  spec = Spec(Memory(WIDE, WIDE, depth=2, expansion=1), chunk_size=4)
  initial = InitialWeights({"0": first, "1": second})
  state = State({"0": changes, "1": more}, None, {"0": more, "1": changes}, count)
  out = run_memory(spec, initial, q, k, v, Gates(step, log_keep), initial_state=state, segment_ids=ids, max_documents=4)
  return out.y, out.loss, out.state.weights


def _softmax(q, k, v, mask, prefix_keys, prefix_values):
  return softmax_attention(q, k, v, mask, (prefix_keys, prefix_values))


def _cached(q, k, v, keys, values, length, ids):
  """Attention beyond its window, from a cache: what `Attention` does between its projections."""
  layer = Attention(num_heads=q.shape[2], head_dim=WIDE, num_key_heads=k.shape[2], window=5)
  out, state = layer.attend(q, k, v, CacheState(keys, values, length), ids)
  return out, state.keys, state.values


def _next(q, k, v, keys, values, length, ids):
  return _cached(*(a[:, :1] for a in (q, k, v)), keys, values, length, ids[:, :1])


MANY, FEW = (BATCH, TOKENS, 8), (BATCH, TOKENS, 4)
MASK = np.tril(np.ones((BATCH, TOKENS, TOKENS), bool))
# For each operation: the function, and its arguments with their axes.
OPERATIONS = {
  "delta rule": (
    _delta,
    [
      (keys(*FEW, WIDTH), TOKEN),
      (keys(*FEW, WIDTH, seed=1), TOKEN),
      (normal(*MANY, WIDTH), TOKEN),
      (gate(*MANY), TOKEN),
      (-gate(*MANY), TOKEN),
      (normal(BATCH, 8, WIDTH, WIDTH), STATE),
      (IDS, ROW),
    ],
  ),
  "delta rule with one key": (
    _delta,
    [
      (keys(BATCH, TOKENS, 1, WIDTH), ROW),
      (keys(BATCH, TOKENS, 1, WIDTH, seed=1), ROW),
      (normal(*MANY, WIDTH), TOKEN),
      (gate(*MANY), TOKEN),
      (-gate(*MANY), TOKEN),
      (normal(BATCH, 8, WIDTH, WIDTH), STATE),
      (IDS, ROW),
    ],
  ),
  "delta product": (
    _product,
    [
      (keys(*MANY, WIDTH), TOKEN),
      (keys(BATCH, TOKENS, 2, 8, WIDTH), P(ROWS, None, None, HEADS)),
      (normal(BATCH, TOKENS, 2, 8, WIDTH), P(ROWS, None, None, HEADS)),
      (gate(BATCH, TOKENS, 2, 8), P(ROWS, None, None, HEADS)),
      (IDS, ROW),
    ],
  ),
  "short convolution": (
    _conv,
    [(normal(BATCH, TOKENS, 256), TOKEN), (normal(BATCH, 3, 256), TOKEN), (normal(4, 256), P(None, HEADS)), (IDS, ROW)],
  ),
  "test-time memory": (
    _memory,
    [
      (keys(*MANY, WIDE), TOKEN),
      (keys(*MANY, WIDE, seed=1), TOKEN),
      (normal(*MANY, WIDE), TOKEN),
      (gate(*MANY) / 30, TOKEN),
      (-gate(*MANY), TOKEN),
      (normal(8, WIDE, WIDE) / 6, HEAD),
      (normal(8, WIDE, WIDE, seed=1) / 6, HEAD),
      (normal(BATCH, 8, WIDE, WIDE) / 60, STATE),
      (normal(BATCH, 8, WIDE, WIDE, seed=1) / 60, STATE),
      (np.array([0, 1, 2, 3], np.int32), ROW),
      (IDS, ROW),
    ],
  ),
  "softmax": (
    _softmax,
    [
      (normal(*MANY, WIDE), TOKEN),
      (normal(*FEW, WIDE), TOKEN),
      (normal(*FEW, WIDE, seed=1), TOKEN),
      (MASK, ROW),
      (normal(1, 3, 4, WIDE), P(None, None, HEADS)),
      (normal(1, 3, 4, WIDE, seed=1), P(None, None, HEADS)),
    ],
  ),
  "attention": (
    _cached,
    [
      (normal(*MANY, WIDE), TOKEN),
      (normal(*FEW, WIDE), TOKEN),
      (normal(*FEW, WIDE, seed=1), TOKEN),
      (normal(BATCH, 4, 5, WIDE), STATE),
      (normal(BATCH, 4, 5, WIDE, seed=1), STATE),
      (np.array([0, 2, 5, 13], np.int32), ROW),
      (IDS, ROW),
    ],
  ),
}
OPERATIONS["one token of attention"] = _next, OPERATIONS["attention"][1]
# Layouts: the devices along the axes "x" and "y", and which of these split rows and heads.
LAYOUTS = {"rows": ((4,), "x", None), "heads": ((4,), None, "x"), "rows and heads": ((2, 2), "y", "x")}


def values_and_gradients(operation, args):
  """A function of the arguments: the results, and the gradients of half the sum of their squares by every float argument."""
  floats = [i for i, (x, _) in enumerate(args) if x.dtype == np.float32]

  def half_squares(own, others):
    merged = iter(own), iter(others)
    out = operation(*(next(merged[i not in floats]) for i in range(len(args))))
    return sum(0.5 * jnp.sum(x * x) for x in jax.tree.leaves(out) if x.dtype == jnp.float32), out

  def run(*args):
    own, others = [args[i] for i in floats], [x for i, x in enumerate(args) if i not in floats]
    gradients, out = jax.grad(half_squares, has_aux=True)(own, others)
    return out, gradients

  return run


def over(spec, rows, heads):
  """Mesh axes in place of labels."""
  return P(*({ROWS: rows, HEADS: heads}.get(label) for label in spec))


@functools.cache
def on_one_device(name):
  """Results and gradients, and the FLOPs of the program's matrix products."""
  operation, args = OPERATIONS[name]
  program = jax.jit(values_and_gradients(operation, args)).lower(*(x for x, _ in args)).compile()
  return jax.device_get(program(*(x for x, _ in args))), flops(program)


def flops(program):
  """FLOPs of a program's matrix products, with loops; of all that it computes if it has none."""
  return parse(program.as_text()).flops() or program.cost_analysis()["flops"]


def collectives(program):
  """The operations of a program that move data between devices: their kinds, and the number of elements of their results."""
  kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
  found = re.findall(rf"= (.*) ({kinds})(?:-start)?\(", program.as_text())
  shapes = [dims for result, _ in found for dims in re.findall(r"\[([\d,]*)\]", result)]
  return {kind for _, kind in found}, sum(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in shapes)


def marks(name):
  return [] if name == "short convolution" else [pytest.mark.slow]


NAMES = [pytest.param(name, marks=marks(name)) for name in OPERATIONS]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["automatic", "explicit"])
@pytest.mark.parametrize("name", NAMES)
def test_each_device_computes_its_share_and_nothing_is_gathered(name, kind, layout):
  """Forward and gradient. Only gradients of arguments without rows, or heads, are summed over the devices that split these."""
  check_share(name, kind, layout, declared=kind == AUTO)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta rule", "short convolution", "attention"])
def test_each_device_computes_its_share_over_automatic_axes_that_nobody_declared(name):
  """A test-time memory does not: XLA splits it over rows only."""
  check_share(name, AUTO, "rows and heads", declared=False)


def check_share(name, kind, layout, declared):
  (operation, args), (shape, rows, heads) = OPERATIONS[name], LAYOUTS[layout]
  mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=(kind,) * len(shape))
  placed = [jax.device_put(x, NamedSharding(mesh, over(spec, rows, heads))) for x, spec in args]
  run = values_and_gradients(operation, args)
  if declared:
    run = split_over(mesh, rows=rows or (), heads=heads or ())(run)
  program = jax.jit(run).lower(*placed).compile()
  (out, gradients), whole = on_one_device(name)
  own_out, own_gradients = jax.device_get(program(*placed))
  assert_close(own_out, out, jnp.float32)
  assert_close(own_gradients, gradients, jnp.float32, gradients=True)
  assert flops(program) <= 0.27 * whole
  kinds, elements = collectives(program)
  assert kinds <= {"all-reduce"}
  floats = [(x.size, spec) for x, spec in args if x.dtype == np.float32]
  without_rows, without_heads = (sum(size for size, spec in floats if label not in spec) for label in (ROWS, HEADS))
  expected = without_rows // (mesh.shape[heads] if heads else 1) if rows else 0
  assert elements == expected + (without_heads // (mesh.shape[rows] if rows else 1) if heads else 0)


@pytest.mark.parametrize("name", NAMES)
def test_operations_run_in_a_shard_map_over_rows_with_its_default_checks(name):
  operation, args = OPERATIONS[name]
  mesh = jax.make_mesh((4,), ("x",))
  specs = tuple(over(spec, "x", None) for _, spec in args)
  gradients = [spec for (x, _), spec in zip(args, specs, strict=True) if x.dtype == np.float32]
  run = values_and_gradients(operation, args)
  run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P("x"), gradients)))
  placed = [jax.device_put(x, NamedSharding(mesh, spec)) for (x, _), spec in zip(args, specs, strict=True)]
  own_out, own_gradients = jax.device_get(run(*placed))
  (out, gradients), _ = on_one_device(name)
  assert_close(own_out, out, jnp.float32)
  assert_close(own_gradients, gradients, jnp.float32, gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GatedConv", "EraseThenDelta", "TTTLinear", "LanguageModel"])
def test_rows_may_be_split_over_the_explicit_axes_that_split_parameters(name):
  """As where the batch is split over all devices, and parameters over some. A width may be split like rows or heads too."""
  trial = Trial(module(name, 8), 8, float64=False)
  mesh = jax.make_mesh((2, 2), ("x", "y"))
  rows = [P(("x", "y"))] if trial.takes_tokens else [P(("x", "y")), P("x", None, "y")]
  with jax.set_mesh(mesh):
    for axes in ({"heads": "y", "mlp": "y"}, {"embed": "y", "vocab": "y"}):
      shardings = trial.shardings(mesh, axes)
      params = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), trial.param_shapes, shardings)
      for spec in rows:
        x = trial.example(4, 5).update(sharding=NamedSharding(mesh, spec))
        y, _ = jax.eval_shape(trial.apply, params, x)
        assert y.sharding.spec[0] == spec[0]


@pytest.mark.parametrize(("axis", "rows"), [("embed", P("x")), ("vocab", P(("x", "y")))])
def test_a_scanned_model_may_split_its_width_or_its_vocabulary_over_an_explicit_axis(axis, rows):
  mixer = GatedConv(channels=4, parent=None)
  model = LanguageModel(vocab_size=12, width=8, depth=2, mixers=((mixer,),), scan=True)
  trial, mesh = Trial(model, 8, float64=False), jax.make_mesh((2, 2), ("x", "y"))
  tokens = np.arange(20, dtype=np.int32).reshape(4, 5) % 12
  params = jax.device_put(trial.params, trial.shardings(mesh, {axis: "y"}))
  with jax.set_mesh(mesh):
    logits, _ = jax.jit(trial.apply)(params, jax.device_put(tokens, NamedSharding(mesh, rows)))
  assert_close(jax.device_get(logits), jax.device_get(jax.jit(trial.apply)(trial.params, tokens)[0]), jnp.float32)


# The mechanism itself, on a function with a scan, an argument without rows and an integer.


def _decayed_sums(x, weight, state, count):
  def step(state, x):
    state = weight[None] * state + x
    return state, state

  x = x * jnp.asarray(np.linspace(1, 2, x.shape[1], dtype=np.float32))[None, :, None]  # a constant
  state, out = jax.lax.scan(step, state + count[:, None].astype(x.dtype), jnp.swapaxes(x, 0, 1))
  return jnp.swapaxes(out, 0, 1), state, count + 1


SPECS = {"in_specs": (TOKEN, HEAD, STATE, ROW), "out_specs": (TOKEN, STATE, ROW)}
decayed_sums = partitioned(_decayed_sums, **SPECS)
undifferentiated_sums = partitioned(_decayed_sums, **SPECS, differentiable=False)
SUMS = normal(4, 6, 8), gate(8), normal(4, 8), np.arange(4, dtype=np.int32)


def mesh_of(kind, shape=(2, 2)):
  return jax.make_mesh(shape, ("x", "y"), axis_types=(kind,) * 2)


def shapes(mesh, *specs, args=SUMS):
  """Shapes of the arguments of `decayed_sums`, with their types on an explicit mesh."""
  places = [NamedSharding(mesh, spec) for spec in specs]
  return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x, place in zip(args, places, strict=True)]


def layout_of(function, *args):
  """The specs of the results on an explicit mesh."""
  return [x.sharding.spec for x in jax.eval_shape(function, *args)]


@pytest.mark.parametrize(
  ("specs", "expected"),
  [
    ((P("x", None, "y"), P("y"), P("x", "y"), P("x")), ("x", "y")),
    ((P("x", None, "y"), P(), P(), P()), ("x", "y")),  # the types of other arguments are brought in line
    ((P("x", "y"), P(), P(), P()), ("x", None)),  # tokens are whole on each device
    ((P(("x", "y")), P("y"), P("y"), P()), (("x", "y"), None)),  # the longest split wins; one axis does not split both
    ((P(), P("x"), P(), P()), (None, "x")),
    ((P(), P(), P(), P()), (None, None)),
  ],
)
def test_explicit_axes_are_read_from_the_types_of_the_operands(specs, expected):
  rows, heads = expected
  expected = [P(rows, None, heads), P(rows, heads), P(rows)]
  assert layout_of(decayed_sums, *shapes(mesh_of(EXPLICIT), *specs)) == expected


def test_a_label_is_split_only_if_all_its_axes_divide():
  """As with key heads that are fewer than devices."""
  few = partitioned(lambda x, y: (x, y), in_specs=(TOKEN, TOKEN), out_specs=(TOKEN, TOKEN))
  args = normal(4, 6, 4), normal(4, 6, 2)
  mesh = jax.make_mesh((1, 4), ("x", "y"))
  assert layout_of(few, *shapes(mesh, P("x", None, "y"), P("x"), args=args))[0] == P("x", None, None)


def test_numpy_arguments_beside_explicit_ones_are_placed_like_them():
  mesh = mesh_of(EXPLICIT)
  x = jax.device_put(SUMS[0], NamedSharding(mesh, P("x", None, "y")))
  out = decayed_sums(x, *SUMS[1:])
  assert out[1].sharding.spec == P("x", "y")
  assert_close(jax.device_get(out), jax.device_get(_decayed_sums(*map(jnp.asarray, SUMS))), jnp.float32)


def declared(function, **axes):
  """The function in a context that splits rows and heads over automatic axes, and where its program leaves its results."""
  program = jax.jit(split_over(mesh_of(AUTO), **axes)(function)).lower(*SUMS).compile()
  return [sharding.spec for sharding in program.output_shardings]


def test_automatic_axes_are_split_as_declared():
  assert declared(decayed_sums, rows="x", heads="y") == [P("x", None, "y"), P("x", "y"), P("x")]
  assert declared(decayed_sums, rows=("x", "y")) == [P(("x", "y"))] * 3


def split_by_callback(function, lead, args):
  """Runs the function on a mesh of automatic axes, without a declaration; `lead` is the number of mapped axes."""
  before = [None] * lead
  specs = P(*before, "x", None, "y"), P("y"), P(*before, "x", "y"), P(*before, "x")
  placed = [jax.device_put(x, NamedSharding(mesh_of(AUTO), spec)) for x, spec in zip(args, specs, strict=True)]
  program = jax.jit(function).lower(*placed).compile()
  assert collectives(program) == (set(), 0)
  assert program.output_shardings[1].spec == specs[2]
  return jax.device_get(program(*placed))


def on_host(*args):
  return jax.device_get(jax.jit(_decayed_sums)(*args))


def test_automatic_axes_that_nobody_declared_are_split_by_callback():
  assert_close(split_by_callback(undifferentiated_sums, 0, SUMS), on_host(*SUMS), jnp.float32)


def test_an_axis_of_size_one_is_whole_for_a_callback_and_so_are_all_with_its_label():
  """Such as one key head for all value heads, which XLA may hold split. Rows are split all the same."""
  mesh = mesh_of(AUTO)

  def weighted(keys, values):
    return jnp.sum(keys, axis=2, keepdims=True) * values

  run = partitioned(weighted, (TOKEN, TOKEN), TOKEN, differentiable=False)
  keys, values = normal(BATCH, TOKENS, 1), normal(BATCH, TOKENS, 4)
  args = (
    jax.device_put(keys, NamedSharding(mesh, P("x"))),
    jax.device_put(values, NamedSharding(mesh, P("x", None, "y"))),
  )
  program = jax.jit(run).lower(*args).compile()
  np.testing.assert_array_equal(program(*args), keys * values)
  assert "f32[2,11,4]" in program.as_text()


def test_symbolic_rows_are_split_only_where_their_number_is_a_multiple():
  few, many = (jax.export.symbolic_shape(rows)[0] for rows in ("b", "2*b"))

  def mapped(rows, function):
    args = [jax.ShapeDtypeStruct((rows if len(x) == 4 else len(x), *x.shape[1:]), x.dtype) for x in SUMS]
    with jax.set_mesh(mesh_of(AUTO)):
      return str(jax.make_jaxpr(lambda *args: function(*args))(*args))

  assert "custom_partitioning" not in mapped(few, undifferentiated_sums)  # a callback is made for known sizes
  declared = split_over(mesh_of(AUTO), rows="x", heads="y")(decayed_sums)
  assert ["'x'" in re.search("manual_axes=.*", mapped(rows, declared))[0] for rows in (few, many)] == [False, True]


def test_a_mapped_axis_joins_the_rows_of_a_callback():
  x, weight, state, count = SUMS
  mapped = jax.vmap(undifferentiated_sums, (0, None, 0, 0))
  pairs = np.stack([x, 2 * x]), weight, np.stack([state, -state]), np.stack([count, count + 1])
  expected = on_host(x, weight, state, count), on_host(2 * x, weight, -state, count + 1)
  expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
  assert_close(split_by_callback(mapped, 1, pairs), expected, jnp.float32)


def test_nothing_is_added_to_a_program_for_one_device():
  plain, inside = (str(jax.make_jaxpr(f)(*SUMS)) for f in (_decayed_sums, decayed_sums))
  assert inside == plain
  with split_over(jax.make_mesh((1, 1), ("x", "y"), axis_types=(AUTO,) * 2, devices=jax.devices()[:1]), rows="x", heads="y"):
    again = partitioned(_decayed_sums, **SPECS)  # JAX keeps the trace of a function that it has seen
    assert str(jax.make_jaxpr(again)(*SUMS)) == plain


def test_heads_are_split_inside_of_a_shard_map_over_rows():
  mesh = mesh_of(AUTO)
  specs = P("x"), P(), P("x"), P("x")
  inner = split_over(mesh, rows="x", heads="y")(decayed_sums)
  by_rows = jax.jit(jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P("x"), axis_names={"x"}))
  out = by_rows(*SUMS)
  assert out[1].sharding.spec == P("x", "y")
  assert_close(jax.device_get(out), jax.device_get(_decayed_sums(*map(jnp.asarray, SUMS))), jnp.float32)


def test_mapped_axes_are_left_alone():
  """`jax.vmap` of values and gradients, over automatic axes that are split and over an axis that is split itself."""

  def gradient(x, weight, state, count):
    return jax.grad(lambda weight: jnp.sum(decayed_sums(x, weight, state, count)[0] ** 2))(weight)

  pairs = [np.stack([x, x[::-1]]) for x in SUMS]
  expected = [jax.device_get(jax.jit(gradient)(*(pair[i] for pair in pairs))) for i in range(2)]
  mapped = split_over(mesh_of(AUTO), rows="x", heads="y")(jax.vmap(gradient))
  assert_close(jax.device_get(jax.jit(mapped)(*pairs)), np.stack(expected), jnp.float32, gradients=True)
  specs = P("y", "x"), P("y"), P("y", "x"), P("y", "x")
  placed = [jax.device_put(x, NamedSharding(mesh_of(EXPLICIT), spec)) for x, spec in zip(pairs, specs, strict=True)]
  assert_close(jax.device_get(jax.jit(jax.vmap(gradient))(*placed)), np.stack(expected), jnp.float32, gradients=True)


def test_carries_made_inside_vary_like_the_operands():
  def total(x):
    return jax.lax.fori_loop(0, 3, lambda _, total: total + jnp.sum(x), varying_alike(x, jnp.zeros(())))[None]

  mesh = jax.make_mesh((4,), ("x",))
  jax.eval_shape(jax.shard_map(total, mesh=mesh, in_specs=P("x"), out_specs=P("x")), *shapes(mesh, P("x"), args=SUMS[:1]))
  assert str(jax.make_jaxpr(lambda x: varying_alike(x, x))(SUMS[0])) == str(jax.make_jaxpr(lambda x: x)(SUMS[0]))


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    ({"rows": "z"}, r"rows=\('z',\).*no axis \['z'\].*\('x', 'y'\)"),
    ({"heads": ("y", "tensor")}, r"heads=\('y', 'tensor'\).*no axis \['tensor'\]"),
    ({"rows": ("x", "y"), "heads": "y"}, r"\['y'\] cannot split both"),
  ],
)
def test_mistakes_are_named(axes, message):
  with pytest.raises(ValueError, match=message), split_over(mesh_of(AUTO), **axes):
    pass
