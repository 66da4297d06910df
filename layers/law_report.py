"""The report of `memzoo.check_layer`: which laws were held, broken or not tried, as plain text."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .tolerances import relative_errors, wide


@dataclass(frozen=True)
class Violation:
  """A law that a layer breaks.

  Attributes:
    law: its number.
    message: what differs, where, and how to fix it.
    token, row: the first token and its batch row; `None` if the difference has no place.
    error, tolerance: relative error and its limit; `None` if nothing was compared.
  """

  law: int
  message: str
  token: int | None = None
  row: int | None = None
  error: float | None = None
  tolerance: float | None = None

  @property
  def place(self) -> str:
    """Token, row and error as text; empty if none is known."""
    parts = [f"{name} {value}" for name, value in (("token", self.token), ("batch row", self.row)) if value is not None]
    if self.error is not None:
      parts.append(f"relative error {self.error:.1e} (tolerance {self.tolerance:.0e})")
    return ", ".join(parts)

  def __str__(self) -> str:
    return f"{self.message} [{self.place}]" if self.place else self.message


@dataclass(frozen=True)
class Result:
  """The outcome of one law.

  Attributes:
    law, title: its number and name.
    violations: empty if none were found.
    not_tried: why a check of it was not tried; `None` if all were.
  """

  law: int
  title: str
  violations: tuple[Violation, ...] = ()
  not_tried: str | None = None

  @property
  def verdict(self) -> str:
    """ "held", "broken" or "not tried"."""
    if self.violations:
      return "broken"
    return "held" if self.not_tried is None else "not tried"


@dataclass(frozen=True)
class Report:
  """The laws that were tried on a layer, in the order of their numbers.

  Attributes:
    layer: name of the layer's class.
    precision: "float64" if the layer computes in its input's precision, else "float32"; it sets the tolerances.
    results: one per law.
    first_broken: the number of the law to fix first, since others may follow from it; `None` if none is broken.
  """

  layer: str
  precision: str
  results: tuple[Result, ...]
  first_broken: int | None = None

  @property
  def violations(self) -> tuple[Violation, ...]:
    """All violations, those of `first_broken` first."""
    found = [violation for result in self.results for violation in result.violations]
    return tuple(sorted(found, key=lambda violation: violation.law != self.first_broken))

  @property
  def ok(self) -> bool:
    """Whether no law is broken."""
    return not self.violations

  def raise_if_broken(self) -> None:
    """Raises `AssertionError`, with the whole report, if a law is broken."""
    if not self.ok:
      raise AssertionError(f"\n{self}")

  def __str__(self) -> str:
    wide = max((len(result.title) for result in self.results), default=0)
    lines = [f"{self.layer}: {self.summary}"]
    for result in self.results:
      why = f"  ({result.not_tried})" if result.not_tried and not result.violations else ""
      lines.append(f"  {result.law:2d}  {result.title:{wide}}  {result.verdict}{why}")
      for violation in result.violations:
        lines += textwrap.wrap(str(violation), 118, initial_indent="        ", subsequent_indent="        ")
    if self.first_broken is not None:
      lines.append(f"Start with law {self.first_broken}: the others may follow from it.")
    return "\n".join(lines)

  @property
  def summary(self) -> str:
    """How many laws were held, broken and not tried."""
    verdicts = [result.verdict for result in self.results]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("held", "broken", "not tried"))
    return f"{counts} (compared in {self.precision})"


def differences(law: int, message: str, actual: Any, expected: Any, allowed: float) -> Iterator[Violation]:
  """Yields a `Violation` for the first leaf that differs between two dictionaries of trees; "y" is compared first.

  Args:
    law, message: of the violation; {leaf} and {where} ("token 3") in the message are filled in.
    actual, expected: trees by name. "y" and "x" have tokens, [B, T, ...]; "state" has rows, [B, ...].
    allowed: largest relative error.
  """
  try:
    errors = relative_errors(actual, expected)
  except AssertionError as error:
    yield Violation(law, f"{message.format(leaf='it', where='the start')}: {error}")
    return
  leaves = zip(errors, jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for (path, error, size), a, e in sorted(leaves, key=lambda leaf: leaf[0][0] != "['y']"):
    if error <= allowed:
      continue
    axes = {"y": 2, "x": 2, "state": 1}.get(path.split("'")[1], 0)
    squares = np.square(wide(a) - wide(e)).reshape(*np.shape(a)[:axes], -1)
    off = ~(np.sqrt(np.mean(squares, axis=-1)) <= allowed * size)
    token = int(np.argmax(off.any(axis=0))) if axes == 2 else None
    row = None if axes == 0 else int(np.argmax(off if token is None else off[:, token]))
    leaf, where = re.sub(r"^\['(\w+)'\]", r"\1", path), "the end" if token is None else f"token {token}"
    yield Violation(law, message.format(leaf=leaf, where=where), token, row, error, allowed)
    return
