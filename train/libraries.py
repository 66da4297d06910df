"""Libraries that only some uses need."""

from importlib import import_module
from typing import Any


def library(module: str, what: str, package: str, more: str = "") -> Any:
  """Imports `module`.

  Args:
    module: its name.
    what: who needs it, the beginning of a sentence, such as "corpus.parquet needs the library pyarrow".
    package: what pip installs, such as "memzoo[data]".
    more: a further sentence for the error.

  Raises:
    ValueError: if it is not installed.
  """
  try:
    return import_module(module)
  except ImportError:
    quoted = f'"{package}"' if "[" in package else package  # shells read brackets as a pattern
    raise ValueError(f"{what}: pip install {quoted}.{more and f' {more}'}") from None
