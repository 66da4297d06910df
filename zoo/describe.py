"""The parts of a model: parameters, bytes of memory and work, block by block.

The forward pass is traced on shapes alone, so a model too large for this machine can be described on it.
"""

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from rich.table import Table

from ..layers.swiglu import SwiGLU
from ..pallas_kernels.measure import count_flops, flops_by_scope
from .formats import table, thousands

_BLOCK = re.compile(r"blocks_(\d+)(?:/(\w+))?")


class Row(NamedTuple):
  """One part of a model.

  Attributes:
    name: "embedding", "block 0", "final norm" or "head".
    kind: the class of a block's mixer, or "".
    parameters: number of parameters.
    mixer_parameters: how many of them belong to the mixer of a block.
    state_bytes: size of the state of one sequence while generating.
    flops: FLOPs of the matrix products in its forward pass, per token; a multiply-add counts as two.
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
    """Bytes of state of one sequence, summed over the blocks with the same kind of mixer."""
    total: Counter[str] = Counter()
    for row in self.rows:
      if row.state_bytes:
        total[row.kind] += row.state_bytes
    return dict(total)


def describe(model: nn.Module, length: int = 1024) -> Description:
  """The parts of a language model.

  Args:
    model: an unbound `LanguageModel`.
    length: tokens of the sequence for which work and memory are counted.
  """
  model = model.clone(scan=False)  # the same numbers, block by block
  shapes = _parameter_shapes(model)
  parameters, flops = _count_parameters(shapes), Counter()
  for scope, count in flops_by_scope(_forward(model), shapes, model.example(1, length)).items():
    flops[_part(scope)] += count / length
  rows = [Row("embedding", "", parameters["embedding"], 0, 0, 0.0)]
  for i in range(model.depth):
    name, layers = f"block {i}", model.block(i)
    state_bytes = sum(layer.state_bytes(1, length) for layer in layers)
    kind = " + ".join(type(layer).__name__ for layer in layers if not isinstance(layer, SwiGLU)) or "SwiGLU"
    rows.append(Row(name, kind, parameters[name], parameters[name, "mixer"], state_bytes, flops[name]))
  rows.append(Row("final norm", "", parameters["final_norm"], 0, 0, 0.0))
  tied = "tied to the embedding" if getattr(model, "tie_embeddings", False) else ""
  rows.append(Row("head", tied, parameters["head"], 0, 0, flops[""]))
  return Description(tuple(rows), length)


def forward_flops(model: nn.Module, batch: int, length: int) -> int:
  """FLOPs of the matrix products in one forward pass over tokens [batch, length]; a multiply-add counts as two."""
  return count_flops(_forward(model), _parameter_shapes(model), model.example(batch, length))


def _part(scope: str) -> str:
  """The row for work in `scope`. Outside the blocks only the head multiplies matrices."""
  block = _BLOCK.search(scope)
  return f"block {block[1]}" if block else ""


def _forward(model: nn.Module) -> Callable[..., Any]:
  return lambda params, tokens: model.apply(params, tokens)[0]


def _parameter_shapes(model: nn.Module) -> Any:
  return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), model.example(1, 1)))


def _count_parameters(shapes: Any) -> Counter:
  """Parameters of each row, and under (row, "mixer") those of its mixer."""
  count: Counter = Counter()
  for path, leaf in jax.tree.leaves_with_path(shapes["params"]):
    keys = [key.key for key in path]
    block = _BLOCK.fullmatch(keys[0])
    name = f"block {block[1]}" if block else keys[0]
    count[name] += leaf.size
    if block and re.fullmatch(r"mixer(_\d+)?", keys[1]):
      count[name, "mixer"] += leaf.size
  return count


def summary(layer: type) -> tuple[str, str]:
  """The first line of a layer's docstring, and the first indented lines (the equation) in it, or else in its module's."""
  own = inspect.getdoc(layer) or ""
  equation = _first_indented_lines(own) or _first_indented_lines(inspect.getdoc(inspect.getmodule(layer)) or "")
  return own.partition("\n")[0].partition("; see ")[0].removesuffix(".") + ".", equation


def _first_indented_lines(text: str) -> str:
  lines = itertools.dropwhile(lambda line: not line.startswith("    "), text.split("\n\nAttributes:")[0].splitlines())
  return "\n".join(line.strip() for line in itertools.takewhile(lambda line: line.startswith("    "), lines))


class Parts(NamedTuple):
  """The cells of a table of a model's parts; neighbours that are equal share a row. Two columns of words, then numbers."""

  columns: tuple[str, ...]
  rows: list[tuple[str, ...]]
  totals: tuple[str, ...]
  caption: str


def parts(description: Description) -> Parts:
  """The table of a description."""
  rows = []
  for (kind, *numbers), equal in itertools.groupby(description.rows, key=lambda row: row[1:]):
    names = [row.name for row in equal]
    name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].removeprefix('block ')}, each"
    rows.append((name, kind, *(f"{number:,.0f}" if number else "" for number in numbers)))
  memory = sum(row.mixer_parameters for row in description.rows)
  totals = (description.parameters, memory, description.state_bytes, description.flops)
  return Parts(
    columns=("part", "memory", "parameters", "of the memory", "state, bytes", "FLOPs per token"),
    rows=rows,
    totals=("all", "", *(f"{total:,.0f}" for total in totals)),
    caption=f"State and work are those of one sequence of {description.length:,} tokens; a multiply-add is two FLOPs.",
  )


def parts_table(name: str, description: Description) -> Table:
  """`parts` for the screen."""
  columns, rows, totals, caption = parts(description)
  title = f"{name}: {thousands(description.parameters)} parameters"
  return table(title, columns, rows, words=2, footer=totals, caption=caption)
