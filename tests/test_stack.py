"""The stack: context between sublayers, the scan over repeats of the pattern, and blocks of any sublayers."""

import chex
import jax
import jax.numpy as jnp
import memzoo
import numpy as np
import pytest
from context_layers import Feeder, NoteReader
from filled import filled
from flax import linen as nn
from memzoo.layers import Attention, Context, DeltaNet, SwiGLU
from memzoo.layers.axes import Named
from memzoo.zoo.language_model import LanguageModel, VectorModel
from memzoo.zoo.stack import Stack, scan_params, sublayer_names, unroll_params, unroll_state
from subjects import layer
from tolerances import assert_close

FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
IN_FLOAT64 = pytest.mark.usefixtures("float64")
IDS = np.array([[1, 1, 1, 2, 2, 0, 0, 3, 3], [0, 0, 1, 1, 1, 1, 2, 2, 2]], np.int32)


def vectors(tokens: int = 9, width: int = 8, seed: int = 0) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=(2, tokens, width)))


def context_stack(depth: int = 6, **fields) -> Stack:
  """A block before the pattern, and a pattern of two blocks."""
  pattern = ((NoteReader(channels=6),), (Feeder(), SwiGLU(ratio=2.0)))
  return Stack(first=((Feeder(), NoteReader(channels=6)),), mixers=pattern, depth=depth, **FLOAT64, **fields)


@IN_FLOAT64
@pytest.mark.slow
def test_a_scanned_stack_equals_the_unrolled_one_in_values_gradients_and_decoding():
  """Six blocks: one first, two scanned repeats of two, one that follows. The scanned one recomputes its blocks (`remat`)."""
  unrolled, x, more = context_stack(), vectors(), vectors(2, seed=1)
  params = filled(unrolled, x, std=0.3)
  scanned, stacked = scan_params(unrolled.clone(remat="full"), params)
  assert scanned.scan
  assert scanned.repeats == 2

  def loss(model, params):
    y, state = model.apply(params, x, None, jnp.asarray(IDS))
    z, state = model.apply(params, more, state)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(z)), (y, z, unroll_state(model, state))

  def run(model, params):
    return jax.jit(jax.value_and_grad(lambda params: loss(model, params), has_aux=True))(params)

  (_, expected), by_expected = run(unrolled, params)
  (_, actual), by_actual = run(scanned, stacked)
  assert_close(actual, expected)
  assert_close(unroll_params(scanned, by_actual)[1], by_expected, gradients=True)


@IN_FLOAT64
def test_parameters_convert_between_the_scanned_and_the_unrolled_form():
  unrolled = context_stack()
  params = filled(unrolled, vectors(), std=0.3)
  scanned, stacked = scan_params(unrolled, params)
  shapes = jax.eval_shape(scanned.init, jax.random.key(0), vectors())
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, nn.unbox(shapes))
  back, again = unroll_params(scanned, stacked)
  assert back == unrolled
  assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
  assert unroll_params(unrolled, params) == (unrolled, params)
  assert scan_params(scanned, stacked) == (scanned, stacked)
  axes = shapes["params"]["periods"]["blocks_0"]["mixer"]["note"]["kernel"].names
  assert axes == ("layers", "embed", "heads")


@IN_FLOAT64
@pytest.mark.parametrize("scan", [False, True])
def test_notes_are_those_of_lower_layers_only(scan):
  """Only one block adds to the stream, so that the output shows what it reads."""
  stack = Stack(mixers=(NoteReader(channels=6),), depth=3, mlp_ratio=0, scan=scan, **FLOAT64)
  x, run = vectors(), jax.jit(stack.apply)
  params = unroll_params(stack, filled(stack, x, std=0.3))[1]

  def reads(reader: int, writer: int) -> bool:
    """Whether the output of block `reader` changes with the notes of block `writer`."""

    def output(factor: float) -> jax.Array:
      def scaled(path, leaf):
        keys = [entry.key for entry in path]
        silenced = "output" in keys and f"blocks_{reader}" not in keys
        return leaf * (0.0 if silenced else factor if "note" in keys and f"blocks_{writer}" in keys else 1.0)

      changed = jax.tree_util.tree_map_with_path(scaled, params)
      return run(scan_params(stack.clone(scan=False), changed)[1] if scan else changed, x)[0]

    return not np.allclose(output(1.0), output(2.0))

  assert [[reads(reader, writer) for writer in range(3)] for reader in range(3)] == np.tri(3, dtype=bool).tolist()


@IN_FLOAT64
@pytest.mark.parametrize("scan", [False, True])
def test_features_reach_the_blocks_that_they_are_for(scan):
  """Against the sums written out: block i receives W_j x_{i-j} from the feeder of each of the three blocks below."""
  stack = Stack(mixers=(Feeder(),), depth=5, mlp_ratio=0, scan=scan, **FLOAT64)
  x = vectors()
  params = filled(stack, x, std=0.3)
  actual, _ = jax.jit(stack.apply)(params, x)
  _, unrolled = unroll_params(stack, params)
  own = jax.tree.map(np.asarray, unrolled["params"])

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale

  stream, fed = np.asarray(x), []
  for i in range(5):
    block = own[f"blocks_{i}"]
    for ahead in (1, 2, 3):
      if i >= ahead:
        stream = stream + fed[i - ahead] @ own[f"blocks_{i - ahead}"]["mixer"][f"ahead_{ahead}"]["kernel"]
    fed.append(norm(stream, block["mixer_norm"]["scale"]))
    stream = stream + fed[-1] @ block["mixer"]["output"]["kernel"]
  assert_close(np.asarray(actual), norm(stream, own["final_norm"]["scale"]))


@pytest.mark.compat
@pytest.mark.slow
def test_a_block_is_made_of_any_sublayers():
  """One model has blocks with and without an MLP, a block with two mixers, and a layer that adds its own input."""

  class Doubled(DeltaNet):
    adds_input = True

  small = {"num_heads": 2, "key_dim": 4, "value_dim": 4}
  pattern = ((DeltaNet(**small), SwiGLU(ratio=2.0)), (Attention(num_heads=2, head_dim=4), Doubled(**small)))
  model = LanguageModel(vocab_size=11, width=8, depth=2, mixers=pattern)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), model.example(1, 2)))["params"]
  assert sorted(shapes["blocks_0"]) == ["mixer", "mixer_norm", "mlp", "mlp_norm"]
  assert sorted(shapes["blocks_1"]) == ["mixer", "mixer_1", "mixer_norm"]
  assert sublayer_names(pattern[1] + pattern[0]) == ["mixer", "mixer_1", "mixer_2", "mlp"]
  states = model.initial_state(3)
  assert [len(states[i]) for i in range(2)] == [2, 2]
  assert model.state_bytes(3, 1) == sum(leaf.nbytes for leaf in jax.tree.leaves(states))

  params = filled(model, jnp.zeros((1, 2), jnp.int32), std=0.3)
  tokens = jnp.arange(6, dtype=jnp.int32)[None]
  run = jax.jit(model.apply)
  y, state = run(params, tokens[:, :3])
  z, _ = run(params, tokens[:, 3:], state)
  whole, _ = run(params, tokens)
  assert_close(jnp.concatenate([y, z], 1), whole, jnp.float32)


@IN_FLOAT64
def test_a_layer_that_adds_its_input_replaces_the_stream():
  class Shift(nn.Module):
    adds_input = True

    def initial_state(self, batch_size):
      return ()

    def state_bytes(self, batch_size, length):
      return 0

    @nn.compact
    def __call__(self, x, state=None, segment_ids=None):
      return x + self.param("shift", nn.initializers.ones, (), x.dtype), ()

  model = VectorModel(width=8, input_dim=3, output_dim=2, depth=2, mixers=(Shift(),), mlp_ratio=0, **FLOAT64)
  x = vectors(width=3)
  params = filled(model, x, std=0.3)
  own = params["params"]
  stream = x @ own["embedding"]["kernel"] + own["blocks_0"]["mixer"]["shift"] + own["blocks_1"]["mixer"]["shift"]
  normed = stream / jnp.sqrt(jnp.mean(stream**2, -1, keepdims=True) + 1e-6) * own["final_norm"]["scale"][None, None]
  assert_close(model.apply(params, x)[0], normed @ own["head"]["kernel"])


def test_a_context_layer_sees_the_token_ids():
  class Lookup(Feeder):
    @nn.compact
    def in_stack(self, x, state, segment_ids, context):
      table = self.param("table", nn.initializers.normal(1.0), (11, x.shape[-1]))
      return table[context.tokens], (), context

  model = LanguageModel(vocab_size=11, width=8, depth=2, mixers=(Lookup(),), mlp_ratio=0)
  tokens = jnp.asarray([[1, 2, 3]], jnp.int32)
  params = filled(model, tokens, std=0.3)
  other = {"params": params["params"] | {"embedding": params["params"]["embedding"] * 0}}
  y = model.clone(tie_embeddings=False).apply({"params": other["params"] | {"head": {"kernel": jnp.eye(8, 11)}}}, tokens)[0]
  tables = sum(params["params"][f"blocks_{i}"]["mixer"]["table"] for i in (0, 1))
  assert np.all(np.argsort(y[0, :, :8]) == np.argsort(tables[tokens[0]] * params["params"]["final_norm"]["scale"][None]))


def test_a_mistake_with_the_context_is_named():
  x = jnp.zeros((1, 3, 8))
  context = Context.start((NoteReader(channels=6),), x)
  with pytest.raises(ValueError, match=r"publish\('other'\).*\['notes'\]"):
    context.publish("other", x)
  with pytest.raises(ValueError, match=r"publish\('notes'\).*declares"):
    context.publish("notes", jax.tree.map(lambda a: a[0, :, :2], context.notes["notes"].values))
  with pytest.raises(ValueError, match=r"ahead=1.*1 to 0"):
    context.add_features(1, x)
  with pytest.raises(ValueError, match=r"ahead=4.*1 to 3"):
    Context.start((Feeder(),), x).add_features(4, x)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"depth": 0}, r"depth=0; expected at least 1"),
    ({"mixers": ()}, r"mixers is empty.*at least one"),
    ({"mixers": ((SwiGLU(),), ())}, r"mixers\[1\] is \(\).*at least one layer"),
    ({"first": ((),)}, r"first\[0\] is \(\).*at least one layer"),
    ({"first": (SwiGLU(),) * 3}, r"depth=2; expected at least the 3 blocks of `first`"),
    ({"remat": "some"}, r"remat='some'.*none"),
  ],
)
def test_impossible_stacks_are_named(fields, message):
  model = Stack(**{"depth": 2, "mixers": (SwiGLU(),), **fields})
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2, 8), jnp.float32))


def test_a_state_of_another_stack_is_refused():
  model = Stack(mixers=(NoteReader(channels=6),), depth=4, mlp_ratio=0, scan=True)
  x = jnp.zeros((2, 3, 8))
  params = filled(model, x, std=0.3)
  with pytest.raises(ValueError, match=r"state is a tuple of 4; expected a tuple of 1"):
    model.apply(params, x, model.clone(scan=False).initial_state(2))
  with pytest.raises(ValueError, match=r"state.* has shape"):
    model.apply(params, x, model.initial_state(3))


def test_init_gives_plain_arrays_equal_to_those_in_boxes():
  model = LanguageModel(vocab_size=5, width=8, depth=2, mixers=(layer("GatedConv"),), scan=True)
  params, boxed = memzoo.init(model, jax.random.key(3)), model.init(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Named)))
  chex.assert_trees_all_equal(params, nn.unbox(boxed))
  with pytest.raises(ValueError, match="x is missing; expected an input of GatedConv"):
    memzoo.init(layer("GatedConv"), jax.random.key(0))


def test_a_layer_keeps_a_dtype_of_parameters_that_it_sets():
  own = layer("GatedConv", param_dtype=jnp.bfloat16)
  model = LanguageModel(vocab_size=5, width=8, depth=2, mixers=((own,), (layer("GatedConv"),)), param_dtype=jnp.float16)
  params = jax.eval_shape(lambda: memzoo.init(model, jax.random.key(0)))["params"]
  first, second = ({leaf.dtype for leaf in jax.tree.leaves(params[f"blocks_{i}"]["mixer"])} for i in range(2))
  assert (first, second) == ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)})
