"""Text as tokens in a folder, written once and read where it lies: for text that does not fit in memory.

    tokens.npy      uint8, uint16 or uint32 [tokens]: all documents, one after another
    documents.npy   [documents]: of each document the end of its tokens, the hash of its name, and the bytes of its text
    index.json      which tokenizer made them, how many they are, and a digest of both files

Both arrays are ordinary NumPy files. Rows of tokens are read from the file when they are needed, without mapping it into
memory, so a run needs memory for 24 bytes of each document, and for none of its tokens. Documents are split into training and
validation by the hashes of their names, as documents in memory are.

`token_writer.py` writes it.
"""

import bisect
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .files import read_record

TOKENS, DOCUMENTS, INDEX = "tokens.npy", "documents.npy", "index.json"
# Of each document: the end of its tokens, a hash of its name, and the bytes of its text.
DOCUMENT = np.dtype([("end", "<i8"), ("name", "<u8"), ("bytes", "<i8")])


def name_hash(name: str) -> int:
  """64 bits that stand for a document's name. The split into training and validation depends on nothing else."""
  return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class TokenFile:
  """An array [tokens] in a NumPy file, of which `file[start:end]` reads a part. `digest`, if given, stands for its content."""

  def __init__(self, path: Path, digest: str | None = None):
    self.digest = digest
    with path.open("rb") as file:
      np.lib.format.read_magic(file)
      (self.size,), _, self.dtype = np.lib.format.read_array_header_1_0(file)
      self._offset = file.tell()
    if path.stat().st_size < self._offset + self.size * self.dtype.itemsize:
      raise ValueError(f"{path.name} is shorter than its header says")
    self._path = path
    self._file = os.open(path, os.O_RDONLY)

  def __getitem__(self, places: slice) -> np.ndarray:
    start, end, _ = places.indices(self.size)
    width = self.dtype.itemsize
    parts, place, last = [], self._offset + start * width, self._offset + max(start, end) * width
    while place < last:  # one call reads 2 GiB at most
      parts.append(os.pread(self._file, last - place, place))
      if not parts[-1]:
        raise OSError(f"{self._path} has become shorter while it is read")
      place += len(parts[-1])
    return np.frombuffer(b"".join(parts), self.dtype)

  def __del__(self):
    if hasattr(self, "_file"):
      os.close(self._file)


class Pieces:
  """Parts of arrays as one array [size], of which `pieces[start:end]` reads a part.

  Attributes:
    arrays: arrays [n], in memory or files.
    array, start: of each piece the number of its array, and where it begins there.
    ends: of each piece its end in the whole.
  """

  def __init__(self, arrays: Sequence[np.ndarray | TokenFile], array: np.ndarray, start: np.ndarray, lengths: np.ndarray):
    self.arrays, self.array, self.start, self.ends = list(arrays), array, start, np.cumsum(lengths)

  @property
  def size(self) -> int:
    return int(self.ends[-1]) if self.ends.size else 0

  @property
  def dtype(self) -> np.dtype:
    return np.result_type(*(array.dtype for array in self.arrays))

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, places: slice) -> np.ndarray:
    start, end, step = places.indices(self.size)
    parts = [self.arrays[array][first:last] for array, first, last in self._between(start, end)]
    return np.concatenate([np.zeros(0, self.dtype), *parts])[::step]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del copy
    return self[:].astype(dtype or self.dtype)

  def part(self, start: int, end: int) -> "Pieces":
    """The array [start:end], not read yet."""
    found = np.array(list(self._between(start, end)), np.int64).reshape(-1, 3)
    return Pieces(self.arrays, found[:, 0], found[:, 1], found[:, 2] - found[:, 1])

  def blocks(self, size: int = 2**24) -> Iterator[np.ndarray]:
    """All of it, in parts of at most `size`."""
    for start in range(0, self.size, size):
      yield self[start : start + size]

  def _between(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The number of the array, the start and the end there, of each part of [start:end]."""
    piece = bisect.bisect_right(self.ends, start)
    while start < end:
      begins = int(self.ends[piece - 1]) if piece else 0
      last = min(end, int(self.ends[piece]))
      first = int(self.start[piece]) + start - begins
      yield int(self.array[piece]), first, first + last - start
      start, piece = last, piece + 1


def joined(parts: Sequence[np.ndarray | Pieces]) -> Pieces:
  """Arrays one after another, not copied."""
  parts = [part if isinstance(part, Pieces) else _whole(part) for part in parts]
  first = np.cumsum([0, *(len(part.arrays) for part in parts)])
  return Pieces(
    [array for part in parts for array in part.arrays],
    np.concatenate([part.array + number for part, number in zip(parts, first, strict=False)]),
    np.concatenate([part.start for part in parts]),
    np.concatenate([np.diff(part.ends, prepend=0) for part in parts]),
  )


def _whole(array: np.ndarray | TokenFile) -> Pieces:
  zero = np.zeros(1, np.int64)
  return Pieces([array], zero, zero, np.array([array.size]))


@dataclass(frozen=True)
class Index:
  """What `index.json` holds.

  Attributes:
    tokenizer: as `TextData.tokenizer` was.
    tokenizer_digest: of the content of the tokenizer.
    vocab_size: one more than its largest token.
    tokens, documents: their numbers.
    digest: of both arrays.
    key: a digest of where the text was and how it was read.
    sources: of the text.
    skipped: number of things that were skipped, by what they are.
  """

  tokenizer: str
  tokenizer_digest: str
  vocab_size: int
  tokens: int
  documents: int
  digest: str
  key: str
  sources: Sequence[str] = ()
  skipped: dict[str, int] = field(default_factory=dict)


class TokenStore:
  """A complete folder of tokens.

  Args:
    folder: where it is.
    trusted: whether its digest stands for the tokens, in the fingerprint of a run; else all of them are read for it.

  Attributes:
    index: see `Index`.
    tokens: all tokens.
    ends: of each document the end of its tokens.
    num_bytes: of each document the bytes of its text.

  Raises:
    ValueError: if the folder is not complete, or damaged.
  """

  def __init__(self, folder: Path, trusted: bool = False):
    self.index = read_record(Index, folder / INDEX, "write the tokens anew with `memzoo tokenize`")
    try:
      self.tokens = TokenFile(folder / TOKENS, self.index.digest if trusted else None)
      documents = np.load(folder / DOCUMENTS)
    except (OSError, ValueError) as error:
      raise ValueError(f"{folder} has not all files of tokens ({error}); write it anew with `memzoo tokenize`.") from None
    if (self.tokens.size, len(documents)) != (self.index.tokens, self.index.documents):
      raise ValueError(f"{folder} has not the tokens that its {INDEX} tells; write it anew with `memzoo tokenize`.")
    self.ends, self._names, self.num_bytes = (np.ascontiguousarray(documents[name]) for name in DOCUMENT.names)

  def split(self, fraction: float) -> tuple["Part", "Part"]:
    """Training and validation, as `data.split_documents` does it, by the hashes of names."""
    starts, ends, num_bytes = np.append(0, self.ends[:-1]), self.ends, self.num_bytes
    is_validation = self._names < np.uint64(math.ceil(fraction * 2**64))
    if is_validation.any() and not is_validation.all():
      return self._part(starts, ends, num_bytes, ~is_validation), self._part(starts, ends, num_bytes, is_validation)
    last = np.ceil((ends - starts) * fraction).astype(np.int64)
    cuts, of_last = ends - last, num_bytes * last // (ends - starts)
    return self._part(starts, cuts, num_bytes - of_last, cuts > starts), self._part(cuts, ends, of_last, last > 0)

  def _part(self, starts: np.ndarray, ends: np.ndarray, num_bytes: np.ndarray, chosen: np.ndarray) -> "Part":
    starts, ends = starts[chosen], ends[chosen]
    begins = np.append(True, starts[1:] != ends[:-1]) if starts.size else np.zeros(0, bool)  # of a piece
    first = np.flatnonzero(begins)
    lengths = np.add.reduceat(ends - starts, first) if first.size else first
    tokens = Pieces([self.tokens], np.zeros(first.size, np.int64), starts[first], lengths)
    return Part(tokens, ends - starts, int(num_bytes[chosen].sum()))


@dataclass(frozen=True)
class Part:
  """Documents: their tokens, how many each has, [documents], the bytes of their text, and how many others have no tokens."""

  tokens: np.ndarray | Pieces
  lengths: np.ndarray
  num_bytes: int
  without: int = 0


def update_digest(digest: Any, tokens: np.ndarray | Pieces) -> None:
  """Adds tokens to a digest of `hashlib`. Of files with a digest only that is added: the ends of documents tell the parts."""
  if not isinstance(tokens, Pieces):
    digest.update(tokens.data)
  elif not any(getattr(array, "digest", None) for array in tokens.arrays):
    for block in tokens.blocks():
      digest.update(block.data)
  else:
    for array in tokens.arrays:
      digest.update(array.digest.encode() if getattr(array, "digest", None) else array[:].data)


def is_store(path: Path) -> bool:
  """Whether a folder holds tokens."""
  return (path / INDEX).is_file() and (path / TOKENS).is_file()
