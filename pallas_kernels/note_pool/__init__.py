"""Attention to pools of notes: some tokens leave a note, a pool keeps a limited number of them, later tokens read it.

    o_t = sum_j w_tj n_j        w_t = softmax over the notes j in the pool of (scale q_t . n_j + log s_j)

n_j is the note of token j and s_j in (0, 1) its score. The pool that token t reads has at most P notes of earlier tokens of its
document. If it is full, a new note

    "fifo"        replaces the oldest
    "priority"    replaces the one with the lowest score, of several the youngest, if its own score is higher; else it is lost

Source: MemMamba (Wang et al. 2025, arXiv:2510.03279).

The paper leaves open -> we do:

- how a scorer learns -> log s_j is added to a note's logit
- what the priority is -> the score
- when a token's note can be read -> from the next token on
- documents -> each begins with an empty pool
"""

import jax
import jax.numpy as jnp

from ..dispatch import Choice, choose_by_length
from ..documents import check_segment_ids
from ..states import check_state
from .chunked import chunked
from .recurrent import recurrent
from .spec import RULES, Notes, Pool, empty_pool

__all__ = ["RULES", "Notes", "Pool", "empty_pool", "explain", "read_notes"]


def read_notes(
  q: jax.Array,
  notes: Notes,
  pool: Pool,
  *,
  rule: str | jax.Array = "fifo",
  scale: float = 1.0,
  segment_ids: jax.Array | None = None,
  chunk_size: int | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, Pool]:
  """Reads L pools together, as one set of notes, while the tokens write to them.

  Args:
    q: [B, T, H, M].
    notes: arrays [L, B, T, ...], what the tokens write to each pool.
    pool: arrays [L, B, ...], the pools before the first token; see `empty_pool`.
    rule: which note a full pool drops, "fifo" or "priority"; or bool [L, B], whether the rule of each pool is "fifo".
    scale: factor of q . n.
    segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding, which leaves no notes and yields zeros.
    chunk_size: tokens that are computed at once; it affects speed only. `None` chooses it.
    implementation: "auto" (default), "recurrent" (the oracle) or "xla" (in chunks). `explain` says what "auto" chooses.

  Returns:
    o [B, T, H, M] in q's dtype, zeros where a token finds no note, and the pools after the last token.

  Raises:
    ValueError: for shapes that do not fit together and for unknown options.
  """
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size}; expected at least 1, or None.")
  if q.ndim != 4 or q.shape[1] == 0:
    raise ValueError(f"q has shape {list(q.shape)}; expected [batch, tokens, heads, width] with at least one token.")
  batch, tokens, _, width = q.shape
  many = notes.notes.shape[0]
  for name, x, axes in (("notes", notes.notes, (width,)), ("log_score", notes.log_score, ()), ("is_note", notes.is_note, ())):
    if x.shape != (many, batch, tokens, *axes):
      raise ValueError(f"notes.{name} has shape {list(x.shape)}; expected {[many, batch, tokens, *axes]} to fit q.")
  if isinstance(rule, str):
    if rule not in RULES:
      raise ValueError(f"rule={rule!r}; expected one of {list(RULES)}.")
    rule = jnp.full((many, batch), rule == "fifo")
  if rule.shape != (many, batch) or rule.dtype != jnp.bool_:
    raise ValueError(f"rule is {rule.dtype}{list(rule.shape)}; expected one of {list(RULES)}, or bool{[many, batch]}.")
  slots = pool.position.shape[-1]
  check_state("pool", "read_notes", pool, jax.eval_shape(lambda: empty_pool((many, batch), slots, width)))
  check_segment_ids(segment_ids, (batch, tokens))
  pool = pool._replace(notes=pool.notes.astype(notes.notes.dtype), log_score=pool.log_score.astype(notes.log_score.dtype))
  chosen = explain(tokens, implementation=implementation).implementation
  if chosen == "recurrent":
    return recurrent(scale, q, notes, pool, rule, segment_ids)
  return chunked(scale, chunk_size, q, notes, pool, rule, segment_ids)


def explain(tokens: int, *, implementation: str = "auto") -> Choice:
  """Says which implementation runs for calls of `tokens` tokens, and why the others do not."""
  return choose_by_length(tokens, "read_notes", implementation)
