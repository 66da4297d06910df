"""Fields that earlier versions of the package had, where they are now, and what the absence of later fields meant.

An operative config (`config.gin` of a run) sets every field. So a config that sets all old fields of a class was written by an
earlier version, and its values move to the new fields. A config that sets only some of them was written by hand, and is refused
with a message that gives the new name. Since format 2 an operative config says which format it has.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

from ..layers.titans import Gating, TitansMemory
from ..layers.titans_wirings import MemoryAsLayer
from ..zoo.language_model import VectorModel


class Place(NamedTuple):
  """The new place of a value: field `option` of the option group of class `name` at a layer's field `field`."""

  field: str
  name: str
  option: str


_TITANS = {
  "depth": Place("network", "Network", "depth"),
  "expansion": Place("network", "Network", "expansion"),
  "gated": Place("network", "Network", "gated"),
  "residual": Place("network", "Network", "residual"),
  "memory_norm": Place("network", "Network", "norm"),
  "memory_norm_epsilon": Place("network", "Network", "norm_epsilon"),
  "loss": Place("loss", "Loss", "kind"),
  "loss_scale": Place("loss", "Loss", "scale"),
  "power": Place("loss", "Loss", "power"),
  "retention": Place("retention", "Retention", "kind"),
  "retention_norm": Place("retention", "Retention", "norm"),
  "anchor": Place("update", "Update", "anchor"),
  "order": Place("update", "Update", "order"),
  "read": Place("update", "Update", "read"),
  "clip": Place("update", "Update", "clip"),
  "momentum": Place("gates", "Gating", "momentum"),
  "forget": Place("gates", "Gating", "forget"),
  "max_step": Place("gates", "Gating", "max_step"),
  "step_bias": Place("gates", "Gating", "step_bias"),
  "forget_bias": Place("gates", "Gating", "forget_bias"),
  "momentum_bias": Place("gates", "Gating", "momentum_bias"),
}

# Old fields of a class and its subclasses. `None`: the field has no successor, and its value is dropped.
_OLD: dict[type, dict[str, Place | None]] = {
  TitansMemory: _TITANS,
  VectorModel: {"vocab_size": None, "tie_embeddings": None},
}

FORMAT = 2  # of operative configs; to be raised with every entry in `_ADDED`

# Fields that were added to a class, each with the format that it was added in and the value that makes it what it was before.
_ADDED: dict[type, dict[str, tuple[int, Any]]] = {Gating: {"decay_to": (2, "zero")}}

# Classes whose old runs cannot be continued, and why.
_ENDED = {MemoryAsLayer: "has another norm now, so the parameters of this run do not fit"}


def is_old(cls: type, field: str, value: Any) -> bool:
  """Whether an earlier version bound `field` of `cls` to such a value. `loss` and `retention` were strings."""
  return field in _old(cls) and (field not in cls.__dataclass_fields__ or isinstance(value, str))


def renewed(name: str, cls: type, where: dict[str, str]) -> dict[str, Place]:
  """The new places of the old fields of `cls` that a config sets.

  Args:
    name: name of the class in the config.
    cls: the class.
    where: the place in the config of each old field that it sets.

  Raises:
    ValueError: if the config was written by hand, or by a version whose runs cannot be continued.
  """
  old = _old(cls)
  if where.keys() != old.keys():
    field, place = next(iter(where.items()))
    raise ValueError(f"{place}: {name}.{field} {_instead(old[field])}.")
  for ended, reason in _ENDED.items():
    if issubclass(cls, ended):
      raise ValueError(
        f"{next(iter(where.values()))}: {name} {reason}. Train it anew, or continue with the version of memzoo that began it."
      )
  return {field: place for field, place in old.items() if place is not None}


def before_added(cls: type, bound: Collection[str], version: int | None) -> dict[str, Any]:
  """The fields that were added to `cls` after a config was written, with the values that make it what it was.

  Args:
    cls: the class.
    bound: the fields that the config sets.
    version: its format. `None`: it is of format 1 if it sets all fields of that time, and was written by hand otherwise.
  """
  added = _ADDED.get(cls, {})
  if version is None:
    version = 1 if set(bound) == {field.name for field in dataclasses.fields(cls)} - added.keys() else FORMAT
  return {name: value for name, (since, value) in added.items() if version < since and name not in bound}


def _old(cls: type) -> dict[str, Place | None]:
  return {field: place for base, fields in _OLD.items() if issubclass(cls, base) for field, place in fields.items()}


def _instead(place: Place | None) -> str:
  if place is None:
    return "does not exist any more; leave it out"
  return f"is {place.name}.{place.option} now (in Python {place.field}={place.name}({place.option}=...))"
