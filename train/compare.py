"""Compares memories on one task: the same backbone, optimiser, examples and budget for each.

An entrant is a layer at one size. A trial trains it at several learning rates and from several seeds, all at once under
`vmap`, and tests the best learning rate on harder and harder tasks. A finished trial is a file, so an interrupted
comparison continues with the next trial.
"""

import bisect
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from .checks import at_least
from .files import read_record, write_record
from .gin_files import Reference
from .keys import new_key
from .optimizer import decay_mask
from .run_folder import settings
from .step import abstract_params, create_state, make_train_step, score_targets
from .tasks import TASKS, Task
from .tasks.data import TaskData, as_batch
from .user_modules import import_class
from .values import did_you_mean

_STEPS_PER_CALL = 25  # training steps in one compiled call


@dataclass(frozen=True)
class Entrant:
  """A layer in the comparison, at one size.

  Attributes:
    name: the name that `enter` got: "DeltaNet", "reflecting/DeltaNet".
    experiment: its model, task and optimiser.
    state_bytes: bytes of the model's state for one sequence.
    parameters: number of the model's parameters.
  """

  name: str
  experiment: Any
  state_bytes: int
  parameters: int

  @property
  def task(self) -> Task:
    return self.experiment.data.task

  @property
  def title(self) -> str:
    return f"{self.name}, {self.state_bytes:,} bytes"


@dataclass(frozen=True)
class Budget:
  """The training budget of each entrant.

  Attributes:
    learning_rates: all are tried; the one with the best score on the training task counts.
    seeds: number of seeds for parameters and examples; results have a mean and a spread over them.
    steps: the largest number of training steps; training ends earlier when `stop_at` is reached.
    batch_size: examples per step.
    stop_at: training ends when all seeds of one learning rate reach this share of right answers on the training task; with a
      value above 1 it never ends early.
    evaluate_every: steps between two evaluations on the training task.
    test_examples: examples of each test.
  """

  learning_rates: tuple[float, ...] = (1e-3, 3e-3)
  seeds: int = 2
  steps: int = 1000
  batch_size: int = 32
  stop_at: float = 0.995
  evaluate_every: int = 100
  test_examples: int = 256

  def __post_init__(self):
    at_least(1, self, "seeds", "steps", "batch_size", "evaluate_every", "test_examples")
    if not self.learning_rates or min(self.learning_rates) <= 0:
      raise ValueError(f"Budget.learning_rates is {self.learning_rates}; expected at least one, all positive.")


@dataclass(frozen=True)
class Trial:
  """The result of an entrant. Scores are shares of right answers, or squared errors for continuous tasks.

  Attributes:
    name, state_bytes, parameters: the entrant's.
    steps: training steps taken.
    seconds: their duration, compilation included.
    learning_rate: the best one.
    scores: for each test, the score of each seed.
    kinds: for each test and each kind of answer, the score of each seed.
    training: for each learning rate, (step, loss of each seed, score of each seed) at every evaluation.
  """

  name: str
  state_bytes: int
  parameters: int
  steps: int
  seconds: float
  learning_rate: float
  scores: dict[str, list[float]]
  kinds: dict[str, dict[str, list[float]]]
  training: dict[str, list[list[Any]]] = field(default_factory=dict)


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
  """Trains and tests each of `entrants`; takes finished trials of earlier calls from `directory`.

  Args:
    entrants: entrants from `enter`, all on the same task.
    budget: the budget of each entrant.
    directory: the folder of `trials/`, which holds one file per trial.
    report: called with an entrant and its progress: "step", "loss" and "score" while it trains, then "trial".
  """
  folder = Path(directory) / "trials"
  folder.mkdir(parents=True, exist_ok=True)
  trials = []
  for entrant in entrants:
    path = folder / f"{_file_name(entrant, budget)}.json"
    if path.exists():
      trial = read_record(Trial, path, "remove it, and its trial is run again")
    else:
      trial = run_trial(entrant, budget, partial(report, entrant))
      write_record(path, trial)
    report(entrant, {"trial": trial})
    trials.append(trial)
  task = entrants[0].task
  chance = {name: test.chance for name, test in task.tests().items()}
  return Comparison(str(task), task.grows, chance, task.continuous, budget, trials)


def _file_name(entrant: Entrant, budget: Budget) -> str:
  """The name of a trial's file; it contains a digest of everything that the trial depends on."""
  text = f"{entrant.name}\n{settings(entrant.experiment.text)}\n{budget}"
  digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
  return f"{entrant.name.replace('/', '_')}-{entrant.state_bytes}-{digest}"


def run_trial(entrant: Entrant, budget: Budget, report: Callable[[dict[str, Any]], None] = lambda progress: None) -> Trial:
  """Trains an entrant at every learning rate and from every seed, and tests the best learning rate."""
  started = time.perf_counter()
  runs = VmappedRuns(entrant, budget)
  history: dict[str, list[list[Any]]] = {f"{rate:g}": [] for rate in budget.learning_rates}
  step, worst = 0, np.inf if entrant.task.continuous else -np.inf
  while step < budget.steps:
    step, loss = runs.train(min(budget.steps, (step // budget.evaluate_every + 1) * budget.evaluate_every))
    score = runs.score(entrant.task.training())
    for rate, losses, scores in zip(history, loss, score, strict=True):
      history[rate].append([step, losses.tolist(), scores.tolist()])
    means = np.nan_to_num(score.mean(axis=1), nan=worst)
    best = int(means.argmin() if entrant.task.continuous else means.argmax())
    report({"step": step, "loss": float(loss[best].mean()), "score": float(means[best])})
    if not entrant.task.continuous and score[best].min() >= budget.stop_at:
      break
  scores, kinds = {}, {}
  for name, test in entrant.task.tests().items():
    scores[name], kinds[name] = runs.test(test, best)
  return Trial(
    name=entrant.name,
    state_bytes=entrant.state_bytes,
    parameters=entrant.parameters,
    steps=step,
    seconds=time.perf_counter() - started,
    learning_rate=budget.learning_rates[best],
    scores=scores,
    kinds=kinds,
    training=history,
  )


def enter(
  config: str,
  layers: Sequence[str],
  overrides: Sequence[str] = (),
  *,
  state_bytes: Sequence[int] | None = None,
  parameters: int | None = None,
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

  Raises:
    ValueError: if the config or a layer cannot be built.
  """
  from ..zoo.registry import LAYERS
  from .config import build, groups_of, references

  config, layers = f"tasks/{config}" if config in TASKS else config, list(dict.fromkeys(layers))
  classes = {name: _class(name) for name in (layer.rpartition("/")[2] for layer in layers)}
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


class VmappedRuns:
  """Trains a model at several learning rates and from several seeds at once.

  Attributes:
    state: that of all runs, leaves [rates * seeds, ...]; runs of the same rate are neighbours. Results are [rates, seeds].
  """

  def __init__(self, entrant: Entrant, budget: Budget):
    self.model, self.budget, self.step = entrant.experiment.model, budget, 0
    one_token = entrant.experiment.data.one_token
    unit = replace(entrant.experiment.optimizer, learning_rate=1.0)  # updates of AdamW are proportional to the rate
    self._transform = unit.build(budget.steps, decay_mask(abstract_params(self.model, one_token)))
    self._schedule = unit.schedule(budget.steps)
    self.grid = len(budget.learning_rates), budget.seeds
    self.rates = np.repeat(np.asarray(budget.learning_rates, np.float32), budget.seeds)
    self.seeds = np.tile(np.arange(budget.seeds, dtype=np.uint32), len(budget.learning_rates))

    def create(seed):
      return create_state(self.model, self._scaled(1.0), new_key(seed), one_token)

    self.state = jax.jit(jax.vmap(create))(self.seeds)
    self._scorers: dict[Task, Callable] = {}
    self.train_on(entrant.task.training(), budget.batch_size)

  def _scaled(self, rate: float | jax.Array) -> optax.GradientTransformation:
    return optax.chain(self._transform, optax.scale(rate))

  def train_on(self, task: Task, batch_size: int) -> None:
    """Takes the examples of further training steps from `task`; step count and learning rates go on."""

    def advance(rate, seed, state, steps):
      step = make_train_step(self.model, self._scaled(rate), lambda count: rate * self._schedule(count), self.budget.steps)

      def one(state, number):
        key = jax.random.fold_in(new_key(seed + 1000), number)
        state, metrics = step(state, as_batch(task.batch(key, batch_size)))
        return state, metrics.loss

      state, losses = jax.lax.scan(one, state, steps)
      return state, losses.mean()

    self.advance = jax.jit(jax.vmap(advance, in_axes=(0, 0, 0, None)), donate_argnums=2)

  def train(self, until: int) -> tuple[int, np.ndarray]:
    """Trains up to a step; returns the step and the mean loss since the last call, [rates, seeds]."""
    losses = []
    while self.step < until:
      count = min(_STEPS_PER_CALL, until - self.step)
      steps = jnp.arange(self.step, self.step + count)
      self.state, loss = self.advance(self.rates, self.seeds, self.state, steps)
      losses.append((count, loss))
      self.step += count
    weights = [count for count, _ in losses]
    mean = np.average([np.asarray(loss) for _, loss in losses], axis=0, weights=weights)
    return self.step, mean.reshape(self.grid)

  def score(self, task: Task) -> np.ndarray:
    """Scores on examples that no training step uses, [rates, seeds]."""
    sums, counts = self._sums(task, self.state.params, self.budget.test_examples)
    return (sums.sum(axis=-1) / counts.sum(axis=-1)).reshape(self.grid)

  def test(self, task: Task, rate: int) -> tuple[list[float], dict[str, list[float]]]:
    """Scores at one learning rate: for each seed, and for each kind of answer and seed."""
    runs = slice(rate * self.budget.seeds, (rate + 1) * self.budget.seeds)
    params = jax.tree.map(lambda leaf: leaf[runs], self.state.params)
    sums, counts = self._sums(task, params, self.budget.test_examples)
    with np.errstate(invalid="ignore"):
      by_kind = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    kinds = {name: column.tolist() for name, column in zip(task.kinds, by_kind.T, strict=True) if not np.isnan(column).all()}
    return (sums.sum(axis=-1) / counts.sum(axis=-1)).tolist(), kinds

  def _sums(self, task: Task, params: Any, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of scores and numbers of answers by kind, [runs, kinds] each."""
    rows = max(1, min(examples, 16384 // task.length))  # of one batch
    if task not in self._scorers:
      scored = jax.vmap(partial(score_answers, self.model, len(task.kinds)), (0, None))
      make = jax.jit(lambda key: task.batch(key, rows))
      self._scorers[task] = make, jax.jit(scored)
    make, scored = self._scorers[task]
    keys = jax.random.split(new_key(2**31 + task.length), math.ceil(examples / rows))
    return summed(scored(params, make(key)) for key in keys)


def summed(parts: Iterable[tuple[jax.Array, jax.Array]]) -> tuple[np.ndarray, np.ndarray]:
  """Adds up the scores and counts of several batches in float64."""
  scores, counts = zip(*parts, strict=True)
  return tuple(np.sum([np.asarray(array, np.float64) for array in arrays], axis=0) for arrays in (scores, counts))


def score_answers(model: nn.Module, kinds: int, params: Any, example: Any) -> tuple[jax.Array, jax.Array]:
  """For each kind: right answers (or squared errors) summed over a batch, and the number of answers; float32 [kinds]."""
  outputs, _ = model.apply(params, example.tokens, segment_ids=example.segment_ids)
  losses, right = score_targets(outputs, example.targets)
  score = losses if jnp.issubdtype(example.targets.dtype, jnp.floating) else right.astype(jnp.float32)
  weights, kind = example.weights.ravel(), example.kind.ravel()
  empty = jnp.zeros(kinds, jnp.float32)
  return empty.at[kind].add(score.ravel() * weights), empty.at[kind].add(weights)


