"""A run at a glance: one self-contained HTML file about a run, about several side by side, or about a comparison.

    write_report([Path("runs/quickstart")])                    # runs/quickstart/report.html
    write_report([Path("runs/a"), Path("runs/b")])             # report.html: their curves in one picture
    write_report([Path("compare/mqar")])                       # compare/mqar/report.html

A report is made from the files in the folder, so a run that is unfinished, or has lost a part, has one too; it says what is
missing. Nothing in the folder is changed but the report.
"""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import __version__
from ..zoo.describe import Description, describe, parts
from ..zoo.formats import binary, thousands
from .chosen_settings import chosen_settings
from .experiment_report import facts as facts_of
from .files import write_text
from .html_comparison import comparison_page
from .html_figures import POINTS, Band, Level, Line, extremes, panel
from .html_memory import memory_section
from .html_parts import Section, badge, facts, folded, grid, note, page, paragraph, preformatted, table, tiles
from .report import MEASURES, smoothed
from .run_folder import Result, run_of
from .run_record import RunRecord, read_run

_RESULTS = "results.json"  # of a comparison


def write_report(folders: Sequence[Path], out: Path | None = None, *, memory: bool = True, best: bool = False) -> Path:
  """Writes the report of a run, of several runs, or of a comparison.

  Args:
    folders: a run's folder, several, or the folder of one comparison.
    out: the file; by default `report.html` in the folder, or here if there are several.
    memory: for one run, also compute what its memories do over a document, which needs its checkpoint and its text.
    best: for that, take the checkpoint with the lowest validation loss, not the newest.

  Returns:
    The path of the file.

  Raises:
    ValueError: if a folder is neither a run nor a comparison, or a comparison is given with others.
    OSError: if the file cannot be written.
  """
  folders = list(dict.fromkeys(run_of(folder) or folder for folder in folders))
  path = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
  if path.is_dir():
    raise ValueError(f"--out is {path}, a folder; expected the path of a file, such as {path / 'report.html'}.")
  comparisons = [folder for folder in folders if (folder / _RESULTS).is_file()]
  if comparisons and len(folders) > 1:
    raise ValueError(f"{comparisons[0]} is a comparison; expected it alone, or several runs.")
  if comparisons:
    text = comparison_page(folders[0] / _RESULTS)
  else:
    _refuse_unfinished_comparisons(folders)
    runs = [read_run(folder) for folder in folders]
    text = run_page(runs[0], memory=memory, best=best) if len(runs) == 1 else runs_page(runs)
  write_text(path, text)
  return path


def _refuse_unfinished_comparisons(folders: Sequence[Path]) -> None:
  for folder in folders:
    if (folder / "trials").is_dir():
      raise ValueError(f"{folder} is a comparison without {_RESULTS}, not finished; the same `memzoo compare` continues it.")


def run_page(run: RunRecord, *, memory: bool = True, best: bool = False) -> str:
  """The page of one run."""
  description = _described(run)
  sections = [
    Section("Curves", _curves([run])),
    memory_section(run.directory, best) if memory and run.checkpoints and run.experiment else Section("", []),
    Section("Sample", [preformatted(run.sample)] if run.sample else [note(_why_no_sample(run))]),
    Section("Model", _model(description)),
    Section("Speed and layout", _speed(run, description)),
    Section("Settings", _settings(run)),
  ]
  head = [badge(*_status(run)), *map(note, run.missing), tiles(_numbers(run, description))]
  return page(run.name, result_in_words(run), head, sections, _footer([run]))


def runs_page(runs: Sequence[RunRecord]) -> str:
  """The page of several runs side by side."""
  notes = [note(f"{_names(runs)[i]}: {text}") for i, run in enumerate(runs) for text in run.missing]
  sections = [
    Section("Results", [_results(runs)]),
    Section("Curves", _curves(runs)),
    Section("Differences of settings", _differences(runs)),
  ]
  title = f"{len(runs)} runs"
  return page(title, _best_in_words(runs), notes, sections, _footer(runs))


def result_in_words(run: RunRecord) -> str:
  """The result of a run, or how far it is, in a sentence."""
  unit = run.measure.replace("_", " ")
  steps = f"{run.step:,} of {run.steps:,} steps" if run.steps else f"{run.step:,} steps"
  final = _final(run)
  if run.result and final is not None:
    others = _baselines(run)
    beside = f" ({', '.join(f'{name}: {value:.3f}' for name, value in others.items())})" if others else ""
    right = f", {run.result.validation_accuracy:.1%} right" if run.result.validation_accuracy is not None else ""
    return f"After {run.result.step:,} steps: {final:.3f} {unit} on validation data{beside}{right}."
  last = f"; at the last evaluation {final:.3f} {unit}" if final is not None else "; not evaluated yet"
  return f"{'In progress' if run.running else 'Not finished'}: {steps}{last}."


def _best_in_words(runs: Sequence[RunRecord]) -> str:
  found = [(value, name, run) for name, run in zip(_names(runs), runs, strict=True) if (value := _final(run)) is not None]
  if len({run.measure for _, _, run in found}) != 1:
    return "The runs have no measure in common."
  value, name, run = min(found, key=lambda each: each[0])
  return f"The best is {name}: {value:.3f} {run.measure.replace('_', ' ')} on validation data, after {run.step:,} steps."


def _final(run: RunRecord) -> float | None:
  """The validation result in the unit of the run: the final one, or else that of the last evaluation."""
  if run.result and run.result.validation_bits_per_byte is not None:
    return run.result.validation_bits_per_byte
  _, values = run.column(f"validation_{run.measure}")
  if run.result and run.result.validation_loss is not None and run.measure != "loss":
    return run.result.validation_loss * _unit(run)
  return float(values[-1]) if len(values) else None


def _unit(run: RunRecord) -> float:
  """What a loss is multiplied with to get the run's measure."""
  row = next((row for row in reversed(run.rows) if row.get("validation_loss")), None)
  return row[f"validation_{run.measure}"] / row["validation_loss"] if row else 1.0


def _baselines(run: RunRecord) -> dict[str, float]:
  """What the measure is without a model, by name."""
  if run.result and run.result.order_0_bits_per_byte is not None:
    return {"byte frequencies": run.result.order_0_bits_per_byte, "zlib -9": run.result.zlib_bits_per_byte}
  if run.experiment and run.measure in ("bits_per_answer", "squared_error"):
    return run.experiment.data.load().baselines([])
  return {}


def _described(run: RunRecord) -> Description | None:
  return describe(run.experiment.model, run.experiment.data.sequence_length) if run.experiment else None


def _status(run: RunRecord) -> tuple[str, bool]:
  if run.running:
    return "training now", False
  if run.result and (run.steps is None or run.result.step >= run.steps):
    return "finished", True
  return f"not finished: step {run.step:,}" + (f" of {run.steps:,}" if run.steps else ""), False


def _numbers(run: RunRecord, description: Description | None) -> list[tuple[str, str, str]]:
  """The tiles at the top of the page."""
  found, final, result = [], _final(run), run.result
  if final is not None:
    baselines = [f"{name} {value:.3f}" for name, value in _baselines(run).items()]
    found.append((run.measure.replace("_", " "), f"{final:.3f}", "; ".join(baselines) or "validation"))
  if run.step:
    found.append(("steps", f"{run.step:,}", f"of {run.steps:,}" if run.steps else ""))
  if description:
    data = run.experiment.data
    seen = data.batch_size * data.sequence_length * run.step
    found.append(("tokens seen", thousands(seen), f"{data.batch_size} x {data.sequence_length} a step"))
    found.append(("parameters", thousands(description.parameters), f"{run.experiment.model.depth} blocks"))
    found.append(("state", binary(description.state_bytes), f"of a sequence of {description.length:,}"))
  if result and result.tokens_per_second:
    found.append(("tokens/s", thousands(result.tokens_per_second), "pauses included"))
  if result and result.peak_bytes:
    found.append(("peak memory", binary(result.peak_bytes), ""))
  skipped = _skipped(run)
  if skipped:
    found.append(("skipped steps", f"{len(skipped):,}", "not finite"))
  return found


def _names(runs: Sequence[RunRecord]) -> list[str]:
  """The names of the runs: of their folders, or their paths if those are alike."""
  names = [run.name for run in runs]
  return names if len(set(names)) == len(names) else [str(run.directory) for run in runs]


def _skipped(run: RunRecord) -> list[int]:
  return [row["step"] for row in run.rows if row.get("skipped")]


def _curves(runs: Sequence[RunRecord]) -> list[str]:
  """Pictures of what `metrics.jsonl` holds. Several runs are lines in the same pictures."""
  names = _names(runs) if len(runs) > 1 else [""]
  named = [(i, name, run) for i, (name, run) in enumerate(zip(names, runs, strict=True)) if run.rows]
  if not named:
    return [note("No steps are recorded yet.")]
  measures = dict.fromkeys(run.measure for _, _, run in named)
  figures = [_learning_curve([each for each in named if each[2].measure == measure], measure) for measure in measures]
  figures += filter(None, (_other_curve(named, name, title) for name, title in _OTHER_CURVES.items()))
  notes = []
  if len(runs) == 1 and (skipped := _skipped(runs[0])):
    first = ", ".join(map(str, skipped[:10])) + (" and more" if len(skipped) > 10 else "")
    notes = [note(f"Skipped, because the loss or a gradient was not finite: {len(skipped)} steps ({first}).")]
  return [*notes, grid(figures), paragraph(f"Lines of more than {POINTS} points are thinned: every n-th is shown.", "faint")]


_OTHER_CURVES = {
  "validation_accuracy": "share of validation right",
  "learning_rate": "learning rate",
  "gradient_norm": "gradient norm",
  "balance": "balance of memories or experts",
}
_NOISY = ("gradient_norm", "balance")  # they are shown smoothed, with a band

_Named = Sequence[tuple[int, str, RunRecord]]  # a run with the number of its colour and its name, "" if it is alone


def _learning_curve(named: _Named, measure: str) -> str:
  """The measure over the steps: of the batches, smoothed, and of the validation data."""
  lines, bands, caption = _smoothed_lines(named, measure)
  alone = named[0][2] if not named[0][1] else None
  for colour, name, run in named:
    x, y = run.column(f"validation_{measure}")
    if len(x):
      label, style = (f"{name}, validation", "dashed") if name else ("validation", "solid")
      lines.append(Line(label, x, y, colour if name else 1, style, marker=True))
  baselines = _baselines(alone).items() if alone else ()
  styles = itertools.cycle(("dotted", "dashed"))
  levels = [Level(f"{name}, {value:.2f}", value, style) for (name, value), style in zip(baselines, styles, strict=False)]
  frame = _frame([*(line.y for line in lines), [level.value for level in levels]])
  labels = {"xlabel": "step", "ylabel": MEASURES.get(measure, measure), "caption": caption}
  return panel(measure.replace("_", " "), lines, bands=bands, levels=levels, wide=True, ylim=frame, **labels)


def _other_curve(named: _Named, column: str, title: str) -> str:
  """Another number over the steps; "" if no run has it."""
  named = [each for each in named if len(each[2].column(column)[0])]
  if not named:
    return ""
  lines, bands, caption, ticks = [], [], "", []
  if column in _NOISY:
    lines, bands, caption = _smoothed_lines(named, column)
  else:
    marker = column.startswith("validation")  # there may be one evaluation only
    lines = [Line(name, *run.column(column), colour, marker=marker) for colour, name, run in named]
  if column == "gradient_norm" and not named[0][1] and (ticks := _skipped(named[0][2])):
    caption += " Marks on the axis are skipped steps."
  positive = np.concatenate([line.y for line in lines])
  positive = positive[np.isfinite(positive) & (positive > 0)]
  wide = column == "gradient_norm" and positive.size and positive.max() > 30 * positive.min()
  frame = (positive.min() / 2, positive.max() * 2) if wide else _frame([line.y for line in lines])
  scale = {"yscale": "log" if wide else "linear", "ylim": frame}
  return panel(title, lines, bands=bands, xlabel="step", ticks=ticks, caption=caption, **scale)


def _smoothed_lines(named: _Named, column: str) -> tuple[list[Line], list[Band], str]:
  """A smoothed line for each run, a band of what was smoothed if there is one run, and a caption."""
  lines, bands, caption = [], [], ""
  for colour, name, run in named:
    x, y = run.column(column)
    what = ["training"] * (column == run.measure) + ["smoothed"] * (not name)
    lines.append(Line(", ".join(filter(None, [name, *what])), x, smoothed(y), colour))
    if name:
      continue
    middles, low, high, every = extremes(x, y)
    if every > 1:
      bands.append(Band(middles, low, high, colour))
      caption = f"The band goes from the lowest to the highest of every {every} steps, and may leave the frame."
    else:
      lines.insert(0, Line("", x, y, colour, faint=True))
      caption = "The thin line is every single step."
  return lines, bands, caption


def _frame(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
  """The limits of an axis for lines: single points that stand out may leave it."""
  values = np.concatenate([np.asarray(curve, float) for curve in curves])
  values = values[np.isfinite(values)]
  if not values.size:
    return 0.0, 1.0
  low, high = float(values.min()), float(values.max())
  margin = 0.06 * (high - low or abs(high) or 1)
  return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _settings(run: RunRecord) -> list[str]:
  """What differs from the defaults, then everything, folded."""
  everything = folded("All settings", preformatted(run.text))
  if not run.experiment:
    return [everything]
  try:
    chosen = chosen_settings(run.experiment)
  except ValueError as error:
    return [note(f"Not compared with the defaults: {error}"), everything]
  rows = ((name, value, default or "none") for name, (value, default) in chosen.items())
  return [
    paragraph("What differs from the defaults, or has none:", "faint"),
    table(("setting", "value", "default"), rows, words=3, code=True, caption="Settings that differ from their defaults."),
    everything,
  ]


def _differences(runs: Sequence[RunRecord]) -> list[str]:
  """The settings that are not the same in all runs: those that all have, then, folded, those of layers that some have."""
  found = [run.settings for run in runs]
  names = [name for name in dict.fromkeys(name for own in found for name in own) if len({own.get(name) for own in found}) > 1]
  shared = [name for name in names if all(name in own for own in found)]
  only = [name for name in names if name not in shared]

  def shown(names: Sequence[str], caption: str) -> str:
    rows = ((name, *(own.get(name, "unset") for own in found)) for name in names)
    return table(("setting", *_names(runs)), rows, words=1 + len(runs), code=True, caption=caption)

  parts = [shown(shared, "Settings with different values.") if shared else paragraph("No setting that all runs have differs.")]
  if only:
    parts.append(folded(f"{len(only)} settings that only some runs have", shown(only, "Settings that only some runs have.")))
  return parts


def _results(runs: Sequence[RunRecord]) -> str:
  rows = []
  for name, run in zip(_names(runs), runs, strict=True):
    final, described = _final(run), _described(run)
    own = (name, _status(run)[0], f"{run.step:,}", f"{final:.3f}" if final is not None else "", run.measure.replace("_", " "))
    size = (f"{described.parameters:,}", binary(described.state_bytes)) if described else ("", "")
    rows.append((*own, *size, thousands(run.result.tokens_per_second) if run.result and run.result.tokens_per_second else ""))
  columns = ("run", "status", "steps", "validation", "in", "parameters", "state", "tokens/s")
  return table(columns, rows, words=2, caption="Validation: the final result, or that of the last evaluation.")


def _model(description: Description | None) -> list[str]:
  """The parts of the model, block by block."""
  if description is None:
    return []
  columns, rows, totals, caption = parts(description)
  return [table(columns, rows, words=2, footer=totals, caption=caption)]


def _speed(run: RunRecord, description: Description | None) -> list[str]:
  """How fast the run was, where its time went, and how it is laid out."""
  found = _measured(run.result) if run.result else []
  if run.experiment and description:
    found += [("mesh", str(run.experiment.mesh)), *facts_of(run.experiment, description)]
  found.append(("checkpoints", ", ".join(f"step {step:,}" for step in run.checkpoints) or "none"))
  shown = [facts(found), paragraph("The memory of parameters and moments is that of this machine's devices.", "faint")]
  if run.result and run.result.shares:
    rows = ((name, f"{share:.1%}") for name, share in run.result.shares.items())
    shown.append(table(("time went to", "share"), rows, caption="Shares of the time after the first step."))
  if run.rates:
    steps, rates = zip(*run.rates.items(), strict=True)
    title = "tokens per second"
    line = Line("", steps, rates, 2, marker=len(steps) < 40)
    shown.append(grid([panel(title, [line], xlabel="step", ylim=(0, None))]))
  return shown


def _measured(result: Result) -> list[tuple[str, str]]:
  """What a run measured at its end."""
  found = []
  if result.tokens_per_second:
    rate, share = thousands(result.flops_per_second, "FLOP/s"), f"{result.matmul_share:.0%} of one large float32 product"
    found.append(("speed", f"{thousands(result.tokens_per_second)} tokens/s after the first step, pauses included"))
    found.append(("arithmetic", f"{rate} in matrix products, {share}"))
  if result.peak_bytes:
    found.append(("peak memory", binary(result.peak_bytes)))
  return found


def _why_no_sample(run: RunRecord) -> str:
  if run.settings.get("Trainer.sample_tokens") == "0":
    return "No sample: Trainer.sample_tokens is 0."
  if run.result is None:
    return "No sample: a run writes it after its last step."
  return "No sample: sample.txt is not there; a run on a task, or of several processes, writes none."


def _footer(runs: Sequence[RunRecord]) -> str:
  command = shlex.join(["memzoo", "report", *(str(run.directory) for run in runs)])
  return f"Made by {command}, memzoo {__version__}."
