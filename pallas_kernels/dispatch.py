"""Chooses an operation's implementation, and gives the reason against each of the others.

No environment variable changes the choice, and there is no silent fallback.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .partition import varying_alike


class Choice(NamedTuple):
  """The implementation that runs, and for each other implementation the reason why it does not."""

  implementation: str
  passed_over: dict[str, str]

  def __str__(self) -> str:
    return "\n".join([self.implementation, *(f"  not {name}: {why}" for name, why in self.passed_over.items())])


def choose(operation: str, requested: str, candidates: Mapping[str, str | None]) -> Choice:
  """Picks the requested implementation, or with "auto" the first candidate without an objection.

  Args:
    operation: the operation's name, for the error message.
    requested: "auto" or the name of a candidate.
    candidates: implementations in order of preference, each with the objection to choosing it by default, or `None`.

  Raises:
    ValueError: if `requested` is neither "auto" nor a candidate.
  """
  if requested != "auto" and requested not in candidates:
    raise ValueError(f"implementation={requested!r} does not exist for {operation}; expected one of {['auto', *candidates]}.")
  chosen = next(name for name, objection in candidates.items() if objection is None) if requested == "auto" else requested
  others = {
    name: (f"implementation={requested!r} was requested" if requested != "auto" else objection or f"{chosen} comes first")
    for name, objection in candidates.items()
    if name != chosen
  }
  return Choice(chosen, others)


def choose_by_length(operation: str, requested: str, tokens: int) -> Choice:
  """`choose` between "xla", a form in chunks, and "recurrent", the oracle, which a call of a single token runs."""
  single = tokens == 1
  return choose(
    operation,
    requested,
    {
      "xla": "a chunk of a single token is the recurrence with overhead" if single else None,
      "recurrent": None if single else "one dependent step per token: the oracle, and the default for decoding",
    },
  )


def kept_by_platform(cpu: Callable[..., Any], others: Callable[..., Any], inputs: Any) -> tuple[Any, tuple[Any, Any]]:
  """The results of `by_platform`, and what the form of each platform keeps for its gradient.

  Each form maps inputs to (results, kept). What another platform's form would keep is zero. A program reads what its own
  platform kept, so the zeros take no memory in it.
  """
  forms = cpu, others
  shapes = [jax.eval_shape(form, inputs)[1] for form in forms]

  def on(platform, inputs):
    results, kept = forms[platform](inputs)
    zeros = varying_alike(inputs, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return results, tuple(kept if i == platform else zeros[i] for i in range(len(forms)))

  return by_platform(partial(on, 0), partial(on, 1), inputs)


def by_platform(cpu: Callable[..., Any], others: Callable[..., Any], *args: Any) -> Any:
  """`cpu(*args)` in programs that are compiled for a CPU, `others(*args)` in all other programs.

  The platform is known when a program is lowered, which may be on another machine; `jax.default_backend()` does not tell. Both
  functions are traced, so results must have equal shapes and dtypes; only one is compiled.
  """
  return jax.lax.platform_dependent(*args, cpu=cpu, default=others)
