"""Many runs of one model at once, at several learning rates and from several seeds, under `vmap`."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from .checks import at_least
from .keys import new_key
from .optimizer import Optimizer, decay_mask
from .step import abstract_params, create_state, make_train_step, score_targets
from .tasks import Task
from .tasks.data import as_batch

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
      value above 1 it never ends early. In place of right answers, continuous tasks have 1 - error / error without memory.
    evaluate_every: steps between two evaluations on the training task.
    test_examples: examples of each test.
    warmup_steps: of each learning rate; `()` means the config's for all.
    halve_every: after this many steps, and again after as many more, the worse half of the learning rates is dropped, until
      one is left; 0 means never.
  """

  learning_rates: tuple[float, ...] = (1e-3, 3e-3)
  seeds: int = 2
  steps: int = 1000
  batch_size: int = 32
  stop_at: float = 0.995
  evaluate_every: int = 100
  test_examples: int = 256
  warmup_steps: tuple[int, ...] = ()
  halve_every: int = 0

  def __post_init__(self):
    at_least(1, self, "seeds", "steps", "batch_size", "evaluate_every", "test_examples")
    at_least(0, self, "halve_every")
    if not self.learning_rates or min(self.learning_rates) <= 0:
      raise ValueError(f"Budget.learning_rates is {self.learning_rates}; expected at least one, all positive.")
    if self.warmup_steps and len(self.warmup_steps) != len(self.learning_rates):
      raise ValueError(
        f"Budget.warmup_steps is {self.warmup_steps}; expected one for each of learning_rates={self.learning_rates}, or ()."
      )

  def optimizers(self, optimizer: Optimizer) -> list[Optimizer]:
    """`optimizer` at each of the learning rates."""
    warmups = self.warmup_steps or [optimizer.warmup_steps] * len(self.learning_rates)
    pairs = zip(self.learning_rates, warmups, strict=True)
    return [replace(optimizer, learning_rate=rate, warmup_steps=warmup) for rate, warmup in pairs]


class VmappedRuns:
  """Trains a model at several learning rates and from several seeds at once.

  Attributes:
    rates: the learning rates that are trained, as indices into `budget.learning_rates`.
    state: that of all runs, leaves [rates * seeds, ...]; runs of the same rate are neighbours. Results are [rates, seeds].
  """

  def __init__(self, entrant: Entrant, budget: Budget):
    self.model, self.budget, self.step = entrant.experiment.model, budget, 0
    self._optimizer, one_token = entrant.experiment.optimizer, entrant.experiment.data.one_token
    self._schedules = [optimizer.schedule(budget.steps) for optimizer in budget.optimizers(self._optimizer)]
    self._decays = decay_mask(abstract_params(self.model, one_token))
    self.rates = list(range(len(budget.learning_rates)))
    self._scorers: dict[Task, Callable] = {}

    def create(seed):
      return create_state(self.model, self._transform(0), new_key(seed), one_token)

    self.state = jax.jit(jax.vmap(create))(self._runs()[1])
    self.train_on(entrant.task.training(), budget.batch_size)

  def _runs(self) -> tuple[np.ndarray, np.ndarray]:
    """The number of its learning rate and the seed of each run, [rates * seeds]."""
    seeds = np.arange(self.budget.seeds, dtype=np.uint32)
    return np.repeat(np.asarray(self.rates), len(seeds)), np.tile(seeds, len(self.rates))

  def _rate(self, number: int | jax.Array, count: jax.Array) -> jax.Array:
    """The learning rate after `count` updates of a run at rate `number`."""
    return jnp.stack([schedule(count) for schedule in self._schedules])[number]

  def _transform(self, number: int | jax.Array) -> optax.GradientTransformationExtraArgs:
    return self._optimizer.build(self.budget.steps, self._decays, partial(self._rate, number))

  def train_on(self, task: Task, batch_size: int) -> None:
    """Takes the examples of further training steps from `task`; step count and learning rates go on."""

    def advance(number, seed, state, steps):
      step = make_train_step(self.model, self._transform(number), partial(self._rate, number), self.budget.steps)

      def one(state, index):
        key = jax.random.fold_in(new_key(seed + 1000), index)
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
      self.state, loss = self.advance(*self._runs(), self.state, steps)
      losses.append((count, loss))
      self.step += count
    weights = [count for count, _ in losses]
    mean = np.average([np.asarray(loss) for _, loss in losses], axis=0, weights=weights)
    return self.step, self._grid(mean)

  def keep(self, rates: Sequence[int]) -> None:
    """Trains only these rates, places in `self.rates`, further on."""
    runs = np.concatenate([np.arange(self.budget.seeds) + rate * self.budget.seeds for rate in rates])
    self.state = jax.tree.map(lambda leaf: leaf[runs], self.state)
    self.rates = [self.rates[rate] for rate in rates]

  def score(self, task: Task) -> np.ndarray:
    """Scores on examples that no training step uses, [rates, seeds]."""
    sums, counts = self._sums(task, self.state.params, self.budget.test_examples)
    return self._grid(sums.sum(axis=-1) / counts.sum(axis=-1))

  def test(self, task: Task, rate: int) -> tuple[list[float], dict[str, list[float]]]:
    """Scores at one learning rate, a place in `self.rates`: for each seed, and for each kind of answer and seed."""
    runs = slice(rate * self.budget.seeds, (rate + 1) * self.budget.seeds)
    params = jax.tree.map(lambda leaf: leaf[runs], self.state.params)
    sums, counts = self._sums(task, params, self.budget.test_examples)
    with np.errstate(invalid="ignore"):
      by_kind = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    kinds = {name: column.tolist() for name, column in zip(task.kinds, by_kind.T, strict=True) if not np.isnan(column).all()}
    return (sums.sum(axis=-1) / counts.sum(axis=-1)).tolist(), kinds

  def _grid(self, runs: np.ndarray) -> np.ndarray:
    return runs.reshape(len(self.rates), self.budget.seeds)

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
