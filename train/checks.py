"""Checks of numeric settings, all with the same error messages."""

import math
from typing import Any

from ..zoo.seeds import as_seed


def at_least(least: int, settings: Any, *names: str) -> None:
  """Raises `ValueError` for the first of these fields that is less than `least`, infinite or NaN."""
  for name in names:
    value = getattr(settings, name)
    if not least <= value < math.inf:
      bound = f"at least {least}" if least else "0 or more"
      bound = bound if math.isfinite(value) else f"a finite number, {bound}"
      raise ValueError(f"{type(settings).__name__}.{name} is {value}; expected {bound}.")


def check_seed(settings: Any) -> None:
  """Makes the field `seed` of a frozen dataclass a Python integer. Raises `ValueError` unless it can seed a random key."""
  object.__setattr__(settings, "seed", as_seed(settings.seed, f"{type(settings).__name__}.seed"))
