"""The pure functions of a run: one step of training, and one of evaluation.

    state, metrics = train_step(state, batch)

Loss is the mean cross-entropy in nats over the targets of non-zero weight. For layers that route, what is minimised also has a
loss that balances them (`memzoo.layers.routing`), that of each batch; it is reported apart. A step whose loss or gradient is
not finite changes only the counters: its update is discarded. With gradient accumulation a step adds its batch to the others
of an update, and the last step of a run makes an update of the batches that are there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from ..layers.context import Notes
from ..layers.routing import balance_loss
from ..zoo.stack import PERIODS, Stack
from .accumulation import Accumulation
from .keys import key_from_data, new_key
from .optimizer import Optimizer, decay_mask
from .sharding import batch_sharding, parameter_shardings, replicated, split_operations


class TrainState(NamedTuple):
  """What a run carries from step to step on its devices.

  Attributes:
    step: int32; batches seen.
    skipped: int32; how many of them had a loss or a gradient that was not finite.
    skipped_in_a_row: int32; how many were skipped since the last finite one.
    key: uint32; the data of a random key (`keys.py`). Every step folds its number into this key.
    params: the model's variables, as `model.apply` takes them.
    opt_state: the optimiser's.
  """

  step: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  key: jax.Array
  params: Any
  opt_state: Any


class Metrics(NamedTuple):
  """The numbers that a step returns, on its devices.

  Attributes:
    loss: float32; nats per target of this batch.
    targets: float32; the number of these targets (the sum of their weights).
    gradient_norm: float32; of this batch, over all parameters, before clipping.
    group_norms: float32 [groups]; the same for each group of parameters, in the order of `parameter_groups`.
    learning_rate: float32; of this step's update.
    skipped_in_a_row: int32; 0 if this step updated the parameters.
    nonfinite_groups: bool [groups]; whether each group of parameters had a non-finite gradient.
    update_loss: nats per target over all batches of the update that this step made; NaN if it made none.
    balance: float32; the loss of `balance_loss`, without its coefficient, of this batch; `None` if no layer has one.
  """

  loss: jax.Array
  targets: jax.Array
  gradient_norm: jax.Array
  group_norms: jax.Array
  learning_rate: jax.Array
  skipped_in_a_row: jax.Array
  nonfinite_groups: jax.Array
  update_loss: jax.Array
  balance: jax.Array | None


class Program(NamedTuple):
  """A run's compiled functions, and the shardings of its arrays.

  Attributes:
    create: `create() -> TrainState`, fresh.
    adopt: `adopt(params) -> TrainState`, the same with these parameters, which it consumes.
    train: `train(state, batch) -> (TrainState, Metrics)`. It consumes `state`.
    evaluate: `evaluate(params, batch) -> (nats, right, tokens)`: the loss summed over the batch's targets, how many of them
      were the likeliest prediction, and their number.
    abstract_state: the state's shapes, dtypes and shardings.
    batch_sharding: sharding of every array of a batch.
    groups: names of the parameter groups.
  """

  create: Callable[[], TrainState]
  adopt: Callable[[Any], TrainState]
  train: Callable[[TrainState, dict], tuple[TrainState, Metrics]]
  evaluate: Callable[[Any, dict], tuple[jax.Array, jax.Array, jax.Array]]
  abstract_state: TrainState
  batch_sharding: jax.sharding.NamedSharding
  groups: tuple[str, ...]


def experiment_program(experiment: Any, mesh: Mesh) -> Program:
  """`build_program` for the model, the data and the trainer of an experiment from `memzoo.build`."""
  data, trainer = experiment.data, experiment.trainer
  return build_program(
    experiment.model,
    experiment.optimizer,
    mesh,
    steps=trainer.steps,
    batch_size=data.batch_size,
    seed=trainer.seed,
    tokens=data.one_token,
  )


def build_program(
  model: nn.Module,
  optimizer: Optimizer,
  mesh: Mesh,
  *,
  steps: int,
  batch_size: int,
  seed: int = 0,
  tokens: jax.Array | None = None,
) -> Program:
  """Lays out and jits the functions of a run of `steps` batches of `batch_size` rows; nothing is computed yet.

  `tokens` is any input that the model takes, by default integers [1, 1].

  Raises:
    ValueError: if the batch or a parameter does not divide over the mesh.
  """
  rows = batch_sharding(mesh, batch_size)
  transform = optimizer.build(steps, decay_mask(abstract_params(model, tokens)))
  create = partial(create_state, model, transform, new_key(seed), tokens)
  shardings = _state_shardings(model, transform, mesh, tokens)
  shapes = jax.eval_shape(create)
  train_step = make_train_step(model, transform, optimizer.schedule(steps), last_step=steps)
  split = split_operations(mesh)
  return Program(
    create=jax.jit(create, out_shardings=shardings),
    adopt=jax.jit(partial(first_state, transform, new_key(seed)), out_shardings=shardings, donate_argnums=0),
    train=jax.jit(
      split(train_step),
      in_shardings=(shardings, rows),
      out_shardings=(shardings, replicated(mesh)),
      donate_argnums=0,
      compiler_options=compiler_options(mesh),
    ),
    evaluate=jax.jit(
      split(partial(sum_scores, model)),
      in_shardings=(shardings.params, rows),
      out_shardings=replicated(mesh),
      compiler_options=compiler_options(mesh),
    ),
    abstract_state=jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    ),
    batch_sharding=rows,
    groups=parameter_groups(shapes.params),
  )


def compiler_options(mesh: Mesh) -> dict[str, str]:
  """Options for XLA.

  On a CPU they make XLA schedule for memory. By default it schedules for concurrency that a CPU does not have; a model that
  recomputes its blocks (`LanguageModel.remat`) then takes four times the memory and a tenth more time.
  """
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else {}


def create_state(
  model: nn.Module, transform: optax.GradientTransformation, key: jax.Array, tokens: jax.Array | None = None
) -> TrainState:
  """A fresh state, with parameters drawn from `key`, one of `keys.new_key`.

  `tokens` is any input that the model takes, by default integers [1, 1].
  """
  params = nn.unbox(_init(model, jax.random.split(key)[0], tokens))
  return first_state(transform, key, params)


def first_state(transform: optax.GradientTransformation, key: jax.Array, params: Any) -> TrainState:
  """The state before the first step, with these parameters."""
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, zero, zero, jax.random.key_data(jax.random.split(key)[1]), params, transform.init(params))


def make_train_step(
  model: nn.Module, transform: optax.GradientTransformation, schedule: optax.Schedule, last_step: int | None = None
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
  """The pure function `train_step(state, batch) -> (state, metrics)`, not yet jitted.

  `schedule` gives the learning rate that is reported. Step `last_step` completes an update that is still accumulated.
  """
  transform = optax.with_extra_args_support(transform)

  def objective(params, batch, key):
    outputs, notes = run_model(model, params, batch, key)
    nats, _, targets = sum_targets(outputs, batch)
    loss, balance = nats / jnp.where(targets > 0, targets, 1), balance_loss(notes)
    if balance is None:
      return loss, (loss, targets, None)
    return loss + balance[1].astype(loss.dtype), (loss, targets, balance[0].astype(jnp.float32))

  def train_step(state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(key_from_data(state.key), state.step)
    (_, (loss, targets, balance)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params, batch, key)
    squares = group_squares(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(squares.sum())
    # Not optax.apply_if_finite: it does not look at the loss, and after its limit it applies updates that are not finite.
    of_batch = {"weight": targets, "loss": loss, "finite": finite, "last": state.step + 1 == (last_step or -1)}
    updates, opt_state = transform.update(gradients, state.opt_state, state.params, **of_batch)
    params = optax.apply_updates(state.params, updates)
    if accumulated := isinstance(opt_state, Accumulation):  # it leaves out such a batch on its own
      made, made_before = opt_state.updates, state.opt_state.updates
      update_loss = jnp.where(made > made_before, opt_state.loss, jnp.nan)
    else:
      made_before, update_loss = state.step - state.skipped, loss
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite | accumulated, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    metrics = Metrics(
      loss=loss,
      targets=targets,
      gradient_norm=jnp.sqrt(squares.sum()),
      group_norms=jnp.sqrt(squares),
      learning_rate=jnp.asarray(schedule(made_before), jnp.float32),
      skipped_in_a_row=in_a_row,
      nonfinite_groups=~jnp.isfinite(squares),
      update_loss=update_loss,
      balance=balance,
    )
    skipped = state.skipped + jnp.where(finite, 0, 1)
    return TrainState(state.step + 1, skipped, in_a_row, state.key, params, opt_state), metrics

  return train_step


def sum_scores(
  model: nn.Module, params: Any, batch: dict, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`sum_targets` of a model's outputs for a batch."""
  return sum_targets(run_model(model, params, batch, key)[0], batch)


def run_model(model: nn.Module, params: Any, batch: dict, key: jax.Array | None = None) -> tuple[jax.Array, dict[str, Notes]]:
  """A model's outputs for a batch, and what its layers published."""
  options = {"segment_ids": batch["segment_ids"], "rngs": None if key is None else {"dropout": key}}
  if not isinstance(model, Stack):
    return model.apply(params, batch["tokens"], **options)[0], {}
  outputs, _, notes = model.apply(params, batch["tokens"], method="with_notes", **options)
  return outputs, notes


def sum_targets(outputs: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sums over a batch's targets of non-zero weight, float32: their cross-entropy, those predicted best, and their number.

  For float targets it is the mean squared error over the last axis, and none is predicted best.
  """
  losses, right = score_targets(outputs, batch["targets"])
  weights = batch["weights"]
  return (losses * weights).sum(), (right & (weights > 0)).sum(dtype=jnp.float32), weights.sum()


def score_targets(outputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """For integer targets [B, T]: the cross-entropy of each, and whether it is the likeliest prediction.

  For float targets [B, T, D]: the mean squared error over D, and `False`.
  """
  if jnp.issubdtype(targets.dtype, jnp.floating):
    return jnp.square(outputs - targets).mean(axis=-1), jnp.zeros(targets.shape[:-1], bool)
  losses = optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets)
  return losses, outputs.argmax(axis=-1) == targets


def parameter_groups(params: Any) -> tuple[str, ...]:
  """Names of the groups in reports, such as "embedding" and "blocks_3/mixer", in the order of the tree."""
  return tuple(dict.fromkeys(_group(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)))


def group_squares(gradients: Any) -> jax.Array:
  """float32 [groups]: the sum of squares of each group's gradients."""
  squares = dict.fromkeys(parameter_groups(gradients), jnp.zeros((), jnp.float32))
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    squares[_group(path)] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
  return jnp.stack(list(squares.values()))


def _group(path: tuple) -> str:
  """The group of a parameter: in a block (also one under `PERIODS`) the block's module, elsewhere the top module."""
  names = [str(entry.key) for entry in path if str(entry.key) != "params"]
  depth = 3 if names[0] == PERIODS else 2 if names[0].startswith("blocks") else 1
  return "/".join(names[:depth])


def abstract_params(model: nn.Module, tokens: jax.Array | None = None) -> Any:
  """Shapes of the model's parameters, in the boxes that say what they are; see `memzoo.layers.axes`."""
  return jax.eval_shape(partial(_init, model, tokens=tokens), new_key(0))


def _init(model: nn.Module, key: jax.Array, tokens: jax.Array | None = None) -> Any:
  return model.init(key, jnp.zeros((1, 1), jnp.int32) if tokens is None else tokens)


def _state_shardings(
  model: nn.Module, transform: optax.GradientTransformation, mesh: Mesh, tokens: jax.Array | None
) -> TrainState:
  boxed = abstract_params(model, tokens)
  params, whole = parameter_shardings(mesh, boxed), replicated(mesh)
  opt_state = optax.tree_utils.tree_map_params(
    transform,
    lambda leaf, sharding: sharding,
    jax.eval_shape(transform.init, nn.unbox(boxed)),
    params,
    transform_non_params=lambda leaf: whole,
  )
  return TrainState(whole, whole, whole, whole, params, opt_state)
