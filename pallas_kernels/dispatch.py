"""Which implementation of an operation runs, and why not the others. Nothing is chosen by environment or in silence."""

from collections.abc import Mapping
from typing import NamedTuple


class Choice(NamedTuple):
  """The implementation that runs, and for every other one the reason why it does not."""

  implementation: str
  passed_over: dict[str, str]

  def __str__(self) -> str:
    return "\n".join([self.implementation, *(f"  not {name}: {why}" for name, why in self.passed_over.items())])


def choose(operation: str, requested: str, candidates: Mapping[str, str | None]) -> Choice:
  """Picks the implementation asked for, or with "auto" the first candidate that nothing speaks against.

  Args:
    operation: name for the error message.
    requested: "auto" or the name of a candidate.
    candidates: implementations in order of preference; what speaks against each as a default, or `None`.

  Raises:
    ValueError: if `requested` is neither.
  """
  if requested != "auto" and requested not in candidates:
    raise ValueError(f"implementation={requested!r} does not exist for {operation}; want one of {['auto', *candidates]}.")
  chosen = next(name for name, against in candidates.items() if against is None) if requested == "auto" else requested
  others = {
    name: (f"implementation={requested!r} was asked for" if requested != "auto" else against or f"{chosen} comes first")
    for name, against in candidates.items()
    if name != chosen
  }
  return Choice(chosen, others)
