"""Titans and Miras: memories that are small networks, trained on every token that they read.

    S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2      M_t = M_0 + (1 - alpha_t) (M_{t-1} - M_0) + S_t      o_t = M_t(q_t)

with q, k = L2(silu(conv(W x))), v = silu(conv(W x)), gates of each token and head, and y = W_o (RMSNorm(o) * sigmoid(W_g x)).
The inner training is a pure function in `memzoo.pallas_kernels.test_time_memory`. This file adds projections, gates and the
initial weights. Sources: Titans (Behrouz et al. 2025, arXiv:2501.00663), Miras (Behrouz et al. 2025, arXiv:2504.13173).

The papers leave open -> we do:

- read before or after the token's own write -> after
- the loss -> |e|^2; neither half of it nor its mean
- gates -> sigmoids, one for each head. theta: see `Gating.max_step` and `step_bias`; alpha starts at 0.005, eta at 0.5
- M -> an MLP with expansion 4, without layer norm and residual. The authors' later papers have a residual. With it a write
  stores mostly -k: recall of 16 pairs is learned in 400 steps without the residual, and never learned with it.
- the output gate -> a sigmoid, because a silu starts closed
- heads -> `num_heads`, each with a memory of its own
- M_0 -> learned. Matrices start such that their outputs have variance one. The last matrix starts at zero, so the initial
  output is zero; not in Moneta, which divides by the norm of its matrices.
- where the memory decays to -> M_0, the learned weights that a document begins with. The paper prints
  M_t = (1 - alpha_t) M_{t-1} + S_t, which decays to zero: there all gradients of a network vanish, so after some thousand
  tokens its output is zero and stays zero. `Gating.decay_to="zero"` is the printed form. Measured: models that find a pass key
  in 64 bytes still find it in the last 64 of a document of 50,000 (0.99); with the printed form they fail after 500 (0.09).
- persistent tokens -> written before every document, in a chunk of their own. No convolution reaches back to them.
- the length of a write -> the gradient of each matrix is clipped to a norm of 10. For the last matrix that norm is 2 |h| |e|:
  with 256 hidden units, errors beyond one half are clipped, including those of values that grow in training.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels import test_time_memory as ttm
from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.states import exportable
from ..pallas_kernels.test_time_memory import Loss, Retention
from .axes import named
from .inner_learner import InnerLearner
from .memory_layer import silence_padding
from .norms import l2_normalise
from .projected_memory import ProjectedMemory, Stream
from .projections import INIT, LogShare, Strength, dense, gate_types
from .ranges import check_ranges


@dataclass(frozen=True)
class Network:
  """The network M of a memory, one for each head; see `ttm.Memory`.

      depth 1:  k W            depth 2:  gelu(k W_0) W_1            gated:  (silu(k W_gate) * k W_up) W_down

  Attributes:
    depth: number of matrices; 1 is a linear memory. A gated network has three.
    expansion: hidden width over `head_dim`.
    gated: a SwiGLU network.
    residual: k + M(k) instead of M(k).
    norm: a layer norm on M(k).
    norm_epsilon: epsilon of this layer norm. It bounds the slope of the norm where M(k) is close to zero.
  """

  depth: int = 2
  expansion: float = 4.0
  gated: bool = False
  residual: bool = False
  norm: bool = False
  norm_epsilon: float = 1e-2

  def __post_init__(self):
    check_ranges(self)


@dataclass(frozen=True)
class Update:
  """Where the gradient of a write is taken, how long it may be, and what a read sees; see `ttm.Spec`.

  Attributes:
    anchor: "chunk": gradients are taken at the weights that the chunk began with. "token": at W_{t-1}, for linear memories
      with the squared loss; results are then the same for every `chunk_size`.
    order: order of decay and gradient, for the token anchor: "gradient_first" or "decay_first".
    read: "after" the token's own write, "before" it, or at the "chunk_start".
    clip: largest norm of a token's gradient, by the output and by each matrix; `None` for no clipping.
  """

  anchor: Literal["chunk", "token"] = "chunk"
  order: Literal["gradient_first", "decay_first"] = "gradient_first"
  read: Literal["after", "before", "chunk_start"] = "after"
  clip: float | None = 10.0

  def __post_init__(self):
    check_ranges(self)


@dataclass(frozen=True)
class Gating:
  """The gates: step size theta = max_step sigmoid(.), decay 1 - alpha = sigmoid(.), momentum eta = sigmoid(.).

  Attributes:
    momentum: whether there is momentum eta.
    forget: whether there is decay alpha.
    max_step: theta lies in (0, max_step). `None`: the step at which one write to a fresh memory brings the error of a unit key
      to zero (unless `Update.clip` shortens it). That is 1 / 2c for a linear memory, c being `Loss.scale`, and about
      1 / (0.85 c hidden) for a network (0.71 where it is gated). With "simplex" retention: 1 / 2c.
    step_bias: initial logit of theta. `None`: theta starts at max_step / (2 sqrt(C)). The C tokens of a chunk do not see each
      other's writes, and writes under similar keys add up: max_step / 2 overshoots, and max_step / 2C, at which C equal keys
      are stable, is slow for distinct keys.
    forget_bias: initial logit of alpha.
    momentum_bias: initial logit of eta.
    decay_to: what the memory decays to: "start", the weights that the document began with, or "zero", as printed, where a
      network of two or more matrices learns nothing more.
  """

  momentum: bool = True
  forget: bool = True
  max_step: float | None = None
  step_bias: float | None = None
  forget_bias: float = -5.3
  momentum_bias: float = 0.0
  decay_to: Literal["start", "zero"] = "start"

  def __post_init__(self):
    check_ranges(self)


@exportable
class TitansState(NamedTuple):
  """State of a `TitansMemory`.

  Attributes:
    memory: the difference of inner weights, momentum and anchor from the initial ones; see
      `memzoo.pallas_kernels.test_time_memory.State`.
    query_tail, key_tail, value_tail: the last inputs of the short convolutions, [B, conv_width - 1, channels].
  """

  memory: ttm.State
  query_tail: jax.Array
  key_tail: jax.Array
  value_tail: jax.Array


class Projections(NamedTuple):
  """The projections of a `TitansMemory`.

  Attributes:
    query, key, value: streams, not yet split into heads.
    gates: the map from x [B, T, D] to `ttm.Gates`.
  """

  query: Stream
  key: Stream
  value: Stream
  gates: Any


class TitansMemory(ProjectedMemory, InnerLearner, kw_only=True):
  """The neural memory of Titans (Behrouz et al. 2025, arXiv:2501.00663): a network trained on every token that it reads.

      S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2     M_t = M_0 + (1 - alpha_t) (M_{t-1} - M_0) + S_t     o_t = M_t(q_t)

  with gradients taken at the weights that the token's chunk began with.

  Attributes:
    head_dim: width of a head's keys and values.
    chunk_size: tokens whose gradients are taken at the same weights. It changes results, not only speed.
    network: M; see `Network`.
    loss: what a write reduces; see `ttm.Loss`.
    retention: the map from accumulated weights to the weights in use; see `ttm.Retention`.
    update: where gradients are taken, what a read sees, clipping; see `Update`.
    gates: step size, decay and momentum; see `Gating`.
    persistent_tokens: number of learned tokens that are written before every document.
    output_gate: "sigmoid", "silu" or "none".

  The other attributes are those of `ProjectedMemory` and `InnerLearner`.
  """

  head_dim: int
  chunk_size: int = 16
  network: Network = Network()
  loss: Loss = Loss()
  retention: Retention = Retention()
  update: Update = Update()
  gates: Gating = Gating()
  persistent_tokens: int = 0
  output_gate: str = "sigmoid"

  @property
  def spec(self) -> ttm.Spec:
    """The arguments of the operation."""
    return ttm.Spec(
      ttm.Memory(self.head_dim, self.head_dim, **dataclasses.asdict(self.network)),
      self.loss,
      self.retention,
      chunk_size=self.chunk_size,
      momentum=self.gates.momentum,
      decay_to=self.gates.decay_to,
      **dataclasses.asdict(self.update),
    )

  @property
  def channels(self) -> int:
    return self.num_heads * self.head_dim

  def initial_state(self, batch_size: int) -> TitansState:
    """The state before the first token."""
    memory = ttm.start(self.spec, batch_size, self.num_heads, accumulator(self.activation_dtype()))
    return TitansState(memory, *(self.tail(batch_size, self.channels) for _ in range(3)))

  @nn.compact
  def __call__(
    self, x: jax.Array, state: TitansState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, TitansState]:
    """Maps x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    y, state = self.update_and_read(x, state, segment_ids, self.persistent(x.shape[-1]), fresh)
    return silence_padding(y, segment_ids), state

  def update_and_read(
    self, x: jax.Array, state: TitansState, segment_ids: jax.Array | None, persistent: jax.Array | None, fresh: bool
  ) -> tuple[jax.Array, TitansState]:
    """The layer without its checks: x [B, T, D] to (y [B, T, D], state). `fresh`: `state` is a fresh one."""
    projections = self.projections(x)
    initial = self.initial_weights(projections, persistent)
    operands, tails = self.project(projections, x, state[1:], segment_ids)
    learned = self.learn(initial, *operands, None if fresh else state.memory, segment_ids)
    return self.read_out(x, learned.y), TitansState(learned.state, *tails)

  def projections(self, x: jax.Array) -> Projections:
    """The modules of streams and gates, to be called within `__call__`, on x or several inputs of its dtype."""
    return Projections(*(self.stream(name, self.channels) for name in ("query", "key", "value")), self._gates(x))

  def _gates(self, x: jax.Array) -> Any:
    """From inputs [B, T, D], of the dtype of x, to `ttm.Gates` of [B, T, H]."""
    gating, types = self.gates, {"param_dtype": self.param_dtype, "precision": self.precision}
    max_step = _longest_step(self.spec) if gating.max_step is None else gating.max_step
    unseen = 1 if self.spec.exact else self.chunk_size  # tokens whose writes do not see each other
    step_bias = -math.log(2 * math.sqrt(unseen) - 1) if gating.step_bias is None else gating.step_bias
    step = Strength(self.num_heads, max_step, step_bias, **types, name="theta")
    keep = LogShare(self.num_heads, -gating.forget_bias, **types, name="keep") if gating.forget else None
    momentum = LogShare(self.num_heads, gating.momentum_bias, **types, name="eta") if gating.momentum else None
    threshold = None
    if self.loss.has_threshold:
      start = 2 * (1 if self.loss.kind == "huber" else self.head_dim**0.5)
      bias = nn.initializers.constant(start + math.log(-math.expm1(-start)))  # softplus(bias) = start
      threshold = dense(self.num_heads, ("embed", "heads"), bias=bias, name="threshold", **gate_types(x, **types))

    def gates(x):
      limit = None if threshold is None else nn.softplus(threshold(x))
      return ttm.Gates(step(x), *(None if gate is None else gate(x) for gate in (keep, momentum)), limit)

    return gates

  def project(
    self, projections: Projections, x: jax.Array, tails: tuple[jax.Array, ...], segment_ids: jax.Array | None
  ) -> tuple[tuple[jax.Array, jax.Array, jax.Array, ttm.Gates], list[jax.Array]]:
    """(q, k, v [B, T, H, d], gates) of x [B, T, D], and the next tails."""
    streams = [stream(x, tail, segment_ids) for stream, tail in zip(projections[:3], tails, strict=True)]
    q, k, v = (self.split(y) for y, _ in streams)
    return (l2_normalise(q), l2_normalise(k), v, projections.gates(x)), [tail for _, tail in streams]

  def split(self, x: jax.Array) -> jax.Array:
    """[B, T, H * d] to [B, T, H, d]."""
    return x.reshape(*x.shape[:2], self.num_heads, self.head_dim)

  def persistent(self, width: int) -> jax.Array | None:
    """The persistent tokens [N, D]; `None` without any."""
    if not self.persistent_tokens:
      return None
    shape = self.persistent_tokens, width
    return self.param("persistent", named(INIT, None, "embed"), shape, self.param_dtype).astype(self.activation_dtype())

  def initial_weights(self, projections: Projections, persistent: jax.Array | None) -> ttm.InitialWeights:
    """The weights at the start of a document: learned, and updated with the persistent tokens [N, D], if any."""
    spec = self.spec
    axes = "heads", None, None
    weights = {
      name: self.param(f"memory_{name}", named(_start(spec, name), *axes), (self.num_heads, *shape), self.param_dtype)
      for name, shape in spec.memory.shapes().items()
    }
    norm = None
    if spec.memory.norm:
      shape, axes = (self.num_heads, self.head_dim), ("heads", None)
      norm = (
        self.param("memory_norm_scale", named(nn.initializers.ones, *axes, decays=False), shape, self.param_dtype),
        self.param("memory_norm_bias", named(nn.initializers.zeros, *axes, decays=False), shape, self.param_dtype),
      )
    initial = ttm.InitialWeights(weights, norm=norm)
    if persistent is None:
      return initial
    operands, _ = self.project(projections, persistent[None], (self.tail(1, self.channels),) * 3, None)
    memory = ttm.run(spec, initial, *operands, implementation=self.implementation, precision=self.precision).state
    wide = accumulator(*jax.tree.leaves(memory.weights))
    learned = {name: w.astype(wide) + memory.weights[name][0] for name, w in initial.weights.items()}
    return initial._replace(weights=learned, momentum=memory.momentum and {name: s[0] for name, s in memory.momentum.items()})


# Mean square of an activation of unit normal inputs.
_POWER = {"gelu": 0.425, "silu": 0.356}


def _hidden_power(memory: ttm.Memory) -> float:
  """The mean square of hidden activations whose inputs have variance one."""
  return _POWER["silu" if memory.gated else memory.activation]


def _longest_step(spec: ttm.Spec) -> float:
  """1 / (2 c |x|^2) for the initial input x of the last matrix: one write brings the error to zero.

  With a simplex 1 / 2c, because its steps change logarithms of weights.
  """
  memory = spec.memory
  squared = memory.hidden * _hidden_power(memory) if memory.depth > 1 or memory.gated else 1
  return (0.5 if spec.retention.kind == "simplex" else 1 / (2 * squared)) / spec.loss.scale


def _start(spec: ttm.Spec, name: str) -> Any:
  """The initialiser of an accumulated matrix [H, in, out]; see the docstring of the module."""
  memory, names = spec.memory, list(spec.memory.shapes())
  meets_keys, last = name in (names[:2] if memory.gated else names[:1]), name == names[-1]

  def init(key, shape, dtype=jnp.float32):
    if last and spec.retention.kind != "norm":
      return jnp.zeros(shape, dtype)
    weights = jax.random.normal(key, shape, dtype)
    if not meets_keys and spec.retention.kind != "simplex":  # keys have unit length
      weights = weights / math.sqrt(_hidden_power(memory) * shape[-2])
    return spec.retention.start(weights)

  return init


_MIRAS = Network(residual=True, norm=True)  # x + LN(MLP(x))


class Yaad(TitansMemory, kw_only=True):
  """Yaad (Miras, arXiv:2504.13173): errors beyond a learned threshold count as outliers and are written by their sign.

      M_t = M_0 + (1 - alpha_t) (M_{t-1} - M_0) - theta_t grad l      l = |e|^2 where |e| <= delta_t, else 2 delta_t sum_i |e_i|

  As printed, the loss jumps at the threshold; `Loss("huber_norm")` is the continuous variant. Thresholds start at
  2 sqrt(head_dim), twice the length of a layer norm's output. Started at half of that, many writes are signs, and recall is
  hardly learned.

  The attributes are those of `TitansMemory`; the network is x + LN(MLP(x)), without momentum.
  """

  network: Network = _MIRAS
  loss: Loss = Loss("mixture")
  gates: Gating = Gating(momentum=False)


class Moneta(TitansMemory, kw_only=True):
  """Moneta (Miras, arXiv:2504.13173): the p-th power of the error, and weights held to a norm.

      A_t = A_0 + (1 - alpha_t) (A_{t-1} - A_0) - theta_t grad sum_i |e_i|^p      M_t = A_t / |A_t|_q^{q-2}

  as printed, with p = 3 (`Loss.power`) and q = 4 (`Retention.norm`). The exact dual of the norm would have degree one in A.
  Within a chunk the divisor is that of the chunk's start.

  The attributes are those of `TitansMemory`; the network is x + LN(MLP(x)), without momentum.
  """

  network: Network = _MIRAS
  loss: Loss = Loss("power")
  retention: Retention = Retention("norm")
  update: Update = Update(clip=1.0)
  gates: Gating = Gating(momentum=False)


class Memora(TitansMemory, kw_only=True):
  """Memora (Miras, arXiv:2504.13173): weights on a simplex, trained by exponentiated gradients.

      L_t = L_0 + (1 - alpha_t) (L_{t-1} - L_0) - theta_t grad_M |e|^2      M_t = c softmax(L_t) over each output's inputs

  A constant added to a column does not change its softmax, so logits are not normalised between writes, and the extra token
  with which the paper begins a chunk is not needed. Reads see the writes of earlier chunks, because M is not linear in L.

  The attributes are those of `TitansMemory`; the network is x + LN(MLP(x)), without momentum.
  """

  network: Network = _MIRAS
  retention: Retention = Retention("simplex")
  update: Update = Update(read="chunk_start")
  gates: Gating = Gating(momentum=False)
