"""Files that are complete or absent: written under a temporary name, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_FORMAT = 1  # of JSON files that hold a dataclass


def cache_folder(name: str) -> Path:
  """The folder `name` of what may be removed at any time and is then made again."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memzoo" / name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Yields a temporary path beside `path`, with the same suffix, to write to. It becomes `path` if the block succeeds."""
  temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
  try:
    yield temporary
    with temporary.open("rb+") as written:
      os.fsync(written.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
  """Writes `text` to `path`, whose content at any moment is the old text or the new."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
  """Writes a Matplotlib figure as a PNG file."""
  with replacing(path) as temporary:
    figure.savefig(temporary, dpi=120)


def read_text(path: Path, remedy: str) -> str:
  """The text of `path`. Raises `ValueError`, which ends with `remedy`, if it is blank or not UTF-8."""
  try:
    text = path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is damaged ({error}); {remedy}.") from None
  if not text.strip():
    raise ValueError(f"{path} is empty; {remedy}.")
  return text


def read_object(path: Path, remedy: str) -> dict[str, Any]:
  """The JSON object in `path`. Raises `ValueError`, which ends with `remedy`, if it holds something else."""
  try:
    found = json.loads(text := read_text(path, remedy))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON ({error}); {remedy}.") from None
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds {text.strip()[:40]!r}, not a JSON object; {remedy}.")
  return found


def write_record(path: Path, record: Any, indent: int | None = None) -> None:
  """Writes a dataclass as a JSON object, with the version of the format as "format"."""
  write_text(path, json.dumps({"format": _FORMAT} | asdict(record), indent=indent) + "\n")


def read_record(cls: type[T], path: Path, remedy: str) -> T:
  """The dataclass `cls` whose fields are the JSON object in `path`. Fields that `cls` does not have are ignored.

  Raises:
    ValueError: as `read_object`, or if a field without a default is missing.
  """
  known = {field.name for field in fields(cls)}
  found = read_object(path, remedy)
  try:
    return cls(**{name: value for name, value in found.items() if name in known})
  except TypeError as error:
    written = "; a newer version of memzoo wrote it" if found.get("format", 0) > _FORMAT else ""
    raise ValueError(f"{path} does not hold a {cls.__name__} ({error}{written}); {remedy}.") from None
