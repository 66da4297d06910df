"""Shows a suite's results: a picture and a table of layers by tasks, and the learning curves."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..zoo import formats
from .files import save_figure, write_text
from .suite import LEARNED, Cell, Challenge, Suite, read


class Column(NamedTuple):
  """A column of the table.

  Attributes:
    title: its heading.
    challenge: the challenge that it is part of.
    test: the test that it shows; "" is the training task.
  """

  title: str
  challenge: Challenge
  test: str


class Results:
  """The cells of a suite that a folder holds."""

  def __init__(self, suite: Suite, folder: Path):
    names = [(challenge, layer) for challenge in suite.challenges for layer in {*suite.layers, challenge.reference}]
    found = {(challenge.name, layer): read(folder, challenge.name, layer) for challenge, layer in names}
    self.cells: dict[tuple[str, str], Cell] = {key: cell for key, cell in found.items() if cell is not None}
    if not self.cells:
      raise ValueError(f"{folder} holds no results of these tasks; expected a folder that `memzoo compare --suite` wrote.")
    self.suite = suite
    self.layers = [layer for layer in suite.layers if any(layer == other for _, other in self.cells)]
    self.columns = [Column(title, task, test) for task in suite.challenges for title, test in task.columns.items()]

  def cell(self, challenge: Challenge, layer: str) -> Cell | None:
    return self.cells.get((challenge.name, layer))

  def counts(self, challenge: Challenge) -> bool:
    """Whether the reference has learned the task, so that the column says something about the others."""
    cell = self.cell(challenge, challenge.reference)
    return cell is not None and cell.learned

  def text(self, column: Column, layer: str) -> str:
    """What the table says: a score, how long the layer has tried, or nothing."""
    cell = self.cell(column.challenge, layer)
    if cell is None:
      return ""
    if not cell.learned:
      return f"not in {cell.steps:,}"
    return f"{cell.share(column.test):.2f}"

  def state(self, layer: str) -> str:
    """The bytes of state on the first task that the layer took."""
    return next(formats.binary(self.cells[name, other].state_bytes) for name, other in self.cells if other == layer)

  def speed(self, layer: str) -> float:
    """Tokens per second in training, as a multiple of attention's on the same tasks and machine (geometric mean)."""
    ratios = []
    for challenge in self.suite.challenges:
      mine, attention = self.cell(challenge, layer), self.cell(challenge, "Attention")
      if mine and attention and mine.made.get("machine") == attention.made.get("machine"):
        ratios.append(mine.tokens_per_second / attention.tokens_per_second)
    return statistics.geometric_mean(ratios) if ratios else math.nan


def write(suite: Suite, folder: Path) -> list[Path]:
  """Writes `table.md`, `suite.png` and `curves.png` to the folder of the cells; returns their paths."""
  results, paths = Results(suite, folder), [folder / name for name in ("table.md", "suite.png", "curves.png")]
  write_text(paths[0], markdown(results))
  draw(results, paths[1])
  draw_curves(results, paths[2])
  return paths


def markdown(results: Results) -> str:
  """The table and what its columns are, in Markdown."""
  rows = []
  for layer in results.layers:
    speed = results.speed(layer)
    facts = [layer, results.state(layer), "" if math.isnan(speed) else f"{speed:.2f}"]
    rows.append([*facts, *(results.text(column, layer) for column in results.columns)])
  titles = [column.title + ("" if results.counts(column.challenge) else " (not solved)") for column in results.columns]
  table = formats.markdown(["layer", "state", "speed", *titles], rows)
  asked = formats.markdown(["task", "asks for", "reference", "it learned in", "setting"], _challenges(results))
  budget, cells = results.suite.budget, results.cells.values()
  rates = ", ".join(f"{rate:g}" for rate in budget.learning_rates)
  words = (
    f"Scores are shares of right answers, means of {budget.seeds} seeds. A number is there where the layer learned the task "
    f'that it was trained on ({LEARNED:.0%} of all answers); "not in 6,000" says that it did not in so many steps. Learning '
    f"rates {rates}; speed is tokens per second in training, attention is 1. {len(results.cells)} cells, "
    f"{sum(cell.seconds for cell in cells) / 3600:.1f} hours on {', '.join(sorted({cell.made['machine'] for cell in cells}))}."
  )
  return f"{words}\n\n{table}\n{asked}"


def _challenges(results: Results) -> Iterator[list[str]]:
  for challenge in results.suite.challenges:
    cell = results.cell(challenge, challenge.reference)
    learned = "" if cell is None else f"{cell.steps:,} steps" if cell.learned else f"not in {cell.steps:,}"
    settings = ", ".join(f"`{text}`" for text in challenge.settings)
    yield [challenge.name, challenge.asks, challenge.reference, learned, f"`{challenge.task}` {settings}".strip()]


def draw(results: Results, path: Path) -> None:
  """The picture: layers by tasks, colour by score; hatched where a layer has not learned the task."""
  from matplotlib import colormaps
  from matplotlib.figure import Figure

  rows, columns = len(results.layers), len(results.columns)
  figure = Figure(figsize=(3.6 + 0.62 * columns, 2.3 + 0.34 * rows), layout="constrained")
  axes = figure.add_subplot()
  colours = colormaps["RdYlBu"]
  for i, layer in enumerate(results.layers):
    for j, column in enumerate(results.columns):
      _draw_cell(axes, colours, results, layer, column, (j, i))
  axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
  titles = [column.title + ("" if results.counts(column.challenge) else " *") for column in results.columns]
  axes.set_xticks(range(columns), titles, rotation=40, ha="left", rotation_mode="anchor", size=9)
  axes.set_yticks(range(rows), [f"{layer}   {results.state(layer)}" for layer in results.layers], size=9)
  axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
  for side in axes.spines.values():
    side.set_visible(False)
  speeds = axes.secondary_yaxis("right")
  speeds.set_yticks(range(rows), [f"{results.speed(layer):.2f}x" for layer in results.layers], size=8)
  speeds.tick_params(length=0)
  speeds.spines["right"].set_visible(False)
  figure.supxlabel("\n".join(_notes(results)), size=8)
  save_figure(figure, path)


def _notes(results: Results) -> Iterator[str]:
  yield "Share of right answers of layers that learned the task.   Hatched: not learned within the budget.   Blank: not run."
  if not all(results.counts(column.challenge) for column in results.columns):
    yield "* The reference has not learned it, so the column says nothing."
  yield "Left: bytes of state of one sequence.   Right: tokens per second in training; attention is 1."


def _draw_cell(axes: Any, colours: Any, results: Results, layer: str, column: Column, place: tuple[int, int]) -> None:
  from matplotlib.patches import Rectangle

  cell, (x, y) = results.cell(column.challenge, layer), place
  if cell is None:
    return
  box = {"xy": (x - 0.47, y - 0.46), "width": 0.94, "height": 0.92, "linewidth": 0}
  if not cell.learned:
    axes.add_patch(Rectangle(**box, facecolor="0.96", edgecolor="0.75", hatch="////"))
    return
  share = cell.share(column.test)
  axes.add_patch(Rectangle(**box, facecolor=colours(share)))
  axes.text(x, y, f"{share:.2f}", ha="center", va="center", size=8, color="white" if not 0.2 < share < 0.85 else "black")


def draw_curves(results: Results, path: Path) -> None:
  """A panel for each task: the score of every layer on the training task over the steps."""
  from matplotlib.figure import Figure

  challenges = results.suite.challenges
  columns = min(4, len(challenges))
  lines = math.ceil(len(challenges) / columns)
  figure = Figure(figsize=(0.6 + 3.1 * columns, 1.0 + 2.3 * lines), layout="constrained")
  grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
  styles = {layer: {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--", "lw": 1.2} for i, layer in enumerate(results.layers)}
  for axes, challenge in zip(grid.flat, challenges, strict=False):
    for layer, style in styles.items():
      if cell := results.cell(challenge, layer):
        axes.plot(*np.transpose(cell.curve), label=layer, **style)
    axes.axhline(LEARNED, color="0.7", lw=0.8, ls=":")
    axes.set_title(challenge.name, size=9)
    axes.set(xlim=(0, None), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.25)
  for axes in list(grid.flat)[len(challenges) :]:
    axes.set_axis_off()
  for axes in grid[-1]:
    axes.set_xlabel("step", size=9)
  found = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
  shown = {layer: found[layer] for layer in results.layers if layer in found}
  figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
  save_figure(figure, path)
