"""Packed documents and padding: the one place that defines what `segment_ids` mean.

`segment_ids` is int32 [B, T]. Equal neighbours belong to one document, a change starts another document, and 0 is padding.
Padding has no effect: the tokens before and after it are neighbours. The first token of a call continues the incoming state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from .partition import ROWS, partitioned


class Documents(NamedTuple):
  """`segment_ids` in the form that the operations use.

  Attributes:
    index: int32 [B, T], non-decreasing along T: the number of the document within the call. Document 0 is the one that the
      incoming state belongs to. Padding has the index of the last token before it.
    is_token: bool [B, T], false at padding.
  """

  index: jax.Array
  is_token: jax.Array

  @property
  def starts(self) -> jax.Array:
    """bool [B, T]: the first tokens of the documents that begin in this call."""
    return jnp.diff(self.index, axis=1, prepend=0) > 0


def check_segment_ids(segment_ids: jax.Array | None, shape: tuple[int, int]) -> None:
  """Raises `ValueError` unless `segment_ids` is `None` or integers of `shape` (batch, tokens)."""
  if segment_ids is None:
    return
  if segment_ids.shape != shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(
      f"segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}; expected integers of shape {list(shape)} (batch, tokens)."
    )


def documents(segment_ids: jax.Array) -> Documents:
  """Numbers the documents of each row of `segment_ids` [B, T]."""
  return partitioned(_documents, P(ROWS), P(ROWS))(segment_ids)


def _documents(segment_ids: jax.Array) -> Documents:
  is_token = segment_ids != 0
  previous = _previous_token(is_token)
  before = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
  starts = is_token & (previous >= 0) & (segment_ids != before)
  return Documents(jnp.cumsum(starts, axis=1, dtype=jnp.int32), is_token)


def undivided(batch: int, tokens: int) -> Documents:
  """One document per row, without padding."""
  return Documents(jnp.zeros((batch, tokens), jnp.int32), jnp.ones((batch, tokens), bool))


def positions(docs: Documents, offset: jax.Array) -> jax.Array:
  """Index of each token within its document, int32 [B, T].

  Args:
    docs: the documents.
    offset: int32 [B], number of tokens of document 0 in earlier calls.
  """
  return partitioned(_positions, P(ROWS), P(ROWS))(docs, offset)


def _positions(docs: Documents, offset: jax.Array) -> jax.Array:
  count = jnp.cumsum(docs.is_token, axis=1, dtype=jnp.int32) - 1
  first = jax.lax.cummax(jnp.where(docs.starts, count, 0), axis=1)
  return count - first + jnp.where(docs.index == 0, offset[:, None], 0)


def select_rows(condition: jax.Array | None, yes: Any, no: Any) -> Any:
  """Selects rows from two trees of arrays [B, ...] by `condition` [B]; returns `no` if the condition is `None`."""
  if condition is None:
    return no
  return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)


def _previous_token(is_token: jax.Array) -> jax.Array:
  """Column of the last token strictly before each column; -1 if there is none."""
  columns = jnp.arange(is_token.shape[1], dtype=jnp.int32)
  last = jax.lax.cummax(jnp.where(is_token, columns[None], -1), axis=1)
  return jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
