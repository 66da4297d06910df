"""The page of a comparison: its table, scores against difficulty, learning curves by rate and seed, budget and command."""

from pathlib import Path

import numpy as np

from .. import __version__
from ..zoo.formats import binary, clock
from . import compare_report
from .compare import Comparison, Trial
from .html_figures import Band, Level, Line, panel
from .html_parts import Section, Shaded, facts, grid, heading, note, page, paragraph, preformatted, table, tiles

_BUDGET = {
  "learning_rates": "learning rates; the best on the training task counts",
  "seeds": "seeds of parameters and examples",
  "steps": "steps at most",
  "batch_size": "examples in a step",
  "stop_at": "share of right answers at which training ends",
  "evaluate_every": "steps between two evaluations",
  "test_examples": "examples in a test",
}
_STYLES = ("solid", "dashed", "dotted")  # of a layer's sizes, from the largest


def comparison_page(path: Path) -> str:
  """The page of the comparison that is saved at `path`. Raises `ValueError` if it is none."""
  comparison = Comparison.load(path)
  if not comparison.trials or not comparison.chance:
    raise ValueError(f"{path} holds no trials; expected the results of `memzoo compare`.")
  sections = [
    Section("Results", [_table(comparison), *_pictures(comparison)]),
    Section("Learning curves", _learning_curves(comparison)),
    Section("By kind of answer", _kinds(comparison)),
    Section("Budget", _budget(comparison)),
    Section("Command", [_command(comparison)]),
  ]
  task = comparison.task.partition("(")[0]
  head = [paragraph(comparison.task, "faint"), tiles(_numbers(comparison))]
  footer = f"Made by memzoo report {path.parent}, memzoo {__version__}."
  return page(f"{task}: {len(comparison.trials)} memories", result_in_words(comparison), head, sections, footer)


def result_in_words(comparison: Comparison) -> str:
  """The best entrant on the hardest test, in a sentence."""
  hardest = _hardest(comparison)
  best = _best(comparison)
  score = compare_report.spread(best.scores[hardest], comparison.continuous)
  chance = compare_report.score(comparison.chance[hardest], comparison.continuous)
  what = "a squared error of" if comparison.continuous else "a share of right answers of"
  return (
    f"On {hardest} {comparison.grows} the best is {compare_report.label(comparison, best)}, with {what} {score}; "
    f"without memory it is {chance}."
  )


def _hardest(comparison: Comparison) -> str:
  return list(comparison.chance)[-1]


def _best(comparison: Comparison) -> Trial:
  sign = 1 if comparison.continuous else -1
  return min(comparison.trials, key=lambda trial: sign * np.mean(trial.scores[_hardest(comparison)]))


def _numbers(comparison: Comparison) -> list[tuple[str, str, str]]:
  trials, budget = comparison.trials, comparison.budget
  sizes = [trial.state_bytes for trial in trials]
  counts = [trial.parameters for trial in trials]
  runs = len(budget.learning_rates) * budget.seeds
  return [
    ("memories", str(len({trial.name for trial in trials})), f"{len(trials)} trials"),
    ("runs", str(len(trials) * runs), f"{len(budget.learning_rates)} rates x {budget.seeds} seeds each"),
    ("state", _range([binary(min(sizes)), binary(max(sizes))]), "of one sequence"),
    ("parameters", _range([f"{min(counts):,}", f"{max(counts):,}"]), ""),
    ("training took", clock(sum(trial.seconds for trial in trials)), "compilation included"),
  ]


def _range(ends: list[str]) -> str:
  return " to ".join(dict.fromkeys(ends))


def _table(comparison: Comparison) -> str:
  """All trials, with the mean score on each test, on a background as strong as the score is good."""
  tests, continuous = list(comparison.chance), comparison.continuous
  rows = []
  for trial in comparison.trials:
    own = [trial.name, f"{trial.state_bytes:,}", f"{trial.parameters:,}", f"{trial.steps:,}", f"{trial.learning_rate:g}"]
    scores = [
      Shaded(compare_report.spread(trial.scores[test], continuous), _goodness(comparison, test, np.mean(trial.scores[test])))
      for test in tests
    ]
    rows.append([*own, clock(trial.seconds), *scores])
  chance = [compare_report.score(value, continuous) for value in comparison.chance.values()]
  footer = ["without memory", *[""] * 5, *chance]
  columns = ["layer", "state, bytes", "parameters", "steps", "rate", "time", *tests]
  seeds = comparison.budget.seeds
  spread = f", mean of {seeds} seeds ± half their range" if seeds > 1 else ""
  caption = f"The last columns are the {compare_report.measure(comparison)} by {comparison.grows}{spread}."
  return table(columns, rows, footer=footer, caption=caption)


def _goodness(comparison: Comparison, test: str, score: float) -> float:
  """How good a score is, from 0, without memory, to 1."""
  chance = comparison.chance[test]
  best = 0.0 if comparison.continuous else 1.0
  return float(np.clip((score - chance) / ((best - chance) or 1), 0, 1))


def _pictures(comparison: Comparison) -> list[str]:
  """Scores against difficulty, and against bytes of state if layers have several sizes."""
  figures = []
  tests, labels = list(comparison.chance), {"ylabel": compare_report.measure(comparison)}
  frame = {} if comparison.continuous else {"ylim": (-0.03, 1.03)}
  if len(tests) > 1:
    lines, bands = _by_difficulty(comparison, tests)
    lines.append(Line("without memory", range(len(tests)), [*comparison.chance.values()], 7, "dotted"))
    places = {"xticks": range(len(tests)), "xticklabels": tests}
    title = f"scores by {comparison.grows}"
    figures.append(panel(title, lines, bands=bands, xlabel=comparison.grows, wide=True, **labels, **frame, **places))
  names = list(dict.fromkeys(trial.name for trial in comparison.trials))
  if len(names) < len(comparison.trials):
    hardest = _hardest(comparison)
    lines = []
    for colour, name in enumerate(names):
      trials = sorted((trial for trial in comparison.trials if trial.name == name), key=lambda trial: trial.state_bytes)
      means = [np.mean(trial.scores[hardest]) for trial in trials]
      lines.append(Line(name, [trial.state_bytes for trial in trials], means, colour, marker=True))
    sizes = sorted({trial.state_bytes for trial in comparison.trials})
    ticks = [size for i, size in enumerate(sizes) if i == 0 or size > 1.3 * sizes[i - 1]]
    scale = {"xscale": "log", "xticks": ticks, "xticklabels": [binary(size) for size in ticks]}
    levels = [Level("without memory", comparison.chance[hardest])]
    title = f"scores by state, on {hardest} {comparison.grows}"
    figures.append(panel(title, lines, levels=levels, xlabel="bytes of state", **labels, **frame, **scale))
  return [grid(figures)] if figures else []


def _by_difficulty(comparison: Comparison, tests: list[str]) -> tuple[list[Line], list[Band]]:
  """Lines of means over seeds with bands of their range; a colour for each layer, a style for each of its sizes."""
  lines, bands, names = [], [], list(dict.fromkeys(trial.name for trial in comparison.trials))
  for trial in comparison.trials:
    x, seeds, colour = range(len(tests)), [trial.scores[test] for test in tests], names.index(trial.name)
    sizes = sorted((other.state_bytes for other in comparison.trials if other.name == trial.name), reverse=True)
    style = _STYLES[sizes.index(trial.state_bytes) % len(_STYLES)]
    means = [float(np.mean(scores)) for scores in seeds]
    lines.append(Line(compare_report.label(comparison, trial), x, means, colour, style, marker=True))
    bands.append(Band(x, [min(scores) for scores in seeds], [max(scores) for scores in seeds], colour))
  return lines, bands


def _learning_curves(comparison: Comparison) -> list[str]:
  """A panel for each trial: the score on the training task over the steps, a colour for each rate, a line for each seed."""
  figures = []
  frame = {"yscale": "log"} if comparison.continuous else {"ylim": (-0.03, 1.03)}
  for trial in comparison.trials:
    lines = []
    for colour, (rate, looks) in enumerate(trial.training.items()):
      if not looks:
        continue
      steps, _, scores = zip(*looks, strict=True)
      chosen = rate == f"{trial.learning_rate:g}"
      seeds = np.array(scores, float).T
      lines += [Line("", steps, seed, colour, faint=True) for seed in seeds]
      lines.append(Line(f"rate {rate}{', chosen' * chosen}", steps, seeds.mean(axis=0), colour, marker=len(steps) == 1))
    if lines:
      title = f"{trial.name}, {binary(trial.state_bytes)}"
      figures.append(panel(title, lines, xlabel="step", ylabel=compare_report.measure(comparison), **frame))
  if not figures:
    return [note("Not drawn: the trials hold no scores of the training.")]
  about = "Scores on the training task. The strong line is the mean over seeds, pale lines are seeds."
  return [paragraph(about, "faint"), grid(figures)]


def _kinds(comparison: Comparison) -> list[str]:
  """For each trial its scores by kind of answer and test, where there are several kinds."""
  hardest = _hardest(comparison)
  if len(comparison.trials[0].kinds[hardest]) < 2:
    return []
  parts = []
  for trial in comparison.trials:
    kinds = list(dict.fromkeys(kind for by_kind in trial.kinds.values() for kind in by_kind))
    rows = [(kind, *(_of_kind(comparison, trial, test, kind) for test in trial.kinds)) for kind in kinds]
    parts += [heading(compare_report.label(comparison, trial)), table(("kind", *trial.kinds), rows)]
  return [paragraph(f"{compare_report.measure(comparison)}, by {comparison.grows}.".capitalize(), "faint"), *parts]


def _of_kind(comparison: Comparison, trial: Trial, test: str, kind: str) -> str | Shaded:
  if kind not in trial.kinds[test]:
    return "none"
  mean = float(np.mean(trial.kinds[test][kind]))
  return Shaded(compare_report.score(mean, comparison.continuous), _goodness(comparison, test, mean))


def _budget(comparison: Comparison) -> list[str]:
  values = {name: getattr(comparison.budget, name) for name in _BUDGET}
  values["learning_rates"] = ", ".join(f"{rate:g}" for rate in values["learning_rates"])
  same = paragraph("The same for every memory.", "faint")
  return [same, facts((words, str(values[name])) for name, words in _BUDGET.items())]


def _command(comparison: Comparison) -> str:
  if comparison.command:
    return preformatted(comparison.command)
  return note("Not recorded: the comparison was made from Python, or by an earlier version.")
