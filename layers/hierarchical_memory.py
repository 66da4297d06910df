"""The hierarchical memory module: two networks that learn at test time, one often, one rarely from what the first retrieves.

    z^L <- norm(z^L + M^L(x + z^L + z^H))    `inner_cycles` times, then    z^H <- norm(z^H + M^H(z^L + z^H)),    `cycles` times
    m = a * z^H + (1 - a) * z^L,    a = sigmoid(W [x, z^L, z^H])

M^L, the episodic memory, is trained on every token, in chunks of C tokens. M^H, the gist memory, is trained on what M^L
retrieved, averaged over each chunk, in chunks of r such averages. Both are read at the weights that their open chunks began
with, so a token sees only the memory of earlier chunks. M(u) = silu(u W_1) W_2 in each head, k, q = L2(silu(W u)), v = W u, and

    S_t = eta_t S_{t-1} - theta_t grad 1/2 |M(k_t) - v_t|^2        W_t = W_0 + (1 - alpha_t) (W_{t-1} - W_0) + S_t

Source: Mela (Chen 2026, arXiv:2605.10537). All equations here are inferred: from its abstract, from summaries that describe the
parts in words (two modules of different update frequencies, a recursion between their latent states through which all gradients
flow, a combination by context, features of several levels fed to the first blocks of a decoder), and from its neighbours Titans
(the update), HRM (the recursion) and DeepStack (the feeding). The paper leaves open -> we do:

- what M^H is trained on -> the mean of z^L over a chunk, normalised (`pairs`)
- norms of latent states -> RMSNorm without weights; a zero stays zero
- the memory before the first chunk has ended -> the learned weights W_0
- where the memory decays to -> W_0; see `memzoo.layers.titans`
- the state between calls -> carried on. The released code starts every call from W_0.
- the largest step -> 0.8 d / (f C) for heads d wide, f hidden units and C writes in a chunk: with it C equal keys do not
  overshoot, momentum of 0.9 included, while the hidden units are as large as at the start
- the order of the fed features -> z^L, m, z^H, from fine to coarse (`features`)
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from ..pallas_kernels import test_time_memory as ttm
from ..pallas_kernels.documents import select_rows
from ..pallas_kernels.numerics import accumulator
from ..pallas_kernels.partition import HEADS, ROWS, aligned
from ..pallas_kernels.states import exportable
from ..pallas_kernels.test_time_memory import Loss
from ..pallas_kernels.test_time_memory.layout import Layout
from .axes import named
from .context import Context, ContextLayer
from .memory_layer import silence_padding
from .norms import RMSNorm, beside, l2_normalise
from .projections import LogShare, Strength, dense
from .segments import lay_out_segments, scan_segments
from .titans import Gating

PAIRS = "pooled", "token", "raw"
MIXES = "context", "half", "fast", "slow"
FEATURES = "fast", "mixed", "slow"
MOST_MOMENTUM = 0.9


@exportable
class HierarchicalState(NamedTuple):
  """State of a `HierarchicalMemory`.

  Attributes:
    fast, slow: of M^L and M^H; see `memzoo.pallas_kernels.test_time_memory.State`.
    summary: the sum of z^L over the open chunk of M^L, float32 [B, D].
  """

  fast: ttm.State
  slow: ttm.State
  summary: jax.Array


_LEVEL = ttm.State(*[P(ROWS, HEADS)] * 3, P(ROWS))
_STATE = HierarchicalState(_LEVEL, _LEVEL, P(ROWS))


class Level(nn.Module):
  """The projections and gates of one memory.

  Attributes:
    spec: of the operation.
    num_heads: number of heads.
    width: width of what it is trained on and read with, and of what it returns.
    gates: its gates; `max_step` is a number.
    dtype, param_dtype, precision, implementation: see `HierarchicalMemory`.
  """

  spec: ttm.Spec
  num_heads: int
  width: int
  gates: Gating
  dtype: Any
  param_dtype: Any
  precision: str | None
  implementation: str

  def setup(self):
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    channels = self.num_heads * self.spec.memory.key_dim
    self.query, self.key, self.value = (dense(channels, ("embed", "heads"), **types) for _ in range(3))
    self.output = dense(self.width, ("heads", "embed"), **types)
    types = {"param_dtype": self.param_dtype, "precision": self.precision}
    self.theta = Strength(self.num_heads, self.gates.max_step, self.gates.step_bias or 0.0, **types)
    self.keep = LogShare(self.num_heads, -self.gates.forget_bias, **types) if self.gates.forget else None
    self.eta = LogShare(self.num_heads, self.gates.momentum_bias, **types) if self.gates.momentum else None

  def read(self, initial: ttm.InitialWeights, weights: ttm.Weights, a: jax.Array) -> jax.Array:
    """M(a) of a [B, C, D] in [B, C, D]; `weights` as differences from the initial ones."""
    q = l2_normalise(nn.silu(self._split(self.query(a))))
    out = ttm.read(self.spec, initial, weights, q, precision=self.precision)
    return self.output(out.reshape(*a.shape[:2], -1))

  def write(self, initial: ttm.InitialWeights, state: ttm.State, x: jax.Array, is_token: jax.Array) -> ttm.State:
    """The memory trained on x [B, C, D], which lies in its open chunk. `memzoo.zoo.inspect` intercepts this method."""
    options = {"implementation": self.implementation, "precision": self.precision}
    return ttm.write(self.spec, initial, *self.pairs(x), state, is_token, **options)

  def pairs(self, x: jax.Array) -> tuple[jax.Array, jax.Array, ttm.Gates]:
    """Keys, values and gates of x [B, C, D]."""
    k, v = l2_normalise(nn.silu(self._split(self.key(x)))), self._split(self.value(x))
    keep = None if self.keep is None else self.keep(x)
    eta = None if self.eta is None else math.log(MOST_MOMENTUM) + self.eta(x)
    return k, v, ttm.Gates(self.theta(x), keep, eta)

  def _split(self, x: jax.Array) -> jax.Array:
    """[B, C, H * d] to [B, C, H, d]."""
    return x.reshape(*x.shape[:2], self.num_heads, -1)


class HierarchicalMemory(ContextLayer, kw_only=True):
  """The hierarchical memory of Mela (Chen 2026, arXiv:2605.10537); the equations are inferred, see the module.

      z^L <- norm(z^L + M^L(x + z^L + z^H))    z^H <- norm(z^H + M^H(z^L + z^H))    m = a * z^H + (1 - a) * z^L

  M^L is trained on every token, M^H on what M^L retrieves. The output is gamma * (W RMSNorm(m)), and gamma starts at zero.
  With `features=("fast", "mixed", "slow")` it is that of z^L, and those of m and z^H are added before the next blocks
  (MemStack): the first block of a decoder should then begin with this layer, and the model starts as one without it.

  Attributes:
    num_heads: number of heads of both memories.
    head_dim: width of a head, d.
    width: width of x; `None` in a model, which sets its own.
    expansion: hidden units of a head over `head_dim`, f / d.
    chunk_size: C, the tokens that train M^L at the same weights. It changes results, not only speed.
    slow_ratio: r: M^H has chunks of r chunks of M^L.
    pairs: what M^H is trained on: "pooled", the mean of z^L over each chunk; "token", z^L of each token; "raw", x of each
      token, where M^H is also read with x + z^H.
    cycles, inner_cycles: how often M^H is read for a token, and M^L before each of these times.
    mix: m: "context", as above, "half", with a = 1/2, or z^L ("fast") or z^H ("slow") alone.
    features: what is fed to the block of this layer and to those above it, in order: "fast", "mixed" or "slow".
    gates: step size, decay and momentum of both memories; momentum is 0.9 of what the gate says. `max_step=None` is the
      bound in the module; `step_bias=None` starts at half of it.
    clip: largest norm of a token's gradient, by the output and by each matrix; `None` for no clipping.
    max_documents: largest number of documents in a row; rows with more return NaN, unless their chunks fit.
    implementation: of the operation: "auto", "xla" or "recurrent" (the oracle: slow, but with derivatives of every mode).
    precision: of the operation and the gates: `None`, or "highest" to multiply bfloat16 activations as float32.
  """

  num_heads: int
  head_dim: int
  width: int | None = None
  expansion: float = 2.0
  chunk_size: int = 32
  slow_ratio: int = 8
  pairs: str = "pooled"
  cycles: int = 1
  inner_cycles: int = 1
  mix: str = "context"
  features: tuple[str, ...] = ("mixed",)
  gates: Gating = Gating(forget_bias=-5.0, momentum_bias=2.0)
  clip: float | None = 10.0
  max_documents: int = 16
  implementation: str = "auto"
  precision: str | None = None

  @property
  def features_ahead(self) -> int:
    """See `ContextLayer`."""
    return max(0, len(self.features) - 1)

  def spec(self, level: str) -> ttm.Spec:
    """The arguments of the operation for the level "fast" or "slow"."""
    memory = ttm.Memory(self.head_dim, self.head_dim, expansion=self.expansion, activation="silu", residual=False)
    options = {"momentum": self.gates.momentum, "decay_to": self.gates.decay_to, "read": "chunk_start", "clip": self.clip}
    return ttm.Spec(memory, Loss(scale=0.5), chunk_size=self._chunk(level), **options)

  def _chunk(self, level: str) -> int:
    """The number of writes in a chunk."""
    if level == "fast":
      return self.chunk_size
    return self.slow_ratio if self.pairs == "pooled" else self.slow_ratio * self.chunk_size

  def initial_state(self, batch_size: int) -> HierarchicalState:
    """The state before the first token."""
    if self.width is None:
      raise ValueError("width=None; expected the width of x, which only a model sets by itself.")
    wide = accumulator(self.activation_dtype())
    fast, slow = (ttm.start(self.spec(level), batch_size, self.num_heads, wide) for level in ("fast", "slow"))
    return HierarchicalState(fast, slow, jnp.zeros((batch_size, self.width), wide))

  def matrices(self, state: HierarchicalState) -> dict[str, jax.Array]:
    """The differences of both memories' matrices from their initial values: "fast 0", "fast 1", "slow 0", "slow 1"."""
    levels = {"fast": state.fast, "slow": state.slow}
    return {f"{level} {name}": change for level, own in levels.items() for name, change in own.weights.items()}

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    for name, known in (("pairs", PAIRS), ("mix", MIXES)):
      if getattr(self, name) not in known:
        raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {list(known)}.")
    if not self.features or not set(self.features) <= set(FEATURES):
      raise ValueError(f"features={self.features!r}; expected one or more of {list(FEATURES)}.")
    _ = self.spec("fast"), self.spec("slow")  # which check their own

  @nn.compact
  def in_stack(
    self, x: jax.Array, state: HierarchicalState | None, segment_ids: jax.Array | None, context: Context
  ) -> tuple[jax.Array, HierarchicalState, Context]:
    """See `ContextLayer`."""
    fresh = state is None
    state = self.begin(x, state, segment_ids)
    if x.shape[-1] != self.width:
      raise ValueError(f"width={self.width}; expected the width of x, {x.shape[-1]}.")
    x = x.astype(self.activation_dtype(x))
    latents, state = self._levels(x, state, segment_ids, fresh)
    first, *others = (self._fed(i, latents[feature], segment_ids) for i, feature in enumerate(self.features))
    for ahead, feature in enumerate(others, start=1):
      context = context.add_features(ahead, feature)
    return first, state, context

  def _levels(
    self, x: jax.Array, state: HierarchicalState, segment_ids: jax.Array | None, fresh: bool
  ) -> tuple[dict[str, jax.Array], HierarchicalState]:
    """The latent states by feature, [B, T, D] each, and the next state: a scan over chunks of M^L."""
    layout = self.layout(x.shape[1], state.fast.count, segment_ids, fresh)
    initial = {level: self._initial_weights(level) for level in ("fast", "slow")}
    state, *_ = aligned((state, x, initial), (_STATE, P(ROWS), P(HEADS)))  # the first carry

    def step(module, state, chunk):
      x, is_token, _, begins, _ = chunk
      return module.chunk(initial, state, x, is_token, begins)

    state, latents = scan_segments(step, self, state, x, layout)
    return latents, state

  def _initial_weights(self, level: str) -> ttm.InitialWeights:
    """The weights of a memory at the start of a document."""
    weights, deviations = {}, (self.head_dim**-0.5, 0.02)
    for (name, shape), deviation in zip(self.spec(level).memory.shapes().items(), deviations, strict=True):
      init = named(nn.initializers.normal(deviation), "heads", None, None, decays=False)
      weights[name] = self.param(f"{level}_memory_{name}", init, (self.num_heads, *shape), self.param_dtype)
    return ttm.InitialWeights(weights)

  @nn.nowrap
  def layout(self, tokens: int, count: jax.Array, segment_ids: jax.Array | None, fresh: bool) -> Layout:
    """The layout of an input [B, tokens] in chunks of M^L, whose open chunk has `count` tokens."""
    return lay_out_segments(self.chunk_size, count, tokens, segment_ids, fresh, self.max_documents)

  def chunk(
    self,
    initial: dict[str, ttm.InitialWeights],
    state: HierarchicalState,
    x: jax.Array,
    is_token: jax.Array,
    fresh: jax.Array | None,
  ) -> tuple[HierarchicalState, dict[str, jax.Array]]:
    """One chunk of M^L, or the part of it in this call: x [B, C, D] to the next state and the latent states."""
    state = select_rows(fresh, jax.tree.map(jnp.zeros_like, state), state)
    fast, slow = (self._level(level) for level in ("fast", "slow"))
    episodes, gist = (initial["fast"], ttm.chunk_start(state.fast)), (initial["slow"], ttm.chunk_start(state.slow))
    z_fast = z_slow = jnp.zeros_like(x)
    for _ in range(self.cycles):
      for _ in range(self.inner_cycles):
        z_fast = _normalise(z_fast + fast.read(*episodes, x + z_fast + z_slow))
      z_slow = _normalise(z_slow + slow.read(*gist, (x if self.pairs == "raw" else z_fast) + z_slow))
    latents = {"fast": z_fast, "mixed": self._mixed(x, z_fast, z_slow), "slow": z_slow}

    after = fast.write(initial["fast"], state.fast, x, is_token)
    summary = state.summary + jnp.sum(z_fast, axis=1, where=is_token[..., None], dtype=state.summary.dtype)
    if self.pairs == "pooled":
      is_full = jnp.any(is_token, axis=1) & (after.count == 0)
      pairs, is_pair = _normalise(summary / self.chunk_size).astype(x.dtype)[:, None], is_full[:, None]
      summary = jnp.where(is_pair, 0, summary)
    else:
      pairs, is_pair, summary = x if self.pairs == "raw" else z_fast, is_token, state.summary
    return HierarchicalState(after, slow.write(initial["slow"], state.slow, pairs, is_pair), summary), latents

  def _level(self, name: str) -> Level:
    spec = self.spec(name)
    gates = self.gates
    if gates.max_step is None:
      gates = dataclasses.replace(gates, max_step=largest_step(spec))
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    options = {"precision": self.precision, "implementation": self.implementation}
    return Level(spec, self.num_heads, self.width, gates, **types, **options, name=name)

  def _mixed(self, x: jax.Array, z_fast: jax.Array, z_slow: jax.Array) -> jax.Array:
    """m [B, C, D]."""
    if self.mix in ("fast", "slow"):
      return z_fast if self.mix == "fast" else z_slow
    if self.mix == "half":
      return (z_fast + z_slow) / 2
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    logits = dense(self.width, (None, "embed"), name="mix", **types)(jnp.concatenate([x, z_fast, z_slow], axis=-1))
    share = nn.sigmoid(logits)
    return share * z_slow + (1 - share) * z_fast

  def _fed(self, index: int, z: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """gamma * (W RMSNorm(z)) of z [B, T, D], with zeros at padding."""
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = RMSNorm(param_dtype=self.param_dtype, name=f"feature_{index}_norm")(z)
    y = dense(self.width, ("embed", None), name=f"feature_{index}", **types)(y)
    gamma = self.param(f"feature_{index}_scale", named(nn.initializers.zeros, None), (self.width,), self.param_dtype)
    return silence_padding(y * beside(y, gamma), segment_ids)


def largest_step(spec: ttm.Spec) -> float:
  """0.8 d / (f C): the largest step at which C equal keys of length one do not overshoot; see the module."""
  return 0.8 * spec.memory.key_dim / (spec.memory.hidden * spec.chunk_size)


def _normalise(z: jax.Array) -> jax.Array:
  """z / sqrt(mean z^2) over the last axis, in the dtype of z; zeros stay zeros."""
  wide = z.astype(accumulator(z))
  return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(z.dtype)
