"""Checks of numeric settings, all with the same error messages."""

from typing import Any


def at_least(least: int, settings: Any, *names: str) -> None:
  """Raises `ValueError` for the first of these fields that is less than `least`, or NaN."""
  for name in names:
    value = getattr(settings, name)
    if not value >= least:
      bound = f"at least {least}" if least else "0 or more"
      raise ValueError(f"{type(settings).__name__}.{name} is {value}; expected {bound}.")


def check_seed(settings: Any) -> None:
  """Raises `ValueError` unless the field `seed` can seed a random key."""
  if not 0 <= settings.seed < 2**32:
    raise ValueError(f"{type(settings).__name__}.seed is {settings.seed}; expected 0 or more, and less than 2**32.")
