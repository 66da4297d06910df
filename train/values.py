"""Checks the values of a configuration against the types of their fields."""

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

_WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string", type(None): "None"}
_UNIONS = (typing.Union, types.UnionType)
_SEQUENCES = (tuple, list, Sequence)
FLOATS = ("float16", "bfloat16", "float32", "float64")


class Mismatch(Exception):
  """A value does not have the type of its field; the message says what is expected."""


def convert(value: Any, annotation: Any, make: Callable[[Any], Any] | None = None) -> Any:
  """Converts a value to the annotated type: a list to a tuple, an integer to a float.

  Args:
    value: a literal: None, a boolean, number, string, or lists, tuples and dictionaries of these; or a reference.
    annotation: a type, as found on a dataclass's field.
    make: builds the object of a reference, and returns anything else unchanged.

  Raises:
    Mismatch: if the value does not have that type.
  """
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is Any:
    return make(value) if make else value
  if origin in _UNIONS:
    return _first_that_fits(value, annotation, arguments, make)
  if origin is typing.Annotated:
    return convert(value, arguments[0], make)
  if origin is typing.Literal:
    if value in arguments:
      return value
  elif (origin or annotation) in _SEQUENCES:
    return _convert_sequence(value, annotation, origin, arguments, make)
  elif (origin or annotation) in (dict, Mapping):
    if isinstance(value, dict):
      keys, values = arguments or (Any, Any)
      return {convert(k, keys, make): convert(v, values, make) for k, v in value.items()}
  elif annotation is float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      return float(value)
  elif annotation in (None, type(None)):
    if value is None:
      return None
  elif isinstance(annotation, type):
    made = make(value) if make else value
    if isinstance(made, annotation) and not (annotation is int and isinstance(made, bool)):
      return made
  raise Mismatch(f"expected {in_words(annotation)}")


def to_dtype(value: Any) -> Any:
  """The JAX type of a name in `FLOATS`: "bfloat16" gives `jnp.bfloat16`. None stays None.

  Raises:
    Mismatch: for any other value.
  """
  if value is None:
    return None
  if value in FLOATS:
    return getattr(jnp, value)
  raise Mismatch(f"expected the name of a floating type: {', '.join(FLOATS)}")


def in_words(annotation: Any) -> str:
  """A phrase for the values that a field of this type takes: "an integer or None"."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation in _WORDS:
    return _WORDS[annotation]
  if origin in _UNIONS:
    return " or ".join(in_words(argument) for argument in arguments)
  if origin is typing.Annotated:
    return in_words(arguments[0])
  if origin is typing.Literal:
    return "one of " + ", ".join(map(repr, arguments))
  if (origin or annotation) in _SEQUENCES:
    items = [a for a in arguments if a is not Ellipsis]
    return f"a list, each item {in_words(items[0])}" if len(items) == 1 else "a list"
  if isinstance(annotation, type) and issubclass(annotation, nn.Module):
    return "a layer, such as @Attention"
  return f"a {getattr(annotation, '__name__', annotation)}"


def did_you_mean(word: str, options: Iterable[str]) -> str:
  """The end of a sentence: ": did you mean 'num_heads'?" with the option nearest to `word`, or "." if none is near."""
  options = list(options)
  near = difflib.get_close_matches(word.lower(), [o.lower() for o in options], n=1)
  found = next((o for o in options if near and o.lower() == near[0]), None)
  found = found or next((o for o in options if word.lower() in o.lower()), None)
  return f": did you mean {found!r}?" if found else "."


def _first_that_fits(value: Any, annotation: Any, arguments: tuple, make: Callable[[Any], Any] | None) -> Any:
  for argument in arguments:
    try:
      return convert(value, argument, make)
    except Mismatch:
      continue
  raise Mismatch(f"expected {in_words(annotation)}")


def _convert_sequence(value: Any, annotation: Any, origin: Any, arguments: tuple, make: Any) -> Any:
  if not isinstance(value, (list, tuple)):
    raise Mismatch(f"expected {in_words(annotation)}")
  container = list if origin is list else tuple
  if not arguments:
    return container(value)
  if origin is tuple and Ellipsis not in arguments:
    if len(value) != len(arguments):
      raise Mismatch(f"expected a list of {len(arguments)} items")
    return tuple(convert(item, argument, make) for item, argument in zip(value, arguments, strict=True))
  return container(convert(item, arguments[0], make) for item in value)
