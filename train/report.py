"""The output of a run: progress on the screen, and files with metrics and curves."""

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # without pyplot, which keeps global state and chooses a windowing system
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..zoo.formats import clock, table, thousands
from .files import save_figure, write_text
from .log_threads import LogThreads

Row = dict[str, Any]
MEASURES = {"bits_per_byte": "bits/byte", "bits_per_answer": "bits/answer", "squared_error": "squared error"}


class Report:
  """Takes a row of numbers at every step and writes it to the screen and to `metrics.jsonl`, which loggers copy.

  A context manager. On a terminal it draws a bar; elsewhere it prints a line every `log_every` steps.

  Args:
    directory: folder of the run.
    first_step, last_step: number of steps taken before, and in total.
    tokens_per_step: tokens in a step, for the rate.
    log_every: steps between two lines.
    measure: the number in each row besides the loss, one of `MEASURES`.
    loggers: names of loggers; see `loggers.py`.
    settings: the settings of the run for the loggers, as name -> text.
    progress: False shows nothing.
    primary: False writes no files and shows nothing; it is for all processes but the first.
  """

  def __init__(
    self,
    directory: Path,
    *,
    first_step: int,
    last_step: int,
    tokens_per_step: int,
    log_every: int,
    measure: str = "bits_per_byte",
    loggers: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
    progress: bool = True,
    primary: bool = True,
  ):
    self._directory, self._last_step, self._log_every = directory, last_step, log_every
    self._tokens_per_step, self._primary, self._measure = tokens_per_step, primary, measure
    self._console = Console(quiet=not (progress and primary), highlight=False)
    if not self._console.is_terminal:
      self._console.width = 120  # a file has no width of its own
    self._since, self._recent = (time.perf_counter(), first_step), []
    self._bar = _progress_bar(self._console) if self._console.is_terminal and not self._console.quiet else None
    self._task = self._bar and self._bar.add_task("", total=last_step, completed=first_step, rates="")
    self._metrics = self._loggers = None
    self._flushed = time.perf_counter()
    if primary:
      keep_rows(directory / "metrics.jsonl", first_step)
      self._metrics = (directory / "metrics.jsonl").open("a")
      self._loggers = LogThreads(directory, loggers, settings or {}, first_step, self.say)

  def __enter__(self) -> "Report":
    if self._bar:
      self._bar.start()
    if self._primary:
      self._loggers.__enter__()
    return self

  def __exit__(self, *error: Any) -> None:
    if self._bar:
      self._bar.stop()
    if self._primary:
      self._metrics.close()
      self._loggers.__exit__(*error)

  def say(self, message: str) -> None:
    """Prints one line, above the bar where there is one."""
    self._console.print(message, markup=False, soft_wrap=True)

  def restart_clock(self, step: int) -> None:
    """Excludes the time until now, such as compilation, from the rates."""
    self._since = (time.perf_counter(), step)

  def row(self, row: Row) -> None:
    """Takes the numbers of one step, including "step", "loss", "targets" and the measure.

    The operating system, and then the loggers, get them after a second, or at the next `flush`.
    """
    if self._primary:
      self._metrics.write(json.dumps(_finite_or_none(row)) + "\n")
    self._recent.append(row)
    if row["step"] % self._log_every == 0 or row["step"] == self._last_step or f"validation_{self._measure}" in row:
      self._summarise(row)
    elif self._bar:
      self._bar.update(self._task, completed=row["step"])
    if time.perf_counter() - self._flushed > 1:
      self.flush()

  def _summarise(self, row: Row) -> None:
    """Shows the means over the targets of the rows since the last summary, and the rate since then."""
    now, step = time.perf_counter(), row["step"]
    seconds, steps = now - self._since[0], step - self._since[1]
    self._since = (now, step)
    rate = self._tokens_per_step * steps / seconds if steps else 0.0
    means = {name: _mean([(r[name], r["targets"]) for r in self._recent]) for name in ("loss", self._measure)}
    self._recent = []
    if self._primary:
      if rate:
        self._loggers.rate(step, rate)
      self.flush()
    self._show(row | means, rate, seconds * (self._last_step - step) / max(1, steps))

  def _show(self, row: Row, rate: float, seconds_left: float) -> None:
    text = f"loss {row['loss']:.3f}  {row[self._measure]:.3f} {MEASURES[self._measure]}"
    if "balance" in row:
      text += f"  balance {row['balance']:.2f}"
    if f"validation_{self._measure}" in row:
      text += f"  validation {row[f'validation_{self._measure}']:.3f}"
    if rate:
      text += f"  {thousands(rate)} tokens/s"
    if self._bar:
      self._bar.update(self._task, completed=row["step"], rates=text)
      return
    left = f"  {clock(seconds_left)} left" if rate and seconds_left else ""
    self.say(f"step {row['step']:>{len(str(self._last_step))}}/{self._last_step}  {text}{left}")

  def flush(self) -> None:
    """Hands all rows to the operating system, so that a kill does not lose them, and the loggers copy them."""
    self._flushed = time.perf_counter()
    if self._primary:
      self._metrics.flush()
      self._loggers.wake()

  def finish(self, result: Row) -> None:
    """Takes the content of `result.json` for the loggers."""
    if self._primary:
      self._loggers.finish(result)

  def table(self, title: str, rows: list[tuple[str, str]]) -> None:
    """Prints a table of two columns."""
    self._console.print(table(title, ("", ""), rows, words=2))


def _progress_bar(console: Console) -> Progress:
  columns = (
    TextColumn("{task.completed:.0f}/{task.total:.0f}"),
    BarColumn(),
    TaskProgressColumn(),
    TextColumn("{task.fields[rates]}"),
    TimeRemainingColumn(),
  )
  return Progress(*columns, console=console, refresh_per_second=2)


def keep_rows(path: Path, last_step: int) -> None:
  """Drops the rows of `metrics.jsonl` after `last_step`, and a row that a kill left incomplete."""
  if path.exists():
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path) -> list[Row]:
  """The rows of a `metrics.jsonl`, without a last one that is incomplete. Null stands for a number that was not finite.

  Raises:
    ValueError: if another line is not a row.
  """
  rows, lines = [], path.read_bytes().split(b"\n")
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      row["step"]
      rows.append(row)
    except (ValueError, TypeError, KeyError):
      if number < len(lines):
        raise ValueError(f"{path}, line {number}, is damaged ({line[:40]!r}); remove the line.") from None
  return rows


def plot_losses(
  rows: list[Row], path: Path, title: str, baselines: dict[str, float] | None = None, measure: str = "bits_per_byte"
) -> None:
  """Draws a measure against steps: training, validation and the baselines by name, as a PNG file."""
  steps = np.array([row["step"] for row in rows])
  raw = np.array([row[measure] for row in rows], float)  # None becomes nan, and a gap
  figure = Figure(figsize=(8, 4.5), layout="constrained")
  axes = figure.add_subplot()
  axes.plot(steps, raw, color="tab:blue", alpha=0.2, linewidth=0.8, label="_batch")
  axes.plot(steps, smoothed(raw), color="tab:blue", label="training, smoothed")
  validation = f"validation_{measure}"
  measured = [(row["step"], row[validation]) for row in rows if validation in row]
  if measured:
    label = f"validation, {measured[-1][1]:.2f}"
    axes.plot(*zip(*measured, strict=True), "o-", color="tab:orange", markersize=4, clip_on=False, label=label)
  for (name, value), style in zip((baselines or {}).items(), itertools.cycle((":", "--")), strict=False):
    axes.axhline(value, color="0.35", linestyle=style, linewidth=1, label=f"{name}, {value:.2f}")
  start = np.nanmax([*raw[:1], *(baselines or {}).values(), *(() if measure == "squared_error" else (1.0,))])
  # The first loss and the baselines are inside the frame; a later spike may leave it.
  axes.set(xlabel="step", ylabel=measure.replace("_", " "), xlim=(0, max(2, int(steps.max(initial=1)))), ylim=(0, 1.1 * start))
  axes.set_title(title, loc="left", fontsize="medium")
  axes.grid(alpha=0.25)
  axes.legend(frameon=False)
  save_figure(figure, path)


def smoothed(values: np.ndarray, span: float = 0.02) -> np.ndarray:
  """Exponential moving average over about the share `span` of the curve, without start-up bias. It skips nan."""
  decay = 1 - 1 / max(1.0, span * len(values))
  total = weight = 0.0
  means = np.full(len(values), np.nan)
  for i, value in enumerate(values):
    if np.isfinite(value):
      total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
    if weight:
      means[i] = total / weight
  return means


def _mean(values: list[tuple[float, float]]) -> float:
  """The mean of the finite ones of `(value, weight)`."""
  finite = [(value, weight) for value, weight in values if math.isfinite(value) and math.isfinite(weight)]
  total = sum(weight for _, weight in finite)
  return sum(value * weight for value, weight in finite) / total if total else math.nan


def _finite_or_none(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite_or_none(entry) for name, entry in value.items()}
  return None if isinstance(value, float) and not math.isfinite(value) else value
