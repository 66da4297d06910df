"""How tensors of other libraries become parameters of ours, and back: permutations of their elements, which lose nothing.

A `Rule` says which tensors of a checkpoint are which parameters. Both directions read it, so an exporter is never written.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Form(NamedTuple):
  """A map between the tensors and the parameters of a rule.

  Attributes:
    ours: the parameters of the tensors.
    theirs: its inverse.
  """

  ours: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
  theirs: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


class Rule(NamedTuple):
  """Tensors of a checkpoint, by name, and the parameters that they hold, by path, such as "blocks_0/mlp/up/kernel".

  A tensor that has had several names has these, with "|" between them. The first is the one that is written.
  """

  theirs: tuple[str, ...]
  ours: tuple[str, ...]
  form: Form


def _each(ours: Callable[[np.ndarray], np.ndarray], theirs: Callable[[np.ndarray], np.ndarray]) -> Form:
  return Form(lambda xs: [ours(x) for x in xs], lambda xs: [theirs(x) for x in xs])


SAME = _each(lambda x: x, lambda x: x)
LINEAR = _each(lambda x: x.T, lambda x: x.T)  # weights [out, in] of PyTorch
CONVOLUTION = _each(lambda x: x[:, 0].T, lambda x: x.T[:, None])  # [channels, 1, width] of PyTorch


def stacked(form: Form, *sizes: int) -> Form:
  """`form` of parts of one tensor, which has so many rows of each, one part after another."""
  places = np.cumsum(sizes)[:-1]
  return Form(
    lambda xs: form.ours(np.split(_only(xs, sum(sizes)), places)),
    lambda xs: [np.concatenate(form.theirs(xs))],
  )


def joined(form: Form, *sizes: int) -> Form:
  """The same, of several tensors one after another, wherever they are cut. They are written as these parts."""
  split = stacked(form, *sizes)
  return Form(lambda xs: split.ours([np.concatenate(xs)]), form.theirs)


def grouped(form: Form, groups: int, *sizes: int) -> Form:
  """The same, of a tensor whose rows are in `groups`, each with so many rows of every part."""
  places = np.cumsum(sizes)[:-1]

  def split(xs):
    x = _only(xs, groups * sum(sizes))
    parts = np.split(x.reshape(groups, -1, *x.shape[1:]), places, axis=1)
    return form.ours([part.reshape(-1, *x.shape[1:]) for part in parts])

  def join(xs):
    parts = [part.reshape(groups, -1, *part.shape[1:]) for part in form.theirs(xs)]
    joined = np.concatenate(parts, axis=1)
    return [joined.reshape(-1, *joined.shape[2:])]

  return Form(split, join)


def _only(xs: Sequence[np.ndarray], rows: int) -> np.ndarray:
  (x,) = xs
  if len(x) != rows:
    raise ValueError(f"it has {len(x)} rows; expected {rows}")
  return x


def rule(theirs: str | Sequence[str], ours: str | Sequence[str], form: Form = LINEAR) -> Rule:
  """A rule of one or several tensors and parameters."""
  return Rule(*((x,) if isinstance(x, str) else tuple(x) for x in (theirs, ours)), form)
