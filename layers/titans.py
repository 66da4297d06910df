"""Titans: a memory that is a small network and learns at test time, and its kin.

    S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2      M_t = (1 - alpha_t) M_{t-1} + S_t      o_t = M_t(q_t)

q, k = L2(silu(conv(W x))), v = silu(conv(W x)); gates of each token and head; y = W_o (RMSNorm(o) * sigmoid(W_g x)). What is
learned inside is pure and lies in `memzoo.pallas_kernels.test_time_memory`; here are projections, gates and what a document
begins with. Sources: Titans (Behrouz et al. 2025, arXiv:2501.00663), Miras (Behrouz et al. 2025, arXiv:2504.13173).

The papers leave open -> we do: read before or after the own write -> after · the loss -> |e|^2, not its half nor its mean ·
gates -> sigmoids, one a head; theta up to where a fresh memory overwrites wholly, from a half of that over the root of the
chunk's size, alpha from 0.005, eta from 0.5 · M -> an MLP, expansion 4, without layer norm and without the residual of the
authors' later papers: with it a write stores mostly -k, and recall of 16 pairs that is learned in 400 steps without is not
begun with it · the output gate -> a sigmoid, for silu starts closed · heads -> as many as asked for, each a memory of its own
· M_0 -> learned; all matrices so that what they put out has variance one, but the last from zero, so that a memory that knows
nothing says nothing; not of Moneta, which divides by its norm · persistent tokens -> written before every document, in a chunk
of their own; no convolution reaches back to them · how long a write may be -> each matrix's gradient up to 10. It is 2 |h| |e|
for the last, so with 256 hidden units errors beyond a half are written no more strongly than that, and training that makes
values longer meets it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels import test_time_memory as ttm
from ..pallas_kernels.numerics import accumulator
from .axes import named
from .inner_learner import InnerLearner
from .memory_layer import silence_padding
from .norms import l2_normalise
from .projected_memory import ProjectedMemory, Stream
from .projections import INIT, LogShare, Strength, dense


class TitansState(NamedTuple):
  """State of a `TitansMemory`.

  Attributes:
    memory: by how much the inner weights, momentum and anchor differ from what a document begins with; see
      `memzoo.pallas_kernels.test_time_memory.State`.
    query_tail, key_tail, value_tail: the last inputs of the short convolutions, [B, conv_width - 1, channels].
  """

  memory: ttm.State
  query_tail: jax.Array
  key_tail: jax.Array
  value_tail: jax.Array


class Projections(NamedTuple):
  """How a `TitansMemory` sees its input.

  Attributes:
    query, key, value: streams, not yet split into heads.
    gates: from x [B, T, D] to `Gates`.
  """

  query: Stream
  key: Stream
  value: Stream
  gates: Any


class TitansMemory(ProjectedMemory, InnerLearner, kw_only=True):
  """The neural memory of Titans (Behrouz et al. 2025, arXiv:2501.00663): a network trained on every token it reads.

      S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2      M_t = (1 - alpha_t) M_{t-1} + S_t      o_t = M_t(q_t)

  with gradients taken at the weights that the token's chunk began with.

  Attributes:
    head_dim: width of a head's keys and values.
    depth: matrices of the network; 1 is a linear memory.
    expansion: hidden width over `head_dim`.
    gated: a SwiGLU network instead.
    residual, memory_norm, memory_norm_epsilon: x + M(x), and a layer norm on M(x), which does not magnify what is smaller than
      the root of epsilon: a memory that has forgotten everything would be all slope.
    loss, loss_scale, power: what a write makes smaller; see `Loss`.
    retention, retention_norm: from what is accumulated to the weights in use; see `Retention`.
    momentum, forget: with eta, with alpha.
    chunk_size: tokens whose gradients are taken at the same weights. Not speed alone: another number is another model.
    anchor, order, read, clip: see `Spec`. `anchor="token"` makes a linear memory the same for every `chunk_size`.
    max_step: theta lies in (0, max_step). `None` for 1 / 2c with a linear memory, c being `loss_scale`, and 1 / (0.85 c hidden)
      with a network (0.71 where `gated`): with unit keys, and hidden units as they start, one write at the ceiling puts the
      error to zero, unless `clip` cuts it short. 1 / 2c with a simplex, whose steps are of logarithms.
    step_bias, forget_bias, momentum_bias: where the logits of the gates start. A `step_bias` of `None` is that of a share of
      1 / (2 sqrt(C)): tokens of a chunk of C do not see each other's writes, and like keys, of which text is full, add up. The
      half that a lone token bears is too much there, and 1 / 2C, which C equal keys bear, slow where all are distinct.
    persistent_tokens: learned tokens that are written before every document.
    output_gate: "sigmoid".

  Further attributes are `ProjectedMemory`'s and `InnerLearner`'s.
  """

  head_dim: int
  depth: int = 2
  expansion: float = 4
  gated: bool = False
  residual: bool = False
  memory_norm: bool = False
  memory_norm_epsilon: float = 1e-2
  loss: str = "squared"
  loss_scale: float = 1.0
  power: float = 3.0
  retention: str = "none"
  retention_norm: float = 4.0
  momentum: bool = True
  forget: bool = True
  chunk_size: int = 16
  anchor: str = "chunk"
  order: str = "gradient_first"
  read: str = "after"
  clip: float | None = 10.0
  max_step: float | None = None
  step_bias: float | None = None
  forget_bias: float = -5.3
  momentum_bias: float = 0.0
  persistent_tokens: int = 0
  output_gate: str = "sigmoid"

  @property
  def spec(self) -> ttm.Spec:
    """The memory, as the operation knows it."""
    return ttm.Spec(
      ttm.Memory(
        self.head_dim,
        self.head_dim,
        depth=self.depth,
        expansion=self.expansion,
        gated=self.gated,
        norm=self.memory_norm,
        norm_epsilon=self.memory_norm_epsilon,
        residual=self.residual,
      ),
      ttm.Loss(self.loss, self.loss_scale, self.power),
      ttm.Retention(self.retention, self.retention_norm),
      chunk_size=self.chunk_size,
      momentum=self.momentum,
      anchor=self.anchor,
      order=self.order,
      read=self.read,
      clip=self.clip,
    )

  @property
  def channels(self) -> int:
    return self.num_heads * self.head_dim

  def initial_state(self, batch_size: int) -> TitansState:
    """Nothing learned yet, no tokens before."""
    memory = ttm.start(self.spec, batch_size, self.num_heads, accumulator(self.activation_dtype()))
    return TitansState(memory, *(self.tail(batch_size, self.channels) for _ in range(3)))

  @nn.compact
  def __call__(
    self, x: jax.Array, state: TitansState | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, TitansState]:
    """x [B, T, D] to (y [B, T, D], state); see `MemoryLayer`."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    x = x.astype(self.activation_dtype(x))
    y, state = self.update_and_read(x, state, segment_ids, self.persistent(x.shape[-1]), fresh)
    return silence_padding(y, segment_ids), state

  def update_and_read(
    self, x: jax.Array, state: TitansState, segment_ids: jax.Array | None, persistent: jax.Array | None, fresh: bool
  ) -> tuple[jax.Array, TitansState]:
    """The whole layer, but for the checks: x [B, T, D] to (y [B, T, D], state). `fresh` says that `state` is."""
    projections = self.projections()
    initial = self.initial_weights(projections, persistent)
    operands, tails = self.project(projections, x, state[1:], segment_ids)
    learned = self.learn(initial, *operands, None if fresh else state.memory, segment_ids)
    return self.read_out(x, learned.y), TitansState(learned.state, *tails)

  def projections(self) -> Projections:
    """Streams and gates, to be called within `__call__`; they may be used on more than one input."""
    streams = (self.stream(name, self.channels) for name in ("query", "key", "value"))
    types = {"param_dtype": self.param_dtype}
    ceiling = _longest_step(self.spec) if self.max_step is None else self.max_step
    unseen = 1 if self.spec.exact else self.chunk_size
    step_bias = -math.log(2 * math.sqrt(unseen) - 1) if self.step_bias is None else self.step_bias
    step = Strength(self.num_heads, ceiling, step_bias, **types, name="theta")
    keep = LogShare(self.num_heads, -self.forget_bias, **types, name="keep") if self.forget else None
    momentum = LogShare(self.num_heads, self.momentum_bias, **types, name="eta") if self.momentum else None
    threshold = None
    if self.spec.loss.has_threshold:
      rare = 2 * (1 if self.loss == "huber" else self.head_dim**0.5)
      bias = nn.initializers.constant(rare + math.log(-math.expm1(-rare)))  # which softplus takes to `rare`
      threshold = dense(self.num_heads, ("embed", "heads"), bias=bias, name="threshold", param_dtype=self.param_dtype)

    def gates(x):
      limit = None if threshold is None else nn.softplus(threshold(x.astype(accumulator(x))))
      return ttm.Gates(step(x), *(None if gate is None else gate(x) for gate in (keep, momentum)), limit)

    return Projections(*streams, gates)

  def project(
    self, projections: Projections, x: jax.Array, tails: tuple[jax.Array, ...], segment_ids: jax.Array | None
  ) -> tuple[tuple[jax.Array, jax.Array, jax.Array, ttm.Gates], list[jax.Array]]:
    """(q, k, v [B, T, H, d], gates) of x [B, T, D], and the next tails."""
    seen = [stream(x, tail, segment_ids) for stream, tail in zip(projections[:3], tails, strict=True)]
    q, k, v = (self.split(y) for y, _ in seen)
    return (l2_normalise(q), l2_normalise(k), v, projections.gates(x)), [tail for _, tail in seen]

  def split(self, x: jax.Array) -> jax.Array:
    """[B, T, H * d] to [B, T, H, d]."""
    return x.reshape(*x.shape[:2], self.num_heads, self.head_dim)

  def persistent(self, width: int) -> jax.Array | None:
    """The persistent tokens [N, D], `None` for none."""
    if not self.persistent_tokens:
      return None
    shape = self.persistent_tokens, width
    return self.param("persistent", named(INIT, None, "embed"), shape, self.param_dtype).astype(self.activation_dtype())

  def initial_weights(self, projections: Projections, persistent: jax.Array | None) -> ttm.InitialWeights:
    """What a document begins with: learned weights that have read the persistent tokens [N, D], if any."""
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
        self.param("memory_norm_scale", named(nn.initializers.ones, *axes), shape, self.param_dtype),
        self.param("memory_norm_bias", named(nn.initializers.zeros, *axes), shape, self.param_dtype),
      )
    initial = ttm.InitialWeights(weights, norm=norm)
    if persistent is None:
      return initial
    operands, _ = self.project(projections, persistent[None], (self.tail(1, self.channels),) * 3, None)
    memory = ttm.run(spec, initial, *operands, implementation=self.implementation).state
    wide = accumulator(*jax.tree.leaves(memory.weights))
    learned = {name: w.astype(wide) + memory.weights[name][0] for name, w in initial.weights.items()}
    return initial._replace(weights=learned, momentum=memory.momentum and {name: s[0] for name, s in memory.momentum.items()})


# The mean square of what an activation makes of a variance of one.
_POWER = {"gelu": 0.425, "silu": 0.356}


def _hidden_power(memory: ttm.Memory) -> float:
  """The mean square of hidden activations whose units have variance one."""
  return _POWER["silu" if memory.gated else memory.activation]


def _longest_step(spec: ttm.Spec) -> float:
  """1 / (2 c |x|^2) for the x that the last matrix meets, as it starts: one write puts the error to zero.

  Of a simplex a half: its steps are of logarithms, and those of weights would not be felt.
  """
  memory = spec.memory
  squared = memory.hidden * _hidden_power(memory) if memory.depth > 1 or memory.gated else 1
  return (0.5 if spec.retention.kind == "simplex" else 1 / (2 * squared)) / spec.loss.scale


def _start(spec: ttm.Spec, name: str) -> Any:
  """Initialises what is accumulated for a matrix [H, in, out]; see the module."""
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


class Yaad(TitansMemory, kw_only=True):
  """Yaad (Miras, arXiv:2504.13173): outliers, beyond a learned threshold, are written by the sign of their error alone.

      M_t = (1 - alpha_t) M_{t-1} - theta_t grad l      l = |e|^2 where |e| <= delta_t, else 2 delta_t sum_i |e_i|

  As printed the loss jumps at the threshold; `loss="huber_norm"` is the continuous variant. Thresholds start at
  2 sqrt(head_dim), twice the length of what a layer norm puts out: from half of that, with signs for many writes, recall is
  hardly learned.

  Attributes are `TitansMemory`'s; the network is x + LN(MLP(x)), without momentum.
  """

  residual: bool = True
  memory_norm: bool = True
  momentum: bool = False
  loss: str = "mixture"


class Moneta(TitansMemory, kw_only=True):
  """Moneta (Miras, arXiv:2504.13173): the p-th power of the error, and weights held to a norm.

      A_t = (1 - alpha_t) A_{t-1} - theta_t grad sum_i |e_i|^p      M_t = A_t / |A_t|_q^{q-2}

  as printed; a view of degree one in A would be the dual of the norm. Within a chunk the divisor is that of its start.

  Attributes:
    power, retention_norm: p = 3 and q = 4, as published.

  Further attributes are `TitansMemory`'s; the network is x + LN(MLP(x)), without momentum.
  """

  residual: bool = True
  memory_norm: bool = True
  momentum: bool = False
  loss: str = "power"
  clip: float | None = 1.0
  retention: str = "norm"


class Memora(TitansMemory, kw_only=True):
  """Memora (Miras, arXiv:2504.13173): weights on a simplex, trained by exponentiated gradients.

      L_t = (1 - alpha_t) L_{t-1} - theta_t grad_M |e|^2      M_t = c softmax(L_t) over the inputs of each output

  Softmax does not see what is added to all of a column, so logits need no normalising between writes, nor the extra token
  that the paper begins a chunk with. Reads see what was written before their chunk, for M is not linear in its writes.

  Attributes are `TitansMemory`'s; the network is x + LN(MLP(x)), without momentum.
  """

  residual: bool = True
  memory_norm: bool = True
  momentum: bool = False
  retention: str = "simplex"
  read: str = "chunk_start"
