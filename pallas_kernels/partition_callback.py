"""Partitioning where nobody tells the layout: XLA's partitioner chooses it, and calls back for the program of one device.

`jax.experimental.custom_partitioning` gives XLA a rule of which axes may be split. JAX can neither differentiate nor map such a
call; here a mapped axis joins the rows. Programs that are compiled for TPUs ahead of time cannot call back.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def by_callback(local: Callable[..., list], in_labels: list[P], out_labels: list[P], rows: str) -> Callable[..., list]:
  """A function of arrays with the results of `local`, split along the labelled axes as XLA chooses.

  Args:
    local: maps arrays to a list of arrays; it treats all indices of a labelled axis alike.
    in_labels, out_labels: the axes of each argument and result. Sizes of a label may differ by factors, as with grouped heads.
    rows: the label that mapped axes join.
  """

  local = jax.jit(local)  # a call of its own keeps its constants, which custom_partitioning refuses

  @jax.custom_batching.custom_vmap
  def run(*xs):
    shapes = [x.shape for x in xs], [x.shape for x in jax.eval_shape(local, *xs)]
    call = custom_partitioning(local)
    call.def_partition(partition=_partition(local, *shapes, in_labels, out_labels), **_rule(*shapes, in_labels, out_labels))
    return call(*xs)

  @run.def_vmap
  def mapped(size, is_mapped, *xs):
    if any(m and rows not in labels for m, labels in zip(is_mapped, in_labels, strict=True)):
      out = jax.vmap(local, [0 if m else None for m in is_mapped])(*xs)
      return out, [True] * len(out)
    joined = [
      _join(x if m else jnp.broadcast_to(x[None], (size, *x.shape)), tuple(labels).index(rows)) if rows in labels else x
      for x, m, labels in zip(xs, is_mapped, in_labels, strict=True)
    ]
    out = run(*joined)
    return [_separate(x, size, tuple(labels).index(rows)) for x, labels in zip(out, out_labels, strict=True)], [True] * len(out)

  # Both are traced; the code of other platforms is dropped.
  return lambda *xs: jax.lax.platform_dependent(*xs, tpu=local, default=run)


def _partition(local: Callable, in_shapes: list, out_shapes: list, in_labels: list[P], out_labels: list[P]) -> Callable:
  divisors = _divisors([*in_shapes, *out_shapes], [*in_labels, *out_labels])

  def split(sharding, labels):
    """The sharding of an array, whole along axes that may not be split: XLA may have split them all the same."""
    entries = zip(sharding.spec, [*labels, *[None] * len(sharding.spec)], strict=False)
    return NamedSharding(sharding.mesh, P(*(entry if divisors.get(label, 1) > 1 else None for entry, label in entries)))

  def partition(mesh, arguments, results):
    placed = tuple(split(x.sharding, labels) for x, labels in zip(arguments, in_labels, strict=True))
    returned = [split(x.sharding, labels) for x, labels in zip(jax.tree.leaves(results), out_labels, strict=True)]
    return mesh, local, jax.tree.unflatten(jax.tree.structure(results), returned), placed

  return partition


def _divisors(shapes: list, labels: list[P]) -> dict[str, int]:
  """For each label the greatest number that divides the sizes of all its axes."""
  sizes: dict[str, list[int]] = {}
  for shape, own in zip(shapes, labels, strict=True):
    for size, label in zip(shape, own, strict=False):
      if label:
        sizes.setdefault(label, []).append(size)
  return {label: math.gcd(*own) for label, own in sizes.items()}


def _rule(in_shapes: list, out_shapes: list, in_labels: list[P], out_labels: list[P]) -> dict:
  """The sharding rule. An axis whose size is a multiple of another with the same label is split like that one."""
  shapes, labels = [*in_shapes, *out_shapes], [*in_labels, *out_labels]
  divisors = _divisors(shapes, labels)
  whole: dict[str, int | None] = {}  # factors that are not split, with their sizes where these are parts of an axis

  def axis(i, d, size, label):
    least = divisors.get(label, 1)
    if least > 1 and size == least:
      return label
    name = f"{label or 'other'}_{i}_{d}"
    whole[name] = size // least if least > 1 else None
    return f"({label} {name})" if least > 1 else name

  names = []
  for i, (shape, own) in enumerate(zip(shapes, labels, strict=True)):
    own = [*own, *[None] * (len(shape) - len(own))]
    names.append(" ".join(axis(i, d, size, label) for d, (size, label) in enumerate(zip(shape, own, strict=True))))
  rule = f"{', '.join(names[: len(in_shapes)])} -> {', '.join(names[len(in_shapes) :])}"
  parts = {name: size for name, size in whole.items() if size is not None}
  return {"sharding_rule": rule, "need_replication_factors": tuple(whole), **parts}


def _join(x: jax.Array, axis: int) -> jax.Array:
  """Merges the first axis of x into axis `axis` of the others, where it is the faster one: rows stay on their devices."""
  x = jnp.moveaxis(x, 0, axis + 1)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _separate(x: jax.Array, size: int, axis: int) -> jax.Array:
  """The inverse of `_join`."""
  return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis + 1, 0)
