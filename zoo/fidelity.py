"""How much of each token a model still holds: later in the text (ETMF), deeper in the model (ECLMF), and by derivatives.

    found = hidden(model, params, tokens, segment_ids)       # token embeddings, and the vectors after each block
    over_time = etmf(found, lags=(1, 4, 16, 64))             # can token t be read from the vectors at token t + k?
    over_depth = eclmf(found, gaps=(1, 2))                   # can block l's vectors be read from those of block l + G?
    response_fidelity(model, params, tokens, (1, 4), (0, 8)) # how strongly token t still moves the vectors at token t + k

`model` is a `LanguageModel` (or another `Stack`) or a single layer, as in `inspect.py`. Give text that the model was not
trained on. Expected Token Memory Fidelity and Expected Cross-Layer Memory Fidelity are from MemMamba (arXiv:2510.03279), which
describes them in words and leaves their normalisation open -> the equations of `etmf` and `eclmf`. Probes are affine maps
fitted by ridge regression on one half of the rows and tested on the other half, in float64. Both measures come with a floor,
what the same probe reaches when it is fitted on shuffled pairs: the value where nothing is left.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ..pallas_kernels.documents import check_segment_ids, documents
from ..pallas_kernels.numerics import accumulator, einsum
from .inspect import _mean, linear_response
from .stack import Stack, sublayer_names, unroll_params

LAGS = (1, 4, 16, 64, 256, 1024)
GAPS = (1, 2, 4, 8)


class Hidden(NamedTuple):
  """Vectors inside a model on a batch of texts, float32 (float64 for a float64 model).

  Attributes:
    inputs: x_t, the input of the first layer, [B, T, D]: token embeddings in a `LanguageModel`.
    layers: h^l_t by name, lowest layer first, [B, T, E].
    document: int [B, T], the number of each token's document in its row; -1 at padding.
  """

  inputs: np.ndarray
  layers: dict[str, np.ndarray]
  document: np.ndarray


class TokenFidelity(NamedTuple):
  """ETMF of L layers at N lags: mean cosines on held-out rows.

  Attributes:
    layers: the L names.
    lags: k, in tokens, [N].
    cosine: between each token's embedding and what the probe reads k tokens later, [L, N].
    floor: the same for a probe fitted on shuffled pairs, [L, N].
    ceiling: the cosine at k = 0, [L].
    pairs: number of pairs that were tested, [N].
  """

  layers: tuple[str, ...]
  lags: np.ndarray
  cosine: np.ndarray
  floor: np.ndarray
  ceiling: np.ndarray
  pairs: np.ndarray

  @property
  def mean(self) -> np.ndarray:
    """ETMF_l, the mean cosine over the lags, [L]."""
    return self.cosine.mean(axis=1)


class LayerFidelity(NamedTuple):
  """ECLMF of L layers at N gaps, on held-out rows. nan where there is no layer l + G, or layer l's vectors are all equal.

  Attributes:
    layers: the L names.
    gaps: G, in layers, [N].
    share: share of the variance of layer l that is read from layer l + G, [L, N]; 1 for all of it.
    floor: the same for a map fitted on shuffled pairs, [L, N]; about 0, or less.
    tokens: number of tokens that were tested.
  """

  layers: tuple[str, ...]
  gaps: np.ndarray
  share: np.ndarray
  floor: np.ndarray
  tokens: int


class ResponseFidelity(NamedTuple):
  """F(k) of L layers for inputs at P positions and N lags; nan where t and t + k are not in one document.

  Attributes:
    layers: the L names.
    positions: t, [P].
    lags: k, in tokens, [N].
    ratio: F(k), [L, P, B, N].
  """

  layers: tuple[str, ...]
  positions: np.ndarray
  lags: np.ndarray
  ratio: np.ndarray

  @property
  def mean(self) -> np.ndarray:
    """The mean over positions and rows, [L, N]; nan where there is none."""
    return np.stack([_mean(ratio) for ratio in self.ratio])


class _Places(NamedTuple):
  """Places of sampled tokens, as (rows, times) [n] each: those that probes are fitted on and tested on.

  `order` is the order [n] of the shuffled targets.
  """

  fit: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]
  order: np.ndarray


def hidden(
  model: nn.Module,
  params: Any,
  inputs: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  of: str = "blocks",
  batch_size: int | None = None,
) -> Hidden:
  """The vectors inside `model` on texts.

  Args:
    model, params: a `Stack`, such as a `LanguageModel`, or a single layer, and its variables.
    inputs: what the model is called with, tokens [B, T] or vectors [B, T, D].
    segment_ids: int [B, T]; equal neighbours are one document, 0 is padding.
    of: "blocks" for the residual stream after each block, "block 0" and so on; "sublayers" for what each sublayer returns,
      "block 0/mixer" and so on. A single layer has one kind of vectors, its "output".
    batch_size: rows in one pass through the model; all of them by default.

  Raises:
    ValueError: for another `of`, a `batch_size` below one, tokens for a single layer, or arguments that the model refuses.
  """
  _check_call(model, inputs, segment_ids, of)
  size = len(inputs) if batch_size is None else batch_size
  if size < 1:
    raise ValueError(f"batch_size={size}; expected at least 1 row.")
  parts = []
  for i in range(0, len(inputs), size):
    ids = None if segment_ids is None else segment_ids[i : i + size]
    parts.append(jax.tree.map(np.asarray, _compiled_read(model, of, params, inputs[i : i + size], ids)))
  x = np.concatenate([own for own, _ in parts])
  layers = {name: np.concatenate([own[name] for _, own in parts]) for name in _names(model, of).values()}
  return Hidden(x, layers, _numbers(inputs, segment_ids))


def _check_call(model: nn.Module, inputs: jax.Array, segment_ids: jax.Array | None, of: str) -> None:
  if of not in ("blocks", "sublayers"):
    raise ValueError(f'of={of!r}; expected "blocks" or "sublayers".')
  if not isinstance(model, Stack) and not jnp.issubdtype(inputs.dtype, jnp.floating):
    raise ValueError(
      f"inputs is {inputs.dtype}{list(inputs.shape)}, but model, a {type(model).__name__}, is a single layer; expected vectors "
      "[batch, tokens, width], or a model that embeds tokens, such as LanguageModel."
    )
  check_segment_ids(segment_ids, inputs.shape[:2])


def _numbers(inputs: jax.Array, segment_ids: jax.Array | None) -> np.ndarray:
  """`Hidden.document`."""
  if segment_ids is None:
    return np.zeros(inputs.shape[:2], np.int32)
  docs = documents(jnp.asarray(segment_ids))
  return np.where(docs.is_token, docs.index, -1)


def _names(model: nn.Module, of: str) -> dict[tuple[str, ...], str]:
  """The names of the model's vectors by the paths of the modules that return them."""
  if not isinstance(model, Stack):
    return {(): "output"}
  if of == "blocks":
    return {(f"blocks_{i}",): f"block {i}" for i in range(model.depth)}
  inside = [(i, name) for i in range(model.depth) for name in sublayer_names(model.block(i))]
  return {(f"blocks_{i}", name): f"block {i}/{name}" for i, name in inside}


def _read(
  model: nn.Module, of: str, params: Any, inputs: jax.Array, segment_ids: jax.Array | None, shift: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The input of the first layer and the vectors of all layers; `shift` [B, T, D] is added to that input.

  Blocks run without scan and checkpoints, so that results may leave them.
  """
  if not isinstance(model, Stack):
    x = _shifted(inputs, shift)
    return _wide(x), {"output": _wide(model.apply(params, x, None, segment_ids)[0])}
  model, params = unroll_params(model.clone(remat="none"), params)
  names, seen = _names(model, of), {}

  def between(call, args, kwargs, context):
    if context.method_name not in ("__call__", "in_stack"):
      return call(*args, **kwargs)
    path = context.module.path
    if path == ("blocks_0",):
      args = _shifted(args[0], shift), *args[1:]
      seen["inputs"] = args[0]
    result = call(*args, **kwargs)
    if path in names:
      seen[path] = result[0]
    return result

  with nn.intercept_methods(between):
    model.apply(params, inputs, None, segment_ids)
  return _wide(seen["inputs"]), {name: _wide(seen[path]) for path, name in names.items()}


_compiled_read = partial(jax.jit, static_argnums=(0, 1))(_read)


def _shifted(x: jax.Array, shift: jax.Array | None) -> jax.Array:
  return x if shift is None else x + shift.astype(x.dtype)


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(accumulator(x))


def etmf(
  found: Hidden, lags: Sequence[int] | None = None, *, pairs: int = 2**16, ridge: float = 1e-2, seed: int = 0
) -> TokenFidelity:
  """Expected token memory fidelity: how well tokens can be read from vectors of later tokens.

      ETMF_l(k) = E_t cos(x_t, R_{l,k}(h^l_{t+k}))

  R_{l,k}(h) = W^T (h - mean h) + mean x is fitted on half of the rows: W = (C + ridge tr(C) / E I)^-1 cov(h, x), C = cov(h, h).
  A probe that is fitted on n pairs reads some noise, which lowers a cosine c to about c / sqrt(1 + E / (n c^2)), for a floor
  of 0: cosines below sqrt(E / n) need more pairs.

  Args:
    found: the result of `hidden`, at least 2 rows.
    lags: k, in tokens, from 1; `LAGS` that are shorter than the text by default.
    pairs: most pairs (t, t + k) for each lag, half of them to fit and half to test. Both tokens lie in one document. All
      layers see the same pairs.
    ridge: strength of the ridge, relative to the mean variance of the E directions of h.
    seed: of the rows' halves and of the samples.

  Raises:
    ValueError: for lags out of range, fewer than 2 rows, or too few pairs to fit a probe.
  """
  length = found.inputs.shape[1]
  lags = _chosen("lags", lags, LAGS, length, f"the text has {length} tokens")
  _check_probe(found, ridge)
  places = [(lag, _sample(found, lag, pairs, seed)) for lag in (0, *lags)]
  values = np.array(
    [[_cosines(vectors, found.inputs, own, lag, ridge) for lag, own in places] for vectors in found.layers.values()]
  )
  tested = np.array([len(own.test[0]) for _, own in places[1:]])
  return TokenFidelity(tuple(found.layers), np.array(lags), values[:, 1:, 0], values[:, 1:, 1], values[:, 0, 0], tested)


def eclmf(
  found: Hidden, gaps: Sequence[int] | None = None, *, tokens: int = 2**16, ridge: float = 1e-2, seed: int = 0
) -> LayerFidelity:
  """Expected cross-layer memory fidelity: how well a layer's vectors can be read from those of a higher layer.

      ECLMF_{l,G} = 1 - E_t |Q(h^{l+G}_t) - h^l_t|^2 / E_t |h^l_t - mean h^l|^2

  Q is an affine map, fitted like R in `etmf`; the expectations and the mean are over the other half of the rows. The ridge
  keeps the result a little below 1 (1e-4 for vectors of equal variance in all directions) where Q could be exact.

  Args:
    found: the result of `hidden`, at least 2 rows and 2 layers.
    gaps: G, in layers, from 1; `GAPS` that are below the number of layers by default.
    tokens: most tokens, half of them to fit and half to test.
    ridge, seed: as in `etmf`.

  Raises:
    ValueError: for gaps out of range, fewer than 2 rows, or too few tokens to fit a map.
  """
  vectors = list(found.layers.values())
  depth = len(vectors)
  gaps = _chosen("gaps", gaps, GAPS, depth, f"there are {depth} layers of vectors")
  _check_probe(found, ridge)
  places = _sample(found, 0, tokens, seed)
  values = np.full((depth, len(gaps), 2), np.nan)
  for i, gap in enumerate(gaps):
    for l in range(depth - gap):
      values[l, i] = _shares(vectors[l + gap], vectors[l], places, ridge)
  return LayerFidelity(tuple(found.layers), np.array(gaps), values[..., 0], values[..., 1], len(places.test[0]))


def _chosen(name: str, chosen: Sequence[int] | None, usual: tuple[int, ...], limit: int, why: str) -> list[int]:
  """`chosen`, or those of `usual` below `limit`."""
  chosen = [n for n in usual if n < limit] if chosen is None else list(chosen)
  wrong = [n for n in chosen if n not in range(1, limit)]
  if wrong or not chosen:
    expected = f"1 to {limit - 1}" if limit > 1 else "at least 2 of them"
    raise ValueError(f"{name}={wrong or '()'}, but {why}; expected {expected}.")
  return [int(n) for n in chosen]


def _check_probe(found: Hidden, ridge: float) -> None:
  if len(found.inputs) < 2:
    shape = list(found.inputs.shape)
    raise ValueError(f"found.inputs has shape {shape}; expected 2 rows or more: half of them to fit probes, half to test them.")
  if not ridge > 0:
    raise ValueError(f"ridge={ridge}; expected more than 0, such as 0.01.")


def _sample(found: Hidden, lag: int, pairs: int, seed: int) -> _Places:
  """Samples tokens t for which t + lag is in the same document, from either half of the rows."""
  document = found.document
  first, last = document[:, : document.shape[1] - lag], document[:, lag:]
  rows, times = np.nonzero((first == last) & (first >= 0))
  numbers = np.random.default_rng(seed)
  order = numbers.permutation(len(document))
  is_fit = np.isin(rows, order[: (len(order) + 1) // 2])
  halves = []
  for half in (np.flatnonzero(is_fit), np.flatnonzero(~is_fit)):
    half = numbers.choice(half, min(len(half), pairs // 2), replace=False)
    halves.append((rows[half], times[half]))
  width = max(vectors.shape[-1] for vectors in found.layers.values())
  for (rows, _), what, least in zip(halves, ("fit", "test"), (width + 1, 2), strict=True):
    if len(rows) < least:
      raise ValueError(
        f"{len(rows)} pairs of tokens at lag {lag} to {what} a probe of vectors of width {width}; expected at least {least}: "
        "give more rows, longer documents, shorter lags or a larger sample."
      )
  return _Places(*halves, numbers.permutation(len(halves[0][0])))


def _at(vectors: np.ndarray, place: tuple[np.ndarray, np.ndarray], lag: int = 0) -> np.ndarray:
  """The vectors `lag` tokens after `place`, float64 [n, width]."""
  rows, times = place
  return vectors[rows, times + lag].astype(np.float64)


def _probe(source: np.ndarray, target: np.ndarray, test: np.ndarray, order: np.ndarray, ridge: float) -> list[np.ndarray]:
  """What probes source -> target read from `test`: the probe, and one that is fitted on targets in another order."""
  both = np.concatenate([target, target[order]], axis=1)
  centre, mean = source.mean(axis=0), both.mean(axis=0)
  source = source - centre
  gram = source.T @ source
  strength = ridge * np.trace(gram) / len(gram) or 1.0  # vectors that are all equal read as the mean
  weights = np.linalg.solve(gram + strength * np.eye(len(gram)), source.T @ (both - mean))
  return np.split((test - centre) @ weights + mean, 2, axis=1)


def _cosines(vectors: np.ndarray, inputs: np.ndarray, places: _Places, lag: int, ridge: float) -> list[float]:
  """The mean cosine and its floor."""
  source, test = _at(vectors, places.fit, lag), _at(vectors, places.test, lag)
  target = _at(inputs, places.test)
  return [_cosine(read, target) for read in _probe(source, _at(inputs, places.fit), test, places.order, ridge)]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
  """The mean cosine of rows; the cosine with a zero vector is 0."""
  size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  return float(np.mean(np.sum(a * b, axis=1) / np.where(size > 0, size, 1)))


def _shares(upper: np.ndarray, lower: np.ndarray, places: _Places, ridge: float) -> list[float]:
  """The share of the lower layer's variance that is read from the upper layer, and its floor."""
  target = _at(lower, places.test)
  variance = np.sum((target - target.mean(axis=0)) ** 2)
  read = _probe(_at(upper, places.fit), _at(lower, places.fit), _at(upper, places.test), places.order, ridge)
  return [1 - np.sum((one - target) ** 2) / variance if variance > 0 else np.nan for one in read]


def response_fidelity(
  model: nn.Module,
  params: Any,
  inputs: jax.Array,
  lags: Sequence[int],
  positions: Sequence[int],
  *,
  segment_ids: jax.Array | None = None,
  of: str = "blocks",
  probes: int | None = None,
  seed: int = 0,
) -> ResponseFidelity:
  """How strongly each layer's vectors k tokens later depend on a token's embedding, without a probe that is fitted:

      F(k) = |d h^l_{t+k} / d x_t|_F / |d h^l_t / d x_t|_F

  Made of `linear_response`; it is not a number where h^l_t does not depend on x_t.

  Args:
    model, params, inputs, segment_ids, of: as in `hidden`.
    lags: k, in tokens, from 1.
    positions: t. The program is compiled once for all of them.
    probes: number of directions of x_t, all D by default, which is exact. Fewer are drawn at random, orthogonal to each
      other; the relative error of a norm is then at most about 1 / sqrt(2 probes). Memory grows with their number.
    seed: of the directions.

  Raises:
    ValueError: for lags, positions or numbers of probes out of range, and as in `hidden`.
  """
  _check_call(model, inputs, segment_ids, of)
  length = inputs.shape[1]
  lags = _chosen("lags", lags, (), length, f"the text has {length} tokens")
  last = length - 1 - max(lags)
  wrong = [t for t in positions if t not in range(last + 1)]
  if wrong or not len(positions):
    reason = f"the text has {length} tokens and the largest lag is {max(lags)}"
    raise ValueError(f"positions={wrong or '()'}, but {reason}; expected 0 to {last}.")
  basis = _basis(jax.eval_shape(partial(_read, model, of), params, inputs, segment_ids)[0], probes, seed)
  offsets = jnp.array([0, *lags], jnp.int32)
  document, ratio = _numbers(inputs, segment_ids), []
  for t in positions:
    found = np.asarray(_responses(model, of, params, inputs, segment_ids, basis, jnp.int32(t), offsets))
    own, later = document[:, t, None], document[:, t + np.array(lags)]
    ratio.append(np.where((own == later) & (own >= 0), found, np.nan))
  return ResponseFidelity(tuple(_names(model, of).values()), np.array(positions), np.array(lags), np.stack(ratio, axis=1))


def _basis(x: jax.ShapeDtypeStruct, probes: int | None, seed: int) -> jax.Array:
  """Directions [probes, D] of the vectors x: orthonormal rows."""
  width = x.shape[-1]
  if probes is not None and not 1 <= probes <= width:
    raise ValueError(f"probes={probes}; expected 1 to {width}, the width of the vectors, or None for exact norms.")
  if probes is None:
    return jnp.eye(width, dtype=x.dtype)
  directions, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, probes)))
  return jnp.asarray(directions.T, x.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _responses(model, of, params, inputs, segment_ids, basis, position, offsets) -> jax.Array:
  """F at `offsets[1:]` from `position`, [L, B, N]."""
  batch, length = inputs.shape[:2]

  def outputs(z):  # z [B, 1, probes]: coordinates of the change of x at `position`
    shift = jnp.zeros((batch, length, basis.shape[1]), basis.dtype)
    shift = shift.at[:, position].set(einsum("bp,pd->bd", z[:, 0], basis))
    _, layers = _read(model, of, params, inputs, segment_ids, shift)
    return jnp.concatenate([vectors[:, position + offsets] for vectors in layers.values()])

  ratio = linear_response(outputs, jnp.zeros((batch, 1, len(basis)), basis.dtype), 0)
  return ratio.reshape(-1, batch, len(offsets))[..., 1:]
