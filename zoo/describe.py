"""What a model is made of: parameters, bytes of memory and work, block by block, without allocating any of it.

Everything follows from tracing the forward pass on shapes alone, so a model too large for this machine can be described
on it.
"""

import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core
from rich.table import Table

from .language_model import VectorModel

_BLOCK = re.compile(r"blocks_(\d+)(?:/(\w+))?")


class Row(NamedTuple):
  """One part of a model.

  Attributes:
    name: where it is: "embedding", "block 0", "final norm", "head".
    kind: what it is: the class of a block's mixer, or "".
    parameters: how many numbers it learns.
    mixer_parameters: those among them that belong to the mixer of a block.
    state_bytes: what it keeps of one sequence while generating.
    flops: in matrix products of its forward pass, per token; a multiply-add counts as two.
  """

  name: str
  kind: str
  parameters: int
  mixer_parameters: int
  state_bytes: int
  flops: float


@dataclass(frozen=True)
class Description:
  """The parts of a model in order, for sequences of `length` tokens, with their sums."""

  rows: tuple[Row, ...]
  length: int

  @property
  def parameters(self) -> int:
    return sum(row.parameters for row in self.rows)

  @property
  def state_bytes(self) -> int:
    return sum(row.state_bytes for row in self.rows)

  @property
  def flops(self) -> float:
    return sum(row.flops for row in self.rows)

  def state_bytes_by_kind(self) -> dict[str, int]:
    """Bytes kept of one sequence, summed over the blocks that share a mixer."""
    total: Counter[str] = Counter()
    for row in self.rows:
      if row.state_bytes:
        total[row.kind] += row.state_bytes
    return dict(total)


def describe(model: nn.Module, length: int = 1024) -> Description:
  """Takes a language model apart.

  Args:
    model: an unbound `LanguageModel`.
    length: tokens of the sequence that work and memory are counted for.
  """
  parameters = _count_parameters(model)
  flops = Counter()
  for scope, count in flops_by_scope(_forward(model), _parameter_shapes(model), _tokens(model, 1, length)).items():
    flops[_part(scope)] += count / length
  rows = [Row("embedding", "", parameters["embedding"], 0, 0, 0.0)]
  for i in range(model.depth):
    name, mixer = f"block {i}", model.mixer(i)
    state_bytes = mixer.state_bytes(1, length)
    kind = type(mixer).__name__
    rows.append(Row(name, kind, parameters[name], parameters[name, "mixer"], state_bytes, flops[name]))
  rows.append(Row("final norm", "", parameters["final_norm"], 0, 0, 0.0))
  rows.append(Row("head", "tied to the embedding" if model.tie_embeddings else "", parameters["head"], 0, 0, flops[""]))
  return Description(tuple(rows), length)


def forward_flops(model: nn.Module, batch: int, length: int) -> int:
  """FLOPs of the matrix products in one forward pass over tokens [batch, length]; a multiply-add counts as two."""
  return count_flops(_forward(model), _parameter_shapes(model), _tokens(model, batch, length))


class Peak(NamedTuple):
  """Bytes that each device is predicted to hold at the peak of a training step.

  Attributes:
    state: parameters, moments and counters.
    batch: a device's share of it.
    temporaries: all else: activations, gradients, what of the results does not take the place of the state, and code.
    backend: that the step was compiled for.
  """

  state: int
  batch: int
  temporaries: int
  backend: str

  @property
  def total(self) -> int:
    return self.state + self.batch + self.temporaries


def predicted_peak(experiment: Any) -> Peak:
  """Compiles an experiment's training step for this machine, and reads off what it will need. Nothing is allocated.

  What the process holds beside a step is not in it: Python, the text, the evaluation, other programs.

  Raises:
    ValueError: if the experiment cannot be run on any mesh of this machine.
  """
  program, _, _ = _laid_out(experiment)
  batch = abstract_batch(experiment.data, program.batch_sharding)
  found = program.train.lower(program.abstract_state, batch).compile().memory_analysis()
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  whole = found.argument_size_in_bytes + results + found.temp_size_in_bytes + found.generated_code_size_in_bytes
  held, given = bytes_on_a_device(program.abstract_state), bytes_on_a_device(batch)
  return Peak(held, given, whole - held - given, jax.default_backend())


def bytes_on_a_device(tree: Any) -> int:
  """Bytes that one device holds of `tree`: arrays, or their shapes with shardings."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def abstract_batch(data: Any, sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch of a `TextData` or a `TaskData`, without its numbers."""
  if not hasattr(data, "sources"):
    batch = jax.eval_shape(data.load().batch_on_device, jax.ShapeDtypeStruct((), jnp.uint32))
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for name, leaf in batch.items()}
  types = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}
  shape = (data.batch_size, data.sequence_length)
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in types.items()}


def _laid_out(experiment: Any) -> tuple[Any, int, str]:
  """A run's `Program` here, the number of its devices, and a remark: one device, where the mesh does not fit them."""
  from ..train.sharding import MeshShape
  from ..train.step import build_program

  def on(shape: MeshShape) -> tuple[Any, int]:
    mesh, data = shape.build(), experiment.data
    options = {"steps": experiment.trainer.steps, "batch_size": data.batch_size, "tokens": data.one_token}
    return build_program(experiment.model, experiment.optimizer, mesh, **options), mesh.size

  try:
    return *on(experiment.mesh), ""
  except ValueError:
    return *on(MeshShape(data=1)), f" alone: {experiment.mesh} does not fit the {jax.device_count()} here"


def count_flops(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of the matrix products (`dot_general`) in `function(*args)`, counted in its jaxpr.

  Bodies of `scan` count once per iteration, of `cond` as the dearest branch, of a Pallas kernel once per grid point.
  The number of turns of a `while` is not known beforehand: its body counts once.

  Args:
    function: to be traced, not run.
    *args: arrays or `jax.ShapeDtypeStruct`s.
  """
  return sum(flops_by_scope(function, *args).values())


def flops_by_scope(function: Callable[..., Any], *args: Any) -> dict[str, int]:
  """As `count_flops`, separately for each `jax.named_scope` (Flax names one after every module)."""
  total: Counter[str] = Counter()
  for scope, count in _dot_flops(jax.make_jaxpr(function)(*args).jaxpr, ""):
    total[scope] += count
  return dict(total)


def _dot_flops(jaxpr: core.Jaxpr, scope: str) -> Iterator[tuple[str, int]]:
  for equation in jaxpr.eqns:
    inner = f"{scope}/{equation.source_info.name_stack}".strip("/")
    match equation.primitive.name:
      case "dot_general":
        yield inner, _dot_general_flops(equation)
      case "cond":
        branches = (list(_dot_flops(branch.jaxpr, inner)) for branch in equation.params["branches"])
        yield from max(branches, key=lambda branch: sum(count for _, count in branch))
      case name:
        times = _repetitions(name, equation.params)
        for nested in _jaxprs(equation.params.values()):
          yield from ((s, times * count) for s, count in _dot_flops(nested, inner))


def _repetitions(primitive: str, params: dict[str, Any]) -> int:
  if primitive == "scan":
    return params["length"]
  if primitive == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  if primitive == "shard_map":
    return params["mesh"].size
  return 1


def _dot_general_flops(equation: core.JaxprEqn) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _jaxprs(values: Any) -> Iterator[core.Jaxpr]:
  for value in values:
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
    elif isinstance(value, (tuple, list)):
      yield from _jaxprs(value)


def _part(scope: str) -> str:
  """The row that work in `scope` belongs to; outside the blocks only the head multiplies."""
  block = _BLOCK.search(scope)
  return f"block {block[1]}" if block else ""


def _forward(model: nn.Module) -> Callable[..., Any]:
  return lambda params, tokens: model.apply(params, tokens)[0]


def _tokens(model: nn.Module, batch: int, length: int) -> jax.ShapeDtypeStruct:
  if isinstance(model, VectorModel):
    return jax.ShapeDtypeStruct((batch, length, model.input_dim), jnp.float32)
  return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def _parameter_shapes(model: nn.Module) -> Any:
  return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), _tokens(model, 1, 1)))


def _count_parameters(model: nn.Module) -> Counter:
  """Parameters per row, and under (row, "mixer") those of its mixer."""
  count: Counter = Counter()
  for path, leaf in jax.tree.leaves_with_path(_parameter_shapes(model)["params"]):
    keys = [key.key for key in path]
    block = _BLOCK.fullmatch(keys[0])
    name = f"block {block[1]}" if block else keys[0]
    count[name] += leaf.size
    if block and keys[1] == "mixer":
      count[name, "mixer"] += leaf.size
  return count


def summary(layer: type) -> tuple[str, str]:
  """What a layer's docstring opens with, and the equation (the first indented lines) in it or else in its module's."""
  own = inspect.getdoc(layer) or ""
  equation = _first_indented_lines(own) or _first_indented_lines(inspect.getdoc(inspect.getmodule(layer)) or "")
  return own.partition("\n")[0].partition("; see ")[0].removesuffix(".") + ".", equation


def _first_indented_lines(text: str) -> str:
  lines = itertools.dropwhile(lambda line: not line.startswith("    "), text.split("\n\nAttributes:")[0].splitlines())
  return "\n".join(line.strip() for line in itertools.takewhile(lambda line: line.startswith("    "), lines))


def render(experiment: Any, description: Description, peak: Peak | None = None) -> list[Any]:
  """An experiment for the screen: rich tables of its model's parts, and of the run that it would be."""
  return [_parts_table(experiment.name, description), _facts_table(experiment, description, peak)]


def _parts_table(name: str, description: Description) -> Table:
  table = Table(
    title=f"{name}: {thousands(description.parameters)} parameters",
    caption=f"State and work are those of one sequence of {description.length:,} tokens; a multiply-add is two FLOPs.",
    title_justify="left",
    caption_justify="left",
    show_footer=True,
  )
  table.add_column("part", footer="all")
  table.add_column("memory")
  totals = (
    ("parameters", f"{description.parameters:,}"),
    ("of the memory", f"{sum(row.mixer_parameters for row in description.rows):,}"),
    ("state, bytes", f"{description.state_bytes:,}"),
    ("FLOPs a token", f"{description.flops:,.0f}"),
  )
  for heading, total in totals:
    table.add_column(heading, justify="right", footer=total)
  for (kind, *numbers), equal in itertools.groupby(description.rows, key=lambda row: row[1:]):
    names = [row.name for row in equal]
    name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].removeprefix('block ')}, each"
    table.add_row(name, kind, *(f"{number:,.0f}" if number else "" for number in numbers))
  return table


def _facts_table(experiment: Any, description: Description, peak: Peak | None) -> Table:
  model, data, optimizer, trainer = experiment.model, experiment.data, experiment.optimizer, experiment.trainer
  state = ", ".join(f"{size / 1024:,.1f} KiB in {kind}" for kind, size in description.state_bytes_by_kind().items())
  tokens = data.batch_size * data.sequence_length
  work = 3 * description.flops * tokens * trainer.steps
  table = Table.grid(padding=(0, 2))
  facts = {
    "model": f"width {model.width}, depth {model.depth}, {model.vocab_size} tokens, {jnp.dtype(model.dtype).name}",
    "state": f"{state}, for a sequence while generating",
    "data": f"{data.source}, {data.batch_size} x {data.sequence_length} a step",
    "optimiser": (
      f"AdamW, rate {optimizer.learning_rate:g} after {optimizer.warmup_steps} steps, cosine to "
      f"{optimizer.learning_rate * optimizer.final_fraction:g}, decay {optimizer.weight_decay:g}"
    ),
    "memory": _memory(experiment),
    "run": f"{trainer.steps:,} steps, {thousands(tokens * trainer.steps)} tokens, {thousands(work)}FLOPs in matrix products",
  }
  if peak:
    facts["peak"] = (
      f"{binary(peak.total)} a device in a training step, as compiled for {peak.backend}: {binary(peak.state)} of state, "
      f"{binary(peak.batch)} of batch, {binary(peak.temporaries)} of temporaries"
    )
  for name, fact in facts.items():
    table.add_row(name, fact)
  return table


def _memory(experiment: Any) -> str:
  program, devices, remark = _laid_out(experiment)
  state = program.abstract_state
  params, optimizer = bytes_on_a_device(state.params), bytes_on_a_device(state.opt_state)
  moments = "moments" if experiment.optimizer.accumulate_steps == 1 else "moments and accumulated gradients"
  where = f"each of {devices} devices" if devices > 1 else f"one device{remark}"
  return f"{binary(params)} of parameters, {binary(optimizer)} of {moments}, on {where}"


def binary(count: int) -> str:
  """Bytes in the largest unit that they make one of: 1536 is "1.5 KiB"."""
  for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if count >= size:
      return f"{count / size:,.1f} {unit}"
  return f"{count} bytes"


def thousands(number: float) -> str:
  """Three digits and a unit: 1234567 is "1.23 M"."""
  for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if number >= size:
      return f"{number / size:.3g} {unit}"
  return f"{number:.3g} "
