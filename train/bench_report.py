"""Shows the results of a benchmark: tables for the screen, and a picture."""

import math
import statistics
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.table import Table

from ..pallas_kernels.bench import LONG, Report, Timing
from ..pallas_kernels.workloads import DIRECTIONS, HALF_AS_WIDE
from ..zoo.formats import binary, milliseconds, table, thousands
from .files import save_figure

_BASELINE = "recurrent"
_COLOURS = {"recurrent": "#b0b0b0", "xla": "#2f6db5"}
_LABELS = {"recurrent": "oracle (token by token)", "xla": "xla (chunked)"}


def tables(report: Report) -> list[Table]:
  """A table of the timings and, if there are any, one of the long runs."""
  return [_timings(report), *([_long(report)] if report.long else [])]


def draw(report: Report, path: Path) -> None:
  """Draws bars of every timing, the directions side by side, as a PNG."""
  directions = [name for name in DIRECTIONS if any(timing.direction == name for timing in report.timings)]
  rows = len(report.timings) / len(directions)
  figure = Figure(figsize=(12, 1.5 + 0.62 * rows), layout="constrained")
  for axes, direction in zip(figure.subplots(1, len(directions), sharey=True, squeeze=False)[0], directions, strict=True):
    _bars(axes, [timing for timing in report.timings if timing.direction == direction])
    axes.set_title(direction)
    axes.set_xlabel("milliseconds per call (logarithmic)")
  axes = figure.axes[0]
  axes.invert_yaxis()
  figure.suptitle(_caption(report))
  figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
  save_figure(figure, path)


def _caption(report: Report) -> str:
  shape, rate = report.shape, statistics.median(timing.matmul_rate for timing in report.timings)
  narrow = f" ({HALF_AS_WIDE}: half of it)" if any(timing.operation == HALF_AS_WIDE for timing in report.timings) else ""
  return (
    f"{shape.batch} x {shape.length:,} tokens, {shape.heads} heads, keys {shape.key_dim}, values {shape.value_dim}{narrow}, "
    f"float32, on {report.device} ({thousands(rate, 'FLOP/s')} in a large product)"
  )


def _timings(report: Report) -> Table:
  others = [name for name in report.timings[0].seconds if name != _BASELINE]
  numbers = ("oracle ms", *(f"{name} ms" for name in others), "speed-up", "floor ms", "floors", "compile s")
  shown = table(_caption(report).replace(", on ", "\non "), ("operation", "", *numbers), words=2)
  for operation, timings in groupby(report.timings, lambda timing: timing.operation):
    for i, timing in enumerate(timings):
      fastest = min(others, key=timing.seconds.get)
      seconds = timing.seconds[fastest]
      shown.add_row(
        "" if i else operation,
        timing.direction,
        milliseconds(timing.seconds[_BASELINE]),
        *(milliseconds(timing.seconds[name]) for name in others),
        f"{timing.seconds[_BASELINE] / seconds:.1f} x",
        milliseconds(timing.floor_seconds) if timing.floor_seconds else "",
        f"{seconds / timing.floor_seconds:.1f}" if timing.floor_seconds else "",
        f"{timing.compile_seconds[fastest]:.1f}",
      )
    shown.add_section()
  return shown


def _long(report: Report) -> Table:
  short, long = LONG
  lengths = (f"{short:,}", f"{long:,}", "ratio")
  columns = ("operation", f"forward {lengths[0]}", *lengths[1:], f"gradient {lengths[0]}", *lengths[1:], "peak", "inputs")
  shown = table(f"From {short:,} to {long:,} tokens: microseconds per token", columns)
  for timing in report.long:
    cells = []
    for seconds in (timing.forward_seconds, timing.gradient_seconds):
      cells += [f"{seconds[short] * 1e6:.2f}", f"{seconds[long] * 1e6:.2f}", f"{seconds[long] / seconds[short]:.2f}"]
    shown.add_row(timing.operation, *cells, binary(timing.peak_bytes), binary(timing.input_bytes))
  return shown


def _bars(axes, timings: list[Timing]) -> None:
  names = list(timings[0].seconds)
  height = 0.8 / len(names)
  for i, name in enumerate(names):
    lengths = [timing.seconds[name] * 1e3 for timing in timings]
    positions = [row + (i + 0.5) * height for row in range(len(timings))]
    bars = axes.barh(positions, lengths, height, color=_COLOURS[name], label=_LABELS[name])
    axes.bar_label(bars, [milliseconds(timing.seconds[name]) for timing in timings], padding=3, fontsize=8)
  floors = {row: timing.floor_seconds * 1e3 for row, timing in enumerate(timings) if timing.floor_seconds}
  lows, highs = list(floors), [row + 0.8 for row in floors]
  axes.vlines(list(floors.values()), lows, highs, color="black", linestyle=":", label="floor (matrix products alone)")
  axes.set_yticks([row + 0.4 for row in range(len(timings))], [timing.operation for timing in timings])
  axes.set_xscale("log")
  shortest = min(*floors.values(), *(1e3 * seconds for timing in timings for seconds in timing.seconds.values()))
  axes.set_xlim(10 ** math.floor(math.log10(shortest)), None)
  axes.xaxis.set_major_formatter("{x:g}")
  axes.xaxis.set_minor_formatter(NullFormatter())
  axes.margins(x=0.15)
  axes.spines[["top", "right"]].set_visible(False)
