"""The settings of an experiment that differ from the defaults."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import linen as nn

from .config import Experiment, build_text
from .run_folder import CONFIG_FORMAT, IGNORED, IMPORT_FOLDERS, settings

_Names = set[tuple[str, str]]  # names of classes and of their fields


def chosen_settings(experiment: Experiment) -> dict[str, tuple[str, str]]:
  """The value and the default of each setting that differs from its default, by name; the default is "" where there is none.

  The defaults are those of the same experiment, built from nothing but the settings that it needs: references to layers, and
  fields without a default.

  Raises:
    ValueError: if the settings that are left do not fit together without the others.
  """
  parts = list(_parts(experiment))
  needed = {(type(part).__name__, field) for part in parts for field in _without_default(type(part))}
  groups = {(type(part).__name__, field) for part in parts for field in _groups(part)} - needed
  kept = [line for line in experiment.text.partition(IGNORED)[0].splitlines() if _is_needed(line, needed, groups)]
  defaults = settings(build_text("\n".join(kept) + "\n", experiment.name).text)
  always = {name for name in defaults if _owner_and_field(name) in needed}
  return {
    name: (value, "" if name in always else defaults.get(name, ""))
    for name, value in settings(experiment.text).items()
    if name in always or defaults.get(name) != value
  }


def _is_needed(line: str, needed: _Names, groups: _Names) -> bool:
  name, _, value = (part.strip() for part in line.partition("="))
  if name in (CONFIG_FORMAT, IMPORT_FOLDERS) or not value:
    return True
  key = _owner_and_field(name)
  return key in needed or ("@" in value and key not in groups)


def _owner_and_field(name: str) -> tuple[str, str]:
  """("Attention", "window") for "local/Attention.window" and for "my_layers.Attention.window"."""
  owner, _, field = name.rpartition("/")[2].rpartition(".")
  return owner.rpartition(".")[2], field


def _parts(value: Any) -> Iterator[Any]:
  """All dataclass objects within `value`, layers included."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    yield value
    for field in dataclasses.fields(value):
      yield from _parts(getattr(value, field.name, None))
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _parts(item)


def _without_default(kind: type) -> list[str]:
  missing = dataclasses.MISSING
  return [field.name for field in dataclasses.fields(kind) if field.default is missing and field.default_factory is missing]


def _groups(part: Any) -> list[str]:
  """The fields of a layer that are groups of options. Their defaults are the layer's, not those of their class."""
  if not isinstance(part, nn.Module):
    return []
  values = {field.name: getattr(part, field.name, None) for field in dataclasses.fields(part)}
  return [name for name, value in values.items() if dataclasses.is_dataclass(value) and not isinstance(value, nn.Module | type)]
