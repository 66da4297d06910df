"""The tokens of a split as rows with targets; see `data.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .token_store import Pieces

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Split:
  """The text of one split, concatenated. It is a sequence of rows, each with at least one target: `split[i]` is row `i`.

  Attributes:
    tokens: [tokens] of unsigned integers, in memory or in files.
    document_ends: [documents], ascending; the end of each document in `tokens`.
    num_bytes: size of the text.
    sequence_length: tokens in a row.
    max_documents: the most documents in a row; `None` for any number.
    begin_tokens: how many tokens come before the text of each document; they are neither text nor predicted.
  """

  tokens: np.ndarray | Pieces
  document_ends: np.ndarray
  num_bytes: int
  sequence_length: int
  max_documents: int | None = None
  begin_tokens: int = 0

  @property
  def bytes_per_token(self) -> float:
    """Mean bytes of text in a token. One that ends a document counts, and has none; those that begin it do not count."""
    return self.num_bytes / (self.tokens.size - self.begin_tokens * np.unique(self.document_ends).size)

  @property
  def num_targets(self) -> int:
    """Number of targets of non-zero weight in all rows. The last token of a document has no target."""
    return self.tokens.size - np.count_nonzero(np.diff(self.document_ends, prepend=0))

  def documents(self, start: int, end: int) -> "Split":
    """The split of documents `start` to `end` alone. Nothing is copied."""
    bounds = np.concatenate([[0], self.document_ends])
    part = self.tokens.part if isinstance(self.tokens, Pieces) else lambda first, last: self.tokens[first:last]
    tokens = part(bounds[start], bounds[end])
    num_bytes = round(self.num_bytes * tokens.size / max(1, self.tokens.size))
    ends = self.document_ends[start:end] - bounds[start]
    return Split(tokens, ends, num_bytes, self.sequence_length, self.max_documents, self.begin_tokens)

  @cached_property
  def bounds(self) -> np.ndarray:
    """Ascending; the start of each row in `tokens`, also of those without targets, and the end of the last one."""
    length, last = self.sequence_length, max(1, self.tokens.size - 1)
    if self.max_documents is None:
      return np.minimum(np.arange(math.ceil(last / length) + 1) * length, self.tokens.size)
    bounds, ends = [0], np.append(self.document_ends, np.full(self.max_documents, self.tokens.size))
    while bounds[-1] < last:
      first = np.searchsorted(ends, bounds[-1], side="right")
      bounds.append(min(bounds[-1] + length, int(ends[first + self.max_documents - 1])))
    return np.array(bounds)

  @cached_property
  def _rows(self) -> np.ndarray:
    """[rows]; the places in `bounds` of the rows that have more tokens than last tokens of documents, which have no target."""
    starts, ends = self.bounds[:-1], self.bounds[1:]
    last_tokens = np.searchsorted(np.unique(self.document_ends), self.bounds, side="right")
    return np.flatnonzero(ends - starts > np.diff(last_tokens))

  @property
  def left_out(self) -> int:
    """Number of rows that are left out, for lack of a target."""
    return len(self.bounds) - 1 - len(self)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, row: int) -> Batch:
    """Row `row`: tokens, targets and segment_ids int32, weights float32, all [sequence_length]."""
    place, length = self._rows[int(row)], self.sequence_length
    start, end = self.bounds[place : place + 2]
    window = self.tokens[start : end + 1 if end - start == length else end]  # a full row's last target is the next token
    first, last = np.searchsorted(self.document_ends, (start, start + window.size), side="right")
    ends = self.document_ends[first:last] - start
    segments = (np.searchsorted(ends, np.arange(window.size), side="right") + 1).astype(np.int32)
    window, segments = (np.pad(array, (0, length + 1 - window.size)) for array in (window.astype(np.int32), segments))
    follows = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    return {
      "tokens": window[:-1],
      "targets": window[1:],
      "segment_ids": segments[:-1],
      "weights": follows.astype(np.float32),
    }


def stack_rows(rows: Sequence[Batch]) -> Batch:
  """Rows as one batch."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
