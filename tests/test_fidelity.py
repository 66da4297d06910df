"""Memory fidelity: every number is checked where its value is known, and every probe on rows that it was not fitted on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_layers import NoteReader
from filled import filled
from flax import linen as nn
from matplotlib.figure import Figure
from memzoo.layers.memory_layer import MemoryLayer
from memzoo.layers.projections import embed, unembed
from memzoo.zoo.fidelity import (
  Hidden,
  LayerFidelity,
  TokenFidelity,
  eclmf,
  etmf,
  hidden,
  response_fidelity,
)
from memzoo.zoo.inspect_figures import draw_eclmf, draw_etmf
from memzoo.zoo.language_model import LanguageModel
from memzoo.zoo.stack import Stack
from tolerances import assert_close

pytestmark = pytest.mark.slow
TOKENS = 12


class Decaying(MemoryLayer):
  """y_t = a_t y_{t-1} + scale x_t, with fixed decays a_t; y_0 = scale x_0 in each document."""

  decays: tuple[float, ...]
  scale: float = 1.0

  def initial_state(self, batch_size):
    return ()

  @nn.compact
  def __call__(self, x, state=None, segment_ids=None):
    times = np.arange(len(self.decays))
    weights = [[np.prod(self.decays[s + 1 : t + 1]) if s <= t else 0 for s in times] for t in times]
    same = jnp.ones((1, 1, 1), x.dtype)
    if segment_ids is not None:
      same = (segment_ids[:, :, None] == segment_ids[:, None]).astype(x.dtype)
    return self.scale * jnp.einsum("bts,bsd->btd", jnp.asarray(weights, x.dtype)[None] * same, x), ()


def texts(rows: int = 6, tokens: int = 300, width: int = 8, mean: float = 0.0) -> np.ndarray:
  """Vectors [rows, tokens, width] that are independent of each other."""
  return np.random.default_rng(0).standard_normal((rows, tokens, width)) + mean


def mixing(width: int = 8, seed: int = 1) -> np.ndarray:
  """An invertible matrix [width, width]."""
  rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
  return rotation * np.linspace(0.5, 2, width)


def one_document(x: np.ndarray, **layers: np.ndarray) -> Hidden:
  return Hidden(x, layers, np.zeros(x.shape[:2], int))


def test_vectors_that_are_an_earlier_token_are_read_at_that_lag_and_are_at_the_floor_at_all_others():
  x = texts(mean=0.5)
  found = etmf(one_document(x, copy=x, late=np.roll(x, 3, axis=1) @ mixing() + 7), lags=(1, 2, 3, 4, 64))
  assert found.layers == ("copy", "late")
  assert found.lags.tolist() == [1, 2, 3, 4, 64]
  assert found.cosine.shape == found.floor.shape == (2, 5)
  assert found.floor.min() > 0.3, "tokens resemble their mean"
  expected = np.where(np.array([[False] * 5, [False, False, True, False, False]]), 1, found.floor)
  np.testing.assert_allclose(found.cosine, expected, atol=0.03)
  np.testing.assert_allclose(found.ceiling, [1, found.floor[1].mean()], atol=0.03)
  assert found.pairs.tolist() == [3 * (300 - lag) for lag in found.lags]
  np.testing.assert_allclose(found.mean[1], found.cosine[1].sum() / 5)


def test_a_leaky_average_of_independent_tokens_fades_with_its_decay():
  """The correlation of x_t and h_{t+k} is a^k sqrt(1 - a^2)."""
  decay, lags = 0.7, np.array([1, 2, 4, 8])
  x = jnp.asarray(texts(rows=16, width=16), jnp.float32)
  found = etmf(hidden(Decaying(decays=(decay,) * 300), {}, x), lags)
  assert found.layers == ("output",)
  curve = [*found.ceiling, *found.cosine[0]]
  assert (np.diff(curve) < -0.02).all()
  np.testing.assert_allclose(curve, decay ** np.array([0, *lags]) * np.sqrt(1 - decay**2), atol=0.03)


def test_probes_are_tested_on_other_rows():
  """Each row turns its tokens in its own way, which cannot be known from other rows."""
  x = texts(rows=2, width=4)
  turned = np.stack([x[0] @ mixing(4, 1), -x[1] @ mixing(4, 1)])
  found = one_document(x, turned=turned, plain=x)
  np.testing.assert_allclose(etmf(found, lags=(1,)).ceiling, [-1, 1], atol=0.03)
  np.testing.assert_allclose(eclmf(found, gaps=(1,)).share[:, 0], [-3, np.nan], atol=0.2)


def test_pairs_lie_in_one_document():
  x = texts(rows=8, tokens=60)
  late = np.roll(x, 3, axis=1)
  ids = np.repeat(np.arange(12), 5)[None].repeat(8, axis=0)
  ids[:, 20:30] = -1
  late[:, (np.arange(60) % 5 < 3)] = 100.0
  late[:, 20:30] = np.nan
  x[:, 20:30] = np.nan
  found = etmf(Hidden(x, {"late": late}, ids), lags=(3,))
  np.testing.assert_allclose(found.cosine, 1, atol=1e-3)
  assert found.pairs.tolist() == [4 * 10 * 2]
  with pytest.raises(ValueError, match=r"^0 pairs of tokens at lag 5 to fit a probe .*width 8; expected at least 9: give"):
    etmf(Hidden(x, {"late": late}, ids), lags=(5,))


def test_a_lag_is_measured_alike_beside_any_other_and_with_any_layers():
  x = texts()
  noisy = x + texts(mean=1)[::-1]
  alone = etmf(one_document(x, noisy=noisy), lags=(2,), pairs=200)
  beside = etmf(one_document(x, late=np.roll(x, 2, axis=1), noisy=noisy), lags=(1, 2), pairs=200)
  assert alone.pairs.tolist() == [100]
  np.testing.assert_array_equal(alone.cosine[0, 0], beside.cosine[1, 1])
  assert etmf(one_document(x, noisy=noisy), lags=(2,), pairs=200, seed=1).cosine != alone.cosine


def test_a_layer_is_read_from_an_invertible_map_of_it_and_not_from_noise():
  x = texts(tokens=50, width=16)
  noise = np.random.default_rng(5).standard_normal(x.shape)
  found = eclmf(one_document(x, low=x + 3, high=x @ mixing(16), noise=noise), gaps=(1, 2), ridge=1e-9)
  assert found.layers == ("low", "high", "noise")
  assert found.tokens == 150
  np.testing.assert_allclose(found.share, [[1, 0], [0, np.nan], [np.nan, np.nan]], atol=0.2)
  np.testing.assert_allclose(found.share[0, 0], 1, atol=1e-6)
  assert (found.floor[:2, 0] < 0.02).all()
  assert found.share[0, 1] < 0.02, "the map is tested on rows that it was not fitted on"


def test_what_a_higher_layer_has_dropped_cannot_be_read_from_it():
  x = texts()
  narrow = x * (np.arange(8) < 6)
  found = eclmf(one_document(x, whole=x, narrow=narrow, again=x, nothing=np.ones_like(x)), gaps=(1, 2, 3))
  np.testing.assert_allclose(found.share[0], [6 / 8, 1, 0], atol=0.03)
  np.testing.assert_allclose(found.share[1:3, 0], [1, 0], atol=0.03)
  assert np.isnan(found.share[3]).all()


def small(scan=False, **fields):
  mixers = Decaying(decays=(0.5,) * TOKENS), NoteReader(channels=3)
  return LanguageModel(vocab_size=11, width=8, depth=4, mixers=mixers, mlp_ratio=1, scan=scan, **fields)


@pytest.fixture(scope="module")
def model():
  """A model, its variables, tokens for it and documents of these."""
  tokens = jax.random.randint(jax.random.key(0), (3, TOKENS), 0, 11, jnp.int32)
  ids = jnp.asarray([[1] * 5 + [2] * 7, [0] * 2 + [1] * 10, [1] * TOKENS], jnp.int32)
  return small(), filled(small(), tokens, std=0.3), tokens, ids


def test_hidden_vectors_begin_with_the_embedding_and_end_with_the_logits(model):
  module, params, tokens, ids = model
  blocks, parts = (hidden(module, params, tokens, ids, of=of) for of in ("blocks", "sublayers"))
  embedding = params["params"]["embedding"]
  assert_close(blocks.inputs, embed(embedding, tokens), jnp.float32)
  assert list(blocks.layers) == [f"block {i}" for i in range(4)]
  assert list(parts.layers) == [f"block {i}/{name}" for i in range(4) for name in ("mixer", "mlp")]
  stream, inside = blocks.inputs, list(parts.layers.values())
  for i, after in enumerate(blocks.layers.values()):
    stream = stream + inside[2 * i] + inside[2 * i + 1]
    assert_close(after, stream, jnp.float32)
  scale = np.asarray(params["params"]["final_norm"]["scale"])
  last = stream / np.sqrt(np.mean(stream**2, axis=-1, keepdims=True) + 1e-6) * scale
  assert_close(unembed(jnp.asarray(last), embedding), jax.jit(module.apply)(params, tokens, None, ids)[0], jnp.float32)
  assert blocks.document.tolist() == [[0] * 5 + [1] * 7, [-1] * 2 + [0] * 10, [0] * TOKENS]


def test_scanned_and_checkpointed_blocks_and_batches_of_rows_give_the_same_vectors(model):
  module, params, tokens, ids = model
  scanned = small(scan=True, remat="full")
  own = dict(params["params"])
  blocks = [own.pop(f"blocks_{i}") for i in range(4)]
  pairs = {f"blocks_{j}": jax.tree.map(lambda a, b: jnp.stack([a, b]), blocks[j], blocks[j + 2]) for j in (0, 1)}
  found = hidden(scanned, {"params": own | {"periods": pairs}}, tokens, ids, batch_size=2)
  assert_close(found, hidden(module, params, tokens, ids), jnp.float32)


class Silent(MemoryLayer):
  """A layer that returns zeros."""

  def initial_state(self, batch_size):
    return ()

  def __call__(self, x, state=None, segment_ids=None):
    return jnp.zeros_like(x), ()


def test_a_model_whose_layers_are_silent_keeps_every_token_and_no_earlier_one():
  silent = LanguageModel(vocab_size=50, width=4, depth=3, mixers=(Silent(),), mlp_ratio=0)
  tokens = jax.random.randint(jax.random.key(0), (8, 64), 0, 50, jnp.int32)
  found = hidden(silent, filled(silent, tokens, std=1.0), tokens)
  over_time = etmf(found)
  assert over_time.lags.tolist() == [1, 4, 16]
  np.testing.assert_allclose(over_time.ceiling, 1, atol=1e-3)
  np.testing.assert_allclose(over_time.cosine, over_time.floor, atol=0.15)
  over_depth = eclmf(found)
  assert over_depth.gaps.tolist() == [1, 2]
  np.testing.assert_allclose(over_depth.share, [[1, 1], [1, np.nan], [np.nan, np.nan]], atol=1e-3)


DECAYS = tuple(float(a) for a in np.linspace(0.95, 0.4, TOKENS))


def test_the_response_of_frozen_decays_is_their_product():
  x = jnp.asarray(texts(2, TOKENS, 3), jnp.float32)
  ids = jnp.asarray([[1] * TOKENS, [0] * 2 + [1] * 5 + [2] * 5], jnp.int32)
  found = response_fidelity(Decaying(decays=DECAYS, scale=3.0), {}, x, (1, 4, 2), (0, 2, 5), segment_ids=ids)
  assert found.ratio.shape == (1, 3, 2, 3)
  product = np.array([[np.prod(DECAYS[t + 1 : t + k + 1]) for k in (1, 4, 2)] for t in (0, 2, 5)])
  np.testing.assert_allclose(found.ratio[0, :, 0], product, rtol=1e-5)
  inside = np.array([[False] * 3, [True] * 3, [True, False, False]])
  np.testing.assert_allclose(found.ratio[0, :, 1], np.where(inside, product, np.nan), rtol=1e-5)
  np.testing.assert_allclose(found.mean[0, 1], (product[0, 1] + 2 * product[1, 1] + product[2, 1]) / 4, rtol=1e-5)


def test_the_response_of_sublayers_is_that_of_their_memory():
  """The norm before a memory turns its input's changes, at both tokens alike."""
  stack = Stack(mixers=(Decaying(decays=DECAYS),), depth=1, mlp_ratio=0)
  x = jnp.asarray(texts(1, TOKENS, 3), jnp.float32)
  params = filled(stack, x)
  found = response_fidelity(stack, params, x, (3,), (2,), of="sublayers").ratio
  np.testing.assert_allclose(found, np.prod(DECAYS[3:6]), rtol=1e-5)
  assert response_fidelity(stack, params, x, (3,), (2,)).ratio < found - 0.05, "a residual stream holds x_t itself"


@pytest.mark.usefixtures("float64")
def test_the_response_of_a_model_is_that_of_finite_differences():
  types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
  fields = {"mixers": (Decaying(decays=DECAYS),), "depth": 2, "mlp_ratio": 1.0, **types}
  tokens = jax.random.randint(jax.random.key(0), (2, TOKENS), 0, 11, jnp.int32)
  model, stack = LanguageModel(vocab_size=11, width=4, remat="full", **fields), Stack(**fields)
  params = filled(model, tokens, std=0.5)
  own = {"params": {name: leaf for name, leaf in params["params"].items() if name != "embedding"}}
  x = np.asarray(embed(params["params"]["embedding"], tokens))
  step, lags, t = 1e-5, (1, 2, 6), 4

  def moved(by):
    at = x.copy()
    at[:, t] += by
    return np.stack([*hidden(stack, own, jnp.asarray(at)).layers.values()])

  jacobian = np.stack([moved(by) - moved(-by) for by in step * np.eye(4)])
  norms = np.sqrt(np.sum(jacobian**2, axis=(0, 4)))[:, :, t:]
  expected = (norms / norms[..., :1])[..., np.array(lags)]
  found = response_fidelity(model, params, tokens, lags, (t,))
  assert found.layers == ("block 0", "block 1")
  np.testing.assert_allclose(found.ratio[:, 0], expected, rtol=1e-6)


def test_random_directions_estimate_the_exact_response():
  stack = Stack(mixers=(Decaying(decays=DECAYS),), depth=1, mlp_ratio=1)
  x = jnp.asarray(texts(2, TOKENS, 8), jnp.float32)
  params = filled(stack, x, std=0.5)
  exact, all_, some = (response_fidelity(stack, params, x, (1, 3), (4, 6), probes=probes).ratio for probes in (None, 8, 5))
  np.testing.assert_allclose(all_, exact, rtol=1e-4)
  np.testing.assert_allclose(some, exact, rtol=2 / np.sqrt(2 * 5))
  assert abs(some / exact - 1).max() > 0.01


def same(rows, tokens, *names):
  """Vectors of width 2 that are the same in all layers."""
  return one_document(texts(rows, tokens, 2), **dict.fromkeys(names, texts(rows, tokens, 2)))


X = same(2, 5, "low", "high")
VECTORS = jnp.ones((2, 5, 3), jnp.float32)
LAYER = Decaying(decays=(0.5,) * 5)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: etmf(X, (1, 5, 9)), r"lags=\[5, 9\], but the text has 5 tokens; expected 1 to 4\."),
    (lambda: etmf(X, (0,)), r"lags=\[0\], but the text has 5 tokens; expected 1 to 4"),
    (lambda: etmf(X, (1.5,)), r"lags=\[1\.5\]"),
    (lambda: etmf(X, ()), r"lags=\(\), but"),
    (lambda: etmf(same(2, 1, "low")), r"lags=\(\), but the text has 1 tokens; expected at least 2"),
    (lambda: etmf(same(1, 9, "low")), r"found.inputs has shape \[1, 9, 2\]; expected 2 rows or more"),
    (lambda: etmf(X, (4,)), "1 pairs of tokens at lag 4 to fit a probe of vectors of width 2; expected at least 3"),
    (lambda: etmf(X, (1,), pairs=4), "2 pairs of tokens at lag 0 to fit a probe .* or a larger sample"),
    (lambda: etmf(X, (1,), ridge=0.0), r"ridge=0\.0; expected more than 0"),
    (lambda: eclmf(X, (1, 2)), r"gaps=\[2\], but there are 2 layers of vectors; expected 1 to 1"),
    (lambda: eclmf(same(2, 5, "low")), r"gaps=\(\), but there are 1 layers of vectors; expected at least 2 of them"),
    (lambda: eclmf(same(1, 9, "low", "high")), "expected 2 rows or more"),
    (lambda: hidden(LAYER, {}, VECTORS, of="heads"), 'of=\'heads\'; expected "blocks" or "sublayers"'),
    (lambda: hidden(LAYER, {}, VECTORS, batch_size=0), "batch_size=0; expected at least 1"),
    (lambda: hidden(LAYER, {}, jnp.ones((2, 5), jnp.int32)), r"inputs is int32\[2, 5\], but model, a Decaying, is a single"),
    (lambda: hidden(LAYER, {}, VECTORS, jnp.ones((2, 4), jnp.int32)), "segment_ids is int32"),
    (lambda: response_fidelity(LAYER, {}, VECTORS, (5,), (0,)), r"lags=\[5\], but the text has 5 tokens; expected 1 to 4"),
    (lambda: response_fidelity(LAYER, {}, VECTORS, (3,), (0, 2)), r"positions=\[2\], but .* largest lag is 3; expected 0 to 1"),
    (lambda: response_fidelity(LAYER, {}, VECTORS, (3,), ()), r"positions=\(\), but"),
    (lambda: response_fidelity(LAYER, {}, VECTORS, (3,), (0,), probes=4), "probes=4; expected 1 to 3, the width"),
  ],
)
def test_mistakes_are_refused(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_figures_show_what_was_found(tmp_path):
  numbers = np.random.default_rng(0)
  names = ("block 0", "block 1", "block 2")
  cosines = (numbers.random(shape) for shape in ((3, 3), (3, 3), 3))
  over_time = TokenFidelity(names, np.array([16, 1, 4]), *cosines, np.ones(3))
  missing = np.array([[1, 1], [1, np.nan], [np.nan, np.nan]])
  over_depth = LayerFidelity(names, np.array([1, 2]), missing * numbers.random((3, 2)), 0 * missing, 9)
  drawn = draw_etmf(over_time), draw_eclmf(over_depth)
  for figure, name in zip(drawn, ("etmf", "eclmf"), strict=True):
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / f"{name}.png")
    assert figure.axes[0].get_title()
  legends = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn]
  assert legends[0] == ["block 0", "block 1", "block 2", "floor: shuffled pairs", "ceiling: the token itself"]
  assert legends[1] == ["block 0", "block 1", "floor: shuffled pairs"]
  cosine, floor, ceiling = drawn[0].axes[0].lines[3:6]
  assert cosine.get_xdata().tolist() == floor.get_xdata().tolist() == [1, 4, 16]
  np.testing.assert_array_equal(cosine.get_ydata(), over_time.cosine[1, [1, 2, 0]])
  np.testing.assert_array_equal(floor.get_ydata(), over_time.floor[1, [1, 2, 0]])
  np.testing.assert_array_equal(ceiling.get_ydata(), over_time.ceiling[1])
  np.testing.assert_array_equal(drawn[1].axes[0].lines[2].get_ydata(), over_depth.share[1])
