"""Local linear attention: each query fits a linear model to the keys and values so far, weighted by softmax, and reads it.

    y_i = b    of    min over b, W    sum_j p_ij |v_j - b - W (k_j - q_i)|^2 + ridge_i |W|^2,    p_i = softmax(scale q_i . k)

It lies between softmax attention (no slope; ridge to infinity) and a global linear model (equal weights; scale = 0). Source:
Zuo et al. 2025, arXiv:2510.01450. In centred form, with the mean m_i = sum_j p_ij k_j,

    A_i = sum_j p_ij (k_j - m_i)(k_j - m_i)^T + ridge_i I
    x_i = A_i^{-1} (q_i - m_i)        y_i = sum_j p_ij (1 + (k_j - m_i) . x_i) v_j

which is the same function without a denominator that could vanish.

The paper leaves open -> we do:

- the ridge: lambda in the paper, lambda times the sum of weights in its code -> the second, so it does not depend on the length
- the gradient: the published kernels leave out how that sum depends on queries and keys -> the exact one, the ridge's included
- small denominators: raised to a floor -> none, because there is none in the centred form
"""

from dataclasses import replace
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp

from ..dispatch import Choice, Objections, choose, choose_kernels, explain
from ..documents import check_segment_ids, documents, positions, undivided
from ..numerics import accumulator, intermediate_precision
from .blockwise import by_blocks, distances, objection
from .dense import dense
from .spec import Allowed, Spec

__all__ = [
  "Allowed",
  "Options",
  "causal",
  "explain",
  "explain_solver",
  "local_linear_attention",
  "parallax_attention",
  "squared_distance",
]

_DIRECT = 32  # channels of a diagonal block up to which a direct solve takes less work than 16 iterations


class Options(TypedDict, total=False):
  """Keyword arguments of the functions that fit a linear model.

  Keys:
    segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding, which is not attended to and yields zeros.
    allowed: documents and positions of queries and keys, for keys from a cache; replaces `segment_ids`.
    window: number of last positions that a query sees, its own included; `None` for all.
    scale: factor of q . k; d^{-1/2} by default.
    blocks: the covariance of the keys is cut to this many diagonal blocks; a divisor of d; 1 by default.
    solver: "direct" (Cholesky), "cg" (conjugate gradients), or "auto" (default); see `explain_solver`.
    iterations, tolerance: of the conjugate gradients, 16 and 1e-5 by default; a query stops when its residual is `tolerance`
      times the first one. The gradient solves a second system in the same way.
    precision: `None`, or "highest" for full products whatever the operands are; see `numerics`.
  """

  segment_ids: jax.Array | None
  allowed: Allowed | None
  window: int | None
  scale: float | None
  blocks: int
  solver: str
  iterations: int
  tolerance: float
  precision: str | None


def local_linear_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, ridge: jax.Array, *, implementation: str = "auto", **options: Unpack[Options]
) -> jax.Array:
  """Local linear attention of each query to the keys at and before it, in its document.

  Args:
    q: [B, T, H, d].
    k: [B, S, Hk, d]; Hk divides H, and H / Hk neighbouring query heads share a key head. S = T without `allowed`.
    v: [B, S, Hk, V].
    ridge: positive, [H] or [B, T, H]; in units of the squared length of keys. Sums are float32 (float64 if q, k or v is).
    implementation: "auto", "pallas" (kernels for TPUs), "xla" (in blocks) or "dense" (the reference, memory O(T^2 d)).
      `explain` says what "auto" chooses.
    **options: see `Options`.

  Returns:
    y [B, T, H, V] in v's dtype. A query that sees no key gives zeros.

  Raises:
    ValueError: for shapes that do not fit together and for unknown options.
  """
  return _run("local_linear_attention", implementation, *_prepared(q, k, v, ridge, **options))


def squared_distance(q: jax.Array, k: jax.Array, ridge: jax.Array, **options: Unpack[Options]) -> jax.Array:
  """How far each query lies from the keys that it attends to: (q_i - m_i)^T A_i^{-1} (q_i - m_i), [B, T, H], at least 0.

  It is a squared Mahalanobis distance, in units of the keys' own spread. Its root bounds how far the result is from that of
  softmax attention, in standard deviations of the values that are attended to, for each channel. It is large at the edge of the
  keys, where a local mean is biased.

  Arguments and errors are those of `local_linear_attention`, but for `implementation`. It has no gradient of its own.
  """
  return distances(*_prepared(q, k, k, ridge, **options))


def _prepared(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ridge: jax.Array,
  segment_ids: jax.Array | None = None,
  allowed: Allowed | None = None,
  *,
  window: int | None = None,
  scale: float | None = None,
  blocks: int = 1,
  solver: str = "auto",
  iterations: int = 16,
  tolerance: float = 1e-5,
  precision: str | None = None,
) -> tuple[Any, ...]:
  """The checked arguments of an implementation."""
  _check(q, k, v, blocks, window)
  own, allowed = allowed is None, _allowed(q, k, segment_ids, allowed)
  if iterations < 0 or not 0 <= tolerance < 1:
    raise ValueError(f"iterations={iterations} and tolerance={tolerance}; expected at least 0, and a share below 1.")
  if ridge.shape not in (q.shape[2:3], q.shape[:3]):
    raise ValueError(f"ridge has shape {list(ridge.shape)}; expected [{q.shape[2]}], one a head, or {list(q.shape[:3])}.")
  ridge = ridge.astype(accumulator(q, k, v)).reshape((1,) * (3 - ridge.ndim) + ridge.shape)
  ridge = jnp.broadcast_to(ridge, q.shape[:3])[..., None]
  intermediate_precision(precision, q, k, v)
  chosen = explain_solver(q.shape[-1], blocks=blocks, solver=solver).implementation
  spec = Spec(
    scale=q.shape[-1] ** -0.5 if scale is None else scale,
    window=window,
    blocks=blocks,
    iterations=None if chosen == "direct" else iterations,
    tolerance=tolerance,
    precision=precision,
    causal=own,
    packed=segment_ids is not None,
  )
  return spec, q, k, v, ridge, allowed


def parallax_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  r: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  allowed: Allowed | None = None,
  window: int | None = None,
  scale: float | None = None,
  implementation: str = "auto",
  precision: str | None = None,
) -> jax.Array:
  """Local linear attention with x = -r given (Zuo et al. 2026, arXiv:2605.29157), y_i = sum_j p_ij (1 - (k_j - m_i) . r_i) v_j.

  Args:
    r: [B, T, H, d], in any unit of inverse keys; it is not scaled. With zeros the result is softmax attention.

  The other arguments are those of `local_linear_attention` and of its options; so are the result and the errors.
  """
  _check(q, k, v, 1, window)
  own, allowed = allowed is None, _allowed(q, k, segment_ids, allowed)
  if r.shape != q.shape:
    raise ValueError(f"r has shape {list(r.shape)}; expected {list(q.shape)}, like q.")
  intermediate_precision(precision, q, k, v)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  spec = Spec(scale, window, given=True, precision=precision, causal=own, packed=segment_ids is not None)
  return _run("parallax_attention", implementation, spec, q, k, v, -r.astype(accumulator(q, k, v)), allowed)


def causal(batch: int, tokens: int, segment_ids: jax.Array | None = None) -> Allowed:
  """The keys that queries see if both are the same tokens."""
  docs = undivided(batch, tokens) if segment_ids is None else documents(segment_ids)
  position = positions(docs, jnp.zeros((batch,), jnp.int32))
  document = jnp.where(docs.is_token, docs.index, -1)
  return Allowed(document, position, document, position)


def explain_solver(head_dim: int, *, blocks: int = 1, solver: str = "auto") -> Choice:
  """Says which solver runs for keys of width `head_dim`, and why the other does not."""
  width = head_dim // blocks
  work = f"a direct solve takes {width} products for each pair of query and key, an iteration 3"
  direct, iterative = (None, work) if width <= _DIRECT else (work, None)
  return choose("local_linear_attention, solver", solver, {"direct": direct, "cg": iterative})


def _run(operation: str, requested: str, spec: Spec, q: jax.Array, *inputs: Any) -> jax.Array:
  """The result by the implementation that is chosen."""

  def others(operation, requested, **kernels):
    all_pairs = "all pairs at once, memory O(T^2 d): the reference"
    return choose(operation, requested, {**kernels, "xla": None, "dense": all_pairs})

  chosen, kernels = choose_kernels(operation, requested, others, Objections(objection(spec, q, *inputs)))
  return dense(spec, q, *inputs) if chosen == "dense" else by_blocks(replace(spec, kernels=kernels), q, *inputs)


def _allowed(q: jax.Array, k: jax.Array, segment_ids: jax.Array | None, allowed: Allowed | None) -> Allowed:
  """`allowed`, checked, or what it is without."""
  if allowed is None:
    if k.shape[1] != q.shape[1]:
      raise ValueError(f"k has {k.shape[1]} tokens and q {q.shape[1]}; expected as many, or `allowed`.")
    check_segment_ids(segment_ids, q.shape[:2])
    return causal(q.shape[0], q.shape[1], segment_ids)
  if segment_ids is not None:
    raise ValueError("segment_ids and allowed were both given; expected one of them.")
  for name, x in allowed._asdict().items():
    expected = (q if name.startswith("query") else k).shape[:2]
    if x.shape != expected or x.dtype != jnp.int32:
      raise ValueError(f"allowed.{name} is {x.dtype}{list(x.shape)}; expected int32{list(expected)}.")
  return allowed


def _check(q: jax.Array, k: jax.Array, v: jax.Array, blocks: int, window: int | None) -> None:
  if q.ndim != 4 or q.shape[1] == 0:
    raise ValueError(f"q has shape {list(q.shape)}; expected [batch, tokens, heads, width] with at least one token.")
  if k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[1] == 0:
    raise ValueError(f"k has shape {list(k.shape)}; expected [{q.shape[0]}, tokens, key heads, {q.shape[3]}] to fit q.")
  if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
    raise ValueError(f"k has {k.shape[2]} heads; expected a divisor of the {q.shape[2]} heads of q.")
  if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
    raise ValueError(f"v has shape {list(v.shape)}; expected {list(k.shape[:3])} and a width, to fit k.")
  if blocks < 1 or q.shape[3] % blocks:
    raise ValueError(f"blocks={blocks}; expected a divisor of the width {q.shape[3]} of q.")
  if window is not None and window < 1:
    raise ValueError(f"window={window}; expected at least 1, or None.")
