"""A layer under test: its parameters, inputs and states, and the few compiled programs that all laws share.

Nearly all the cost of a law is compilation. One program, which computes outputs, state and all gradients at one shape, serves
most laws: incoming states, documents, padding and the weights of the loss are its arguments. The other large program makes the
same call token by token. The code around them is NumPy, because each `jax.numpy` operation outside a program compiles another.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .axes import Named
from .law_report import Violation, differences
from .memory_layer import MemoryLayer
from .tolerances import tolerance

CHUNK = 4
ROWS, TOKENS = 6, 22  # TOKENS is not a multiple of CHUNK
HOSTILE = 70  # tokens of hostile inputs, so that decays add up

# Sizes for the fields of these names that a layer has: small, and odd if possible.
SMALL = {
  "num_heads": 4,
  "num_key_heads": 2,
  "head_dim": 6,
  "key_dim": 6,
  "value_dim": 5,
  "latent_dim": 7,
  "feature_dim": 3,
  "shared_dim": 4,
  "state_dim": 3,
  "num_groups": 2,
  "num_memories": 3,
  "slots": 3,
  "eidetic_slots": 3,
  "note_dim": 4,
  "read_heads": 2,
  "window": 5,
  "channels": 6,
  "chunk_size": CHUNK,
  "segment": 6,
  "negative_eigenvalues": True,
}
_STEPS = ("chunk_size", "window", "segment")  # fields that are lengths in tokens


def _documents(*rows: tuple[int, ...]) -> np.ndarray:
  return np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in rows]).astype(np.int32)


ONE = np.ones((ROWS, TOKENS), np.int32)
# Documents of 1 to 3 tokens, of one chunk and longer, on and off the chunk grid; some reuse an earlier id.
PACKED = _documents((1, 3, 2, 7, 1, 8), (1, 1, 1, 19), (4, 4, 4, 10), (9, 13), (2, 3, 2, 3, 2, 3, 2, 5), (21, 1))
PACKED[4] = 1 + PACKED[4] % 2
PADDED = np.array(
  [
    [0, 0, 1, 1, 1, 0, 0, 0, 2, 3, 3, 0, 4, 4, 4, 4, 4, 4, 0, 0, 4, 0],
    [3, 3, 3, 3, 3, 1, 1, 3, 3, 3, 0, 3, 3, 2, 2, 2, 2, 2, 2, 5, 5, 5],
    [0] * 7 + [2] * 6 + [4] * 9,
    [1] * 6 + [2] * 9 + [0] * 7,
    [0] * 4 + [1] * 5 + [0] * 6 + [1] * 4 + [0] * 3,
    [0] * 22,
  ],
  np.int32,
)


class Pass(NamedTuple):
  """The results of a call as NumPy arrays: y, the state, and the gradients of a weighted sum of both, by argument."""

  y: np.ndarray
  state: Any
  gradients: dict[str, Any]


class Trial:
  """A layer, with the inputs, states and programs that the laws use.

  Args:
    layer: a module with the contract of `MemoryLayer`; it takes vectors, or token ids if its `example` is integer.
    width: width of the vectors.
    float64: whether to compare in float64; `None` to find out whether the layer computes in the precision of its input.
    wide: a layer of the same kind, and its width, for laws in float32, at sizes with realistic rounding; `None` for the layer
      itself.

  Attributes:
    layer, params: the layer, and parameters whose matrices are as varied as trained ones.
    x: an input [ROWS, TOKENS, width], or [ROWS, TOKENS] token ids.
    fresh, used: a fresh state of `ROWS` rows, and one in the middle of a chunk.
  """

  def __init__(
    self, layer: nn.Module, width: int = 64, *, float64: bool | None = None, wide: tuple[nn.Module, int] | None = None
  ):
    self.given, self.width, self.wide = layer, width, wide
    self.float64 = self._follows_float64() if float64 is None else float64
    self.layer = _in(layer, self.dtype)
    self._passes: dict[str, Any] = {}
    self._shapes: dict[int, Any] = {}

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(np.float64 if self.float64 else np.float32)

  @functools.cached_property
  def float32(self) -> "Trial":
    """The same trial in float32."""
    layer, width = self.wide or (self.given, self.width)
    return Trial(layer, width, float64=False)

  # Inputs and parameters.

  def example(self, batch: int, tokens: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an input."""
    if self.is_model:
      shape = self.given.example(batch, tokens)
      return shape if self._is_integer(shape) else jax.ShapeDtypeStruct(shape.shape, self.dtype)
    return jax.ShapeDtypeStruct((batch, tokens, self.width), self.dtype)

  @property
  def takes_tokens(self) -> bool:
    """Whether the input is token ids."""
    return self._is_integer(self.example(1, 1))

  @property
  def is_model(self) -> bool:
    """Whether the layer is a whole model: it describes its input by `example`, and its outputs at padding have no meaning."""
    return hasattr(self.given, "example")

  @property
  def input_name(self) -> str:
    """The name of the layer's input argument."""
    return list(inspect.signature(type(self.given).__call__).parameters)[1]

  def inputs(self, batch: int = ROWS, tokens: int = TOKENS, seed: int = 0) -> np.ndarray:
    """Token ids, or floats that share a direction, so that keys are correlated like trained ones."""
    rng, shape = np.random.default_rng(seed), self.example(batch, tokens)
    if self.takes_tokens:
      return rng.integers(0, self.given.vocab_size, shape.shape).astype(shape.dtype)
    return (rng.normal(size=shape.shape) + rng.normal(size=shape.shape[2:])).astype(shape.dtype)

  @functools.cached_property
  def initial(self) -> Any:
    """Parameters as the layer's initialisers make them."""
    params = nn.unbox(jax.jit(lambda x: self.layer.init(jax.random.key(7), x))(self.inputs(1, 2)))
    return jax.tree.map(lambda a, like: np.asarray(a, like.dtype), params, self.params)

  @functools.cached_property
  def other(self) -> np.ndarray:
    """An input that differs from `x` at every token."""
    other = self.inputs(seed=1)
    return (self.x + 1 + other % (self.given.vocab_size - 1)) % self.given.vocab_size if self.takes_tokens else other

  @functools.cached_property
  def boxed(self) -> Any:
    """Shapes of the parameters, with the names of their axes if the layer gives any."""
    return jax.eval_shape(lambda x: self.layer.init(jax.random.key(7), x), self.example(1, 2))

  @functools.cached_property
  def param_shapes(self) -> Any:
    """Shapes of the parameters, their floats in the trial's precision."""

    def shape(leaf):
      dtype = self.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
      return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map(shape, nn.meta.unbox(self.boxed))

  @functools.cached_property
  def _are_matrices(self) -> list[bool]:
    """Whether each parameter has two or more axes, and weight decay, as gates and rates have not."""
    boxes = jax.tree.leaves(self.boxed, is_leaf=lambda box: isinstance(box, Named))
    return [nn.meta.unbox(box).ndim > 1 and getattr(box, "decays", True) for box in boxes]

  @functools.cached_property
  def _vectors(self) -> list[np.ndarray]:
    """The initial values of parameters that are no matrices. Compiling those too would cost five times as much."""

    def vectors(x):
      leaves = jax.tree.leaves(nn.meta.unbox(self.layer.init(jax.random.key(7), x)))
      return [leaf for leaf, is_matrix in zip(leaves, self._are_matrices, strict=True) if not is_matrix]

    return jax.device_get(jax.jit(vectors)(self.inputs(1, 2)))

  def params_of(self, gain: float = 1.0) -> Any:
    """Parameters: vectors near their initial values, and random matrices whose outputs are about `gain` times their inputs."""
    rng, vectors = np.random.default_rng(7), iter(self._vectors)

    def fill(leaf, is_matrix):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.zeros(leaf.shape, leaf.dtype) if is_matrix else next(vectors)
      noise = rng.normal(size=leaf.shape)
      value = gain * noise / np.sqrt(leaf.shape[-2]) if is_matrix else next(vectors) + 0.1 * noise
      return np.asarray(value, self.dtype)

    leaves, structure = jax.tree.flatten(nn.meta.unbox(self.boxed))
    return structure.unflatten([fill(leaf, is_matrix) for leaf, is_matrix in zip(leaves, self._are_matrices, strict=True)])

  @functools.cached_property
  def params(self) -> Any:
    return self.params_of()

  def shardings(self, mesh: jax.sharding.Mesh, over: dict[str, str]) -> Any:
    """The sharding of each parameter: an axis named in `over` is split over that mesh axis if its size is a multiple."""
    kind = jax.sharding.PartitionSpec

    def sharding(spec, leaf):
      axes = [over.get(name) for name in spec]
      axes = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, leaf.shape, strict=False)]
      return jax.sharding.NamedSharding(mesh, kind(*axes))

    specs = nn.get_partition_spec(self.boxed)
    return jax.tree.map(sharding, specs, self.param_shapes, is_leaf=lambda node: isinstance(node, kind))

  def initial_state(self, params: Any, batch: int) -> Any:
    return self.layer.apply(params, batch, method="initial_state")

  def fresh_shapes(self, batch: int) -> Any:
    """A fresh state, as shapes."""
    return jax.eval_shape(lambda params: self.initial_state(params, batch), self.param_shapes)

  def fresh_of(self, batch: int) -> Any:
    """A fresh state, as NumPy arrays."""
    return jax.device_get(jax.jit(self.initial_state, static_argnums=1)(self.params, batch))

  @functools.cached_property
  def x(self) -> np.ndarray:
    return self.inputs()

  @functools.cached_property
  def fresh(self) -> Any:
    return self.fresh_of(ROWS)

  @functools.cached_property
  def used(self) -> Any:
    return self.at_once(self.inputs(seed=11), self.fresh, first(7)).state

  # Programs.

  def apply(self, params: Any, x: Any, state: Any = None, segment_ids: Any = None) -> Any:
    return self.layer.apply(params, x, state, segment_ids)

  def shapes(self, x: Any, state: Any = None, segment_ids: Any = None) -> Any:
    """(y, state) of a call, as shapes; nothing is compiled."""
    return jax.eval_shape(self.apply, self.param_shapes, x, state, segment_ids)

  def shapes_of(self, tokens: int) -> Any:
    """(y, state) of a call of `ROWS` rows of `tokens` tokens on a fresh state, as shapes."""
    if tokens not in self._shapes:
      self._shapes[tokens] = self.shapes(self.example(ROWS, tokens), self.fresh_shapes(ROWS))
    return self._shapes[tokens]

  @functools.cached_property
  def run(self) -> Any:
    """The call alone, compiled once per shape: `run(params, x, state, segment_ids)`."""
    return jax.jit(self.apply)

  def after_random(self, params: Any, tokens: int, piece: int = 500) -> Any:
    """The state after so many random tokens of one document, in pieces: one row, repeated `ROWS` times."""

    def one(state, key):
      like = self.example(1, piece)
      if self.takes_tokens:
        x = jax.random.randint(key, like.shape, 0, self.given.vocab_size, like.dtype)
      else:
        x = jax.random.normal(key, like.shape, like.dtype)
      return self.apply(params, x, state)[1], None

    def all_pieces():
      keys = jax.random.split(jax.random.key(0), tokens // piece)
      return jax.lax.scan(one, jax.tree.map(lambda a: a[:1], self.fresh), keys)[0]

    return jax.tree.map(lambda a: np.repeat(a, ROWS, axis=0), jax.device_get(jax.jit(all_pieces)()))

  def at_once(self, x: Any, state: Any, segment_ids: Any, weights: Any = None) -> Pass:
    """A call of `ROWS` rows of `TOKENS` tokens."""
    return self._pass(self._at_once, x, state, segment_ids, weights)

  def by_token(self, x: Any, state: Any, segment_ids: Any, weights: Any = None) -> Pass:
    """The same, one row at a time by `vmap` and one token at a time by `scan`; the backward pass recomputes each token.

    The layer gets no segment ids: each document starts from a fresh state, and padding is skipped.
    """
    return self._pass(self._by_token, x, state, segment_ids, weights)

  def from_nothing(self, x: Any, segment_ids: Any, weights: Any = None) -> Pass:
    """A call without a state."""
    return self._pass(self._from_nothing, x, None, segment_ids, weights)

  def at_length(self, params: Any, x: Any, state: Any, is_token: np.ndarray) -> Pass:
    """A call of any shape, with `params`."""
    out = self.shapes(x, state)
    weights = [np.random.default_rng(5).normal(size=a.shape).astype(self.dtype) for a in jax.tree.leaves(out)]
    return Pass(*jax.device_get(self._at_once(params, x, state, is_token.astype(np.int32), weights)))

  def _pass(self, program: Any, x: Any, state: Any, segment_ids: Any, weights: Any) -> Pass:
    return Pass(*jax.device_get(program(self.params, x, state, segment_ids, weights or self.weights())))

  @functools.cached_property
  def _at_once(self) -> Any:
    return self._differentiated(self.apply, "params", "x", "state")

  @functools.cached_property
  def _from_nothing(self) -> Any:
    return self._differentiated(lambda params, x, state, ids: self.apply(params, x, None, ids), "params", "x")

  @functools.cached_property
  def _by_token(self) -> Any:
    oracle = self.layer
    if isinstance(oracle, MemoryLayer) and hasattr(oracle, "implementation"):
      oracle = oracle.clone(implementation=oracle.reference)
    call = jax.checkpoint(lambda params, x, state: oracle.apply(params, x[None, None], state))

    def row(params, x, state, ids):
      fresh = self.initial_state(params, 1)

      def step(carry, token):
        state, document = carry
        x, id = token
        is_token = id != 0
        starts = is_token & (document != 0) & (document != id)
        y, after = call(params, x, _select(starts, fresh, state))
        return (_select(is_token, after, state), jnp.where(is_token, id, document)), jnp.where(is_token, y[0, 0], 0)

      start = jax.tree.map(lambda a: a[None], state), jnp.zeros((), ids.dtype)
      (state, _), y = jax.lax.scan(step, start, (x, ids))
      return y, jax.tree.map(lambda a: a[0], state)

    return self._differentiated(jax.vmap(row, (None, 0, 0, 0)), "params", "x", "state")

  def _differentiated(self, run: Any, *names: str) -> Any:
    """`run`, compiled: (y, state, gradients of their weighted sum by the arguments `names`)."""
    wanted = {name: i for i, name in enumerate(("params", "x", "state")) if name in names}
    if self.takes_tokens:
      wanted.pop("x")

    def loss(weights, *args):
      out = run(*args)
      total = jax.dtypes.canonicalize_dtype(float)
      terms = [
        jnp.sum(w.astype(total) * leaf.astype(total))
        for w, leaf in zip(weights, jax.tree.leaves(out), strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
      ]
      return sum(terms), out

    def program(params, x, state, ids, weights):
      by = tuple(i + 1 for i in wanted.values())
      (_, (y, last)), found = jax.value_and_grad(loss, by, has_aux=True, allow_int=True)(weights, params, x, state, ids)
      found = jax.tree.map(lambda g: jnp.zeros(()) if g.dtype == jax.dtypes.float0 else g, found)
      return y, last, dict(zip(wanted, found, strict=True))

    return jax.jit(program)

  # States.

  def weights(self, visible: list[Any] | None = None) -> list[np.ndarray]:
    """Weights of y and of the state's leaves in the loss, so that gradients depend on all outputs and on the state.

    Those of the state are zero where `visible` is false.
    """
    rng, (y, state) = np.random.default_rng(5), self._out
    weights = [rng.normal(size=leaf.shape).astype(self.dtype) for leaf in (y, *jax.tree.leaves(state))]
    return weights if visible is None else [weights[0], *(w * v for w, v in zip(weights[1:], visible, strict=True))]

  @functools.cached_property
  def _out(self) -> Any:
    return self.shapes(self.example(ROWS, TOKENS), self.fresh, ONE)

  def visible(self, state: Any) -> list[Any]:
    """For each leaf of a state, a mask of the entries that later outputs depend on; true for all integers.

    Other entries may hold anything, such as slots of a ring that the window has passed.
    """
    weights = self.weights([np.zeros(())] * len(jax.tree.leaves(state)))
    gradients = self.at_once(self.inputs(seed=12), state, ONE, weights).gradients["state"]
    is_float = [np.issubdtype(leaf.dtype, np.floating) for leaf in jax.tree.leaves(state)]
    return [g != 0 if f else np.array(True) for g, f in zip(jax.tree.leaves(gradients), is_float, strict=True)]

  def both_ways(self, name: str, x: np.ndarray, segment_ids: np.ndarray) -> tuple[Pass, Pass]:
    """One call and token-by-token calls from a used state; state entries that are not visible are zero. Cached by `name`."""
    if name not in self._passes:
      seen = self.visible(self.by_token(x, self.used, segment_ids).state)
      is_token = (segment_ids != 0)[..., None]
      weights = self.weights(seen)
      weights[0] = weights[0] * is_token
      passes = (program(x, self.used, segment_ids, weights) for program in (self.at_once, self.by_token))
      if self.is_model:
        passes = (out._replace(y=np.where(is_token, out.y, 0)) for out in passes)
      self._passes[name] = tuple(out._replace(state=masked(out.state, seen)) for out in passes)
    return self._passes[name]

  def differences(
    self, law: int, message: str, actual: Any, expected: Any, *, gradients: bool = False, dtype: Any = None
  ) -> Iterator[Violation]:
    """`law_report.differences`, with the tolerance of the trial's precision or of `dtype`."""
    return differences(law, message, actual, expected, tolerance(dtype or self.dtype, gradients))

  def _follows_float64(self) -> bool:
    """Whether the layer computes in float64 throughout when its input is float64."""
    self.float64 = True
    with jax.enable_x64(True):
      self.layer = _in(self.given, self.dtype)
      try:
        fresh = self.fresh_shapes(1)
        run = jax.make_jaxpr(self.apply, return_shape=True)
        jaxpr, (_, state) = run(self.param_shapes, self.example(1, 5), fresh, jax.ShapeDtypeStruct((1, 5), np.int32))
        same = jax.tree.map(lambda a: a.dtype, fresh) == jax.tree.map(lambda a: a.dtype, state)
        return same and not re.search(r"\b(f32|bf16|f16)\[", str(jaxpr))
      except Exception:  # an error that also occurs in float32 is reported there
        return False
      finally:
        for name in ("boxed", "param_shapes"):
          self.__dict__.pop(name, None)

  @staticmethod
  def _is_integer(shape: Any) -> bool:
    return bool(jnp.issubdtype(shape.dtype, jnp.integer))


def first(tokens: int) -> np.ndarray:
  """Segment ids of one document of `tokens` tokens, followed by padding."""
  return np.broadcast_to(np.arange(TOKENS) < tokens, (ROWS, TOKENS)).astype(np.int32)


def masked(state: Any, visible: list[Any]) -> Any:
  """A state with zeros where `visible` is false."""
  leaves, structure = jax.tree.flatten(state)
  return structure.unflatten([np.where(v, leaf, 0) for v, leaf in zip(visible, leaves, strict=True)])


def has_field(layer: nn.Module, name: str) -> bool:
  return name in type(layer).__dataclass_fields__


def small(layer_type: type[nn.Module], **fields: Any) -> nn.Module:
  """A layer of this class with `fields`, and with the sizes in `SMALL` for its other fields.

  Raises:
    ValueError: if a field does not exist or is missing; the message names it.
  """
  known = {field.name for field in dataclasses.fields(layer_type) if field.init} - {"parent", "name"}
  if unknown := sorted(fields.keys() - known):
    raise ValueError(f"{layer_type.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
  settings = {name: value for name, value in (SMALL | fields).items() if name in known}
  try:
    return layer_type(**settings)
  except TypeError as error:
    raise ValueError(f"{layer_type.__name__} cannot be built with {settings}: {error}. Set the missing fields.") from None


def with_small_steps(layer: nn.Module) -> nn.Module:
  """The layer with chunks, windows and segments that are shorter than the laws' inputs."""
  long = {n: SMALL[n] for n in _STEPS if has_field(layer, n) and (getattr(layer, n) is None or getattr(layer, n) > 8)}
  return layer.clone(**long) if long else layer


def _in(layer: nn.Module, dtype: Any) -> nn.Module:
  """The layer with its fields `dtype` and `param_dtype`, if any, set to `dtype`."""
  return layer.clone(**{name: dtype for name in ("dtype", "param_dtype") if has_field(layer, name)})


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
