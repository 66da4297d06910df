"""Text from the standard library's source, files, folders and globs."""

import glob
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Tests and tables of character sets. They are near copies of one another and would leak from training to validation.
_NOT_STDLIB_TEXT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})


class Document(NamedTuple):
  """One text.

  `name` is relative to the source: to the folder, to the part of a glob before its first wildcard, or to the file's own folder.
  So it is the same on every machine, and other files do not change it.
  """

  name: str
  text: bytes


class Source(NamedTuple):
  """The documents of a source, and how many things in it were skipped, by what they are."""

  name: str
  documents: list[Document]
  skipped: Counter[str]


def read_documents(sources: str | Sequence[str], field: str = "text") -> list[Document]:
  """All documents of `sources` in one list; see `read_sources`."""
  return [document for source in read_sources(sources, field) for document in source.documents]


def read_sources(sources: str | Sequence[str], field: str = "text") -> list[Source]:
  """Reads each of `sources`.

  Args:
    sources: one or several of "stdlib" (the *.py files of Python's standard library), a file, a folder (its text files at
      any depth, also in linked folders, without hidden and binary ones) or a glob (without hidden and binary files). Every
      line of a *.jsonl file is a document; any other file is one document. Files may be compressed (*.gz).
    field: the field of a JSONL line's object that holds the text.

  Raises:
    ValueError: if a source is missing, cannot be read or holds no text, or a line of JSONL is malformed.
  """
  sources = [sources] if isinstance(sources, str) else list(sources)
  if not sources:
    raise ValueError('TextData.sources is empty; expected "stdlib", or a file, folder or glob.')
  return [_read_source(source, field) for source in sources]


def skipped_in_words(skipped: Counter[str]) -> str:
  """A sentence that follows another, such as " Skipped: binary files (3)."; empty if nothing was skipped."""
  return f" Skipped: {', '.join(f'{what} ({count:,})' for what, count in sorted(skipped.items()))}." if skipped else ""


def _read_source(source: str, field: str) -> Source:
  skipped: Counter[str] = Counter()
  if source == "stdlib":
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _walk(source, root, _NOT_STDLIB_TEXT) if path.suffix == ".py"]
    documents = [Document(_name(path, root), _read(source, path)) for path in paths]
  else:
    documents = list(_read_paths(source, field, skipped))
  if empty := sum(not document.text for document in documents):
    skipped["empty documents"] = empty
    documents = [document for document in documents if document.text]
  if not documents:
    raise ValueError(
      f"TextData.sources names {source!r}, which holds no text; expected a file that is not empty.{skipped_in_words(skipped)}"
    )
  return Source(source, documents, skipped)


def _read_paths(source: str, field: str, skipped: Counter[str]) -> Iterator[Document]:
  path = Path(os.path.expanduser(source))
  if path.is_dir():
    root, paths = path, _walk(source, path, frozenset(), skipped)
  elif path.exists():
    yield from _read_file(source, path, path.name, field)
    return
  else:
    root, paths = _glob(source, os.path.expanduser(source), skipped)
  for path in paths:
    if path.exists() and not path.is_file():
      skipped["special files"] += 1
    else:
      yield from _read_file(source, path, _name(path, root), field, skipped)


def _glob(source: str, pattern: str, skipped: Counter[str]) -> tuple[Path, list[Path]]:
  """The part of a glob before its first wildcard, and the files that match, sorted."""
  found = [path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if not _in_loop(path)]
  paths = [path for path in found if not path.is_dir()]
  if not paths:
    raise ValueError(
      f"TextData.sources names {source!r}, which matches no file here ({os.getcwd()}); expected \"stdlib\", or the path of "
      "a file or folder, or a glob."
    )
  read = {folder for path in paths for folder in path.parents}
  if folders := sum(path.is_dir() and path not in read for path in found):
    skipped["folders that a glob matches"] = folders
  parts = Path(pattern).parts
  return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts[:-1])), paths


def _in_loop(path: Path) -> bool:
  """Whether `path` passes a link to a folder that it has already passed."""
  folders = path.parents
  return any(folder.is_symlink() for folder in folders) and len(set(map(os.path.realpath, folders))) < len(folders)


def _read_file(source: str, path: Path, name: str, field: str, skipped: Counter[str] | None = None) -> Iterator[Document]:
  """The documents of a file. If `skipped` is given, a binary file has none and is counted there."""
  text = _read(source, path)
  if path.name.removesuffix(".gz").endswith(".jsonl"):
    yield from _json_lines(path, name, text, field)
  elif skipped is not None and b"\0" in text[:8192]:
    skipped["binary files"] += 1
  else:
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


def _walk(source: str, root: Path, left_out: frozenset[str], skipped: Counter[str] | None = None) -> Iterator[Path]:
  """Files under `root` sorted by name, without hidden ones and folders named in `left_out`.

  If `skipped` is given, linked folders are entered too. Those that would be read twice are counted there instead.
  """

  def hidden(names: Iterable[str]) -> bool:
    return any(name in left_out or name.startswith((".", "__pycache__")) for name in names)

  def read_anyway(link: Path) -> bool:
    real, top = Path(os.path.realpath(link)), Path(os.path.realpath(root))
    above = {os.path.realpath(folder) for folder in link.parents if folder == root or root in folder.parents}
    return str(real) in above or (real.is_relative_to(top) and not hidden(real.relative_to(top).parts))

  def enter(folder: Path) -> bool:
    if skipped is None or not folder.is_symlink() or not read_anyway(folder):
      return True
    skipped["links to folders that are read anyway"] += 1
    return False

  def refuse(error: OSError) -> None:
    raise _unreadable(source, error.filename, error)

  for folder, folders, files in os.walk(root, onerror=refuse, followlinks=skipped is not None):
    folders[:] = sorted(name for name in folders if not hidden([name]) and enter(Path(folder, name)))
    yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _name(path: Path, root: Path) -> str:
  return path.relative_to(root).as_posix()


def _read(source: str, path: Path) -> bytes:
  try:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content
  except (OSError, EOFError, zlib.error) as error:
    raise _unreadable(source, path, error) from None


def _unreadable(source: str, path: str | Path, error: Exception) -> ValueError:
  reason = getattr(error, "strerror", None) or error
  return ValueError(f"TextData.sources names {source!r}, but {path} cannot be read: {reason}.")
