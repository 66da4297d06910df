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

  A tensor that has had several names has these, with "|" between them. The first is the one that is written. Where none of the
  tensors is there, the rule `instead` holds, if there is one.
  """

  theirs: tuple[str, ...]
  ours: tuple[str, ...]
  form: Form
  instead: "Rule | None" = None


def _each(ours: Callable[[np.ndarray], np.ndarray], theirs: Callable[[np.ndarray], np.ndarray]) -> Form:
  return Form(lambda xs: [ours(x) for x in xs], lambda xs: [theirs(x) for x in xs])


SAME = _each(lambda x: x, lambda x: x)
LINEAR = _each(lambda x: x.T, lambda x: x.T)  # weights [out, in] of PyTorch
CONVOLUTION = _each(lambda x: x[:, 0].T, lambda x: x.T[:, None])  # [channels, 1, width] of PyTorch
MANY_LINEAR = _each(lambda x: x.swapaxes(1, 2), lambda x: x.swapaxes(1, 2))  # the same of several maps, [maps, out, in]


def of_shape(*shape: int) -> Form:
  """Of tensors of this shape, that are vectors of ours."""
  return _each(lambda x: x.reshape(-1), lambda x: x.reshape(shape))


def of_heads(heads: int) -> Form:
  """Of linear maps [heads * out, in], that are one matrix [in, out] for each head of ours."""
  return _each(
    lambda x: x.reshape(heads, -1, x.shape[-1]).swapaxes(1, 2), lambda x: x.swapaxes(1, 2).reshape(-1, x.shape[1])
  )


def gathered(count: int) -> Form:
  """Of linear maps [out, in], of which each `count` are one array [count, in, out] of ours."""
  return Form(
    lambda xs: [np.stack([x.T for x in xs[i : i + count]]) for i in range(0, len(xs), count)],
    lambda xs: [x.T for each in xs for x in each],
  )


def beside(form: Form, *sizes: int) -> Form:
  """`form` of parts of one tensor [maps, rows, in], which has so many rows of each."""
  places = np.cumsum(sizes)[:-1]
  return Form(
    lambda xs: form.ours(np.split(_only(xs, sum(sizes), 1), places, axis=1)),
    lambda xs: [np.concatenate(form.theirs(xs), axis=1)],
  )


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


def _only(xs: Sequence[np.ndarray], rows: int, axis: int = 0) -> np.ndarray:
  (x,) = xs
  if x.shape[axis] != rows:
    raise ValueError(f"it has {x.shape[axis]} rows; expected {rows}")
  return x


def rule(theirs: str | Sequence[str], ours: str | Sequence[str], form: Form = LINEAR, instead: Rule | None = None) -> Rule:
  """A rule of one or several tensors and parameters."""
  return Rule(*((x,) if isinstance(x, str) else tuple(x) for x in (theirs, ours)), form, instead)
