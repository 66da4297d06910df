"""Operations on several devices: each device computes its own rows and heads, and nothing is gathered.

Rows and heads are independent of each other in every operation, but XLA's partitioner does not see that through reshapes,
gathers and loops. An operation therefore describes its arguments and results by `ROWS` and `HEADS`,

    run = partitioned(local, in_specs=(P(ROWS, None, HEADS), P(ROWS, HEADS)), out_specs=P(ROWS, None, HEADS))
    y = run(x, state)

and `local` is called on each device with that device's part, by `jax.shard_map`. Over which mesh axes rows and heads are split
is read from the operands' types where these axes are explicit. Types do not tell where axes are automatic; there it is what the
caller says,

    with split_over(mesh, rows=("data", "fsdp"), heads="tensor"):
      y = model.apply(params, x)

and else what XLA's partitioner chooses; operations with a gradient rule of their own help it on CPUs and GPUs (`by_callback`).
Inside a `jax.shard_map` of the caller's, over manual axes, operands are parts already.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .compat import varying_axes
from .partition_callback import by_callback
from .sizes import known

__all__ = [
  "HEADS",
  "ROWS",
  "aligned",
  "apart",
  "free_axes",
  "is_split_by_xla",
  "partitioned",
  "placed_like",
  "split_over",
  "varying_alike",
  "with_gradient",
]

ROWS, HEADS = "rows", "heads"


class _Declared(NamedTuple):
  """What `split_over` was told: a mesh, and the names of its axes for rows and heads."""

  mesh: Mesh | AbstractMesh
  rows: tuple[str, ...]
  heads: tuple[str, ...]

  @property
  def names(self) -> dict[str, tuple[str, ...]]:
    """By label."""
    return {ROWS: self.rows, HEADS: self.heads}


_DECLARED: ContextVar[_Declared | None] = ContextVar("declared", default=None)


@contextmanager
def split_over(mesh: Mesh, *, rows: str | Sequence[str] = (), heads: str | Sequence[str] = ()) -> Iterator[None]:
  """Operations called in this context are split over automatic axes of `mesh`: batch rows over `rows`, heads over `heads`.

  It also decorates functions. It counts while a function is traced: enter it inside of the function that you jit, or around
  all calls. A label whose size does not divide over its axes is split over the first of them only, or not at all.

  Raises:
    ValueError: if the mesh lacks an axis, or an axis has both roles.
  """
  declared = _Declared(mesh, _names(rows), _names(heads))
  for label, own in declared.names.items():
    if missing := sorted(set(own) - set(mesh.axis_names)):
      raise ValueError(f"split_over({label}={own}): the mesh has no axis {missing}; expected some of {mesh.axis_names}.")
  if both := sorted(set(declared.rows) & set(declared.heads)):
    raise ValueError(f"split_over(rows={rows!r}, heads={heads!r}): {both} cannot split both; expected other axes.")
  with _declared(declared):
    yield


@contextmanager
def _declared(declared: _Declared | None) -> Iterator[None]:
  token = _DECLARED.set(declared)
  try:
    yield
  finally:
    _DECLARED.reset(token)


def partitioned(local: Callable, in_specs: Any, out_specs: Any, *, differentiable: bool = True) -> Callable:
  """Returns a function of the same arguments and results as `local` that computes on each device that device's part.

  Args:
    local: a function of arrays that treats all rows and heads alike. It takes sizes from its arguments, and closes over no
      arrays. Its floats all vary over the same manual axes, as the carries of a `jax.lax.scan` must, and so do its integers.
    in_specs: for each argument a `PartitionSpec` of the labels `ROWS` and `HEADS`, or a tree of them, as in `jax.shard_map`.
      Axes without a label are whole on each device. A label is split over a mesh axis only if all axes with it divide.
    out_specs: the same for the results. A float result has all labels of the arguments; JAX sums gradients over the others.
    differentiable: whether JAX may differentiate it. If not, as inside of a `jax.custom_vjp`, it is split also over automatic
      axes that nobody declared; see `by_callback`.
  """

  def run(*operands):
    leaves = jax.tree.leaves(operands)
    structure = jax.tree.structure(operands)
    specs = _specs(in_specs, operands)
    split = _split(leaves, specs)
    if split.is_unknown and not differentiable:
      results = jax.eval_shape(local, *operands)
      flat = by_callback(
        lambda *leaves: jax.tree.leaves(local(*jax.tree.unflatten(structure, leaves))), specs, _specs(out_specs, results), ROWS
      )
      return jax.tree.unflatten(jax.tree.structure(results), flat(*leaves))
    if not split.manual:
      return local(*_alike(operands))
    operands = jax.tree.unflatten(structure, map(split.place, leaves, specs))
    return jax.shard_map(
      lambda *parts: local(*_alike(parts)),
      mesh=split.mesh if jax.sharding.get_abstract_mesh().empty else None,
      in_specs=jax.tree.map(split.spec, in_specs),
      out_specs=jax.tree.map(split.spec, out_specs),
      # By default all axes, without those that are mapped, which only JAX knows.
      axis_names=frozenset() if split.manual == frozenset(split.mesh.axis_names) else split.manual,
    )(*operands)

  return run


def with_gradient(function: Callable, forward: Callable, backward: Callable) -> Callable:
  """`function(static, *operands)` with the two rules of a `jax.custom_vjp`, which are called with `static` first.

  JAX calls the rules when it differentiates, which may be outside of a `split_over`. All three see what was declared where the
  function is called.
  """

  def under(rule):
    def run(static, *args):
      declared, own = static
      with _declared(declared):
        return rule(own, *args)

    return run

  differentiable = jax.custom_vjp(under(function), nondiff_argnums=(0,))
  differentiable.defvjp(under(forward), under(backward))
  return lambda static, *operands: differentiable((_DECLARED.get(), static), *operands)


def is_split_by_xla(tree: Any, specs: Any) -> bool:
  """Whether XLA's partitioner may split arrays of `tree`: over automatic mesh axes that nobody declared, or that do not divide.

  It cannot split kernels. In all other cases a function that is `partitioned` runs on each device alone.
  """
  return not _split(jax.tree.leaves(tree), _specs(specs, tree)).alone


def aligned(tree: Any, specs: Any) -> Any:
  """The arrays of `tree` with the types that `partitioned` gives to such arguments: split and varying alike.

  A `jax.custom_vjp` needs it for its arguments, because gradients have their types, and so has the first carry of a scan.
  """
  leaves, structure = jax.tree.flatten(tree)
  labels = _specs(specs, tree)
  split = _split(leaves, labels)
  return _alike(jax.tree.unflatten(structure, map(split.place, leaves, labels)))


def apart(x: jax.Array, taken: Iterable[Any]) -> jax.Array:
  """x, not split over explicit mesh axes in the entries `taken` of another array's `PartitionSpec`.

  Arithmetic of x with that array is then possible: a result has no axis that is split like another one.
  """
  place = jax.typeof(x).sharding
  free = [free_axes(entry, taken) for entry in place.spec]
  return x if free == [*place.spec] else jax.sharding.reshard(x, NamedSharding(place.mesh, P(*free)))


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """x, split over explicit mesh axes as `like` is. The carry of a scan keeps its type."""
  place, own = jax.typeof(like).sharding, jax.typeof(x).sharding
  return x if own.spec == place.spec else jax.sharding.reshard(x, NamedSharding(own.mesh, place.spec))


def free_axes(entry: Any, taken: Iterable[Any]) -> Any:
  """An entry of a `PartitionSpec` without the mesh axes in the entries `taken`; as it is if it has none of them."""
  others = {name for each in taken for name in _names(each)}
  if others.isdisjoint(_names(entry)):
    return entry
  return tuple(name for name in _names(entry) if name not in others) or None


def varying_alike(like: Any, tree: Any) -> Any:
  """The arrays of `tree`, varying over the manual axes of the arrays of `like` too. Outside of `jax.shard_map` no change.

  The first carry of a `jax.lax.scan` must vary over the axes that later carries vary over.
  """
  axes = frozenset().union(*map(varying_axes, jax.tree.leaves(like)))
  return jax.tree.map(lambda x: _vary(x, axes), tree)


def _specs(specs: Any, tree: Any) -> list[P]:
  """The spec of each leaf of `tree`."""
  return jax.tree.leaves(jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), specs, tree))


def _alike(operands: Any) -> Any:
  """Integers that vary like all integers, and floats that vary like all operands. So integers stay equal over heads."""
  integers = [x for x in jax.tree.leaves(operands) if not _is_float(x)]
  return jax.tree.map(lambda x: varying_alike(operands if _is_float(x) else integers, x), operands)


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  missing = axes - varying_axes(x)
  return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


class _Split(NamedTuple):
  """How the operands of a call are split.

  Attributes:
    mesh: the mesh, or `None` where no axis of a mesh matters.
    names: for each label the mesh axes that it is split over.
    manual: the axes that become manual: all that are not yet, if the operands are then alone; else these axes, and the other
      explicit axes that operands are split over.
    explicit: the explicit axes that operands are split over.
    alone: whether no axis is left to XLA's partitioner that it might split operands over.
    is_unknown: whether operands of known sizes may be split over automatic axes, and nobody declared how.
  """

  mesh: Mesh | AbstractMesh | None
  names: dict[str, tuple[str, ...]]
  manual: frozenset[str]
  explicit: frozenset[str]
  alone: bool
  is_unknown: bool

  def spec(self, labels: P) -> P:
    """The mesh axes in place of labels."""
    return P(*(self.names[label] if label else None for label in labels))

  def place(self, x: jax.Array, labels: P) -> jax.Array:
    """Moves x where its type says that it is split over explicit axes in another way."""
    if not self.explicit:
      return x
    wanted = P(*(tuple(n for n in _names(name) if n in self.explicit) or None for name in self.spec(labels)))
    if _dimensions(jax.typeof(x).sharding.spec, x.ndim) == _dimensions(wanted, x.ndim):
      return x
    return jax.sharding.reshard(x, NamedSharding(self.mesh, wanted))


def _split(leaves: list[jax.Array], specs: list[P]) -> _Split:
  """Finds the axes of each label: explicit ones in the operands' types, automatic ones in what `split_over` was told."""
  types = [jax.typeof(x).sharding for x in leaves]
  declared = _DECLARED.get()
  meshes = [jax.sharding.get_abstract_mesh(), *map(_mesh, leaves), *([declared.mesh] if declared else [])]
  mesh = next((mesh for mesh in meshes if not mesh.empty), None)
  if mesh is None:
    return _Split(None, {}, frozenset(), frozenset(), alone=True, is_unknown=False)
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  split = [_dimensions(sharding.spec, x.ndim) for x, sharding in zip(leaves, types, strict=True)]
  explicit = frozenset(name for dimensions in split for names in dimensions for name in names)
  explicit = frozenset(name for name in explicit if kinds[name] == AxisType.Explicit)
  names, taken = {}, set()
  for label in (ROWS, HEADS):
    places = [(i, d) for i, spec in enumerate(specs) for d, own in enumerate(spec) if own == label]
    seen = max((tuple(n for n in split[i][d] if n in explicit) for i, d in places), key=len, default=())
    told = () if declared is None else (n for n in declared.names[label] if kinds.get(n) == AxisType.Auto and mesh.shape[n] > 1)
    sizes = [leaves[i].shape[d] for i, d in places]
    names[label] = _dividing(mesh, [n for n in (*seen, *told) if n not in taken], sizes)
    taken |= set(names[label])
  free = frozenset(name for name, kind in kinds.items() if kind != AxisType.Manual)
  automatic = frozenset(name for name in free if kinds[name] == AxisType.Auto and mesh.shape[name] > 1)
  meant = automatic if declared is None else automatic & {*declared.rows, *declared.heads}
  alone = meant <= taken  # a label that does not divide over its axis, XLA splits all the same
  manual = free if alone and mesh.size > 1 else explicit | taken
  sized = all(known(*x.shape) for x in leaves)  # a callback is made for its sizes
  is_unknown = sized and not alone and declared is None and not explicit and AxisType.Manual not in kinds.values()
  return _Split(mesh, names, manual, explicit, alone, is_unknown)


def _mesh(x: jax.Array) -> Mesh | AbstractMesh:
  """The mesh that x is on. A call that is not traced needs the devices, which types lack."""
  if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding):
    return x.sharding.mesh
  return jax.typeof(x).sharding.mesh


def _dividing(mesh: Mesh | AbstractMesh, names: list[str], sizes: list[int]) -> tuple[str, ...]:
  """The first of these mesh axes, as long as their devices divide all sizes."""
  while names and any(size % math.prod(mesh.shape[name] for name in names) != 0 for size in sizes):
    names = names[:-1]
  return tuple(names)


def _dimensions(spec: P, ndim: int) -> list[tuple[str, ...]]:
  """The mesh axes of each dimension."""
  return [_names(name) for name in (*spec, *(None,) * (ndim - len(spec)))]


def _names(names: str | Sequence[str] | None) -> tuple[str, ...]:
  return () if names is None else (names,) if isinstance(names, str) else tuple(names)
