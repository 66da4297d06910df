"""Pools of notes: lists in plain Python, attention and windows as special cases, and chunks against token by token."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.pallas_kernels.note_pool import RULES, Notes, empty_pool, explain, read_notes
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64"), pytest.mark.xdist_group("note_pool")]
POOLS, BATCH, TOKENS, HEADS, SLOTS, WIDTH = 2, 3, 22, 2, 4, 3
IDS = np.stack([
  [0, 0, 1, 2, 2, 3, 3, 3, 0, 3, 4, 4, 4, 4, 4, 4, 0, 4, 4, 4, 4, 4],
  [1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 0, 1, 0, 0, 0, 1, 5, 5, 5, 5, 0, 0],
  [1] * 22,
]).astype(np.int32)  # fmt: skip


def inputs(pools=POOLS, share=0.7, seed=0):
  """Queries and notes; scores are few different numbers, so that many are equal."""
  rng = np.random.default_rng(seed)
  q, notes = rng.normal(size=(BATCH, TOKENS, HEADS, WIDTH)), rng.normal(size=(pools, BATCH, TOKENS, WIDTH))
  log_score = -rng.integers(1, 4, size=(pools, BATCH, TOKENS)) / 2
  is_note = rng.uniform(size=log_score.shape) < share
  return jnp.asarray(q), Notes(jnp.asarray(notes), jnp.asarray(log_score), jnp.asarray(is_note))


def used_pool():
  """Pools with two tokens of a document, not all of which left a note."""
  q, notes = inputs(seed=1)
  notes = jax.tree.map(lambda x: x[:, :, :2], notes)
  return read_notes(q[:, :2], notes, empty_pool((POOLS, BATCH), SLOTS, WIDTH, jnp.float64), implementation="recurrent")[1]


@partial(jax.jit, static_argnums=(0, 1, 5))
def values_and_gradients(implementation, rule, q, notes, pool, chunk_size=None, ids=None):
  """The results, and gradients by all floats of a weighted sum of them."""

  def run(q, written, scored, held, scores):
    return read_notes(
      q,
      Notes(written, scored, notes.is_note),
      pool._replace(notes=held, log_score=scores),
      rule=rule,
      scale=0.7,
      segment_ids=ids,
      chunk_size=chunk_size,
      implementation=implementation,
    )

  def loss(*floats):
    o, after = run(*floats)
    filled = (after.position >= 0).astype(o.dtype)
    weights = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in (o, after.notes, after.log_score)]
    kept = after.notes * filled[..., None], after.log_score * filled
    return sum(jnp.sum(w * x) for w, x in zip(weights, (o, *kept), strict=True)), (o, after)

  floats = q, notes.notes, notes.log_score, pool.notes, pool.log_score
  (_, out), gradients = jax.value_and_grad(loss, argnums=tuple(range(5)), has_aux=True)(*floats)
  return out, gradients


def in_python(rule, q, notes, ids, slots=SLOTS):
  """A pool is a list of (position, score, note); each token reads the lists of all pools, then writes."""
  o = np.zeros(q.shape)
  kept = []
  for b in range(BATCH):
    pools, document, position = [[] for _ in notes.is_note], 0, 0
    for t in np.flatnonzero(ids[b]):
      if document not in (0, ids[b, t]):
        pools, position = [[] for _ in pools], 0
      document = ids[b, t]
      entries = [entry for pool in pools for entry in pool]
      for h in range(HEADS if entries else 0):
        logits = np.array([0.7 * q[b, t, h] @ note + score for _, score, note in entries])
        weights = np.exp(logits - logits.max())
        o[b, t, h] = weights / weights.sum() @ np.array([note for *_, note in entries])
      for l, pool in enumerate(pools):
        if notes.is_note[l, b, t]:
          entry = (position, notes.log_score[l, b, t], notes.notes[l, b, t])
          if len(pool) < slots:
            pool.append(entry)
          elif rule == "fifo":
            pool[:] = [*pool[1:], entry]
          else:
            lowest = min(pool, key=lambda held: (held[1], -held[0]))
            if entry[1] > lowest[1]:
              pool.remove(lowest)
              pool.append(entry)
      position += 1
    kept.append([[place for place, *_ in pool] for pool in pools])
  return o, kept


@pytest.mark.parametrize("implementation", ["recurrent", "xla"])
@pytest.mark.parametrize("rule", RULES)
def test_pools_are_lists_that_a_token_reads_and_then_writes(rule, implementation):
  q, notes = inputs()
  pool = empty_pool((POOLS, BATCH), SLOTS, WIDTH, jnp.float64)
  (o, after), _ = values_and_gradients(implementation, rule, q, notes, pool, 5, jnp.asarray(IDS))
  expected, kept = in_python(rule, np.asarray(q), jax.tree.map(np.asarray, notes), IDS)
  assert_close(o, expected)
  places = [[[int(p) for p in after.position[l, b] if p >= 0] for l in range(POOLS)] for b in range(BATCH)]
  assert places == kept


@pytest.mark.compat
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 5, 22])
@pytest.mark.parametrize("rule", RULES)
def test_chunks_are_the_recurrence_in_values_and_every_gradient(rule, chunk_size, packed):
  """From pools with notes, whose scores and those of new notes are often equal."""
  (q, notes), pool, ids = inputs(), used_pool(), jnp.asarray(IDS) if packed else None
  actual = values_and_gradients("xla", rule, q, notes, pool, chunk_size, ids)
  expected = values_and_gradients("recurrent", rule, q, notes, pool, None, ids)
  assert_close(actual[0], expected[0])
  assert_close(actual[1], expected[1], gradients=True)


def attention(q, notes, visible):
  """Softmax attention of q to the notes of one pool, where `visible` [T, T]; zeros where nothing is."""
  logits = 0.7 * np.einsum("bthm,bjm->bthj", q, notes.notes[0]) + np.asarray(notes.log_score)[0][:, None, None]
  weights = np.exp(logits) * visible[None, :, None]
  total = weights.sum(axis=-1, keepdims=True)
  return np.einsum("bthj,bjm->bthm", weights / np.where(total > 0, total, 1), notes.notes[0])


@pytest.mark.parametrize("rule", RULES)
def test_a_pool_for_all_tokens_is_strictly_causal_attention(rule):
  q, notes = inputs(pools=1, share=2)
  (o, _), _ = values_and_gradients("xla", rule, q, notes, empty_pool((1, BATCH), TOKENS, WIDTH, jnp.float64), 7)
  assert_close(o, attention(q, notes, np.tri(TOKENS, k=-1)))


def test_the_oldest_note_first_is_a_sliding_window():
  q, notes = inputs(pools=1, share=2)
  (o, _), _ = values_and_gradients("xla", "fifo", q, notes, empty_pool((1, BATCH), SLOTS, WIDTH, jnp.float64), 7)
  assert_close(o, attention(q, notes, np.tri(TOKENS, k=-1) - np.tri(TOKENS, k=-1 - SLOTS)))


def test_without_notes_reads_are_zero_and_gradients_finite():
  q, notes = inputs(share=-1)
  (o, _), gradients = values_and_gradients("xla", "fifo", q, notes, empty_pool((POOLS, BATCH), SLOTS, WIDTH, jnp.float64))
  assert not np.any(o)
  assert not any(np.any(np.asarray(g)) for g in gradients)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("t", [0, 6, 21])
def test_a_token_changes_no_read_up_to_its_own(rule, t):
  q, notes = inputs()
  pool = empty_pool((POOLS, BATCH), SLOTS, WIDTH, jnp.float64)
  other = Notes(notes.notes.at[:, :, t].add(1), notes.log_score.at[:, :, t].add(3), notes.is_note.at[:, :, t].set(True))
  (before, _), (after, _) = (read_notes(q, n, pool, rule=rule, chunk_size=5) for n in (notes, other))
  assert_close(before[:, : t + 1], after[:, : t + 1])
  assert t == 21 or np.any(before[:, t + 1] != after[:, t + 1])


def test_pools_of_different_rules_are_read_together():
  (q, notes), pool = inputs(), used_pool()
  mixed = jnp.broadcast_to(jnp.array([True, False])[:, None], (POOLS, BATCH))
  results = {name: read_notes(q, notes, pool, rule=mixed, implementation=name, chunk_size=5) for name in ("xla", "recurrent")}
  assert_close(results["xla"], results["recurrent"])
  for l, rule in enumerate(RULES):
    _, own = read_notes(q, notes, pool, rule=rule)
    assert_close(jax.tree.map(lambda x, l=l: x[l], results["xla"][1]), jax.tree.map(lambda x, l=l: x[l], own))


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"rule": "lru"}, "rule='lru'; expected one of ['fifo', 'priority']."),
    ({"rule": jnp.zeros((2, 3))}, "rule is float32[2, 3]; expected one of ['fifo', 'priority'], or bool[2, 3]."),
    ({"chunk_size": 0}, "chunk_size=0; expected at least 1, or None."),
    ({"q": jnp.zeros((3, 22, 3))}, "q has shape [3, 22, 3]; expected [batch, tokens, heads, width] with at least one token."),
    ({"q": jnp.zeros((3, 22, 2, 5))}, "notes.notes has shape [2, 3, 22, 3]; expected [2, 3, 22, 5] to fit q."),
    ({"pool": empty_pool((1, 3), SLOTS, 3)}, "pool.notes has shape [1, 3, 4, 3]; expected [2, 3, 4, 3]"),
    ({"implementation": "cuda"}, "implementation='cuda' does not exist for read_notes"),
  ],
)
def test_mistakes_are_named(wrong, message):
  q, notes = inputs()
  right = {"q": q, "notes": notes, "pool": used_pool()}
  with pytest.raises(ValueError, match=re.escape(message)):
    read_notes(**right | wrong)


def test_one_token_is_the_recurrence_and_more_are_chunks():
  assert [explain(tokens).implementation for tokens in (1, 2)] == ["recurrent", "xla"]
