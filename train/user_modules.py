"""Imports modules of the user's own, such as those with layers."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def import_from(name: str, folders: Sequence[Path]) -> tuple[ModuleType, Path | None]:
  """Imports a module from the first of `folders` that has it, or else from Python's path.

  Returns:
    The module, and its folder if that is one of `folders`.

  Raises:
    ImportError: if there is none, or if this process has imported another module of that name.
  """
  folder = next((folder for folder in folders if _has(folder, name)), None)
  if folder is None:
    try:
      return import_module(name), None
    except ModuleNotFoundError as error:
      looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
      raise ImportError(f"{error} in {looked} or on Python's path") from error
  sys.path.insert(0, str(folder))
  try:
    module = import_module(name)
  finally:
    sys.path.remove(str(folder))
  expected = folder.joinpath(*name.split(".")).resolve()
  found = Path(module.__file__ or expected).resolve()
  if expected not in (found.with_suffix(""), found.parent):
    raise ImportError(f"{found} has that name and is imported already; start another process, or rename one of them")
  return module, folder


def _has(folder: Path, name: str) -> bool:
  """Whether `folder` has the module or package `name`. A folder without `__init__.py` counts if it is part of a longer name."""
  spec = PathFinder.find_spec(name.partition(".")[0], [str(folder)])
  return spec is not None and (spec.origin is not None or "." in name)


def import_class(path: str, what: str = "layer", listed: str = "in `memzoo list`") -> type:
  """Imports the class "package.module.Class", also from the current folder.

  Args:
    path: the class.
    what, listed: words for messages: what the class is for, and where the names are that need no module.

  Raises:
    ValueError: if it cannot be imported, or is no class.
  """
  module, _, name = path.rpartition(".")
  try:
    if not module:
      raise ImportError("it names no module")
    found: Any = getattr(import_from(module, [Path.cwd()])[0], name)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"{what} {path!r} is neither {listed} nor a class: {error}; expected module.Class.") from None
  if not isinstance(found, type):
    raise ValueError(f"{what} {path!r} is {type(found).__name__}, not a class; expected module.Class.")
  return found
