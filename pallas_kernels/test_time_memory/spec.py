"""The five independent choices that define a memory that learns at test time.

    memory      f(W; x), a small network                            `Memory`
    loss        l(f(W; k), v), which a write reduces                `Loss`
    retention   from accumulated weights to the weights in use      `Retention`
    optimiser   momentum, decay, averaging                          `Spec`, and which gates are given
    chunks      where gradients are taken, what a read sees         `Spec`
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ..numerics import FULL, Precision, matmul

Weights = dict[str, jax.Array]
Linear = Callable[[str, jax.Array], jax.Array]

ACTIVATIONS = {"gelu": lambda x: jax.nn.gelu(x, approximate=True), "silu": jax.nn.silu}
_EPSILON = 1e-6
_SMALLEST = 0.3


class Gates(NamedTuple):
  """The gates of each token, float [B, T, H] each; `None` for those that the optimiser or the loss does not have.

  Attributes:
    step: theta >= 0, the step size.
    log_keep: log a <= 0; a is the share of the weights that is kept, and -inf forgets them all.
    log_momentum: log eta <= 0; eta is the share of the momentum that is kept.
    threshold: delta > 0; larger errors are outliers. Only for losses with a threshold.
  """

  step: jax.Array
  log_keep: jax.Array | None = None
  log_momentum: jax.Array | None = None
  threshold: jax.Array | None = None


class InitialWeights(NamedTuple):
  """The parameters that the outer loop learns: the start of every document.

  Attributes:
    weights: W_0, by name, [H, in, out] each; with a retention, the accumulated A_0.
    momentum: S_0, likewise; zeros if `None`.
    norm: gain and bias of the memory's layer norm, [H, value_dim] each.
    average: lambda [H, chunk_size], the learned correction of the running average.
  """

  weights: Weights
  momentum: Weights | None = None
  norm: tuple[jax.Array, jax.Array] | None = None
  average: jax.Array | None = None


class Carry(NamedTuple):
  """The carry between tokens or chunks: weights, momentum and anchor; `None` for those that the spec does not have."""

  weights: Weights
  momentum: Weights | None
  anchor: Weights | None


@dataclass(frozen=True)
class Memory:
  """A small network f(W; x). Every head of every sequence has its own weights.

      depth 1:  x W            depth 2:  act(x W_0) W_1            gated:  (silu(x W_gate) * x W_up) W_down

  then a layer norm, if `norm`, then + x, if `residual`. With `biases` the last row of every matrix is a bias.

  Attributes:
    key_dim, value_dim: widths of input and output.
    depth: number of matrices; a gated memory always has three.
    expansion: hidden width over `key_dim`.
    activation: "gelu" (tanh approximation) or "silu".
    gated, norm, residual, biases: as above.
    norm_epsilon: added to the variance in the layer norm, which magnifies inner gradients by up to its inverse root.
  """

  key_dim: int
  value_dim: int
  depth: int = 2
  expansion: float = 4
  activation: str = "gelu"
  gated: bool = False
  norm: bool = False
  residual: bool = True
  biases: bool = False
  norm_epsilon: float = 1e-6

  def __post_init__(self):
    if self.key_dim < 1 or self.value_dim < 1:
      raise ValueError(f"key_dim={self.key_dim}, value_dim={self.value_dim}; expected at least 1 each.")
    if self.depth < 1:
      raise ValueError(f"depth={self.depth}; expected at least one matrix.")
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation={self.activation!r}; expected one of {list(ACTIVATIONS)}.")
    if self.residual and self.key_dim != self.value_dim:
      raise ValueError(f"value_dim={self.value_dim} differs from key_dim={self.key_dim}; expected the same, or residual=False.")
    if self.hidden < 1 and (self.depth > 1 or self.gated):
      raise ValueError(f"expansion={self.expansion} of a width of {self.key_dim} has no hidden units; expected a larger one.")

  @property
  def hidden(self) -> int:
    return int(self.key_dim * self.expansion)

  @property
  def is_linear(self) -> bool:
    """Whether the output is linear in the weights."""
    return self.depth == 1 and not self.gated and not self.norm

  def shapes(self) -> dict[str, tuple[int, int]]:
    """The shapes (in, out) of one head's matrices, by name."""
    if self.gated:
      wide = self.key_dim, self.hidden
      shapes = {"gate": wide, "up": wide, "down": (self.hidden, self.value_dim)}
    else:
      widths = [self.key_dim, *[self.hidden] * (self.depth - 1), self.value_dim]
      shapes = {str(i): (widths[i], widths[i + 1]) for i in range(self.depth)}
    return {name: (rows + self.biases, columns) for name, (rows, columns) in shapes.items()}

  def apply(self, linear: Linear, norm: tuple[jax.Array, jax.Array] | None, x: jax.Array) -> jax.Array:
    """f(x) of x [..., key_dim]. `linear(name, x)` is x times a matrix, plus its bias, which the caller defines."""
    if self.gated:
      h = linear("down", jax.nn.silu(linear("gate", x)) * linear("up", x))
    else:
      h = linear("0", x)
      for i in range(1, self.depth):
        h = linear(str(i), ACTIVATIONS[self.activation](h))
    if self.norm:
      gain, bias = (jnp.expand_dims(a, range(h.ndim - 1)) for a in norm)
      h = h - h.mean(axis=-1, keepdims=True)
      h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.norm_epsilon) * gain + bias
    return x + h if self.residual else h

  def multiply(self, x: jax.Array, w: jax.Array, precision: Precision = FULL) -> jax.Array:
    """x W of x [..., in], plus the bias in the last row of W [in + 1, out] if there are biases."""
    if not self.biases:
      return matmul(x, w, precision)
    return matmul(x, w[:-1], precision) + jnp.expand_dims(w[-1], range(x.ndim - 1))


@dataclass(frozen=True)
class Loss:
  """The loss l that a write reduces, a function of the error e = f(W; k) - v.

      squared       c |e|^2                       dot          -c <f, v>              power   c sum (e^2 + 1e-6)^{p/2}
      huber         in each coordinate: c e^2 up to |e| = delta, linear beyond
      huber_norm    c |e|^2 up to |e| = delta, linear in |e| beyond
      mixture       c |e|^2 up to |e| = delta, 2c delta sum |e| beyond, whose gradient is a sign (Yaad, as printed)

  Attributes:
    kind: one of these.
    scale: c. Titans has c = 1, and one half in an appendix.
    power: p, for "power".
  """

  kind: Literal["squared", "dot", "power", "huber", "huber_norm", "mixture"] = "squared"
  scale: float = 1.0
  power: float = 3.0

  def __post_init__(self):
    if self.kind not in _LOSSES:
      raise ValueError(f"Loss.kind={self.kind!r}; expected one of {list(_LOSSES)}.")
    if not 0 < self.scale < math.inf:
      raise ValueError(f"Loss.scale={self.scale}; expected a positive number.")
    if not 1 <= self.power < math.inf:
      raise ValueError(f"Loss.power={self.power}; expected at least 1.")

  @property
  def has_threshold(self) -> bool:
    return self.kind in ("huber", "huber_norm", "mixture")

  def __call__(self, out: jax.Array, v: jax.Array, threshold: jax.Array | None) -> jax.Array:
    """The loss of each token: out, v [..., value_dim] and threshold [...] to [...]."""
    return self.scale * _LOSSES[self.kind](out, v, threshold, self.power)


def _squared(out, v, threshold, power):
  return jnp.sum(jnp.square(out - v), axis=-1)


def _dot(out, v, threshold, power):
  return -jnp.sum(out * v, axis=-1)


def _power(out, v, threshold, power):
  return jnp.sum((jnp.square(out - v) + _EPSILON) ** (power / 2), axis=-1)


def _huber(out, v, threshold, power):
  size, limit = jnp.abs(out - v), threshold[..., None]
  return jnp.sum(jnp.where(size <= limit, size * size, limit * (2 * size - limit)), axis=-1)


def _huber_norm(out, v, threshold, power):
  squared = jnp.sum(jnp.square(out - v), axis=-1)
  size = jnp.sqrt(squared + _EPSILON)
  return jnp.where(size <= threshold, squared, threshold * (2 * size - threshold))


def _mixture(out, v, threshold, power):
  squared = jnp.square(out - v)
  signs = 2 * threshold * jnp.sum(jnp.sqrt(squared + _EPSILON), axis=-1)
  squared = jnp.sum(squared, axis=-1)
  return jnp.where(squared <= threshold * threshold, squared, signs)


_LOSSES = {
  "squared": _squared,
  "dot": _dot,
  "power": _power,
  "huber": _huber,
  "huber_norm": _huber_norm,
  "mixture": _mixture,
}


@dataclass(frozen=True)
class Retention:
  """From an accumulated matrix A to the matrix in use W (Miras, arXiv:2504.13173).

      none      W = A
      norm      W = A / |A|_q^{q-2}, with the entrywise q-norm of the matrix (Moneta, as printed)
      simplex   W = c softmax(A) over the inputs of each output, c = sqrt(inputs) (Memora)

  Attributes:
    kind: one of these.
    norm: q, for "norm".
  """

  kind: Literal["none", "norm", "simplex"] = "none"
  norm: float = 4.0

  def __post_init__(self):
    if self.kind not in ("none", "norm", "simplex"):
      raise ValueError(f"Retention.kind={self.kind!r}; expected 'none', 'norm' or 'simplex'.")
    if not 2 <= self.norm < math.inf:
      raise ValueError(f"Retention.norm={self.norm}; expected at least 2.")

  def scale(self, a: jax.Array) -> jax.Array:
    """The divisor |A|_q^{q-2} of A [..., in, out]: [..., 1, 1].

    |A|_q is bounded from below, so that W stays finite, by the q-norm of a matrix with equal entries and Frobenius norm 0.3.
    """
    smallest = _SMALLEST * (a.shape[-2] * a.shape[-1]) ** (1 / self.norm - 1 / 2)
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    size = jax.lax.stop_gradient(jnp.maximum(largest, smallest))  # keeps the powers of entries in range
    power = jnp.sum(jnp.square(a / size) ** (self.norm / 2), axis=(-2, -1), keepdims=True)
    norm = size * jnp.where(power > 0, power, 1) ** (1 / self.norm)
    return jnp.maximum(norm, smallest) ** (self.norm - 2)

  def view(self, a: jax.Array) -> jax.Array:
    """From A [..., in, out] to W."""
    if self.kind == "norm":
      return a / self.scale(a)
    if self.kind == "simplex":
      return math.sqrt(a.shape[-2]) * jax.nn.softmax(a, axis=-2)
    return a

  def start(self, w: jax.Array) -> jax.Array:
    """The A whose view is W [..., in, out]. For q = 3, where all views have the same norm, and for "simplex": W itself.

    For q between 3 and 4, |A|_q may lie below the bound in `scale`; the view is then shorter than W.
    """
    if self.kind != "norm" or self.norm == 3:
      return w
    return w * self.scale(w) ** (-1 / (self.norm - 3))


@dataclass(frozen=True)
class Spec:
  """A memory that learns at test time.

      S_t = eta_t S_{t-1} - theta_t grad l(W_anchor; k_t, v_t)        W_t = W_o + a_t (W_{t-1} - W_o) + S_t
      y_t = f(W_read; q_t)

  The weights decay towards W_o: the weights that the document began with, or zero. With `average` they are a rescaled average
  of the chunk's steps (TTT), without decay and momentum:

      S_t = S_{t-1} - theta_t grad l(W_anchor; k_t, v_t)        W_t = W_anchor + max(0, 1/i + lambda_i) S_t        i = 1..C

  Attributes:
    memory, loss, retention: see the classes.
    chunk_size: C. Gradients of a chunk's tokens are taken at the weights that the chunk began with. Chunks are counted from
      the first token of each document.
    momentum: whether there is an S; without it S_t is the step alone.
    decay_to: "start", or "zero", as Titans prints it. A network of two or more matrices that has decayed to zero has no
      gradients: it stays zero, and learns nothing more. Without decay both are the same.
    average: as above.
    anchor: "chunk", as above, or "token": gradients at W_{t-1}. The token anchor exists only for linear memories, and
      `chunk_size` then affects speed only.
    order: for the token anchor: "gradient_first", as printed above, or "decay_first": gradients at the decayed weights, as in
      the gated delta rule. With chunk anchors both are the same.
    read: "after" the token's own write, "before" it, or at the "chunk_start".
    clip: largest norm of a token's gradient, by the memory's output and then by each matrix; `None` for no clipping. With it
      weights stay finite for any input. Without it a memory diverges when steps are too long: for C equal unit keys and a
      linear memory at theta > 1 / (c C). Outer gradients are products over chunks and are not bounded by the clip; they
      overflow at steps far longer than that.
  """

  memory: Memory
  loss: Loss = Loss()
  retention: Retention = Retention()
  chunk_size: int = 16
  momentum: bool = False
  decay_to: str = "start"
  average: bool = False
  anchor: str = "chunk"
  order: str = "gradient_first"
  read: str = "after"
  clip: float | None = None

  def __post_init__(self):
    for name, kind in (("memory", Memory), ("loss", Loss), ("retention", Retention)):
      if not isinstance(getattr(self, name), kind):
        raise ValueError(f"{name}={getattr(self, name)!r}; expected a {kind.__name__}.")
    if self.chunk_size < 1:
      raise ValueError(f"chunk_size={self.chunk_size}; expected at least one token.")
    for name, known in (
      ("decay_to", ("start", "zero")),
      ("anchor", ("chunk", "token")),
      ("order", ("gradient_first", "decay_first")),
      ("read", ("after", "before", "chunk_start")),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {list(known)}.")
    if self.exact and not (
      self.memory.is_linear and self.loss.kind == "squared" and self.retention.kind == "none" and not self.average
    ):
      raise ValueError("anchor='token' is for linear memories with the squared loss; expected anchor='chunk', chunk_size=1.")
    if self.exact and self.clip is not None:
      raise ValueError(f"clip={self.clip} with anchor='token'; expected clip=None, or anchor='chunk'.")
    if self.order == "decay_first" and not self.exact:
      raise ValueError("order='decay_first' is for anchor='token'; with chunk anchors expected order='gradient_first'.")
    if self.exact and self.read == "chunk_start":
      raise ValueError("read='chunk_start' with anchor='token', which has no chunks; expected 'after' or 'before'.")
    if self.average and self.momentum:
      raise ValueError("average=True with momentum=True; expected one of them.")
    if self.retention.kind == "simplex" and self.read != "chunk_start":
      raise ValueError(f"read={self.read!r} with retention 'simplex', which is not linear; expected 'chunk_start'.")
    if self.clip is not None and self.clip <= 0:
      raise ValueError(f"clip={self.clip}; expected a positive norm, or None.")

  @property
  def exact(self) -> bool:
    """Whether gradients are taken at W_{t-1}."""
    return self.anchor == "token"

  @property
  def accumulates(self) -> bool:
    """Whether an S is carried."""
    return self.momentum or self.average

  @property
  def keeps_anchor(self) -> bool:
    """Whether the anchor is carried besides the weights."""
    return not self.exact and not self.average and self.chunk_size > 1

  def carry(self, weights: Weights, momentum: Weights | None) -> Carry:
    """The carry at the start of a document with these initial values; `None` for a momentum of zeros."""
    if self.accumulates and momentum is None:
      momentum = jax.tree.map(jnp.zeros_like, weights)
    return Carry(weights, momentum if self.accumulates else None, weights if self.keeps_anchor else None)

  def view(self, weights: Weights) -> Weights:
    """The weights in use."""
    return {name: self.retention.view(a) for name, a in weights.items()}


def forward(spec: Spec, weights: Weights, norm: Any, x: jax.Array, precision: Precision = FULL) -> jax.Array:
  """f(W; x) of one head: x [..., key_dim], W the weights in use."""
  return spec.memory.apply(lambda name, x: spec.memory.multiply(x, weights[name], precision), norm, x)


def running_average(learned_average: jax.Array, position: jax.Array) -> jax.Array:
  """max(0, 1/i + lambda_i) for `position` i - 1 in the chunk, 0 for position -1; `learned_average` is lambda [C]."""
  at = jnp.maximum(position, 0)
  share = jnp.maximum(0, 1 / (at + 1).astype(learned_average.dtype) + learned_average[at])
  return jnp.where(position >= 0, share, 0)


def length(x: jax.Array) -> jax.Array:
  """Euclidean norm over the last axis, without overflow for large entries and with gradient 0 at 0."""
  scale = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1))
  squared = jnp.sum(jnp.square(x / scale), axis=-1)
  return jnp.where(squared > 0, scale[..., 0] * jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def shortened(x: jax.Array, by: jax.Array, limit: float) -> jax.Array:
  """x [..., n] scaled by min(1, limit / by), `by` [...] being a length that is proportional to x."""
  return x * (limit / jnp.maximum(by, limit))[..., None]
