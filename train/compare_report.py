"""Shows the results of a comparison: a table for the screen, one in Markdown, and pictures."""

import math
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..zoo import formats
from .compare import Comparison, Entrant, Trial
from .files import save_figure


class Board:
  """The live table of all entrants' progress; pass it to `compare` as `report`."""

  def __init__(self, entrants: Iterable[Entrant]):
    self._rows: dict[str, dict[str, Any]] = {entrant.title: {"entrant": entrant} for entrant in entrants}
    self.continuous = any(row["entrant"].task.continuous for row in self._rows.values())

  def __call__(self, entrant: Entrant, progress: dict[str, Any]) -> None:
    """Records the progress of an entrant."""
    self._rows[entrant.title].update(progress)

  def __rich__(self) -> Table:
    tests = list(next(iter(self._rows.values()))["entrant"].task.tests())
    rows = []
    for row in self._rows.values():
      entrant, trial = row["entrant"], row.get("trial")
      scores = [spread(trial.scores[test], self.continuous) for test in tests] if trial else [""] * len(tests)
      step = trial.steps if trial else row.get("step", "")
      now = [f"{row[name]:.3f}" if name in row else "" for name in ("loss", "score")]
      rows.append((entrant.name, formats.binary(entrant.state_bytes), f"{entrant.parameters:,}", str(step), *now, *scores))
    return formats.table(None, ("layer", "state", "parameters", "step", "loss", "training", *tests), rows)


def markdown(comparison: Comparison) -> str:
  """The table of results in Markdown: means over seeds, and half their range if there are several seeds."""
  tests, continuous = list(comparison.chance), comparison.continuous
  means = f"mean of {comparison.budget.seeds} seeds ± half their range"
  rows = []
  for trial in comparison.trials:
    facts = [trial.name, f"{trial.state_bytes:,}", f"{trial.parameters:,}", str(trial.steps), f"{trial.learning_rate:g}"]
    rows.append([*facts, *(spread(trial.scores[test], continuous) for test in tests)])
  rows.append(["without memory", *[""] * 4, *(score(value, continuous) for value in comparison.chance.values())])
  columns = ["layer", "state, bytes", "parameters", "steps", "rate", *tests]
  return f"`{comparison.task}`: {measure(comparison)} by {comparison.grows}, {means}\n\n{formats.markdown(columns, rows)}"


def draw(comparison: Comparison, directory: Path) -> list[Path]:
  """Draws the pictures that the comparison has data for; returns their paths.

  `training.png` has scores on the training task over the steps, a line for each layer, and `scores.png` those of the tests.
  `frontier.png` has scores over the bytes of state, if layers have several sizes. `kinds.png` has scores by kind of answer, as
  maps if all tests have the same kinds.
  """
  drawn = [_draw_training(comparison, directory / "training.png")]
  if len(comparison.chance) > 1:
    drawn.append(_draw_scores(comparison, directory / "scores.png"))
  if len({trial.name for trial in comparison.trials}) < len(comparison.trials):
    drawn.append(_draw_frontier(comparison, directory / "frontier.png"))
  kinds = [list(by_kind) for by_kind in comparison.trials[0].kinds.values()]
  if len(kinds[-1]) > 1:
    shared = len(kinds) > 1 and all(names == kinds[0] for names in kinds)
    drawn.append((_draw_maps if shared else _draw_kinds)(comparison, directory / "kinds.png"))
  return drawn


def _draw_scores(comparison: Comparison, path: Path) -> Path:
  figure, axes = _canvas(comparison)
  tests = list(comparison.chance)
  for trial, style in zip(comparison.trials, _styles(comparison), strict=True):
    _line(axes, range(len(tests)), [trial.scores[test] for test in tests], label(comparison, trial), style)
  axes.plot(range(len(tests)), list(comparison.chance.values()), ":", color="0.5", linewidth=1, label="without memory")
  axes.set_xticks(range(len(tests)), tests)
  axes.set_xlabel(comparison.grows)
  return _finish(figure, axes, path)


def _draw_training(comparison: Comparison, path: Path) -> Path:
  figure, axes = _canvas(comparison, ", during training")
  for trial, style in zip(comparison.trials, _styles(comparison), strict=True):
    steps, _, scores = zip(*trial.training[f"{trial.learning_rate:g}"], strict=True)
    _line(axes, steps, scores, label(comparison, trial), style | {"markersize": 2})
  if comparison.continuous:
    axes.set_yscale("log")
  axes.set_xlabel("step")
  return _finish(figure, axes, path)


def _draw_frontier(comparison: Comparison, path: Path) -> Path:
  hardest = list(comparison.chance)[-1]
  figure, axes = _canvas(comparison, f", on {hardest} {comparison.grows}")
  colours = _colours(comparison)
  for name, colour in colours.items():
    trials = sorted((trial for trial in comparison.trials if trial.name == name), key=lambda trial: trial.state_bytes)
    seeds = [trial.scores[hardest] for trial in trials]
    _line(axes, [trial.state_bytes for trial in trials], seeds, name, {"color": colour, "marker": "o"})
  axes.axhline(comparison.chance[hardest], linestyle=":", color="0.5", linewidth=1, label="without memory")
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter(lambda size, _: formats.binary(int(size)))
  axes.set_xlabel("state of one sequence")
  return _finish(figure, axes, path)


def _draw_kinds(comparison: Comparison, path: Path) -> Path:
  hardest = list(comparison.chance)[-1]
  figure, axes = _canvas(comparison, f", on {hardest} {comparison.grows}")
  for trial, style in zip(comparison.trials, _styles(comparison), strict=True):
    kinds = trial.kinds[hardest]
    _line(axes, range(len(kinds)), list(kinds.values()), label(comparison, trial), style | {"markersize": 2})
  names = list(comparison.trials[0].kinds[hardest])
  shown = range(0, len(names), max(1, len(names) // 8))
  axes.set_xticks(list(shown), [names[i] for i in shown])
  if comparison.continuous:
    axes.set_yscale("log")
    axes.set_ylim(bottom=None)
  axes.set_xlabel("position")
  return _finish(figure, axes, path)


def _draw_maps(comparison: Comparison, path: Path) -> Path:
  from matplotlib.figure import Figure

  trials, tests = comparison.trials, list(comparison.chance)
  kinds = list(trials[0].kinds[tests[0]])
  columns = min(4, len(trials))
  rows = math.ceil(len(trials) / columns)
  size = (1.5 + 2.6 * columns, 0.8 + rows * (1.2 + 0.28 * len(kinds)))
  figure = Figure(figsize=size, layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  top = max(np.mean(s) for t in trials for by in t.kinds.values() for s in by.values()) if comparison.continuous else 1.0
  for axes, trial in zip(grid.flat, trials, strict=False):
    values = np.array([[np.mean(trial.kinds[test][kind]) for test in tests] for kind in kinds])
    image = axes.imshow(values, vmin=0, vmax=top, aspect="auto", cmap="viridis")
    for (i, j), value in np.ndenumerate(values):
      ink = "white" if value < top / 2 else "black"
      axes.text(j, i, score(value, comparison.continuous), ha="center", va="center", size=7, color=ink)
    axes.set_title(label(comparison, trial), size=9)
    axes.set_xticks(range(len(tests)), tests, size=8)
    axes.set_yticks(range(len(kinds)), kinds, size=8)
  for axes in list(grid.flat)[len(trials) :]:
    axes.set_axis_off()
  figure.colorbar(image, ax=grid, label=measure(comparison), shrink=0.8)
  figure.suptitle(_title(comparison), size=10)
  save_figure(figure, path)
  return path


def _canvas(comparison: Comparison, more: str = "") -> tuple[Any, Any]:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4.5), layout="constrained")
  figure.suptitle(_title(comparison, more), size=10)
  axes = figure.add_subplot()
  axes.set_ylabel(measure(comparison))
  if not comparison.continuous:
    axes.set_ylim(-0.02, 1.02)
  axes.grid(alpha=0.25)
  return figure, axes


def _line(axes: Any, x: Iterable, seeds: list[list[float]], label: str, style: dict[str, Any]) -> None:
  """Draws the mean over seeds as a line and their range as a band."""
  x, means = list(x), [float(np.mean(values)) for values in seeds]
  axes.plot(x, means, label=label, **({"marker": "o", "markersize": 4} | style))
  axes.fill_between(x, [min(v) for v in seeds], [max(v) for v in seeds], color=style["color"], alpha=0.15, linewidth=0)


def _finish(figure: Any, axes: Any, path: Path) -> Path:
  axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
  save_figure(figure, path)
  return path


def _colours(comparison: Comparison) -> dict[str, str]:
  names = dict.fromkeys(trial.name for trial in comparison.trials)
  return {name: f"C{i}" for i, name in enumerate(names)}


def _styles(comparison: Comparison) -> list[dict[str, Any]]:
  """A colour for each layer; smaller sizes of a layer are paler."""
  colours, styles = _colours(comparison), []
  for trial in comparison.trials:
    sizes = sorted(other.state_bytes for other in comparison.trials if other.name == trial.name)
    strength = (1 + sizes.index(trial.state_bytes)) / len(sizes)
    styles.append({"color": colours[trial.name], "alpha": 0.3 + 0.7 * strength})
  return styles


def label(comparison: Comparison, trial: Trial) -> str:
  """A trial's name, with its bytes of state if the layer has several sizes."""
  several = sum(other.name == trial.name for other in comparison.trials) > 1
  return f"{trial.name}, {formats.binary(trial.state_bytes)}" if several else trial.name


def _title(comparison: Comparison, more: str = "") -> str:
  """The task and `more`, in lines that fit above a picture."""
  return "\n".join(textwrap.wrap(comparison.task + more, 80))


def measure(comparison: Comparison) -> str:
  """What a score is."""
  return "squared error" if comparison.continuous else "share of right answers"


def spread(seeds: list[float], continuous: bool) -> str:
  """The mean of the seeds' scores, and half their range if there are several."""
  half = (max(seeds) - min(seeds)) / 2
  return score(statistics.fmean(seeds), continuous) + (f" ± {score(half, continuous)}" if len(seeds) > 1 else "")


def score(value: float, continuous: bool) -> str:
  """A score as text."""
  return f"{value:.3g}" if continuous else f"{value:.2f}"
