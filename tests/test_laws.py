"""The fifteen laws of a memory layer, for every layer of the registry and for a model of them.

A layer added to `memzoo.zoo.registry.LAYERS` is held to all of them without a line here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from subjects import CHUNK, WIDTH, cases
from tolerances import assert_close, assert_finite

IN_FLOAT64 = pytest.mark.usefixtures("float64")
every_layer = pytest.mark.parametrize("subject", cases())
every_layer_in_float32 = pytest.mark.parametrize("subject", cases(jnp.float32))

# Documents of 1 to 3 tokens and longer than a chunk, none of them on the chunk grid; padding before, between and after.
DOCUMENTS = (1, 3, 2, 7, 1, 6)
PACKED = np.repeat(np.arange(1, 7, dtype=np.int32), DOCUMENTS)
BETWEEN = np.array([0, 0, 1, 1, 1, 0, 0, 0, 2, 3, 3, 0, 4, 4, 4, 4, 4, 4, 0, 0], np.int32)


def loss(y, state, seed=5):
  """A weighted sum of everything that comes out, so that its gradient sees every output and the state's cotangent."""
  leaves = [leaf for leaf in jax.tree.leaves((y, state)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  rng = np.random.default_rng(seed)  # NumPy's, for JAX's would be compiled into every test
  return sum(jnp.sum(leaf * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)) for leaf in leaves)


@functools.cache
def differentiated(run, wanted):
  """`run`, compiled: its (y, state) and the gradients of their `loss` by the arguments `wanted`; integers have none."""

  def scalar(*args):
    out = run(*args)
    return loss(*out), out

  def values_and_gradients(*args):
    (_, out), gradients = jax.value_and_grad(scalar, wanted, has_aux=True, allow_int=True)(*args)
    return out, jax.tree.map(lambda g: jnp.zeros(()) if g.dtype == jax.dtypes.float0 else g, gradients)

  return jax.jit(values_and_gradients)


def values_and_gradients(run, subject, *args):
  """What comes out of a call, and the gradients by parameters, state and, for a layer, input."""
  return differentiated(run, (0, 2) if subject.takes_tokens else (0, 1, 2))(*args)


def visible(state):
  """A state without what nothing can see any more: slots of a ring that its length says are not of this document."""

  def seen(cache):
    if not hasattr(cache, "length"):
      return cache
    used = jnp.arange(cache.keys.shape[1], dtype=jnp.int32)[None] < cache.length[:, None]
    return jax.tree.map(lambda a: jnp.where(used[..., None, None], a, 0) if a.ndim == 4 else a, cache)

  return jax.tree.map(seen, state, is_leaf=lambda node: hasattr(node, "length"))


def assert_same(subject, run, other, *args):
  """Asserts that two ways to run are one, in values and in all gradients."""
  (actual, by_actual), (expected, by_expected) = (values_and_gradients(way, subject, *args) for way in (run, other))
  assert_close(actual, expected)
  assert_close(by_actual, by_expected, gradients=True)


@IN_FLOAT64
@every_layer
def test_01_causality(subject):
  params, x, other = subject.params(), subject.inputs(1, 9)[0], subject.inputs(1, 9, seed=1)[0]
  first_changed = jnp.arange(10)  # the last row is as it was
  changed = jnp.arange(9)[None] >= first_changed[:, None]
  rows = jnp.where(changed.reshape(10, 9, *[1] * (x.ndim - 1)), other[None], x[None])
  rows, _ = subject.run(params, rows, subject.fresh(params, 10))
  for p in range(9):
    assert_close(rows[p, :p], rows[9, :p])
    assert not np.allclose(rows[p, p:], rows[9, p:])


@IN_FLOAT64
@every_layer
@pytest.mark.parametrize("pieces", [(9, 8), (3, 3, 1, 1, 9)], ids=str)
@pytest.mark.compat
def test_02_any_split_is_one_pass(subject, pieces):
  params, x = subject.params(), subject.inputs(2, sum(pieces))
  state = subject.used(params, 2)
  whole = subject.run(params, x, state)
  parts = []
  for piece in jnp.split(x, np.cumsum(pieces)[:-1], axis=1):
    y, state = subject.run(params, piece, state)
    parts.append(y)
  assert_close((jnp.concatenate(parts, axis=1), state), whole)


@IN_FLOAT64
@every_layer
@pytest.mark.compat
def test_03_packed_documents_are_separate_documents(subject):
  """Packed in a row, or each in a row of its own, which nothing but padding shares with it."""
  params, x = subject.params(), subject.inputs(1, len(PACKED))
  state, ids = subject.used(params, 1), jnp.asarray(PACKED)[None]
  count, longest = len(DOCUMENTS), max(DOCUMENTS)
  ends = np.cumsum(DOCUMENTS)
  column = ends[:, None] - np.array(DOCUMENTS)[:, None] + np.arange(longest)
  is_token = column < ends[:, None]
  where = np.nonzero(is_token)

  def separate(params, x, state, ids):
    del ids
    fresh = subject.fresh(params, count - 1)
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), state, fresh)
    y, last = subject.apply(params, x[0][np.minimum(column, len(PACKED) - 1)], rows, jnp.asarray(is_token, jnp.int32))
    return y[where][None], visible(jax.tree.map(lambda a: a[-1:], last))

  def packed(*args):
    y, last = subject.apply(*args)
    return y, visible(last)

  assert_same(subject, packed, separate, params, x, state, ids)


@IN_FLOAT64
@every_layer
@pytest.mark.compat
def test_04_padding_is_not_there(subject):
  params, ids = subject.params(), jnp.asarray(BETWEEN)[None]
  x, state = subject.inputs(1, len(BETWEEN)), subject.used(params, 1)
  if not subject.takes_tokens:  # whatever padding holds must not matter
    x = jnp.where(ids[..., None] == 0, 1e6, x)
  tokens = np.flatnonzero(BETWEEN)
  y, last = subject.run(params, x, state, ids)
  assert_close((y[:, tokens], last), subject.run(params, x[:, tokens], state, ids[:, tokens]))
  if not subject.takes_tokens:
    assert not np.any(np.asarray(y)[:, BETWEEN == 0])


@IN_FLOAT64
@every_layer
def test_04_a_padded_batch_of_prompts_decodes_as_if_each_were_alone(subject):
  params, lengths = subject.params(), (7, 1, 4)
  prompts, more = subject.inputs(3, 7), subject.inputs(3, 6, seed=1)
  ids = jnp.asarray(np.arange(7)[None] < np.array(lengths)[:, None], jnp.int32)
  _, state = subject.run(params, prompts, None, ids)
  together = list(decoded(subject, params, more, state))
  for row, length in enumerate(lengths):
    _, state = subject.run(params, prompts[row : row + 1, :length])
    for actual, alone in zip(together, decoded(subject, params, more[row : row + 1], state), strict=True):
      assert_close(of_row(actual, row), of_row(alone, 0))


def of_row(tree, row):
  return jax.tree.map(lambda a: a[row], tree)


def decoded(subject, params, x, state):
  """(y, state) after each token."""
  for token in jnp.split(x, x.shape[1], axis=1):
    y, state = subject.run(params, token, state)
    yield y, visible(state)


@IN_FLOAT64
@every_layer
def test_05_every_implementation_is_the_oracle(subject):
  """Of layers over an operation, against its token-by-token form; of all, against themselves a token at a time."""
  params, x = subject.params(), subject.inputs(2, 3 * CHUNK + 5)
  assert_same(subject, subject.apply, subject.one_by_one, params, x, subject.used(params, 2))
  if any(field.name == "implementation" for field in dataclasses.fields(subject.module)):
    oracle = dataclasses.replace(subject, module=subject.module.clone(implementation="recurrent")).apply
    x, ids = subject.inputs(2, len(BETWEEN)), jnp.asarray(np.stack([BETWEEN, PACKED]))
    assert_same(subject, subject.apply, oracle, params, x, subject.used(params, 2), ids)


@IN_FLOAT64
@every_layer
def test_06_batch_rows_are_independent(subject):
  params, x, other = subject.params(), subject.inputs(10, 9), subject.inputs(10, 9, seed=1)
  state = subject.used(params, 10)
  expected = subject.run(params, x, state)
  actual = subject.run(params, x.at[1].set(other[1]), state)
  others = np.delete(np.arange(10), 1)
  assert_close(of_row(actual, others), of_row(expected, others))
  assert not np.allclose(actual[0][1], expected[0][1])


@IN_FLOAT64
@every_layer
def test_07_every_length(subject):
  params, x = subject.params(), subject.inputs(2, 3 * CHUNK + 5)
  fresh = subject.fresh(params, 2)
  alone, states = zip(*decoded(subject, params, x, fresh), strict=True)
  for tokens in (1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5):
    y, state = subject.run(params, x[:, :tokens], fresh)
    assert_close((y, visible(state)), (jnp.concatenate(alone[:tokens], axis=1), states[tokens - 1]))


# Heads as wide as real ones: a norm over five numbers magnifies what cancels in them.
@pytest.mark.parametrize("subject", cases(jnp.float32, 32, key_dim=16, value_dim=16, head_dim=16))
def test_08_bfloat16_activations(subject):
  params, x = subject.params(scale=1.0), subject.inputs(2, 17)
  narrow = dataclasses.replace(subject, module=subject.module.clone(dtype=jnp.bfloat16))
  x = x if subject.takes_tokens else x.astype(jnp.bfloat16)
  y, state = narrow.run(params, x)
  expected, _ = subject.run(params, x if subject.takes_tokens else x.astype(jnp.float32))
  assert_close(y.astype(jnp.float32), expected, jnp.bfloat16)
  assert subject.takes_tokens or y.dtype == jnp.bfloat16
  fresh = narrow.fresh(params, 2)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), fresh)


@IN_FLOAT64
@every_layer
@pytest.mark.compat
def test_09_transformations_compose(subject):
  params, x = subject.params(), subject.inputs(2, 6)

  def scalar(params, x):
    def step(state, x):
      y, state = jax.checkpoint(subject.apply)(params, x[None, None], state)
      return state, loss(y, state)

    return jnp.sum(jax.lax.scan(step, subject.fresh(params, 1), x)[1])

  both = jax.jit(jax.vmap(jax.grad(scalar), (None, 0)))(params, x)
  alone = jax.jit(jax.grad(scalar))
  each = [alone(params, row) for row in x]
  assert_close(both, jax.tree.map(lambda *rows: jnp.stack(rows), *each), gradients=True)


@IN_FLOAT64
@every_layer
def test_09_equal_shapes_compile_once(subject):
  params, run = subject.params(), jax.jit(subject.apply)
  _, state = run(params, subject.inputs(2, 5), subject.fresh(params, 2))
  run(params, subject.inputs(2, 5, seed=1), state)
  assert run._cache_size() == 1


@every_layer_in_float32
@pytest.mark.parametrize("kind", ["zeros", "repeated", "large", "strong"])
def test_10_hostile_inputs_stay_finite(subject, kind):
  params, x = subject.params(30.0 if kind == "strong" else 8.0), subject.inputs(2, 70)
  if subject.takes_tokens:
    x = jnp.full_like(x, 3) if kind in ("zeros", "repeated") else x
  else:
    noise = 1e-3 * x
    x = {"zeros": jnp.zeros_like(x), "repeated": x[:, :1] + noise, "large": 1e4 * x, "strong": x}[kind]
  state = subject.used(params, 2)
  assert_finite(values_and_gradients(subject.apply, subject, params, x, state))


@IN_FLOAT64
@every_layer
def test_11_sharded_is_unsharded(subject):
  params, x = subject.params(), subject.inputs(4, 9)
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  rules = (("heads", "tensor"), ("mlp", "tensor"), ("vocab", None), ("embed", None), ("norm", None))
  specs = nn.logical_to_mesh(nn.get_partition_spec(params), rules)
  params = nn.meta.unbox(params)

  def place(leaf, spec):
    fits = all(name is None or size % mesh.shape[name] == 0 for name, size in zip(spec, leaf.shape, strict=False))
    return jax.device_put(leaf, NamedSharding(mesh, spec if fits else PartitionSpec()))

  sharded = jax.tree.map(place, params, specs)
  rows = NamedSharding(mesh, PartitionSpec("data"))
  y, state = jax.jit(subject.apply, out_shardings=rows)(sharded, jax.device_put(x, rows))
  assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
  assert_close((y, state), subject.run(params, x))


@IN_FLOAT64
@every_layer
def test_12_the_state_survives_a_checkpoint(subject, tmp_path):
  params = subject.params()
  state = subject.used(params, 2)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  x = subject.inputs(2, 3)
  assert_close(subject.run(params, x, restored), subject.run(params, x, state))
  on_the_host = jax.device_get(restored)  # as NumPy's arrays, and not compiled
  assert_close(subject.apply(params, x, on_the_host), subject.run(params, x, state))


@IN_FLOAT64
@every_layer
def test_13_mistakes_are_named(subject):
  params, x = subject.params(), subject.inputs(2, 5)
  name = "tokens" if subject.takes_tokens else "x"
  with pytest.raises(ValueError, match=rf"{name} .*\[2\].*want"):
    subject.apply(params, x[:, 0] if subject.takes_tokens else x[:, 0, 0])
  with pytest.raises(ValueError, match=r"x .*no tokens.*want"):
    subject.apply(params, x[:, :0])
  with pytest.raises(ValueError, match=r"segment_ids .*\[2, 4\].*expected .*\[2, 5\]"):
    subject.apply(params, x, None, jnp.ones((2, 4), jnp.int32))
  with pytest.raises(ValueError, match=r"segment_ids is float64.*expected integers"):
    subject.apply(params, x, None, jnp.ones((2, 5), jnp.float64))
  with pytest.raises(ValueError, match=r"state.* has shape .*expected"):
    subject.apply(params, x, subject.fresh(params, 3))
  with pytest.raises(ValueError, match=r"state is .*expected"):
    subject.apply(params, x, (jnp.zeros((2, 3)),) * 9)
  with pytest.raises(ValueError, match=r"state.* is int32; expected float64"):
    subject.apply(params, x, jax.tree.map(lambda a: a.astype(jnp.int32), subject.fresh(params, 2)))


@IN_FLOAT64
@every_layer
def test_14_the_state_does_not_grow(subject):
  params, shapes = subject.params(), lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  fresh = subject.fresh(params, 2)
  for tokens in (1, 17):
    _, state = subject.run(params, subject.inputs(2, tokens), fresh)
    assert shapes(state) == shapes(fresh)
  places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(fresh) if leaf.size]
  assert len(places) == len(set(places))  # each may be given away, as a loop that generates will do
  bytes_held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  assert subject.module.state_bytes(2, 17) == subject.module.state_bytes(2, 1_000_000) == bytes_held


@every_layer_in_float32
@pytest.mark.compat
def test_15_it_runs_under_nnx(subject):
  x = subject.inputs(2, 5)
  module = nnx.bridge.ToNNX(subject.module, rngs=nnx.Rngs(0)).lazy_init(x)
  y, state = module(x)
  more, _ = module(x, state)
  assert_finite((y, more))
  assert y.shape == (2, 5, 11 if subject.takes_tokens else WIDTH)
  assert not np.allclose(y, more)
