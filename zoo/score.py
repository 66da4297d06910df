"""How likely a model finds given continuations of given texts.

    score(model, params, [(context, continuation), ...])      # log p(continuation | context), and whether it is the likeliest

Rows are read in pieces whose state is carried on, so a context of any length counts as a whole, in memory that does not grow.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .generate import padded_length

_SHORTEST, _PIECE = 16, 256  # lengths of the calls: powers of two from the one to the other, so few are compiled


class Score(NamedTuple):
  """Of one continuation.

  Attributes:
    log_likelihood: log p(continuation | context), in nats.
    is_greedy: whether each of its tokens is the likeliest after those before it.
  """

  log_likelihood: float
  is_greedy: bool


def score(
  model: nn.Module,
  params: Any,
  rows: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  batch_size: int = 8,
  advance: Callable[[int], None] = lambda rows: None,
) -> list[Score]:
  """The scores of continuations.

  Args:
    model: an unbound `LanguageModel`.
    params: its variables, as `model.init` returns them.
    rows: pairs of lists of tokens, a context of at least one token and a continuation of any number.
    batch_size: rows in a call; the longest go first.
    advance: called with the number of rows that were done.

  Raises:
    ValueError: if a context is empty, or a token is not one of the model's.
  """
  for i, (context, continuation) in enumerate(rows):
    if not len(context):
      raise ValueError(f"rows[{i}] has an empty context; expected at least one token, such as that which begins a text.")
    tokens = np.asarray([*context, *continuation])
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
      raise ValueError(f"rows[{i}] has tokens from {tokens.min()} to {tokens.max()}; expected 0 to {model.vocab_size - 1}.")
  order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
  scores: list[Score | None] = [None] * len(rows)
  for start in range(0, len(rows), batch_size):
    chosen = order[start : start + batch_size]
    for i, found in zip(chosen, _score_batch(model, params, [rows[i] for i in chosen], batch_size), strict=False):
      scores[i] = found
    advance(len(chosen))
  return scores


def _score_batch(model, params, rows, size: int) -> list[Score]:
  longest = max(len(context) + len(continuation) - 1 for context, continuation in rows)
  length = padded_length(longest, _SHORTEST, _PIECE)
  tokens, targets, ids, counts = (np.zeros((size, length), np.int32) for _ in range(4))
  for i, (context, continuation) in enumerate(rows):
    row = np.asarray([*context, *continuation], np.int32)
    last = len(row) - 1
    tokens[i, :last], targets[i, :last], ids[i, :last] = row[:-1], row[1:], 1
    counts[i, len(context) - 1 : last] = 1
  state, piece = None, min(length, _PIECE)
  total, right = np.zeros(size), np.ones(size, bool)
  for start in range(0, length, piece):
    part = slice(start, start + piece)
    log_p, is_likeliest, state = _read(model, params, *(jnp.asarray(a[:, part]) for a in (tokens, targets, ids)), state)
    counted = counts[:, part] == 1
    total += np.where(counted, np.asarray(log_p, np.float64), 0).sum(axis=1)
    right &= (np.asarray(is_likeliest) | ~counted).all(axis=1)
  return [Score(float(a), bool(b)) for a, b in zip(total, right, strict=True)]


@partial(jax.jit, static_argnames="model")
def _read(model, params, tokens, targets, ids, state):
  """log p of the targets [B, T], whether they are the likeliest tokens, and the state."""
  logits, state = model.apply(params, tokens, state, ids)
  logits = logits.astype(jnp.float32)
  found = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return found - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets, state
