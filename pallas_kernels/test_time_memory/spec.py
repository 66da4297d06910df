"""What a memory that learns at test time is made of: five choices, kept apart.

    memory      f(W; x), a small network                            `Memory`
    loss        l(f(W; k), v), what a write makes smaller           `Loss`
    retention   from what is accumulated to the weights in use      `Retention`
    optimiser   momentum, decay, averaging                          `Spec`, by the gates it is given
    chunks      where gradients are taken, what a read sees         `Spec`
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..numerics import matmul

Weights = dict[str, jax.Array]
Linear = Callable[[str, jax.Array], jax.Array]

ACTIVATIONS = {"gelu": lambda x: jax.nn.gelu(x, approximate=True), "silu": jax.nn.silu}
_EPSILON = 1e-6
_SMALLEST = 0.3


class Gates(NamedTuple):
  """What each token says of its own write, float [B, T, H] each; `None` for what the optimiser does not have.

  Attributes:
    step: theta >= 0, the step size.
    log_keep: log a <= 0, the share of the weights that is kept; -inf forgets them all.
    log_momentum: log eta <= 0, the share of the momentum that is kept.
    threshold: delta > 0, from which on an error counts as an outlier; of the losses that ask for one.
  """

  step: jax.Array
  log_keep: jax.Array | None = None
  log_momentum: jax.Array | None = None
  threshold: jax.Array | None = None


class InitialWeights(NamedTuple):
  """What the outer loop learns, and every document begins with.

  Attributes:
    weights: W_0, by name [H, in, out]; of what is accumulated, where a retention says that this is not the weights.
    momentum: S_0, likewise; zeros unless given.
    norm: gain and bias of the memory's layer norm, [H, value_dim] each.
    average: lambda [H, chunk_size], a correction of the running average.
  """

  weights: Weights
  momentum: Weights | None = None
  norm: tuple[jax.Array, jax.Array] | None = None
  average: jax.Array | None = None


class Carry(NamedTuple):
  """What lies between tokens and chunks: the weights, and where the spec has them momentum and anchor; `None` where not."""

  weights: Weights
  momentum: Weights | None
  anchor: Weights | None


@dataclass(frozen=True)
class Memory:
  """A small network, f(W; x), for every head of every sequence its own.

      depth 1:  x W            depth 2:  act(x W_0) W_1            gated:  (silu(x W_gate) * x W_up) W_down

  then a layer norm, if `norm`, then + x, if `residual`. With `biases` every matrix has a last row that meets a one.

  Attributes:
    key_dim, value_dim: width of what goes in, and comes out.
    depth: matrices; of a gated memory always three.
    expansion: width in between over `key_dim`.
    activation: "gelu" (by tanh) or "silu".
    gated, norm, residual, biases: as above.
    norm_epsilon: what the layer norm adds to the variance. The inner gradient is up to its inverse root times as large.
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
      raise ValueError(f"key_dim={self.key_dim}, value_dim={self.value_dim}; want heads at least 1 wide.")
    if self.depth < 1:
      raise ValueError(f"depth={self.depth}; want at least one matrix.")
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation={self.activation!r}; want one of {list(ACTIVATIONS)}.")
    if self.residual and self.key_dim != self.value_dim:
      raise ValueError(f"value_dim={self.value_dim} differs from key_dim={self.key_dim}; want them equal, or residual=False.")
    if self.hidden < 1 and (self.depth > 1 or self.gated):
      raise ValueError(f"expansion={self.expansion} of a width of {self.key_dim} leaves no hidden units; want a larger one.")

  @property
  def hidden(self) -> int:
    return int(self.key_dim * self.expansion)

  @property
  def is_linear(self) -> bool:
    """Its output is linear in its weights."""
    return self.depth == 1 and not self.gated and not self.norm

  def shapes(self) -> dict[str, tuple[int, int]]:
    """Of the matrices of one head, (in, out), by name."""
    if self.gated:
      wide = self.key_dim, self.hidden
      shapes = {"gate": wide, "up": wide, "down": (self.hidden, self.value_dim)}
    else:
      widths = [self.key_dim, *[self.hidden] * (self.depth - 1), self.value_dim]
      shapes = {str(i): (widths[i], widths[i + 1]) for i in range(self.depth)}
    return {name: (rows + self.biases, columns) for name, (rows, columns) in shapes.items()}

  def apply(self, linear: Linear, norm: tuple[jax.Array, jax.Array] | None, x: jax.Array) -> jax.Array:
    """f of x [..., key_dim]; `linear(name, x)` is the product with a matrix, whatever that means to the caller."""
    if self.gated:
      h = self._linear(linear, "down", jax.nn.silu(self._linear(linear, "gate", x)) * self._linear(linear, "up", x))
    else:
      h = self._linear(linear, "0", x)
      for i in range(1, self.depth):
        h = self._linear(linear, str(i), ACTIVATIONS[self.activation](h))
    if self.norm:
      gain, bias = (jnp.expand_dims(a, range(h.ndim - 1)) for a in norm)
      h = h - h.mean(axis=-1, keepdims=True)
      h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.norm_epsilon) * gain + bias
    return x + h if self.residual else h

  def _linear(self, linear: Linear, name: str, x: jax.Array) -> jax.Array:
    return linear(name, jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1) if self.biases else x)


@dataclass(frozen=True)
class Loss:
  """What a write makes smaller, of the error e = f(W; k) - v. The inner gradient knows it only through d loss / d f.

      squared       c |e|^2                       dot          -c <f, v>              power   c sum (e^2 + 1e-6)^{p/2}
      huber         coordinate by coordinate: c e^2 up to |e| = delta, then straight on
      huber_norm    c |e|^2 up to |e| = delta, then straight on along e
      mixture       c |e|^2 up to |e| = delta, then 2c delta sum |e|, whose slope is the sign (Yaad, as printed)

  Attributes:
    kind: one of these.
    scale: c. The paper of Titans has |e|^2, c = 1, and an appendix with one half.
    power: p.
  """

  kind: str = "squared"
  scale: float = 1.0
  power: float = 3.0

  def __post_init__(self):
    if self.kind not in _LOSSES:
      raise ValueError(f"loss={self.kind!r}; want one of {list(_LOSSES)}.")
    if self.scale <= 0:
      raise ValueError(f"the loss's scale={self.scale}; want a positive one.")
    if self.power < 1:
      raise ValueError(f"the loss's power={self.power}; want at least 1.")

  @property
  def has_threshold(self) -> bool:
    return self.kind in ("huber", "huber_norm", "mixture")

  def __call__(self, out: jax.Array, v: jax.Array, threshold: jax.Array | None) -> jax.Array:
    """Of each token: out, v [..., value_dim] and threshold [...] to [...]."""
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
  """From what is accumulated, A, to the weights in use, W, of each matrix on its own (Miras, arXiv:2504.13173).

      none      W = A
      norm      W = A / |A|_q^{q-2}, the entrywise q-norm of the whole matrix (Moneta, as printed)
      simplex   W = c softmax(A) over the inputs of each output, c = sqrt(inputs) (Memora)

  Attributes:
    kind: one of these.
    norm: q, of "norm".
  """

  kind: str = "none"
  norm: float = 4.0

  def __post_init__(self):
    if self.kind not in ("none", "norm", "simplex"):
      raise ValueError(f"retention={self.kind!r}; want 'none', 'norm' or 'simplex'.")
    if self.kind == "norm" and not self.norm >= 2:
      raise ValueError(f"the retention's norm={self.norm}; want q of at least 2.")

  def scale(self, a: jax.Array) -> jax.Array:
    """|A|_q^{q-2}, what A [..., in, out] is divided by: [..., 1, 1].

    Where it would make W burst, of an |A|_q below that of a matrix with all entries alike and a Frobenius norm of 0.3, it
    is of that one.
    """
    smallest = _SMALLEST * (a.shape[-2] * a.shape[-1]) ** (1 / self.norm - 1 / 2)
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    size = jax.lax.stop_gradient(jnp.maximum(largest, smallest))  # so that no power of an entry is out of range
    power = jnp.sum(jnp.square(a / size) ** (self.norm / 2), axis=(-2, -1), keepdims=True)
    norm = size * jnp.where(power > 0, power, 1) ** (1 / self.norm)
    return jnp.maximum(norm, smallest) ** (self.norm - 2)

  def view(self, a: jax.Array) -> jax.Array:
    """W of A [..., in, out]."""
    if self.kind == "norm":
      return a / self.scale(a)
    if self.kind == "simplex":
      return math.sqrt(a.shape[-2]) * jax.nn.softmax(a, axis=-2)
    return a

  def start(self, w: jax.Array) -> jax.Array:
    """A whose view is W [..., in, out], or has W's direction where every view has one norm (q = 3); of "simplex", W.

    For q between 3 and 4 that A may be smaller than what `scale` lets divide, and its view shorter than W.
    """
    if self.kind != "norm" or self.norm == 3:
      return w
    return w * self.scale(w) ** (-1 / (self.norm - 3))


@dataclass(frozen=True)
class Spec:
  """A memory that learns at test time.

      S_t = eta_t S_{t-1} - theta_t grad l(W_anchor; k_t, v_t)        W_t = a_t W_{t-1} + S_t        y_t = f(W_read; q_t)

  With `average` the weights are a rescaled average of the chunk's steps instead (TTT), and decay and momentum mean nothing:

      S_t = S_{t-1} - theta_t grad l(W_anchor; k_t, v_t)        W_t = W_anchor + max(0, 1/i + lambda_i) S_t        i = 1..C

  Attributes:
    memory, loss, retention: see there.
    chunk_size: C. Gradients of a chunk's tokens are taken at the weights that it began with; chunks count a document's own
      tokens from its first.
    momentum: the optimiser has S; without it S_t is the step alone.
    average: as above.
    anchor: "chunk" as above; "token": gradients at W_{t-1}. Linear memories alone have that in parallel form, and
      `chunk_size` then means speed only.
    order: of the token anchor: "gradient_first" as printed above, or "decay_first", gradients at a_t W_{t-1}, as in the
      gated delta rule. Chunk anchors know no difference.
    read: "after" the token's own write, "before" it, or "chunk_start".
    clip: of the norm of a token's gradient, by the memory's output and then by each matrix; `None` for none. It keeps weights
      finite whatever is read. Off, a memory whose steps are too long diverges: of C equal unit keys, at theta > 1 / (c C) for
      a linear one. The outer gradient is a product of what every chunk does to the weights, which no clip bounds: far beyond
      such steps it overflows.
  """

  memory: Memory
  loss: Loss = Loss()
  retention: Retention = Retention()
  chunk_size: int = 16
  momentum: bool = False
  average: bool = False
  anchor: str = "chunk"
  order: str = "gradient_first"
  read: str = "after"
  clip: float | None = None

  def __post_init__(self):
    for name, kind in (("memory", Memory), ("loss", Loss), ("retention", Retention)):
      if not isinstance(getattr(self, name), kind):
        raise ValueError(f"{name}={getattr(self, name)!r}; want a {kind.__name__}.")
    if self.chunk_size < 1:
      raise ValueError(f"chunk_size={self.chunk_size}; want at least one token.")
    for name, known in (
      ("anchor", ("chunk", "token")),
      ("order", ("gradient_first", "decay_first")),
      ("read", ("after", "before", "chunk_start")),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"{name}={getattr(self, name)!r}; want one of {list(known)}.")
    if self.exact and not (
      self.memory.is_linear and self.loss.kind == "squared" and self.retention.kind == "none" and not self.average
    ):
      raise ValueError("anchor='token' is of linear memories with the squared loss alone; want anchor='chunk', chunk_size=1.")
    if self.exact and self.clip is not None:
      raise ValueError(f"clip={self.clip} with anchor='token'; want anchor='chunk', or no clip.")
    if self.order == "decay_first" and not self.exact:
      raise ValueError("order='decay_first' is of anchor='token'; with chunk anchors both orders are one.")
    if self.exact and self.read == "chunk_start":
      raise ValueError("read='chunk_start' with anchor='token', which knows no chunks; want 'after' or 'before'.")
    if self.average and self.momentum:
      raise ValueError("average and momentum exclude each other; want one of them.")
    if self.retention.kind == "simplex" and self.read != "chunk_start":
      raise ValueError(f"read={self.read!r} with retention='simplex', which is not linear in its writes; want 'chunk_start'.")
    if self.clip is not None and self.clip <= 0:
      raise ValueError(f"clip={self.clip}; want a positive norm, or None.")

  @property
  def exact(self) -> bool:
    """Gradients at W_{t-1}."""
    return self.anchor == "token"

  @property
  def accumulates(self) -> bool:
    """There is an S to carry."""
    return self.momentum or self.average

  @property
  def keeps_anchor(self) -> bool:
    """Within a chunk, the anchor is something else than the weights that are carried."""
    return not self.exact and not self.average and self.chunk_size > 1

  def carry(self, weights: Weights, momentum: Weights | None) -> Carry:
    """What a document carries that begins with these."""
    return Carry(weights, momentum if self.accumulates else None, weights if self.keeps_anchor else None)

  def view(self, weights: Weights) -> Weights:
    """The weights in use."""
    return {name: self.retention.view(a) for name, a in weights.items()}


def forward(spec: Spec, weights: Weights, norm: Any, x: jax.Array) -> jax.Array:
  """f(W; x) of one head: x [..., key_dim], `weights` those in use."""
  return spec.memory.apply(lambda name, x: matmul(x, weights[name]), norm, x)


def running_average(learned_average: jax.Array, position: jax.Array) -> jax.Array:
  """max(0, 1/i + lambda_i) at the token of `position` i - 1 of its chunk; `learned_average` [C]. 0 at position -1."""
  at = jnp.maximum(position, 0)
  share = jnp.maximum(0, 1 / (at + 1).astype(learned_average.dtype) + learned_average[at])
  return jnp.where(position >= 0, share, 0)


def length(x: jax.Array) -> jax.Array:
  """Euclidean norm over the last axis. No square of a large number is taken, and the gradient at 0 is 0."""
  scale = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1))
  squared = jnp.sum(jnp.square(x / scale), axis=-1)
  return jnp.where(squared > 0, scale[..., 0] * jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def shortened(x: jax.Array, by: jax.Array, limit: float) -> jax.Array:
  """x [..., n], scaled so that the length `by` [...], in proportion to x, becomes no more than `limit`."""
  return x * (limit / jnp.maximum(by, limit))[..., None]
