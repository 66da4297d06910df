"""B'MOJO in NumPy, token by token with the stored tokens as a list, and the identities that follow from its equations.

Only the names of parameters come from the package.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from memzoo.layers import Attention, BMojo, GatedDeltaNet, Mamba2, MemoryLayer
from memzoo.layers.memory_layer import silence_padding
from memzoo.pallas_kernels.documents import documents
from memzoo.pallas_kernels.top_scores import Held, Offered, hold_highest
from memzoo.zoo.inspect import memories, retention
from test_mamba_on_paper import FLOAT64, MAMBA2, mamba2, rms_norm
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64"), pytest.mark.xdist_group("bmojo")]

WIDTH, TOKENS, WINDOW = 6, 23, 3
SIZES = {"num_heads": 4, "num_key_heads": 2, "head_dim": 4, "window": WINDOW, "rope_base": 50.0} | FLOAT64
IDS = np.repeat([[1, 2, 3]], [15, 6, 2], axis=1).astype(np.int32)


class Nothing(NamedTuple):
  rows: jax.Array


class Identity(MemoryLayer):
  """f = u."""

  def initial_state(self, batch_size):
    return Nothing(jnp.zeros((batch_size,), jnp.int32))

  def __call__(self, x, state=None, segment_ids=None):
    state = self.begin(x, state, segment_ids)
    return silence_padding(x, segment_ids), state


def layer(**fields):
  return BMojo(**SIZES | {"memory": Identity(), "width": WIDTH} | fields)


def inputs(rows=1, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, TOKENS, WIDTH)))


@functools.cache
def compiled(module):
  return jax.jit(module.apply)


def run(module, params, x, *rest):
  return compiled(module)(params, x, *rest)


def rotated(x, position):
  """x [H, d] with the angle of its position, in pairs of channels half a head apart."""
  half = x.shape[-1] // 2
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * position * SIZES["rope_base"] ** (-np.arange(half) / half))
  return np.concatenate([turned.real, turned.imag], axis=-1)


class Projected:
  """Queries, keys and values of u or f [T, D], [T, heads, d] each."""

  def __init__(self, p, prefix=""):
    self.p, self.prefix = p, prefix

  def __call__(self, name, x):
    out = (x @ self.p[f"{self.prefix}{name}"]["kernel"]).reshape(len(x), -1, SIZES["head_dim"])
    norm = self.p.get(f"{self.prefix}{name}_norm")
    out = out if norm is None else rms_norm(out, norm["scale"])
    return out if name == "value" else np.stack([rotated(row, t) for t, row in enumerate(out)])


def on_paper(module, p, u):
  """B'MOJO for one document u [T, D], and the stored tokens at its end: (innovation, place), the first is the first to go."""
  f = mamba2(p["fading_memory"], u)
  context, fading = Projected(p), Projected(p, "" if module.tied else "fading_")
  q, k, v = context("query", u), context("key", u), context("value", u)
  q_f, k_f, v_f = fading("query", u), fading("key", f), fading("value", f)
  stored, out = [], []
  for i in range(len(u)):
    if (j := i - WINDOW) >= 0 and module.eidetic_slots:
      before = u[max(0, j - 4) : j]
      predicted = before.mean(axis=0) if j else np.zeros(WIDTH)
      stored.append((np.sum((u[j] - predicted) ** 2) / (np.sum(u[j] ** 2) + 1e-6), -j))
      if len(stored) > module.eidetic_slots:
        stored.remove(min(stored))
    seen = [*range(max(0, i - WINDOW + 1), i + 1), *(-j for _, j in stored)]
    faded = range(max(0, i - 2 * WINDOW + 1), max(0, i - WINDOW + 1))
    heads = []
    for h in range(SIZES["num_heads"]):
      g = h // 2
      logits = [q[i, h] @ k[j, g] for j in seen] + [q_f[i, h] @ k_f[j, g] for j in faded]
      powers = np.exp(np.array(logits) / SIZES["head_dim"] ** 0.5)
      heads.append(powers / powers.sum() @ np.array([v[j, g] for j in seen] + [v_f[j, g] for j in faded]))
    out.append(np.concatenate(heads) @ p["output"]["kernel"])
  return np.array(out), sorted(stored, reverse=True)


@pytest.mark.parametrize(
  "fields",
  [{}, {"tied": False, "qk_norm": True}, {"eidetic_slots": 3}, {"eidetic_slots": 3, "tied": False}],
  ids=["F", "F-untied", "eidetic", "eidetic-untied"],
)
def test_the_layer_is_the_papers_equation(fields):
  """Three documents in a row of text, whose stored tokens change several times."""
  module, x = layer(memory=Mamba2(**MAMBA2), **fields), inputs()
  params = filled(module, x, std=0.8)
  y, state = run(module, params, x, None, jnp.asarray(IDS))
  p = jax.tree.map(np.asarray, params["params"])
  ends = np.flatnonzero(np.diff(IDS[0])) + 1
  parts = [on_paper(module, p, part) for part in np.split(np.asarray(x[0]), ends)]
  assert_close(y[0], np.concatenate([out for out, _ in parts]))
  if module.eidetic_slots:
    assert [-j for _, j in parts[0][1]] != [0, 1, 2], "the first tokens are replaced"
    _, longer = run(module, params, x[:, : ends[0]])
    np.testing.assert_array_equal(longer.eidetic.position[0], [-j for _, j in parts[0][1]])
    assert_close(longer.eidetic.score[0], np.array([e for e, _ in parts[0][1]]))
    np.testing.assert_array_equal(state.eidetic.position[0], [-1] * 3, "the last document is shorter than the window")


WITHOUT_FADING = {"fading": False, "eidetic_slots": 4}


@pytest.mark.parametrize("fields", [{}, WITHOUT_FADING, {"tied": False}], ids=["F", "no fading", "untied"])
@pytest.mark.parametrize("pieces", [(1,) * TOKENS, (2, 9, 1, 4, 1, 6)], ids=["ones", "shorter and longer than the window"])
def test_any_split_is_one_pass(fields, pieces):
  module, x = layer(memory=Mamba2(**MAMBA2), num_key_heads=1, **fields), inputs(2)
  params, state, parts = filled(module, x, std=0.8), None, []
  for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
    y, state = run(module, params, jnp.asarray(piece), state)
    parts.append(y)
  whole, last = run(module, params, x)
  assert_close(jnp.concatenate(parts, axis=1), whole)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, last)


SLIDING = {
  "a window as long as the text: attention": ({"window": TOKENS, "eidetic_slots": 4}, TOKENS),
  "f = u: attention to two windows": ({}, 2 * WINDOW),
  "nothing but the context: attention to one": ({"fading": False}, WINDOW),
  "all older tokens stored: attention to all": ({"fading": False, "eidetic_slots": TOKENS}, TOKENS),
}


@pytest.mark.parametrize("case", SLIDING)
def test_special_cases_are_attention(case):
  fields, window = SLIDING[case]
  module, x, ids = layer(**fields), inputs(2), jnp.asarray(np.repeat([[1, 0, 2], [1, 2, 3]], [8, 1, 14], axis=1), jnp.int32)
  params = filled(module, x, std=0.8)
  attention = Attention(**SIZES | {"window": window})
  assert_close(run(module, params, x, None, ids)[0], run(attention, params, x, None, ids)[0])


def test_of_equal_innovations_the_older_tokens_stay():
  """Orthogonal tokens: those of the first, which nothing predicts, is 1, then 2, 3/2, 4/3, and 5/4 from the fifth on."""
  tokens = 16
  module = layer(eidetic_slots=6, width=tokens)
  x = jnp.eye(tokens)[None]
  _, state = run(module, filled(module, x), x)
  np.testing.assert_array_equal(state.eidetic.position, [[1, 2, 3, 4, 5, 6]])
  assert_close(state.eidetic.score, np.array([[2, 3 / 2, 4 / 3, 5 / 4, 5 / 4, 5 / 4]]) / (1 + 1e-6))


def shares(*, fading, **fields):
  """[8, 8], the share of each of eight tokens in what each reads, by their values or by those of the fading tokens.

  All keys are zero, so that shares are equal, and u = f are unit vectors.
  """
  module = layer(num_heads=1, num_key_heads=1, head_dim=8, tied=False, width=8, **fields)
  x = jnp.eye(8)[None]
  params = jax.tree.map(jnp.zeros_like, filled(module, x))
  own = params["params"]
  for name in ("output", "fading_value" if fading else "value"):
    own[name]["kernel"] = jnp.eye(8)
  return np.asarray(run(module, params, x)[0][0])


def spread(tokens, count):
  """[8], 1 / count at `tokens`."""
  return np.where(np.isin(np.arange(8), tokens), 1 / count, 0)


def test_a_query_sees_the_context_the_fading_tokens_before_it_and_the_stored_ones():
  context, faded, stored = shares(fading=False), shares(fading=True), shares(fading=False, eidetic_slots=2)
  assert_close(context[6], spread([4, 5, 6], 6))
  assert_close(faded[6], spread([1, 2, 3], 6))
  assert_close(context[1], spread([0, 1], 2))
  assert_close(faded[:WINDOW], np.zeros((WINDOW, 8)))
  assert_close(stored[4], spread([0, 1, 2, 3, 4], 7))
  assert_close(stored[7], spread([1, 2, 5, 6, 7], 8))


@pytest.mark.parametrize("block", [1, 4, 12])
def test_the_highest_scores_are_those_of_a_sorted_list(block):
  """Scores with many ties, documents, and steps in which nothing is offered."""
  rng, slots, tokens = np.random.default_rng(3), 3, 12
  score, offers = rng.integers(0, 4, (5, tokens)).astype(np.float64), rng.random((5, tokens)) < 0.8
  ids = np.repeat(1 + np.arange(4)[None], 3, axis=1) * np.ones((5, 1), int)
  ids[:3], ids[3:, 10:] = 1, 0
  docs = documents(jnp.asarray(ids, jnp.int32))
  held = Held(jnp.asarray([[2.0, 2, 0]] * 5), jnp.asarray([[1, 0, -1]] * 5, jnp.int32))
  number = jnp.broadcast_to(slots + jnp.arange(tokens, dtype=jnp.int32)[None], score.shape)
  offered = Offered(jnp.asarray(score), number, jnp.where(offers, docs.index, -1))
  index, mask, last = jax.jit(hold_highest, static_argnums=3)(offered, docs, held, block)
  for row in range(5):
    entries = [(2.0, 0, 1), (2.0, -1, 0)]
    for t in range(tokens):
      if t and ids[row, t] not in (0, ids[row, t - 1]):
        entries = []
      if ids[row, t] and offers[row, t]:
        entries = sorted([*entries, (score[row, t], -2 - t, slots + t)], reverse=True)[:slots]
      n, k = divmod(t, block)
      numbers = [*np.asarray(index)[row, n], *(slots + n * block + np.arange(block))]
      if ids[row, t]:
        assert {numbers[i] for i in np.flatnonzero(mask[row, n, k])} == {e[2] for e in entries}
    np.testing.assert_array_equal(last.index[row], ([e[2] for e in entries] + [-1] * slots)[:slots])
    np.testing.assert_array_equal(last.score[row], ([e[0] for e in entries] + [0] * slots)[:slots])


def test_the_fading_memory_takes_the_layers_dtypes_and_shows_its_matrices():
  memory = GatedDeltaNet(num_heads=2, key_dim=4, value_dim=3)
  module = BMojo(num_heads=2, head_dim=4, window=WINDOW, dtype=jnp.bfloat16, memory=memory)
  x = inputs().astype(jnp.bfloat16)
  params = filled(module, x, std=0.5)
  state = module.apply({}, 1, method="initial_state")
  assert state.memory.key_tail.dtype == state.fading.keys.dtype == jnp.bfloat16
  assert memories(module, state)["fading_memory/memory"].shape == (1, 2, 4, 3)
  kept = retention(module, params, x, every=5)
  assert kept["fading_memory/memory"].cosine.shape[1:] == (1, TOKENS, 1, 2)


@pytest.mark.parametrize("slots", [0, 16])
def test_one_token_reads_the_rings_where_they_lie(slots):
  """A ring that is copied takes as much memory again."""
  module = layer(window=1024, head_dim=32, eidetic_slots=slots, dtype=jnp.float32, param_dtype=jnp.float32)
  x = inputs(2)[:, :1].astype(jnp.float32)
  state = module.apply({}, 2, method="initial_state")
  step = jax.jit(module.apply, donate_argnums=2).lower(filled(module, x), x, state).compile()
  assert step.memory_analysis().temp_size_in_bytes < state.context.keys.nbytes


def test_mistakes_are_named():
  x = jnp.zeros((1, 4, WIDTH))
  with pytest.raises(ValueError, match="width=None"):
    BMojo(**SIZES, eidetic_slots=2).init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="width=9; expected the width of x, 6"):
    BMojo(**SIZES, eidetic_slots=2, width=9).init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="eidetic_slots=-1"):
    layer(eidetic_slots=-1).check_settings()
  with pytest.raises(ValueError, match="num_groups=3"):
    layer(memory=Mamba2(num_heads=4, num_groups=3)).check_settings()
