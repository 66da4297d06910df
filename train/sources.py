"""Text from the standard library's source, files, folders and globs; and tokenizers."""

import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Tests and tables of character sets. They are near copies of one another and would leak from training to validation.
_NOT_STDLIB_TEXT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})


class Document(NamedTuple):
  """One text. `name` is relative to its source, so it is the same on every machine."""

  name: str
  text: bytes


def read_documents(sources: str | Sequence[str], field: str = "text") -> list[Document]:
  """All documents of `sources` in one list; see `read_sources`."""
  return [document for source in read_sources(sources, field) for document in source]


def read_sources(sources: str | Sequence[str], field: str = "text") -> list[list[Document]]:
  """The documents of each of `sources`, sorted by name within each.

  Args:
    sources: one or several of "stdlib" (the *.py files of Python's standard library), a file, a folder (its text files at
      any depth, without hidden and binary ones) or a glob. Every line of a *.jsonl file is a document; any other file is
      one document. Files may be compressed (*.gz).
    field: the field of a JSONL line's object that holds the text.

  Raises:
    ValueError: if a source is missing, cannot be read or holds no text, or a line of JSONL is malformed.
  """
  sources = [sources] if isinstance(sources, str) else list(sources)
  if not sources:
    raise ValueError('TextData.sources is empty; expected "stdlib", or a file, folder or glob.')
  return [_read_source(source, field) for source in sources]


def _read_source(source: str, field: str) -> list[Document]:
  if source == "stdlib":
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _walk(root, _NOT_STDLIB_TEXT) if path.suffix == ".py"]
    documents = [Document(_name(path, root), _read(source, path)) for path in paths]
  else:
    documents = list(_read_paths(source, field))
  documents = [document for document in documents if document.text]
  if not documents:
    raise ValueError(f"TextData.sources names {source!r}, which holds no text; expected a file that is not empty.")
  return documents


def _read_paths(source: str, field: str) -> Iterator[Document]:
  expanded = os.path.expanduser(source)
  if os.path.isdir(expanded):
    root = Path(expanded)
    for path in _walk(root, frozenset()):
      yield from _read_file(source, path, _name(path, root), field, skip_binary=True)
    return
  paths = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
  paths = [path for path in paths if not os.path.isdir(path)]
  if not paths:
    raise ValueError(
      f"TextData.sources names {source!r}, which matches no file here ({os.getcwd()}); expected \"stdlib\", or the path of "
      "a file or folder, or a glob."
    )
  root = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
  for path in map(Path, paths):
    yield from _read_file(source, path, _name(path, root), field, skip_binary=len(paths) > 1)


def _read_file(source: str, path: Path, name: str, field: str, skip_binary: bool) -> Iterator[Document]:
  text = _read(source, path)
  if path.name.removesuffix(".gz").endswith(".jsonl"):
    yield from _json_lines(path, name, text, field)
  elif not (skip_binary and b"\0" in text[:8192]):
    yield Document(name, text)


def _json_lines(path: Path, name: str, text: bytes, field: str) -> Iterator[Document]:
  for number, line in enumerate(text.split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)[field]
      yield Document(f"{name}:{number}", value.encode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f'{path}, line {number}: expected a JSON object with a field "{field}" that is a string '
        f"({type(error).__name__}: {error})."
      ) from None


def _walk(root: Path, left_out: frozenset[str]) -> Iterator[Path]:
  """Files under `root` sorted by name, without hidden ones and folders named in `left_out`."""
  for folder, folders, files in os.walk(root):
    folders[:] = sorted(name for name in folders if name not in left_out and not name.startswith((".", "__pycache__")))
    yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _name(path: Path, root: Path) -> str:
  return path.relative_to(root).as_posix()


def _read(source: str, path: Path) -> bytes:
  try:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content
  except (OSError, EOFError, zlib.error) as error:
    reason = getattr(error, "strerror", None) or error
    raise ValueError(f"TextData.sources names {source!r}, but {path} cannot be read: {reason}.") from None


class ByteTokenizer:
  """Tokens are the bytes of the UTF-8 text; none is special."""

  vocab_size = 256

  def encode(self, text: str) -> list[int]:
    """The tokens of `text`."""
    return list(text.encode())

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of `tokens`. Bytes that are not valid UTF-8 become U+FFFD."""
    return bytes(int(token) & 255 for token in tokens).decode(errors="replace")

  def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
    """The tokens of each document, in the smallest dtype that holds them."""
    return [np.frombuffer(document.text, np.uint8) for document in documents]


class FileTokenizer:
  """A `tokenizer.json` of the `tokenizers` library, used without special tokens."""

  def __init__(self, path: str):
    """Loads the file at `path`.

    Raises:
      ValueError: if the library is not installed, or the file is missing or is not a tokenizer.
    """
    _need_tokenizers(f"TextData.tokenizer is {path!r}, which")
    from tokenizers import Tokenizer

    if not os.path.isfile(path):
      raise ValueError(f'TextData.tokenizer is {path!r}, not a file; expected "bytes" or the path of a tokenizer.json.')
    try:
      self._tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception
      raise ValueError(f"TextData.tokenizer is {path!r}, which is not a tokenizer.json: {error}.") from None
    self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str) -> list[int]:
    """The tokens of `text`."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of `tokens`."""
    return self._tokenizer.decode([int(token) for token in tokens])

  def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
    """The tokens of each document, in the smallest dtype that holds them."""
    dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
    texts = [document.text.decode(errors="replace") for document in documents]
    encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(encoding.ids, dtype) for encoding in encodings]


def _need_tokenizers(what: str) -> None:
  try:
    import tokenizers  # noqa: F401
  except ImportError:
    raise ValueError(
      f'{what} needs the tokenizers library: pip install "memzoo[hub]". The default, "bytes", needs nothing.'
    ) from None


def load_tokenizer(name: str) -> ByteTokenizer | FileTokenizer:
  """The tokenizer that `TextData.tokenizer` names: "bytes", or the path of a tokenizer.json."""
  return ByteTokenizer() if name == "bytes" else FileTokenizer(os.path.expanduser(name))


def train_tokenizer(sources: str | Sequence[str], vocab_size: int, path: str | os.PathLike, field: str = "text") -> int:
  """Learns byte-pair merges from text and writes them as a `tokenizer.json`. It can encode any text.

  Args:
    sources, field: as for `read_sources`.
    vocab_size: number of tokens, including the 256 bytes.
    path: path of the file to write.

  Returns:
    The number of tokens; fewer than `vocab_size` if the text has no more pairs.

  Raises:
    ValueError: if a source cannot be used, or `vocab_size` is less than 256.
  """
  if vocab_size < 256:
    raise ValueError(f"vocab_size is {vocab_size}; expected at least 256, one for each byte.")
  _need_tokenizers("learning a tokenizer")
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
  texts = (document.text.decode(errors="replace") for document in read_documents(sources, field))
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(os.fspath(path))
  return tokenizer.get_vocab_size()
