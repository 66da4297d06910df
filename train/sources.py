"""Text from the standard library's source, files, folders and globs."""

import dataclasses
import glob
import itertools
import math
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .libraries import library
from .readers import Document, is_binary, is_one_document, read_file, saved_by_datasets, size_of_text

__all__ = ["Document", "Source", "read_documents", "read_sources", "skipped_in_words"]

HUB = "hf:"  # begins the name of a data set that `datasets` reads

# Tests and tables of character sets. They are near copies of one another and would leak from training to validation.
_NOT_STDLIB_TEXT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})


@dataclass(frozen=True)
class Source:
  """Files that hold documents.

  Attributes:
    name: as it was given.
    files: the path of each, and the name of its documents.
    field: the field of objects, or the column of tables, that holds the text.
    is_exact: whether the file was named itself, so that it is read even if it seems to be binary.
    skipped: how many things were skipped, by what they are, up to where it has been read.
  """

  name: str
  files: list[tuple[Path, str]]
  field: str
  is_exact: bool = False
  skipped: Counter[str] = dataclasses.field(default_factory=Counter)

  @cached_property
  def documents(self) -> list[Document]:
    """All documents."""
    return list(self.read())

  @property
  def size(self) -> int:
    """About the number of bytes of text."""
    return sum(size_of_text(path) for path, _ in self.files if path.is_file())

  @property
  def identity(self) -> list[str]:
    """Changes when the files do: the path, name, size and time of change of each."""
    found = []
    for path, name in self.files:
      status = path.stat()
      found += [str(path.absolute()), name, str(status.st_size), str(status.st_mtime_ns)]
    return found

  def read(self) -> Iterator[Document]:
    """Reads the documents that have a text.

    Raises:
      ValueError: if a file cannot be read, is malformed or needs a library, or there is no text.
    """
    found = False
    for number in range(len(self.files)):
      for document in self.read_one(number):
        found = True
        yield document
    if not found:
      raise ValueError(
        f"TextData.sources names {self.name!r}, which holds no text; expected a file that is not empty."
        f"{skipped_in_words(self.skipped)}"
      )

  def read_one(self, number: int) -> Iterator[Document]:
    """The documents of one of the files."""
    path, name = self.files[number]
    if not self.is_exact and path.exists() and not path.is_file():
      self.skipped["special files"] += 1
      return
    try:
      if not self.is_exact and is_one_document(path) and is_binary(path):
        self.skipped["binary files"] += 1
        return
      for document in read_file(path, name, self.field):
        if document.text:
          yield document
        else:
          self.skipped["empty documents"] += 1
    except (OSError, EOFError, zlib.error) as error:
      raise _unreadable(self.name, path, error) from None


class HubSource(Source):
  """A data set that `datasets` reads as a stream; `files` has one entry, which is no file."""

  @property
  def size(self) -> float:
    """Unknown."""
    return math.inf

  @property
  def identity(self) -> list[str]:
    """See `Source`. It does not change with the data set: what was read once is not read again."""
    return [self.name]

  def read_one(self, number: int) -> Iterator[Document]:
    """The rows of the data set."""
    del number
    name, *options = self.name.removeprefix(HUB).split("@")
    split, _, config = options[0].partition("/") if options else ("train", "", "")
    rows = _stream(self.name, name, config or None, split)
    for count, row in enumerate(rows, start=1):
      if not isinstance(text := row.get(self.field, 0), str | None):
        raise ValueError(
          f'{self.name} has no text in the field "{self.field}", row {count}; its fields are {sorted(row)}. Expected one with '
          "text as TextData.text_field."
        )
      if text:
        yield Document(f"{name}:{count}", text.encode())
      else:
        self.skipped["empty documents"] += 1


def _stream(source: str, name: str, config: str | None, split: str) -> Iterable[dict]:
  """The rows of a data set."""
  datasets = library("datasets", f"TextData.sources names {source!r}, which needs the library datasets", "memzoo[datasets]")
  try:
    return datasets.load_dataset(name, config, split=split, streaming=True)
  except Exception as error:  # the library raises whatever its parts raise
    raise ValueError(
      f"TextData.sources names {source!r}, which datasets cannot read ({type(error).__name__}: {error}); expected {HUB}NAME, "
      f"{HUB}NAME@SPLIT or {HUB}NAME@SPLIT/CONFIG of the hub, or {HUB}FOLDER."
    ) from None


def read_documents(sources: str | Sequence[str], field: str = "text") -> list[Document]:
  """All documents of `sources` in one list; see `read_sources`."""
  return [document for source in read_sources(sources, field) for document in source.documents]


def read_sources(sources: str | Sequence[str], field: str = "text") -> list[Source]:
  """Finds the files of each of `sources`; their content is read later.

  Args:
    sources: one or several of "stdlib" (the *.py files of Python's standard library), a file, a folder (its text files at
      any depth, also in linked folders, without hidden and binary ones) or a glob (without hidden and binary files). Of a
      folder that `datasets` saved the rows are read, in their order. "hf:NAME", "hf:NAME@SPLIT" or "hf:NAME@SPLIT/CONFIG" is a
      data set of the hub, read as a stream by `datasets`. For the formats of files see `readers.py`.
    field: the field of a JSONL line's object, or the column of a table, that holds the text.

  Raises:
    ValueError: if a source is missing or cannot be read.
  """
  sources = [sources] if isinstance(sources, str) else list(sources)
  if not sources:
    raise ValueError('TextData.sources is empty; expected "stdlib", or a file, folder or glob.')
  return [_find_source(source, field) for source in sources]


def skipped_in_words(skipped: Counter[str]) -> str:
  """A sentence that follows another, such as " Skipped: binary files (3)."; empty if nothing was skipped."""
  return f" Skipped: {', '.join(f'{what} ({count:,})' for what, count in sorted(skipped.items()))}." if skipped else ""


def _find_source(source: str, field: str) -> Source:
  skipped: Counter[str] = Counter()
  path = Path(os.path.expanduser(source))
  if source.startswith(HUB):
    return HubSource(source, [(Path(source), source)], field)
  if source == "stdlib":
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _walk(source, root, _NOT_STDLIB_TEXT) if path.suffix == ".py"]
    return Source(source, [(path, _name(path, root)) for path in paths], field, is_exact=True)
  if path.is_dir():
    saved = saved_by_datasets(path)
    root, paths = path, _walk(source, path, frozenset(), skipped) if saved is None else saved
  elif path.exists():
    return Source(source, [(path, path.name)], field, is_exact=True)
  else:
    root, paths = _glob(source, os.path.expanduser(source), skipped)
  return Source(source, [(path, _name(path, root)) for path in paths], field, skipped=skipped)


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


def _unreadable(source: str, path: str | Path, error: Exception) -> ValueError:
  reason = getattr(error, "strerror", None) or error
  return ValueError(f"TextData.sources names {source!r}, but {path} cannot be read: {reason}.")
