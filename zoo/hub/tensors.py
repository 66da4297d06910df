"""Folders of safetensors files: `model.safetensors`, or several and `model.safetensors.index.json`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


class Tensors(Mapping[str, Any]):
  """The tensors of a folder by name. One is read when it is asked for, and its file is mapped into memory only meanwhile.

  Args:
    folder: with one of the files `SINGLE` and `INDEX`.
    renamed: beginnings of names in the files, and what stands for them here.

  Raises:
    ValueError: if there are no such files, or they are damaged.
    ImportError: if safetensors is not installed.
  """

  def __init__(self, folder: str | Path, renamed: Sequence[tuple[str, str]] = ()):
    self.folder = Path(folder)
    self._places: dict[str, tuple[Path, str]] = {}
    for path in (self.folder / name for name in self._names()):
      try:
        with _open(path) as file:
          self._places |= {_renamed(name, renamed): (path, name) for name in file.keys()}  # noqa: SIM118
      except Exception as error:  # safetensors has an exception of its own
        if isinstance(error, ImportError):
          raise
        raise ValueError(f"{path} cannot be read: {error}. Expected a complete safetensors file.") from None

  def _names(self) -> list[str]:
    if (index := self.folder / INDEX).is_file():
      try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
      except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {error!r}. Expected the index of safetensors files.") from None
    if (self.folder / SINGLE).is_file():
      return [SINGLE]
    raise ValueError(f"{self.folder} has no {SINGLE} and no {INDEX}; expected one of them.")

  def __getitem__(self, name: str) -> np.ndarray:
    path, own = self._places[name]
    with _open(path) as file:
      return file.get_tensor(own)

  def __iter__(self) -> Iterator[str]:
    return iter(self._places)

  def __len__(self) -> int:
    return len(self._places)


def _renamed(name: str, renamed: Sequence[tuple[str, str]]) -> str:
  """A name after the first replacement of its beginning that fits."""
  return next((new + name.removeprefix(old) for old, new in renamed if name.startswith(old)), name)


def save(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
  """Writes tensors as they come, in files of at most `shard_bytes` each, or of one larger tensor."""
  save_file = _safetensors().numpy.save_file
  shards, shard, size = [], {}, 0

  def flush() -> None:
    name = f"model-{len(shards) + 1:05d}.safetensors"
    save_file({key: np.ascontiguousarray(x) for key, x in shard.items()}, folder / name, metadata={"format": "pt"})
    shards.append((name, list(shard), size))
    shard.clear()

  for name, x in tensors:
    if shard and size + x.nbytes > shard_bytes:
      flush()
      size = 0
    shard[name], size = x, size + x.nbytes
  flush()
  if len(shards) == 1:
    (folder / shards[0][0]).rename(folder / SINGLE)
    return
  places = {}
  for i, (name, keys, _) in enumerate(shards):
    final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    (folder / name).rename(folder / final)
    places |= dict.fromkeys(keys, final)
  index = {"metadata": {"total_size": sum(size for *_, size in shards)}, "weight_map": places}
  (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _open(path: Path) -> Any:
  return _safetensors().safe_open(path, framework="numpy")


def _safetensors() -> Any:
  try:
    import safetensors
    import safetensors.numpy
  except ImportError:
    raise ImportError("safetensors is not installed; expected `pip install memzoo[hub]`.") from None
  return safetensors
