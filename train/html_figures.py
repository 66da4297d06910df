"""Figures of a page: drawn by Matplotlib without a background, as inline SVG whose colours follow the page's.

Lines get the names of the page's colours (`var(--c0)`), so that one picture serves light and dark pages. Text stays text.
"""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from .html_parts import escaped, figure, legend, ramp

POINTS = 400  # the most points of a line
COLOURS = 8
_SMALL, _LARGE = (4.1, 2.45), (11.4, 3.5)  # inches
_MAP = "viridis"
_FAINT, _LINE = "#fe0100", "#fe0101"  # stand for the page's colours until a picture is written
_NUMBERS = itertools.count(1)


class Line(NamedTuple):
  """A line in a panel.

  Attributes:
    label: its name in the legend; "" for none.
    x, y: its points; nan is a gap.
    colour: the number of its colour; from `COLOURS` on they repeat.
    style: "solid", "dashed" or "dotted".
    faint: whether it is thin and pale.
    marker: whether its points have marks.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  colour: int = 0
  style: str = "solid"
  faint: bool = False
  marker: bool = False


class Band(NamedTuple):
  """An area between two lines."""

  x: Sequence[float]
  low: Sequence[float]
  high: Sequence[float]
  colour: int = 0


class Level(NamedTuple):
  """A horizontal line with a name."""

  label: str
  value: float
  style: str = "dotted"


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
  """Every n-th point, the last one included, so that about `points` remain."""
  x, y = np.asarray(x, float), np.asarray(y, float)
  every = max(1, -(-len(x) // points))
  kept = np.unique([*range(0, len(x), every), *([len(x) - 1] if len(x) else [])]).astype(int)
  return x[kept], y[kept]


def extremes(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """The lowest and the highest value of every n points: the middles of x, both values, and n. Gaps are left out."""
  x, y = np.asarray(x, float), np.asarray(y, float)
  every = max(1, -(-len(x) // points))
  parts = [slice(start, start + every) for start in range(0, len(x), every)]
  parts = [part for part in parts if np.isfinite(y[part]).any()]
  low, high = (np.array([function(y[part]) for part in parts]) for function in (np.nanmin, np.nanmax))
  return np.array([x[part].mean() for part in parts]), low, high, every


def panel(
  title: str,
  lines: Sequence[Line],
  *,
  xlabel: str,
  ylabel: str = "",
  bands: Sequence[Band] = (),
  levels: Sequence[Level] = (),
  ticks: Sequence[float] = (),
  caption: str = "",
  wide: bool = False,
  **axes: Any,
) -> str:
  """A figure of lines.

  Args:
    title: shown above it.
    lines, bands, levels: what to draw.
    xlabel, ylabel: names of the axes; no `ylabel` if the title says it.
    ticks: places on the x axis to mark in the colour of warnings.
    caption: shown below it.
    wide: draws it over the page's whole width, and once more for narrow pages.
    axes: properties of the axes, as `Axes.set` takes them.
  """
  alt = f"{title}: {f'{ylabel} ' if ylabel else ''}against {xlabel}. {_in_words(lines, levels)}"

  def draw(size: tuple[float, float]) -> str:
    with _canvas(size) as (drawn, ax):
      for band in bands:
        ax.fill_between(band.x, band.low, band.high, color=_colour(band.colour), alpha=0.22, linewidth=0)
      for line in lines:
        look = {"linewidth": 0.8, "alpha": 0.45} if line.faint else {"linewidth": 1.5}
        look |= {"marker": "o", "markersize": 3} if line.marker else {}
        ax.plot(*thinned(line.x, line.y), color=_colour(line.colour), linestyle=line.style, **look)
      for level in levels:
        ax.axhline(level.value, color=_FAINT, linestyle=level.style, linewidth=1)
      for place in ticks:
        ax.axvline(place, ymax=0.06, color=_colour(1), linewidth=1.2)
      ax.set(xlabel=xlabel, ylabel=ylabel, **axes)
      _plain_ticks(ax, own="xticks" in axes)
      ax.grid(color=_LINE, linewidth=0.6)
      return _svg(drawn, alt)

  pictures = _sized(draw(_LARGE), "large") + _sized(draw(_SMALL), "small") if wide else draw(_SMALL)
  named = [(line.label, f"var(--c{line.colour % COLOURS})", line.style) for line in lines if line.label]
  named += [(level.label, "var(--faint)", level.style) for level in levels]
  return figure(title, pictures, caption=caption, legend=legend(named), wide=wide)


def heatmap(
  title: str,
  values: np.ndarray,
  rows: Sequence[str],
  *,
  xlabel: str,
  ylabel: str = "",
  columns: Sequence[str] = (),
  extent: float | None = None,
  caption: str = "",
  wide: bool = False,
) -> str:
  """A figure whose colours show `values` [rows, columns]; nan is left open.

  Args:
    rows: labels; one that is empty has no tick.
    columns: labels of the columns, if they are few; else the x axis counts from 0 to `extent`.
  """
  finite = values[np.isfinite(values)]
  low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
  alt = f"{title}: a map with rows {', '.join(filter(None, rows)) or ylabel}, against {xlabel}, from {low:.3g} to {high:.3g}."

  def draw(width: float) -> str:
    with _canvas((width, min(5.0, 0.75 + 0.16 * max(4, len(rows))))) as (drawn, ax):
      end = len(columns) or extent or values.shape[1]
      area = (0, end, len(rows), 0)
      ax.imshow(values, aspect="auto", interpolation="none", cmap=_MAP, vmin=low, vmax=high, extent=area)
      named = [i for i, row in enumerate(rows) if row]
      ax.set_yticks(np.array(named) + 0.5, [rows[i] for i in named])
      if columns:
        ax.set_xticks(np.arange(len(columns)) + 0.5, columns)
      ax.set(xlabel=xlabel, ylabel=ylabel)
      ax.tick_params(length=0)
      return _svg(drawn, alt)

  pictures = _sized(draw(_LARGE[0]), "large") + _sized(draw(_SMALL[0]), "small") if wide else draw(_SMALL[0])
  return figure(title, pictures, caption=caption, legend=ramp(f"{low:.3g}", f"{high:.3g}", _stops()), wide=wide)


def _plain_ticks(ax: Any, own: bool) -> None:
  """Plain numbers instead of powers of ten; no ticks between the caller's own on the x axis."""
  if own:
    ax.xaxis.minorticks_off()
  for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
    if axis.get_scale() == "log" and not (own and name == "x"):
      axis.set_major_formatter("{x:g}")


def _in_words(lines: Sequence[Line], levels: Sequence[Level]) -> str:
  """The lines' names with their first and last values, and the levels, for those who do not see the picture."""
  words = []
  for line in lines:
    y = np.asarray(line.y, float)
    y = y[np.isfinite(y)]
    if line.label and y.size:
      words.append(f"{line.label}: from {y[0]:.3g} to {y[-1]:.3g}")
  return "; ".join([*words, *(f"{level.label}: {level.value:.3g}" for level in levels)]) + "."


def _colour(number: int) -> str:
  return f"#fe00{number % COLOURS:02x}"


def _stops() -> list[str]:
  from matplotlib import colormaps
  from matplotlib.colors import to_hex

  return [to_hex(colour) for colour in colormaps[_MAP](np.linspace(0, 1, 7))]


@contextmanager
def _canvas(size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
  """A figure with axes, in the colours that `_svg` replaces."""
  import matplotlib
  from matplotlib.figure import Figure

  look = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": f"memzoo{next(_NUMBERS)}", "path.simplify_threshold": 0.3}
  look |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _FAINT)
  look |= {"axes.edgecolor": _LINE, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
  look |= {"xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "axes.formatter.useoffset": False}
  look |= {"figure.constrained_layout.h_pad": 0.02, "figure.constrained_layout.w_pad": 0.02}
  with matplotlib.rc_context(look):
    drawn = Figure(figsize=size, layout="constrained")
    yield drawn, drawn.add_subplot()


def _svg(drawn: Any, alt: str) -> str:
  """A figure as an element of a page: without declarations, metadata and unused names, in the page's colours."""
  written = io.StringIO()
  drawn.savefig(written, format="svg", transparent=True, metadata={"Date": None})
  text = written.getvalue()
  text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
  tag, end, text = text.partition(">")
  text = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", tag) + end + text
  text = text.replace("xlink:href=", "href=")
  used = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", text))
  text = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", text)
  text = re.sub(r"#fe00(0\d)", lambda found: f"var(--c{int(found[1])})", text)
  for stand_in, name in ((_FAINT, "faint"), (_LINE, "line")):
    text = text.replace(stand_in, f"var(--{name})")
  text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
  text = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # hundredths of a point
  text = re.sub(r">\s+<", "><", text)
  return f'<svg role="img" aria-label="{escaped(alt)}"{text.removeprefix("<svg").strip()}'


def _sized(picture: str, size: str) -> str:
  return picture.replace("<svg ", f'<svg class="{size}" ', 1)
