"""Programs that `jax.export` makes once for any batch and any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.layers.law_trial import Trial
from memzoo.pallas_kernels.delta_rule import gated_delta_rule
from memzoo.pallas_kernels.short_conv import short_conv
from memzoo.pallas_kernels.sizes import at_most, bounded, known, pieces, quotient
from subjects import WIDTH, module
from tolerances import assert_close

pytestmark = pytest.mark.xdist_group("export")


def exported(function, *shapes, platforms=("cpu",)):
  """The function as a program that was written to bytes and read again."""
  program = jax.export.export(jax.jit(function), platforms=platforms)(*shapes)
  return jax.export.deserialize(program.serialize())


def filled(tree, seed):
  """Arrays of these shapes: small normal numbers, and integers from 0 to 2 in ascending order along the last axis."""
  rng = np.random.default_rng(seed)

  def fill(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return np.sort(rng.integers(0, 3, leaf.shape), axis=-1).astype(leaf.dtype)
    return (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

  return jax.tree.map(fill, tree)


class Subject:
  """A small layer or model in float32, with the arguments of its calls."""

  def __init__(self, name, continues):
    self.trial = Trial(module(name, WIDTH), WIDTH, float64=False)
    self.continues = continues

  def call(self, params, x, *rest):
    return self.trial.apply(params, x, *rest)

  def shapes(self, batch, length):
    """x, and if the call continues a state, the state and segment ids."""
    x = self.trial.example(batch, length)
    more = self.trial.fresh_shapes(batch), jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return (x, *more) if self.continues else (x,)


def marks(name):
  return [pytest.mark.compat] if name == "GatedConv" else [pytest.mark.slow]


@pytest.mark.parametrize(
  ("name", "continues"),
  [
    pytest.param(name, continues, marks=marks(name))
    for name, continues in [
      ("GatedConv", True),
      ("GatedConv", False),
      ("LanguageModel", True),  # erase-then-delta and attention
      ("TitansMemory", True),
      ("TitansMemory", False),
    ]
  ],
)
def test_one_program_serves_all_batches_and_lengths(name, continues):
  subject = Subject(name, continues)
  trial, (batch, length) = subject.trial, jax.export.symbolic_shape("b, t")
  program = exported(subject.call, trial.param_shapes, *subject.shapes(batch, length))
  args = filled(subject.shapes(2, 11), 1)
  y, state = jax.jit(subject.call)(trial.params, *args)
  assert_close(dict(enumerate(program.call(trial.params, *args))), dict(enumerate((y, state))), jnp.float32)
  x, *rest = args
  first = [jax.tree.map(lambda leaf: leaf[:1], leaf) for leaf in rest[:1]], [ids[:1, :3] for ids in rest[1:]]
  y_first, after = program.call(trial.params, x[:1, :3], *first[0], *first[1])
  assert_close({"y": y_first}, {"y": y[:1, :3]}, jnp.float32)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(lambda leaf: (1, *leaf.shape[1:]), state)


OTHERS = "BMojo", "DeltaProduct", "MemoryAsContext", "MixtureOfMemories", "TTTLinear", "ContextModel"


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS])
def test_layers_take_a_symbolic_batch_and_length(name):
  subject = Subject(name, continues=True)
  batch, length = jax.export.symbolic_shape("b, t")
  x, state, ids = subject.shapes(batch, length)
  y, after = subject.trial.shapes(x, state, ids)
  assert y.shape[:2] == (batch, length)
  assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)


def _delta_shapes(batch, length):
  keys, values, gates = ((batch, length, 2, *width) for width in ((4,), (3,), ()))
  return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (keys, keys, values, gates, gates)]


def _delta_gradients(*args):
  def half_squares(q, k, v, beta, log_decay):
    out = gated_delta_rule(q, k, v, beta, -(log_decay**2))
    return sum(0.5 * jnp.sum(x * x) for x in out)

  return jax.grad(half_squares, range(5))(*args)


def _conv_shapes(batch, length):
  return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, length, 3), (4, 3))]


def _conv_gradients(*args):
  return jax.grad(lambda *args: sum(jnp.sum(x * x) for x in short_conv(*args)), (0, 1))(*args)


@pytest.mark.parametrize(
  ("gradients", "shapes"),
  [pytest.param(_delta_gradients, _delta_shapes, marks=pytest.mark.slow), (_conv_gradients, _conv_shapes)],
  ids=["delta rule", "convolution"],
)
def test_gradients_are_exported_for_all_batches_and_lengths(gradients, shapes):
  program = exported(gradients, *shapes(*jax.export.symbolic_shape("b, t")))
  for size in ((2, 2), (1, 40)):
    args = filled(shapes(*size), 2)
    assert_close(program.call(*args), jax.jit(gradients)(*args), jnp.float32, gradients=True)


def test_a_program_for_any_batch_is_exported_for_other_platforms():
  (batch,) = jax.export.symbolic_shape("b")
  program = exported(lambda *args: gated_delta_rule(*args), *_delta_shapes(batch, 70), platforms=("tpu", "cuda"))
  assert str(program.out_avals[0].shape) == "(b, 70, 2, 3)"
  assert program.platforms == ("tpu", "cuda")


def test_choices_by_symbolic_sizes_hold_for_all_their_values():
  (small,) = jax.export.symbolic_shape("s", constraints=["s <= 8"])
  (size,) = jax.export.symbolic_shape("t")
  assert (known(4, 5), known(4, size)) == (True, False)
  assert at_most(4, 4)
  assert at_most(small, 8)
  assert not any((at_most(5, 4), at_most(small, 7), at_most(size, 8)))
  assert (bounded(3, 4), bounded(9, 4), bounded(size, 4)) == (3, 4, 4)
  assert (quotient(256, 3), quotient(2, 3), quotient(256, size)) == (85, 1, 1)
  assert [pieces(n, 4) for n in (1, 4, 5)] == [1, 1, 2]
  assert pieces(size, 4) * 4 - size >= 0


def test_attention_within_its_window_is_chosen_by_a_constraint():
  """A length that may exceed the window is cut into blocks; one that cannot is not."""
  subject = Subject("Attention", continues=False)
  window = subject.trial.layer.window

  def is_cut(*size):
    return " sort[" in str(jax.make_jaxpr(subject.call)(subject.trial.param_shapes, *subject.shapes(*size)))

  assert not is_cut(2, window)
  assert not is_cut(*jax.export.symbolic_shape("b, t", constraints=[f"t <= {window}"]))
  assert is_cut(*jax.export.symbolic_shape("b, t"))
