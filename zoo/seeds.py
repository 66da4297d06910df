"""Random seeds: the same range everywhere, because JAX and Grain keep 32 bits of a seed."""

import operator
from typing import Any


def as_seed(value: Any, name: str) -> int:
  """`value`, an integer of Python, NumPy or JAX, as a Python integer.

  Raises:
    ValueError: if it is no integer, or not from 0 to 2**32 - 1.
  """
  try:
    seed = operator.index(value)
  except TypeError:
    seed = -1
  if not 0 <= seed < 2**32:
    raise ValueError(f"{name} is {value!r}; expected an integer of 0 or more, and less than 2**32.")
  return seed
