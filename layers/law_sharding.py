"""Law 11: a layer on four devices equals the layer on one, each device computes its own part, and nothing is gathered."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.hlo import parse
from ..pallas_kernels.measure import count_flops
from ..pallas_kernels.partition import split_over
from .law_report import Violation
from .law_trial import CHUNK, PACKED, ROWS, Trial, first, masked

UNTYPED = "ShardingTypeError"  # what JAX raises over explicit mesh axes if it cannot tell how a result is split
_LOCALLY = "keep rows and heads as axes of their own, or compute them by memzoo.pallas_kernels.partition.partitioned"


def automatic_axes(trial: Trial) -> Iterator[Violation]:
  """Rows and parameter axes split over automatic mesh axes change nothing, and nothing is gathered."""
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  params = jax.device_put(trial.params, trial.shardings(mesh, {"heads": "tensor", "mlp": "tensor"}))
  args = params, *jax.device_put(_short_call(trial), NamedSharding(mesh, P("data")))
  split = split_over(mesh, rows="data", heads="tensor")(trial.apply)
  program = jax.jit(lambda *args: {"over automatic mesh axes": split(*args)}).lower(*args).compile()
  yield from _equal_to_one_device(trial, program, args)
  if "all-gather" in {each.kind for each in parse(program.as_text()).collectives()}:
    yield Violation(11, f"activations are gathered over automatic mesh axes: {_LOCALLY}")


def explicit_and_manual_axes(trial: Trial) -> Iterator[Violation]:
  """Rows split over explicit mesh axes, or by `jax.shard_map`, change nothing; each device computes its share, alone."""
  rows = 4
  mesh = jax.make_mesh((rows,), ("x",))
  args = trial.params, *jax.tree.map(lambda leaf: leaf[:rows], _short_call(trial))
  by_rows = jax.shard_map(trial.apply, mesh=mesh, in_specs=(P(), *[P("x")] * 3), out_specs=P("x"))
  placed = jax.device_put(args[0], NamedSharding(mesh, P())), *jax.device_put(args[1:], NamedSharding(mesh, P("x")))
  calls = {"over explicit mesh axes": trial.apply, "in shard_map": by_rows}

  def compiled():
    with jax.set_mesh(mesh):
      return jax.jit(lambda *args: {how: call(*args) for how, call in calls.items()}).lower(*placed).compile()

  try:
    program = compiled()
  except Exception as error:
    if type(error).__name__ != UNTYPED:
      raise
    del calls["over explicit mesh axes"]  # `explicit_heads` tells it
    program = compiled()
  yield from _equal_to_one_device(trial, program, placed)
  read = parse(program.as_text())
  if moved := {each.kind for each in read.collectives()}:
    yield Violation(11, f"rows depend on each other through {', '.join(sorted(moved))} {_and(calls)}: {_LOCALLY}")
  if (share := read.flops() / max(1, len(calls) * count_flops(trial.apply, *args))) > 0.27:
    yield Violation(11, f"each of {rows} devices does {share:.2f} of the FLOPs {_and(calls)}: {_LOCALLY}")


def _and(calls: dict[str, Callable]) -> str:
  return " and ".join(calls)


def explicit_heads(trial: Trial) -> Iterator[Violation]:
  """Rows and parameter axes may be split over explicit mesh axes."""
  mesh = jax.make_mesh((2, 2), ("x", "y"))
  shardings = trial.shardings(mesh, {"heads": "y", "mlp": "y"})
  rows = NamedSharding(mesh, P("x"))
  params = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), trial.param_shapes, shardings)
  shapes = trial.example(ROWS, CHUNK), trial.fresh_shapes(ROWS), jax.ShapeDtypeStruct((ROWS, CHUNK), np.int32)
  with jax.set_mesh(mesh):
    jax.eval_shape(trial.apply, params, *jax.tree.map(lambda leaf: leaf.update(sharding=rows), shapes))
  yield from ()


def _short_call(trial: Trial) -> tuple[Any, Any, np.ndarray]:
  """An input, state and segment ids of two chunks."""
  return trial.x[:, : 2 * CHUNK], trial.used, PACKED[:, : 2 * CHUNK]


def _equal_to_one_device(trial: Trial, program: Callable, args: tuple) -> Iterator[Violation]:
  """Compares results of `_short_call`, or of its first rows, with those of one device; `program` returns them by name."""
  whole = trial.at_once(trial.x, trial.used, PACKED * first(2 * CHUNK))
  rows = len(args[-1])
  y, state = whole.y[:rows, : 2 * CHUNK], jax.tree.map(lambda leaf: leaf[:rows], whole.state)
  seen = [mask[:rows] if mask.ndim else mask for mask in trial.visible(whole.state)]
  expected = {"y": y, "state": masked(state, seen)}
  for how, (y, state) in jax.device_get(program(*args)).items():
    message = f"{{leaf}} {how} differs from that on one device, first at {{where}}"
    yield from trial.differences(11, message, {"y": y, "state": masked(state, seen)}, expected)
