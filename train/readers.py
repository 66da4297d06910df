"""Documents in files: text, JSON lines, parquet, Arrow and ArrayRecord, plain or compressed.

A file is read from its beginning to its end, a document or a batch of them at a time. Which format it has is said by its name:

    *.jsonl                    each line is an object with the text in a field
    *.parquet                  each row of a column is a document (pyarrow)
    *.arrow                    the same; such files are in folders that `datasets` saved (pyarrow)
    *.array_record             each record is a text (array_record, which comes with Grain)
    anything else              is one document

and *.gz, *.zst after it that it is compressed. A row, a line or a record is named after its file and its number from 1 on, as
if it was a line of JSON. Documents are split into training and validation by their names, so all formats give the same split.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from .libraries import library

_ROWS = 256  # of a table, decoded at once
_BUFFER = 2**20  # bytes read at once from a table's file
_LOOKED_AT = 8192  # bytes of a file, in which a zero says that it is binary


class Document(NamedTuple):
  """One text.

  `name` is relative to the source: to the folder, to the part of a glob before its first wildcard, or to the file's own folder.
  So it is the same on every machine, and other files do not change it.
  """

  name: str
  text: bytes


def read_file(path: Path, name: str, field: str) -> Iterator[Document]:
  """The documents of a file.

  Args:
    path: of the file.
    name: of its documents, before their numbers.
    field: the field of objects, or the column of tables, that holds the text.

  Raises:
    ValueError: if the content is not what the file's name says, or a library is missing.
    OSError, EOFError, zlib.error: if it cannot be read.
  """
  suffix, packed = _suffixes(path)
  name = name.removesuffix(".zst")
  if suffix == ".jsonl":
    with _opened(path, packed) as lines:
      yield from _json_lines(path, name, lines, field)
    return
  rows = _TABLES.get(suffix)
  if rows is None:
    yield Document(name, _content(path, packed))
    return
  if packed:
    raise ValueError(f"{path} is compressed as a whole; expected a {suffix} file, which compresses its own content.")
  name = f"{name.removesuffix(path.suffix)}.jsonl"
  for number, text in enumerate(rows(path, field), start=1):
    yield Document(f"{name}:{number}", text)


def is_one_document(path: Path) -> bool:
  """Whether a file is one document, by its name."""
  suffix, _ = _suffixes(path)
  return suffix != ".jsonl" and suffix not in _TABLES


def is_binary(path: Path) -> bool:
  """Whether a file that is one document is no text."""
  with _opened(path, _suffixes(path)[1]) as file:
    return b"\0" in file.read(_LOOKED_AT)


def _suffixes(path: Path) -> tuple[str, str]:
  """The suffix of a file's name that says its format, and the one that says its compression or ""."""
  packed = path.suffix if path.suffix in (".gz", ".zst") else ""
  return Path(path.name.removesuffix(packed)).suffix, packed


def size_of_text(path: Path) -> int:
  """About the number of bytes of text in a file."""
  suffix, packed = _suffixes(path)
  return path.stat().st_size * (4 if packed or suffix == ".parquet" else 1)


def saved_by_datasets(folder: Path) -> list[Path] | None:
  """The files of a folder that `datasets` saved, in the order of its rows; `None` for other folders.

  Raises:
    ValueError: if the folder holds several data sets.
  """
  if (folder / "dataset_dict.json").is_file():
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    names = ", ".join(splits)
    raise ValueError(f"{folder} holds data sets called {names}; expected one of them, such as {folder / splits[0]}.")
  if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
    return None
  return [folder / file["filename"] for file in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]]


def _content(path: Path, packed: str) -> bytes:
  if not packed:
    return path.read_bytes()
  with _opened(path, packed) as file:
    return file.read()


@contextmanager
def _opened(path: Path, packed: str) -> Iterator[IO[bytes]]:
  """The content of a file, decompressed."""
  if packed == ".zst":
    with _zstandard(path) as file:
      yield file
    return
  with gzip.open(path) if packed else path.open("rb") as file:
    yield file


@contextmanager
def _zstandard(path: Path) -> Iterator[IO[bytes]]:
  zstandard = library("zstandard", f"{path} needs the library zstandard", "memzoo[data]")
  try:
    with zstandard.open(path, "rb") as file:
      yield io.BufferedReader(file, _BUFFER)
  except zstandard.ZstdError as error:
    raise zlib.error(str(error)) from None


def _json_lines(path: Path, name: str, lines: IO[bytes], field: str) -> Iterator[Document]:
  for number, line in enumerate(lines, start=1):
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


def _parquet(path: Path, field: str) -> Iterator[bytes]:
  pyarrow = library("pyarrow", f"{path} needs the library pyarrow", "memzoo[data]")
  from pyarrow import parquet

  try:
    # Without `pre_buffer`, and with a buffer of its own, only a small part of a row group is in memory.
    with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as table:
      _check_column(path, table.schema_arrow, field)
      for batch in table.iter_batches(_ROWS, columns=[field], use_threads=False):
        yield from _texts(batch.column(0))
  except pyarrow.ArrowException as error:
    raise ValueError(f"{path} is not a parquet file, or damaged: {str(error).rstrip('.')}.") from None


def _arrow(path: Path, field: str) -> Iterator[bytes]:
  pyarrow = library("pyarrow", f"{path} needs the library pyarrow", "memzoo[data]")
  try:
    with pyarrow.OSFile(str(path)) as file, _arrow_batches(pyarrow, file) as batches:
      _check_column(path, batches.schema, field)
      for batch in batches:
        yield from _texts(batch.column(batch.schema.get_field_index(field)))
  except pyarrow.ArrowException as error:
    raise ValueError(f"{path} is not an Arrow file, or damaged: {str(error).rstrip('.')}.") from None


def _arrow_batches(pyarrow: Any, file: Any) -> Any:
  """The batches of a stream, as `datasets` writes it, or of a file."""
  magic = file.read(6)
  file.seek(0)
  if magic != b"ARROW1":
    return pyarrow.ipc.open_stream(file)
  reader = pyarrow.ipc.open_file(file)
  return pyarrow.RecordBatchReader.from_batches(reader.schema, map(reader.get_batch, range(reader.num_record_batches)))


def _check_column(path: Path, schema: Any, field: str) -> None:
  from pyarrow import types

  texts = types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary, types.is_null
  known = [column.name for column in schema if any(is_text(column.type) for is_text in texts)]
  if field not in known:
    raise ValueError(
      f'{path} has no column "{field}" of text; its columns of text are {known}. Expected one of them as TextData.text_field.'
    )


def _texts(column: Any) -> Iterator[bytes]:
  """The values of a column; empty where there is none."""
  for value in column.to_pylist():
    yield b"" if value is None else value.encode() if isinstance(value, str) else value


def _array_record(path: Path, field: str) -> Iterator[bytes]:
  del field
  module = library("array_record.python.array_record_module", f"{path} needs the library array_record", "array_record")
  try:
    reader = module.ArrayRecordReader(str(path))
    count = reader.num_records()
    for start in range(0, count, _ROWS):
      yield from reader.read(start, min(count, start + _ROWS))
    reader.close()
  except (RuntimeError, IndexError, TypeError, ValueError) as error:  # whichever the library raises
    raise ValueError(f"{path} is not an ArrayRecord file, or damaged: {str(error).rstrip('.')}.") from None


_TABLES = {".parquet": _parquet, ".arrow": _arrow, ".array_record": _array_record, ".arrayrecord": _array_record}
