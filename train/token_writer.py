"""Writes a store of tokens (`token_store.py`): in pieces, so that whoever was stopped goes on after the last complete one."""

import hashlib
import io
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..zoo.formats import thousands
from .files import read_record, write_record
from .lock import Lock
from .sources import Document, Source
from .token_store import DOCUMENT, DOCUMENTS, INDEX, TOKENS, Index, TokenStore, name_hash

WITHOUT_TOKENS = "documents or parts without tokens"
_PROGRESS = "progress.json"
_BATCH = 2**23  # bytes of text that are encoded at once
_PIECE = 2**28  # bytes of text in a piece
_HEADER = 256  # bytes of the header of a NumPy file with one axis
_POLL = 1.0  # seconds

Report = Callable[[int, int], None]


@dataclass
class _Progress:
  """How much of a store is written.

  Attributes:
    key: a digest of what is written.
    source, file, read: the source, its file, and the number of documents of that file that have been read.
    tokens, documents, bytes: what is written.
    skipped: how many things were skipped in the files before that one, by what they are.
    without: documents without tokens.
  """

  key: str
  source: int = 0
  file: int = 0
  read: int = 0
  tokens: int = 0
  documents: int = 0
  bytes: int = 0
  skipped: dict[str, int] = field(default_factory=dict)
  without: int = 0


def write_store(
  folder: Path, sources: Sequence[Source], tokenizer: Any, name: str, report: Report = lambda text, documents: None
) -> TokenStore:
  """Writes the tokens of all documents of `sources`, or continues, or finds it done. Other processes that want the same wait.

  Args:
    folder: where; it is made if it is missing.
    sources: from `read_sources`.
    tokenizer: from `load_tokenizer`.
    name: of the tokenizer, for `index.json`.
    report: called with the bytes of text and the number of documents written so far.

  Raises:
    ValueError: if the folder holds something else, or a source cannot be used.
  """
  key = text_digest(sources, tokenizer)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"{folder} cannot be written to ({error.strerror}); expected a folder of your own.") from None
  while not (folder / INDEX).exists():
    foreign = [path.name for path in folder.iterdir() if path.name not in (TOKENS, DOCUMENTS, _PROGRESS, ".lock")]
    if foreign:
      raise ValueError(f"{folder} holds {foreign[0]}; expected an empty or new folder.")
    try:
      lock = Lock(folder)
    except ValueError:  # another process writes it
      time.sleep(_POLL)
      continue
    try:
      if not (folder / INDEX).exists():
        _Writer(folder, sources, tokenizer, key, report).write(name)
    finally:
      lock.release()
  store = TokenStore(folder)
  if store.index.key != key:
    raise ValueError(f"{folder} holds the tokens of other text, or of another tokenizer; expected a new folder.")
  return store


def text_progress(say: Callable[[str], None], every: float = 5.0) -> Report:
  """Returns a `report` for `write_store`, which says every few seconds how much is written."""
  began = last = time.perf_counter()

  def report(text: int, documents: int) -> None:
    nonlocal last
    now = time.perf_counter()
    if now - last >= every:
      last = now
      rate = thousands(text / (now - began), "B")
      say(f"Writing tokens: {thousands(text, 'B')} of text in {documents:,} documents so far, {rate}/s.")

  return report


def text_digest(sources: Sequence[Source], tokenizer: Any) -> str:
  """A digest of the files and of how they are read; of a file its path, its size and when it was changed."""
  digest = hashlib.blake2b(tokenizer.digest.encode(), digest_size=16)
  for source in sources:
    digest.update("\0".join([source.field, *source.identity]).encode())
  return digest.hexdigest()


class _Encoded(NamedTuple):
  """Documents and their tokens, and how much will have been written with them."""

  documents: list[Document]
  tokens: Future
  after: _Progress


class _Writer:
  """Reads documents in one thread and encodes those before in another."""

  def __init__(self, folder: Path, sources: Sequence[Source], tokenizer: Any, key: str, report: Report):
    self._folder, self._sources, self._tokenizer, self._report = folder, sources, tokenizer, report
    self._dtype = tokenizer.encode_documents([])[0].dtype
    self._found = sum((source.skipped for source in sources), Counter())  # without reading
    path = folder / _PROGRESS
    self._progress = read_record(_Progress, path, "remove the folder") if path.exists() else _Progress(key)
    if self._progress.key != key:
      self._progress = _Progress(key)
    self._saved = self._progress.bytes

  def write(self, name: str) -> None:
    with ThreadPoolExecutor(1) as pool, self._open(TOKENS) as tokens, self._open(DOCUMENTS) as documents:
      self._cut(tokens, documents)
      before = None
      for batch, after in self._batches():
        encoded = _Encoded(batch, pool.submit(self._tokenizer.encode_documents, batch), after)
        if before:
          self._append(before, tokens, documents)
        before = encoded
      if before:
        self._append(before, tokens, documents)
      for file, dtype, count in ((tokens, self._dtype, self._progress.tokens), (documents, DOCUMENT, self._progress.documents)):
        file.seek(0)
        file.write(_header(dtype, count))
        _flush(file)
    self._finish(name)

  def _open(self, name: str) -> IO[bytes]:
    path = self._folder / name
    path.touch()
    return path.open("r+b")

  def _cut(self, tokens: IO[bytes], documents: IO[bytes]) -> None:
    """Goes to the end of what is written for sure."""
    for file, width, count in (
      (tokens, self._dtype.itemsize, self._progress.tokens),
      (documents, DOCUMENT.itemsize, self._progress.documents),
    ):
      file.truncate(_HEADER + width * count)
      file.seek(0, os.SEEK_END)

  def _batches(self) -> Iterator[tuple[list[Document], _Progress]]:
    """Documents that are not written yet, in batches, and the progress after each, without numbers of tokens."""
    batch, size, at = [], 0, self._progress
    for at, document in self._documents():
      batch.append(document)
      size += len(document.text)
      if size >= _BATCH:
        yield batch, at
        batch, size = [], 0
    yield batch, at

  def _documents(self) -> Iterator[tuple[_Progress, Document]]:
    begun = self._progress
    skipped = Counter(begun.skipped)
    for number in range(begun.source, len(self._sources)):
      source = self._sources[number]
      for file in range(begun.file if number == begun.source else 0, len(source.files)):
        read = begun.read if (number, file) == (begun.source, begun.file) else 0
        before, known = dict(skipped), Counter(source.skipped)
        for count, document in enumerate(source.read_one(file), start=1):
          if count > read:
            yield _Progress(begun.key, number, file, count, skipped=before), document
        skipped += source.skipped - known
    self._skipped = skipped

  def _append(self, encoded: _Encoded, tokens: IO[bytes], documents: IO[bytes]) -> None:
    """Writes a batch, and makes sure of it at the end of a piece."""
    ids, lengths = encoded.tokens.result()
    kept = lengths > 0
    found = np.zeros(len(lengths), DOCUMENT)
    found["end"] = self._progress.tokens + np.cumsum(lengths)
    found["name"] = [name_hash(document.name) for document in encoded.documents]
    found["bytes"] = [len(document.text) for document in encoded.documents]
    tokens.write(np.ascontiguousarray(ids).data)
    documents.write(found[kept].tobytes())
    written = self._progress
    self._progress = replace(
      encoded.after,
      tokens=written.tokens + len(ids),
      documents=written.documents + int(kept.sum()),
      bytes=written.bytes + int(found["bytes"].sum()),
      without=written.without + int((~kept).sum()),
    )
    self._report(self._progress.bytes, self._progress.documents)
    if self._progress.bytes - self._saved >= _PIECE:
      _flush(tokens)
      _flush(documents)
      write_record(self._folder / _PROGRESS, self._progress)
      self._saved = self._progress.bytes

  def _finish(self, name: str) -> None:
    """Writes the index, with which the store is complete."""
    progress, sources = self._progress, [source.name for source in self._sources]
    skipped = self._found + self._skipped + Counter({WITHOUT_TOKENS: progress.without})
    if not progress.tokens:
      raise ValueError(f"TextData.sources names {', '.join(map(repr, sources))}, without any tokens; expected text.")
    index = Index(
      tokenizer=name,
      tokenizer_digest=self._tokenizer.digest,
      vocab_size=self._tokenizer.vocab_size,
      tokens=progress.tokens,
      documents=progress.documents,
      digest=_digest(self._folder / TOKENS, self._folder / DOCUMENTS),
      key=progress.key,
      sources=sources,
      skipped={what: count for what, count in skipped.items() if count},
    )
    write_record(self._folder / INDEX, index, indent=1)
    (self._folder / _PROGRESS).unlink(missing_ok=True)


def _header(dtype: np.dtype, count: int) -> bytes:
  file = io.BytesIO()
  described = np.lib.format.dtype_to_descr(dtype)
  np.lib.format.write_array_header_1_0(file, {"descr": described, "fortran_order": False, "shape": (count,)})
  header = file.getvalue()
  # The format allows spaces before the line's end.
  padded = header[:-1].ljust(_HEADER - 1) + b"\n"
  return padded[:8] + (_HEADER - 10).to_bytes(2, "little") + padded[10:]


def _flush(file: IO[bytes]) -> None:
  file.flush()
  os.fsync(file.fileno())


def _digest(*paths: Path) -> str:
  digest = hashlib.blake2b(digest_size=16)
  for path in paths:
    with path.open("rb") as file:
      while part := file.read(2**24):
        digest.update(part)
  return digest.hexdigest()
