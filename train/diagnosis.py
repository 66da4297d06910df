"""Diagnosis of jumps in the loss and of numbers that are not finite."""

import re
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from ..zoo.stack import Stack, unroll_params

_ORDER = ("embedding", "blocks", "mixer_norm", "mixer", "mlp_norm", "mlp", "final_norm", "head")  # by data flow


class NonFiniteError(ArithmeticError):
  """Several steps in a row had a loss or a gradient that was not finite."""


class Spikes:
  """Notices losses far above the median of recent ones: by more than `deviations` median deviations, and by a tenth.

  Args:
    window: number of losses that count as recent. No jump is noticed before half as many have been seen.
    deviations: how far above the median a loss must be, in median deviations.
  """

  def __init__(self, window: int = 50, deviations: float = 10.0):
    self._recent, self._deviations = deque(maxlen=window), deviations

  def __call__(self, loss: float) -> float | None:
    """Takes the next loss. Returns the median of the recent ones if it is far above them, else None."""
    recent, median = list(self._recent), None
    self._recent.append(loss)
    if 2 * len(recent) >= self._recent.maxlen:
      median = statistics.median(recent)
      deviation = statistics.median(abs(value - median) for value in recent)
      if loss > median + max(self._deviations * deviation, 0.1 * median):
        return median
    return None


def nonfinite_groups(groups: Sequence[str], nonfinite: Sequence[bool]) -> str:
  """Names the groups of parameters whose gradients were not finite, for a message."""
  bad = [group for group, is_bad in zip(groups, nonfinite, strict=True) if is_bad]
  return "every group" if len(bad) == len(groups) else ", ".join(bad) or "none, but their sum is not"


def first_nonfinite_module(model: nn.Module, params: Any, batch: dict[str, jax.Array]) -> str | None:
  """The first module, in the order of the data flow, whose output on `batch` is not finite, such as "blocks_2/mixer".

  None if all outputs are finite (the backward pass is then at fault), or only the model's own output is not.
  """
  if isinstance(model, Stack):
    model, params = unroll_params(model, params)
  _, variables = model.apply(
    params, batch["tokens"], segment_ids=batch["segment_ids"], capture_intermediates=True, mutable=["intermediates"]
  )
  outputs = {path[:-1]: calls for path, calls in flatten_dict(variables["intermediates"]).items() if len(path) > 1}
  bad = [path for path, calls in outputs.items() if any(not _is_finite(call) for call in calls)]
  # A module that contains a bad one has a bad output too. The innermost is the most specific.
  innermost = [path for path in bad if not any(other[: len(path)] == path and other != path for other in bad)]
  return "/".join(min(innermost, key=_position)) if innermost else None


def _is_finite(output: Any) -> bool:
  """Whether a module's output is finite, apart from the state that may come with it."""
  output = output[0] if isinstance(output, tuple) else output
  return bool(jnp.isfinite(output).all())


def _position(path: tuple[str, ...]) -> tuple:
  """A sort key: the order of the data flow, inferred from names."""

  def rank(name: str) -> tuple:
    stem, number = re.fullmatch(r"(.*?)_?(\d*)", name).groups()
    return (_ORDER.index(stem) if stem in _ORDER else len(_ORDER), int(number or 0), stem)

  return tuple(map(rank, path))
