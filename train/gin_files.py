"""Finds and parses gin files, and imports the modules that they name. With `config.py`, the only files that know gin."""

import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from gin import config_parser
from gin.config_parser import BindingStatement, BlockDeclaration, ImportStatement, IncludeStatement

from .run_folder import run_of
from .values import did_you_mean

__all__ = ["BindingStatement", "BlockDeclaration", "ImportStatement", "IncludeStatement"]

_PACKAGE = __package__.rpartition(".")[0]


class Source(NamedTuple):
  """The text of a configuration.

  Attributes:
    name: the name of its file, for messages.
    text: its text.
    folder: where files that it includes and modules that it imports are looked for first; None for a shipped configuration.
  """

  name: str
  text: str
  folder: Path | None = None


@dataclass(frozen=True)
class Reference:
  """`@scope/name`: an object, built from the bindings of `name` and of `name` in `scope`."""

  scope: str
  name: str

  def __str__(self) -> str:
    return "/".join(filter(None, (self.scope, self.name)))

  def __repr__(self) -> str:
    return f"@{self}"


@dataclass(frozen=True)
class Macro:
  """`%name`: the value of `name = ...`."""

  name: str

  def __repr__(self) -> str:
    return f"%{self.name}"


class _Delegate(config_parser.ParserDelegate):
  """Tells gin's parser what to make of references and macros. Whether they exist is checked later."""

  def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
    del evaluate  # `@X()` and `@X` mean the same here: a new object for every mention
    scope, _, name = scoped_configurable_name.rpartition("/")
    return Reference(scope, name)

  def macro(self, macro_name: str) -> Macro:
    return Macro(macro_name)


def parse(text: str, name: str) -> list[Any]:
  """gin's statements in `text`. Raises `ValueError` with the line of a syntax error."""
  try:
    return list(config_parser.ConfigParser(io.StringIO(text), _Delegate()))
  except SyntaxError as error:
    raise ValueError(f"{name}:{error.lineno}: {error.msg.splitlines()[0]} in {(error.text or '').strip()!r}.") from None
  except tokenize.TokenError as error:
    raise ValueError(f"{name}:{error.args[1][0]}: {error.args[0]}.") from None


def shipped() -> list[str]:
  """Names of the shipped configurations that are whole experiments, not parts to include."""
  return sorted(name for name in _shipped_files() if not name.startswith("parts/"))


def find(config: str) -> tuple[Source, str]:
  """The text of a configuration, and the name of its experiment.

  Args:
    config: a shipped name, the path of a `.gin` file, or the folder of a run.

  Raises:
    ValueError, FileNotFoundError: as `memzoo.build`.
  """
  if (run := run_of(config)) is not None:
    return _read(run / "config.gin"), run.resolve().name
  path, name = Path(config).expanduser(), config.removesuffix(".gin")
  if path.suffix == ".gin" and path.is_file():
    return _read(path), path.stem
  if name in shipped():
    return _read_shipped(name), name.rpartition("/")[2]
  if path.suffix == ".gin":
    raise FileNotFoundError(f"there is no file {config}")
  if path.is_dir():
    raise ValueError(f"{config} is no run: it has no config.gin; expected a folder that `memzoo train` has written.")
  raise ValueError(
    f"there is no config {config!r}{did_you_mean(config, shipped())} Expected the path of a .gin file, the folder of a run, or "
    f"one of {', '.join(shipped())}."
  )


def find_included(filename: str, folder: Path | None, where: str) -> Source:
  """An included file: one beside the including file, or else a shipped one."""
  if folder is not None and (folder / filename).is_file():
    return _read(folder / filename)
  if filename.removesuffix(".gin") in _shipped_files():
    return _read_shipped(filename.removesuffix(".gin"))
  beside = f"in {folder} or " if folder is not None else ""
  raise ValueError(f"{where}: cannot include {filename!r}: no such file {beside}among the shipped configurations.")


def _read(path: Path) -> Source:
  return Source(str(path), path.read_text(encoding="utf-8"), path.parent)


def _read_shipped(name: str) -> Source:
  file = resources.files(f"{_PACKAGE}.configs").joinpath(f"{name}.gin")
  return Source(f"{name}.gin", file.read_text(encoding="utf-8"))


def _shipped_files() -> list[str]:
  return list(_walk(resources.files(f"{_PACKAGE}.configs"), ""))


def _walk(folder: Any, prefix: str) -> Iterator[str]:
  for entry in folder.iterdir():
    if entry.is_dir():
      yield from _walk(entry, f"{prefix}{entry.name}/")
    elif entry.name.endswith(".gin"):
      yield prefix + entry.name.removesuffix(".gin")
