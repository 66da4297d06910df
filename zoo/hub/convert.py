"""Parameters from tensors, and tensors from parameters, by the rules of a family."""

import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .forms import Rule
from .tensors import Tensors

_SHOWN = 3  # names in a message


def to_params(
  rules: Sequence[Rule],
  tensors: Tensors,
  wanted: Any,
  ignored: tuple[str, ...] = (),
  shardings: Any = None,
) -> Any:
  """The parameters of a model from the tensors of a checkpoint, one after another.

  Args:
    rules: of its family.
    tensors: of the checkpoint. Every one is read once.
    wanted: the parameters' shapes and dtypes, as a tree. Every one is filled once.
    ignored: beginnings of names of tensors that are passed over.
    shardings: of the parameters, as a tree; `None` for the default device. No device gets more than its part.

  Raises:
    ValueError: if a tensor is missing, is left over, or has the wrong shape, or a parameter is not filled.
  """
  wanted = flatten_dict(wanted["params"], sep="/")
  rules = [_present(rule, tensors) for rule in rules]
  _same("tensors", (name for rule in rules for name in rule.theirs), (name for name in tensors if not name.startswith(ignored)))
  _same("parameters", (path for rule in rules for path in rule.ours), wanted)
  params, places = {}, {} if shardings is None else flatten_dict(shardings["params"], sep="/")
  for rule in rules:
    try:
      arrays = rule.form.ours([tensors[name] for name in rule.theirs])
    except ValueError as error:
      raise ValueError(f"{', '.join(rule.theirs)} does not fit: {error}.") from None
    for path, x in zip(rule.ours, arrays, strict=True):
      if x.shape != wanted[path].shape:
        shape = list(wanted[path].shape)
        raise ValueError(f"{', '.join(rule.theirs)} gives {path} the shape {list(x.shape)}; expected {shape}, by config.json.")
      # Before the next tensor is read, so that there is never more than one beside the parameters.
      params[path] = jax.block_until_ready(jax.device_put(x.astype(wanted[path].dtype, copy=False), places.get(path)))
    del arrays, x
    _give_back()
  return {"params": unflatten_dict(params, sep="/")}


def _give_back() -> None:
  """Returns freed memory to the system, where the C library keeps it (glibc): an eighth of a model's size otherwise."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
  if trim is not None:
    trim(0)


def to_tensors(rules: Sequence[Rule], params: Any) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of a checkpoint from the parameters of a model, one after another; the inverse of `to_params`."""
  found = flatten_dict(params["params"], sep="/")
  _same("parameters", (path for rule in rules for path in rule.ours), found)
  for rule in rules:
    names = (name.split("|")[0] for name in rule.theirs)
    yield from zip(names, rule.form.theirs([np.asarray(found[path]) for path in rule.ours]), strict=True)


def _present(rule: Rule, tensors: Tensors) -> Rule:
  """The rule that holds, with the names of its tensors that are there, or else their first names."""
  choices = [name.split("|") for name in rule.theirs]
  if rule.instead is not None and not any(name in tensors for names in choices for name in names):
    return _present(rule.instead, tensors)
  return rule._replace(theirs=tuple(next((name for name in names if name in tensors), names[0]) for names in choices))


def _same(what: str, expected: Iterable[str], found: Iterable[str] | Mapping[str, Any]) -> None:
  """Raises `ValueError` unless the names are the same."""
  expected, found = list(expected), set(found)
  for names, wrong in ((found - set(expected), "has no place for"), (set(expected) - found, "lacks")):
    if names:
      shown = ", ".join(sorted(names)[:_SHOWN])
      more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
      raise ValueError(f"The model {wrong} these {what}: {shown}{more}.")
