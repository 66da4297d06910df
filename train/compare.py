"""Compares memories on one task: the same backbone, optimiser, examples and budget for each.

An entrant is a layer at one size. A trial trains it at several learning rates and from several seeds, all at once under
`vmap`, and tests the best learning rate on harder and harder tasks. A trial is a file, so an interrupted comparison continues
where it was.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from .files import read_record, write_record
from .gin_files import Reference
from .tasks import TASKS
from .tasks.data import TaskData
from .trial import Trial, digest, finished_trial, run_trial
from .user_modules import import_class
from .values import did_you_mean
from .vmapped_runs import Budget, Entrant, VmappedRuns

__all__ = ["Budget", "Comparison", "Entrant", "Trial", "VmappedRuns", "compare", "enter"]


@dataclass(frozen=True)
class Comparison:
  """All trials on one task.

  Attributes:
    task: the task with its parameters, as text.
    grows: the quantity that grows from test to test.
    chance: for each test, the score without memory.
    continuous: scores are squared errors; smaller is better.
    budget: the budget of each trial.
    trials: the trials in the order of the entrants.
    command: the command line that made it; "" if none did.
  """

  task: str
  grows: str
  chance: dict[str, float]
  continuous: bool
  budget: Budget
  trials: list[Trial]
  command: str = ""

  def save(self, path: Path) -> None:
    """Writes it as JSON."""
    write_record(path, self, indent=1)

  @classmethod
  def load(cls, path: Path) -> "Comparison":
    """Reads what `save` has written. Raises `ValueError` if the file holds something else."""
    remedy = "run `memzoo compare` again, which keeps finished trials"
    found = read_record(cls, path, remedy)
    try:
      budget, trials = Budget(**found.budget), [Trial(**trial) for trial in found.trials]
    except TypeError as error:
      raise ValueError(f"{path} does not hold a comparison ({error}); {remedy}.") from None
    return replace(found, budget=budget, trials=trials)


Report = Callable[[Entrant, dict[str, Any]], None]


def compare(
  entrants: Sequence[Entrant], budget: Budget, directory: str | Path, report: Report = lambda entrant, progress: None
) -> Comparison:
  """Trains and tests each of `entrants`; takes finished trials of earlier calls from `directory`, and continues stopped ones.

  Args:
    entrants: entrants from `enter`, all on the same task.
    budget: the budget of each entrant.
    directory: the folder of `trials/`, which holds one file per trial.
    report: called with an entrant and its progress: "step", "loss" and "score" while it trains, then "trial".
  """
  trials = []
  for entrant in entrants:
    trial = stored_trial(entrant, budget, directory, partial(report, entrant))
    report(entrant, {"trial": trial})
    trials.append(trial)
  task = entrants[0].task
  chance = {name: test.chance for name, test in task.tests().items()}
  return Comparison(str(task), task.grows, chance, task.continuous, budget, trials)


def stored_trial(
  entrant: Entrant, budget: Budget, directory: str | Path, report: Callable[[dict[str, Any]], None] = lambda progress: None
) -> Trial:
  """The trial of an entrant: from `directory/trials`, where it is kept, if it is finished there."""
  path = trial_path(entrant, budget, directory)
  path.parent.mkdir(parents=True, exist_ok=True)
  trial = finished_trial(budget, path)
  if trial is None:
    trial = run_trial(entrant, budget, path.with_suffix(".npz"), report)
    write_record(path, trial)
  return trial


def trial_path(entrant: Entrant, budget: Budget, directory: str | Path) -> Path:
  """The file of a trial."""
  name = f"{entrant.name.replace('/', '_')}-{entrant.state_bytes}-{digest(entrant, budget)}"
  return Path(directory) / "trials" / f"{name}.json"


def enter(
  config: str,
  layers: Sequence[str],
  overrides: Sequence[str] = (),
  *,
  state_bytes: Sequence[int] | None = None,
  parameters: int | None = None,
  others: Sequence[str] = (),
) -> list[Entrant]:
  """Builds the entrants of a comparison.

  Args:
    config: a task's name, such as "mqar" for the shipped "tasks/mqar", or any config whose data is a `TaskData`. Each layer
      replaces the last of the config's mixers.
    layers: names of layers, or scoped names ("reflecting/DeltaNet") whose fields `overrides` sets. A layer of your own is
      "my_layers.EMA". A name that is given twice enters once.
    overrides: further bindings. A binding of a layer or of its options (`linear/Network.depth=1`) applies to that layer only.
    state_bytes: each layer enters once for each of these sizes of the model's state, matched as closely as possible by its
      key and value width, or by its window for attention.
    parameters: number of parameters of every model, matched as closely as possible by its width; `None` keeps the config's.
    others: layers that do not enter, whose bindings among `overrides` are left out.

  Raises:
    ValueError: if the config or a layer cannot be built.
  """
  from ..zoo.registry import LAYERS
  from .config import build, groups_of, references

  config, layers = f"tasks/{config}" if config in TASKS else config, list(dict.fromkeys(layers))
  classes = {name: _class(name) for name in (layer.rpartition("/")[2] for layer in (*layers, *others))}
  if not layers:
    raise ValueError(f"--layers names none; expected some of {', '.join(LAYERS)}.")
  known = LAYERS | classes
  groups = {group for layer in known.values() for group in groups_of(layer)}
  base = build(config, [text for text in overrides if _bound(text) not in known.keys() | groups])
  if not isinstance(base.data, TaskData):
    raise ValueError(f"{config} has no task{did_you_mean(config, TASKS)} Expected one of {', '.join(TASKS)}.")
  grouped = {group for layer in classes.values() for group in groups_of(layer)}
  field, names = f"{type(base.model).__name__}.mixers", references(base, "mixers")
  imports = [f"import {name.rpartition('.')[0]}" for name in classes if name not in LAYERS]

  def counts(text: str, layer: str) -> bool:
    """Whether an override is for `layer`: it does not name another entrant, nor a scope other than the layer's."""
    (scope, _, name), bound, target = layer.rpartition("/"), _bound(text), _target(text)
    if (bound in classes and bound != name) or (bound in grouped and bound not in groups_of(classes[name])):
      return False
    return "/" not in target or target == layer or (bound in groups and target.rpartition("/")[0] == scope)

  def build_one(layer: str, more: Sequence[str]) -> Any:
    own = [text for text in overrides if counts(text, layer)]
    pattern = _replace_last(names, Reference(*layer.rpartition("/")[::2]))
    return _fitted(build(config, [*imports, *own, f"{field}={pattern}", *more]))

  def enter_one(layer: str, more: Sequence[str]) -> Entrant:
    if parameters is not None:
      more = [*more, _width_for(lambda text: build_one(layer, [*more, text]), base, parameters)]
    experiment = build_one(layer, more)
    return Entrant(layer, experiment, _state_bytes(experiment), _count(experiment))

  entrants = []
  for layer in layers:
    if state_bytes is None:
      entrants.append(enter_one(layer, ()))
    for size in state_bytes or ():
      entrants.append(enter_one(layer, _size_for(layer, build_one(layer, ()), size)))
  return list({entrant.title: entrant for entrant in entrants}.values())


def _class(name: str) -> type:
  """The class of a layer that is called `name` here."""
  from ..zoo.registry import LAYERS

  if "." not in name and name not in LAYERS:
    raise ValueError(
      f"--layers names {name!r}{did_you_mean(name, LAYERS)} Expected some of {', '.join(LAYERS)}, or module.Class of your own."
    )
  return LAYERS.get(name) or import_class(name)


def _replace_last(mixers: Sequence[Any], mixer: Any) -> tuple:
  """The pattern `mixers` with `mixer` in place of the first layer of its last block."""
  *others, last = mixers
  return (*others, (mixer, *last[1:]) if isinstance(last, (tuple, list)) else mixer)


def _target(override: str) -> str:
  """The class that an override sets a field of, with its scope."""
  return override.partition("=")[0].strip().rpartition(".")[0]


def _bound(override: str) -> str:
  """The class that an override sets a field of."""
  return _target(override).rpartition("/")[2]


def _fitted(experiment: Any) -> Any:
  """The experiment with the model's vocabulary, or dimensions, set to those of the task."""
  task = experiment.data.task
  known = {"input_dim": task.input_dim, "output_dim": task.output_dim} if task.continuous else {"vocab_size": task.vocab_size}
  experiment.data.check_model(model := experiment.model.clone(**known))
  return replace(experiment, model=model)


def _state_bytes(experiment: Any) -> int:
  return experiment.model.state_bytes(1, experiment.data.task.length)


def _count(experiment: Any) -> int:
  shapes = jax.eval_shape(experiment.model.init, jax.random.key(0), experiment.data.one_token)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _size_for(layer: str, experiment: Any, size: int) -> list[str]:
  """The overrides that bring the model's state closest to `size` bytes."""
  mixer = experiment.model.mixer(len(experiment.model.mixers) - 1)
  fields = [name for name in ("key_dim", "value_dim") if hasattr(mixer, name)] or ["window"]
  if not hasattr(mixer, fields[0]):
    raise ValueError(f"--state-bytes needs a layer with key_dim, value_dim or window; {layer} has none of them.")

  def state_bytes(width: int) -> int:
    sized = mixer.clone(parent=None, **dict.fromkeys(fields, width))
    model = experiment.model.clone(mixers=_replace_last(experiment.model.mixers, sized))
    return model.state_bytes(1, experiment.data.task.length)

  widths = range(4, 1025, 4)
  first = bisect.bisect_left(widths, size, key=state_bytes)
  near = widths[max(0, first - 1) : first + 1]
  width = min(near, key=lambda width: abs(math.log(state_bytes(width) / size)))
  return [f"{layer}.{name}={width}" for name in fields]


def _width_for(build_one: Callable[[str], Any], base: Any, parameters: int) -> str:
  """The override that brings the model closest to `parameters` parameters."""
  name = f"{type(base.model).__name__}.width"
  widths = range(8, 1025, 8)
  first = bisect.bisect_left(widths, parameters, key=lambda width: _count(build_one(f"{name}={width}")))
  near = widths[max(0, first - 1) : first + 1]
  return min((f"{name}={width}" for width in near), key=lambda text: abs(_count(build_one(text)) - parameters))
