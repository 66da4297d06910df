"""The operations as benchmarks call them: their inputs, what is differentiated, hostile cases, and the least work they need."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import delta_rule, local_linear, selective_scan, short_conv
from . import test_time_memory as ttm
from .measure import count_flops
from .routed_scan import Copies
from .taylor_attention import count_features, taylor_attention

DIRECTIONS = ("forward", "gradient")
HALF_AS_WIDE = "test_time_mlp"  # heads of half the width: on a CPU the gradient of its oracle stores weights for every token
# Inputs in the dtype of activations; the others are float32.
_ACTIVATIONS = frozenset({"q", "k", "v", "erase_key", "feedback_key", "x", "b", "c"})


@dataclass(frozen=True)
class Shape:
  """Shape of an operation's inputs: [batch, length, heads, key_dim or value_dim]."""

  batch: int = 1
  length: int = 2048
  heads: int = 4
  key_dim: int = 128
  value_dim: int = 128

  @property
  def token_heads(self) -> int:
    """Tokens times heads: the unit in which times are compared."""
    return self.batch * self.length * self.heads


def _titans(q, k, v, step, log_keep, log_momentum, *weights, memory: Callable[..., ttm.Memory], **options):
  """A test-time memory with chunks of 64 tokens, momentum and decay."""
  shape = memory(q.shape[-1], v.shape[-1])
  spec = ttm.Spec(shape, chunk_size=64, momentum=True)
  initial = ttm.InitialWeights(dict(zip(shape.shapes(), weights, strict=True)))
  return ttm.run(spec, initial, q, k, v, ttm.Gates(step, log_keep, log_momentum), **options)[:2]


def _ttt_mlp(q, k, v, step, norm_scale, norm_bias, average, *weights, **options):
  """The memory of `memzoo.layers.TTTMLP`: chunks of 16 tokens, a norm, biases, and the average of a chunk's steps."""
  memory = _TTT_MLP(q.shape[-1], v.shape[-1])
  spec = ttm.Spec(memory, ttm.Loss(scale=0.5), chunk_size=_TTT_CHUNK, average=True)
  named = dict(zip(memory.shapes(), weights, strict=True))
  initial = ttm.InitialWeights(named, norm=(norm_scale, norm_bias), average=average)
  return ttm.run(spec, initial, q, k, v, ttm.Gates(step), **options)[:2]


def _local_linear(q, k, v, ridge, *, iterations: int, implementation: str = "auto", **options):
  """Local linear attention by conjugate gradients; without iterations it is softmax attention."""
  implementation = "dense" if implementation == "recurrent" else implementation
  options |= {"solver": "cg", "iterations": iterations, "implementation": implementation}
  return local_linear.local_linear_attention(q, k, v, ridge, **options), ()


def _packed(q, *others, segment_ids=None, **options):
  """The gated delta rule on documents, by default of 1,000 tokens."""
  of_1000 = jnp.broadcast_to(1 + jnp.arange(q.shape[1]) // 1000, q.shape[:2])
  return delta_rule.gated_delta_rule(q, *others, segment_ids=of_1000 if segment_ids is None else segment_ids, **options)


def _mixture(q, k, v, beta, log_decay, scores, *, segment_ids=None, **options):
  """Memories of the gated delta rule: each token goes to the two of largest score, and to one more that all tokens share."""
  weights, chosen = jax.lax.top_k(jax.nn.softmax(scores), 2)
  weights, chosen = (
    jnp.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=last) for x, last in ((weights, 1), (chosen, scores.shape[-1]))
  )
  copies = Copies.of(chosen.astype(jnp.int32), segment_ids, scores.shape[-1] + 1)

  def step(parameters, state, block, tokens, weight):
    del parameters
    out, state = delta_rule.gated_delta_rule(*tokens, initial_state=state, segment_ids=block.document, **options)
    return weight[..., None, None] * out.astype(weight.dtype), state

  states = jnp.zeros((len(q), scores.shape[-1] + 1, q.shape[2], q.shape[3], v.shape[3]), jnp.float32)
  y, states = copies.scan(step, (), states, (q, k, v, beta, log_decay), copies.weigh(weights))
  return y.astype(v.dtype), states


_LINEAR = partial(ttm.Memory, depth=1, residual=False)
_MLP = partial(ttm.Memory, depth=2, residual=False)
_TTT_MLP = partial(ttm.Memory, depth=2, expansion=4, norm=True, biases=True)
_TTT_CHUNK = 16
_STATES = 16  # of a selective scan
_MEMORIES = 4  # of a mixture, without the one that all tokens share
_TAYLOR = 16  # channels of queries and keys, as in Based

# Operations with per-channel decays get the bound that their layers pass.
OPERATIONS: dict[str, Callable[..., Any]] = {
  "linear_attention": delta_rule.linear_attention,
  "delta_rule": delta_rule.delta_rule,
  "gated_delta_rule": delta_rule.gated_delta_rule,
  "kimi_delta_rule": partial(delta_rule.kimi_delta_rule, decay_bound=-5.0),
  "delta_product": delta_rule.delta_product,
  "erase_then_delta_rule": partial(delta_rule.erase_then_delta_rule, decay_bound=-5.0),
  "test_time_linear": partial(_titans, memory=_LINEAR),
  "test_time_mlp": partial(_titans, memory=_MLP),
  "short_conv": short_conv.short_conv,
}
# Further uses of them. Accelerators are measured on all but `HALF_AS_WIDE`, for which they have "titans_mlp".
VARIANTS: dict[str, Callable[..., Any]] = {
  "linear_attention_without_decay": delta_rule.linear_attention,
  "linear_attention_shared_keys": delta_rule.linear_attention,
  "gated_delta_rule_packed": _packed,
  "kimi_delta_rule_unbounded": delta_rule.kimi_delta_rule,
  "erase_then_delta_rule_unbounded": delta_rule.erase_then_delta_rule,
  "titans_mlp": partial(_titans, memory=_MLP),
  "ttt_mlp": _ttt_mlp,
  "gated_delta_rule_2": delta_rule.gated_delta_rule_2,
  "comba_rule": delta_rule.comba_rule,
  "taylor_attention": taylor_attention,
  "linear_attention_taylor_state": delta_rule.linear_attention,
  "mixture_of_memories": _mixture,
  "selective_scan": selective_scan.selective_scan,
  "softmax_attention": partial(_local_linear, iterations=0),
  "local_linear_attention": partial(_local_linear, iterations=16),
}
_OF_PAIRS = ("softmax_attention", "local_linear_attention")
ON_ACCELERATORS = tuple(name for name in OPERATIONS | VARIANTS if name != HALF_AS_WIDE)


def find(name: str) -> Callable[..., Any]:
  """The operation that `OPERATIONS` or `VARIANTS` calls `name`.

  Raises:
    ValueError: for an unknown name.
  """
  known = OPERATIONS | VARIANTS
  if name not in known:
    raise ValueError(f"operation is {name!r}; expected one of {', '.join(known)}.")
  return known[name]


def make_inputs(name: str, shape: Shape, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, ...]:
  """Inputs like those of a trained layer: unit keys, strengths in (0, 1), decays with a memory of hundreds of tokens.

  Args:
    name: of the operation.
    shape: shape of the inputs.
    seed: of the random numbers.
    dtype: of queries, keys, values and the convolution's input; gates and weights are float32.
  """
  return tuple(x.astype(dtype) if called in _ACTIVATIONS else x for called, x in _named_inputs(name, shape, seed).items())


def _named_inputs(name: str, shape: Shape, seed: int) -> dict[str, jax.Array]:
  find(name)
  b, t, h, k, v = dataclasses.astuple(shape)
  keys = iter(jax.random.split(jax.random.key(seed), 16))
  normal = lambda *dims: jax.random.normal(next(keys), dims, jnp.float32)  # noqa: E731
  unit = lambda *dims: _unit(normal(*dims))  # noqa: E731
  strength = lambda *dims: jax.nn.sigmoid(normal(*dims))  # noqa: E731
  decay = lambda *dims: -jax.nn.softplus(normal(*dims) - jnp.float32(5.0))  # noqa: E731
  q, values = unit(b, t, h, k), normal(b, t, h, v)
  match name.removesuffix("_unbounded").removesuffix("_packed"):
    case "linear_attention_without_decay":
      return {"q": q, "k": unit(b, t, h, k), "v": values}
    case "linear_attention":
      return {"q": q, "k": unit(b, t, h, k), "v": values, "log_decay": decay(b, t, h)}
    case "linear_attention_taylor_state":  # as large as that of Taylor attention
      features = count_features(_TAYLOR)
      return {"q": unit(b, t, h, features), "k": unit(b, t, h, features), "v": normal(b, t, h, v + 1)}
    case "mixture_of_memories":
      gates = {"beta": strength(b, t, h), "log_decay": decay(b, t, h), "scores": normal(b, t, _MEMORIES)}
      return {"q": q, "k": unit(b, t, h, k), "v": values} | gates
    case "taylor_attention":
      return {"q": normal(b, t, h, _TAYLOR), "k": normal(b, t, h, _TAYLOR), "v": values}
    case "linear_attention_shared_keys":
      return {"q": unit(b, t, 1, k), "k": unit(b, t, 1, k), "v": values, "log_decay": decay(b, t, h)}
    case "delta_rule":
      return {"q": q, "k": unit(b, t, h, k), "v": values, "beta": strength(b, t, h)}
    case "gated_delta_rule":
      return {"q": q, "k": unit(b, t, h, k), "v": values, "beta": strength(b, t, h), "log_decay": decay(b, t, h)}
    case "kimi_delta_rule":
      return {"q": q, "k": unit(b, t, h, k), "v": values, "beta": strength(b, t, h), "log_decay": decay(b, t, h, k)}
    case "gated_delta_rule_2":
      gates = {"erase_gate": strength(b, t, h, k), "write_gate": strength(b, t, h, v)}
      return {"q": q, "k": unit(b, t, h, k), "v": values} | gates | {"log_decay": decay(b, t, h, k)}
    case "comba_rule":
      key = unit(b, t, h, k)
      written = {"q": q, "k": key, "v": values, "beta": strength(b, t, h), "feedback_key": jnp.float32(0.7) * key}
      return written | {"log_decay": decay(b, t, h)}
    case "delta_product":
      k, v, beta = unit(b, t, 2, h, k), normal(b, t, 2, h, v), strength(b, t, 2, h)
      return {"q": q, "k": k, "v": v, "beta": beta, "log_decay": decay(b, t, h)}
    case "erase_then_delta_rule":
      written = {"q": q, "k": unit(b, t, h, k), "v": values, "beta": strength(b, t, h)}
      erased = {"erase_key": unit(b, t, h, k), "erase_strength": strength(b, t, h)}
      return written | erased | {"log_decay": decay(b, t, h, k)}
    case "test_time_linear" | "test_time_mlp" | "titans_mlp":
      if name == HALF_AS_WIDE:
        k, v = k // 2, v // 2
      gates = {"step": 0.01 * strength(b, t, h), "log_keep": decay(b, t, h), "log_momentum": decay(b, t, h)}
      tokens = {"q": unit(b, t, h, k), "k": unit(b, t, h, k), "v": normal(b, t, h, v)}
      memory = find(name).keywords["memory"](k, v)
      return tokens | gates | _weights(memory, h, normal)
    case "ttt_mlp":
      tokens = {"q": q, "k": unit(b, t, h, k), "v": values, "step": 0.1 / k * strength(b, t, h)}
      start = {"norm_scale": jnp.ones((h, v)), "norm_bias": jnp.zeros((h, v)), "average": jnp.zeros((h, _TTT_CHUNK))}
      return tokens | start | _weights(_TTT_MLP(k, v), h, normal)
    case "softmax_attention" | "local_linear_attention":
      key_norm = jnp.float32(k**0.5)  # keys as long as the layer's
      return {"q": key_norm * q, "k": key_norm * unit(b, t, h, k), "v": values, "ridge": jnp.ones(h)}
    case "selective_scan":  # of heads * key_dim channels
      step = jax.nn.softplus(normal(b, t, h * k) - jnp.float32(4.0))
      counts = jnp.arange(1, _STATES + 1, dtype=jnp.float32)
      a = jnp.broadcast_to(-counts[:, None], (_STATES, h * k))
      return {"x": normal(b, t, h * k), "step": step, "a": a, "b": normal(b, t, _STATES), "c": normal(b, t, _STATES)}
    case "short_conv":
      return {"x": normal(b, t, h * k), "weight": normal(4, h * k)}


def _weights(memory: ttm.Memory, heads: int, normal: Callable[..., jax.Array]) -> dict[str, jax.Array]:
  shapes = memory.shapes().items()
  return {f"weight_{name}": normal(heads, *shape) * jnp.float32(shape[0] ** -0.5) for name, shape in shapes}


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def flat(call: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct]) -> tuple[Callable[..., Any], list]:
  """A call of tokens whose heads are not yet apart, [B, T, heads * width], as projections make them; and such inputs.

  A TPU keeps inputs and results with heads apart in tiles of heads by channels, which suit XLA.
  Kernels take tiles of tokens by channels: a program with them would begin and end with copies.
  """

  tokens = inputs[0].shape[:2]

  def joined(x):
    return (*tokens, math.prod(x.shape[2:])) if x.shape[:2] == tokens and x.ndim > 3 else x.shape

  def run(*arguments):
    results = call(*(x.reshape(like.shape) for x, like in zip(arguments, inputs, strict=True)))
    return jax.tree.map(lambda x: x.reshape(joined(x)), results)

  return run, [jax.ShapeDtypeStruct(joined(x), x.dtype) for x in inputs]


def timed_inputs(name: str, direction: str, shape: Shape) -> tuple[jax.Array, ...]:
  """The arguments of `function(name, direction)`, "forward" or "both", in bfloat16."""
  inputs = jax.jit(lambda: make_inputs(name, shape, dtype=jnp.bfloat16))()
  if direction == "forward":
    return inputs
  output, _ = jax.eval_shape(find(name), *inputs)
  return jax.random.normal(jax.random.key(1), output.shape, output.dtype), *inputs


def function(name: str, direction: str, implementation: str = "auto") -> Callable[..., Any]:
  """The function that is measured.

  "forward" is the operation. "gradient" maps the inputs to the gradient of a weighted sum of the output by each of them. "both"
  maps the output's cotangent and the inputs to the output and its pull-back, as a training step does.
  """
  run = partial(find(name), implementation=implementation)

  def output(*inputs):
    return run(*inputs)[0]

  def weighted_sum(*inputs):
    y = output(*inputs)
    weights = np.cos(np.arange(y.shape[-1])).astype(y.dtype)
    return jnp.sum(y * jnp.expand_dims(weights, range(y.ndim - 1)))

  def gradient(*inputs):
    return jax.grad(weighted_sum, argnums=tuple(range(len(inputs))))(*inputs)

  return {"forward": run, "gradient": gradient, "both": with_pull_back(output)}[direction]


def with_pull_back(output: Callable[..., Any]) -> Callable[..., Any]:
  """Maps the output's cotangent and the inputs to the output and its pull-back."""

  def both(cotangent, *inputs):
    y, pull = jax.vjp(output, *inputs)
    return y, pull(cotangent)

  return both


class Work(NamedTuple):
  """The least work of a function of an operation.

  Attributes:
    flops: FLOPs of the matrix products in the recurrence, or for pairs of a query and a key; three times that for a gradient.
    bytes: size of all inputs and results, each read or written once.
  """

  flops: int
  bytes: int

  def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
    """The time that it takes at these rates (the roofline)."""
    return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def least_work(name: str, direction: str, *arguments: Any) -> Work:
  """The least work of `function(name, direction)` on these arguments, arrays or shapes. Nothing is computed."""
  inputs = arguments[direction == "both" :]
  flops = _forward_flops(name, inputs) * (1 if direction == "forward" else 3)
  results = jax.eval_shape(function(name, direction, "recurrent"), *arguments)
  return Work(flops, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arguments, results))))


def _forward_flops(name: str, inputs: Sequence[Any]) -> int:
  if name not in _OF_PAIRS:
    return count_flops(function(name, "forward", "recurrent"), *inputs)
  batch, length, heads, width = inputs[0].shape
  iterations = find(name).keywords["iterations"]
  # Scores and values; the mean of the keys and k . x; k . b of the iterates b, and the sum of keys that it weights.
  products = width + inputs[2].shape[-1] + (2 * width + iterations * 2 * width if iterations else 0)
  return batch * heads * length * (length + 1) // 2 * 2 * products


def cases(name: str) -> list[str]:
  """The names of the inputs on which the operation's accuracy is measured; `case_inputs` makes them."""
  keywords = getattr(find(name), "keywords", {})
  inputs = jax.eval_shape(lambda: _named_inputs(name, Shape(1, 1, 1, 2, 2), 0))
  fit = {
    "random": True,
    "documents": True,
    "cosine 0.95, beta 0.95": "beta" in inputs,
    "cosine 0.95, beta 1.9": "beta" in inputs,
    "decays -3 to -5": "log_decay" in inputs,
    "decays -8 to -16": "log_decay" in inputs and "decay_bound" not in keywords,
    "decays -20 to -60 at times": "log_decay" in inputs and "decay_bound" not in keywords,
  }
  return [case for case, fits in fit.items() if fits]


def case_inputs(name: str, case: str, shape: Shape) -> tuple[list[np.ndarray], np.ndarray]:
  """Float64 inputs of one of `cases`, and segment ids. Activations are exact in bfloat16, the others in float32."""
  rng = np.random.default_rng(len(case))
  inputs = {key: np.asarray(x, np.float64) for key, x in _named_inputs(name, shape, seed=1).items()}
  segment_ids = np.ones((shape.batch, shape.length), np.int32)
  if case.startswith("cosine"):
    beta = float(case.rpartition(" ")[2])
    alike = {key: _alike(rng, x, 0.95) for key, x in inputs.items() if key in ("k", "erase_key")}
    alike |= {"feedback_key": 0.7 * alike["k"]} if "feedback_key" in inputs else {}
    strengths = {key: np.full_like(x, beta) for key, x in inputs.items() if key in ("beta", "erase_strength")}
    faded = {key: 0.01 * x for key, x in inputs.items() if key == "log_decay"}
    inputs |= alike | strengths | faded
  elif case == "documents":
    borders = rng.choice(np.arange(1, shape.length), min(8, shape.length // 4), replace=False)
    segment_ids += np.isin(np.arange(shape.length), borders).cumsum().astype(np.int32)
  elif case != "random":
    _, high, _, low, *rare = case.split()
    decays = rng.uniform(float(low), float(high), inputs["log_decay"].shape)
    inputs["log_decay"] = np.where(rng.uniform(size=decays.shape) < 0.1, decays, -0.001) if rare else decays
  rounded = {key: x.astype(jnp.bfloat16 if key in _ACTIVATIONS else np.float32) for key, x in inputs.items()}
  return [x.astype(np.float64) for x in rounded.values()], segment_ids


def _alike(rng: np.random.Generator, keys: np.ndarray, cosine: float) -> np.ndarray:
  """Unit vectors like `keys`, any two of which have about this cosine."""
  common = rng.standard_normal(keys.shape[-1])
  common /= np.linalg.norm(common)
  others = keys - (keys @ common)[..., None] * common
  others /= np.linalg.norm(others, axis=-1, keepdims=True)
  return np.sqrt(cosine) * common + np.sqrt(1 - cosine) * others
