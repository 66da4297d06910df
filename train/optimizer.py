"""AdamW with warm-up, cosine decay and clipping (Loshchilov & Hutter 2019, arXiv:1711.05101), built from optax's parts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from ..layers.axes import Named
from ..zoo.stack import PERIODS
from .accumulation import accumulate
from .checks import at_least


@dataclass(frozen=True)
class Optimizer:
  """The settings of AdamW; `build(steps)` gives the `optax.GradientTransformation`.

  Attributes:
    learning_rate: peak learning rate, reached after `warmup_steps`.
    warmup_steps: steps of linear warm-up; at most a tenth of the run.
    final_fraction: the share of `learning_rate` at the last step; the rate falls to it along a cosine.
    weight_decay: the decay of matrices and embeddings per update, in units of the learning rate. Gates, norms and biases do not
      decay; see `decay_mask`.
    b1, b2: decay rates of the running averages of the first and second moments.
    epsilon: added to the root of the second moment.
    clip_norm: the largest global norm of a gradient; 0 does not clip.
    accumulate_steps: batches that make one update, as one larger batch does (`accumulation.py`). The last update of a run is
      made of the batches that are left. `steps` and `warmup_steps` count batches.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 100
  final_fraction: float = 0.1
  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  clip_norm: float = 1.0
  accumulate_steps: int = 1

  def __post_init__(self):
    at_least(0, self, "learning_rate", "warmup_steps", "weight_decay", "epsilon", "clip_norm")
    if not 0 <= self.final_fraction <= 1:
      raise ValueError(f"Optimizer.final_fraction is {self.final_fraction}; expected a share between 0 and 1.")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"Optimizer.{name} is {getattr(self, name)}; expected 0 or more, and less than 1.")
    at_least(1, self, "accumulate_steps")

  def warmup(self, steps: int) -> int:
    """The warm-up steps of a run of `steps` batches: those that were asked for, or a tenth of the run if that is less."""
    updates = -(-steps // self.accumulate_steps)
    return min(self.warmup_steps, updates // 10 * self.accumulate_steps)

  def schedule(self, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made, for a run of `steps` batches."""
    updates, warmup = -(-steps // self.accumulate_steps), self.warmup(steps) // self.accumulate_steps
    schedule = optax.schedules.warmup_cosine_decay_schedule(
      init_value=self.learning_rate / (warmup + 1),  # a rate of zero would waste the first update
      peak_value=self.learning_rate,
      warmup_steps=warmup,
      decay_steps=max(updates, warmup + 1),
      end_value=self.learning_rate * self.final_fraction,
    )
    return _with_usual_promotion(schedule)

  def build(
    self, steps: int, decays: Any = None, schedule: optax.Schedule | None = None
  ) -> optax.GradientTransformationExtraArgs:
    """The optimiser for a run of `steps` batches. Its `update` takes the arguments of `accumulate`.

    Args:
      steps: number of batches.
      decays: which parameters decay, from `decay_mask` of the parameters in their boxes; `None` for matrices.
      schedule: the learning rate, in place of `self.schedule(steps)`.
    """
    transform = optax.chain(
      optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
      optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.epsilon),
      optax.add_decayed_weights(self.weight_decay, mask=decay_mask if decays is None else decays),
      optax.scale_by_learning_rate(self.schedule(steps) if schedule is None else schedule),
    )
    if self.accumulate_steps > 1:
      transform = accumulate(transform, self.accumulate_steps)
    return optax.GradientTransformationExtraArgs(*map(_with_usual_promotion, optax.with_extra_args_support(transform)))


def _with_usual_promotion(function: Callable) -> Callable:
  """`function` under JAX's default promotion rules, which optax needs, even where stricter ones are set."""

  @wraps(function)
  def relaxed(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      return function(*args, **kwargs)

  return relaxed


def decay_mask(params: Any) -> Any:
  """A tree like `params` without boxes: whether weight decay applies to each.

  Parameters of this package say so themselves (`memzoo.layers.axes.Named`). Of others, those with two or more axes decay. Under
  `PERIODS` the leading axis counts layers and is not one of these axes.
  """

  def decays(path, leaf) -> bool:
    if isinstance(leaf, Named):
      return leaf.decays
    stacked = any(getattr(entry, "key", None) == PERIODS for entry in path)
    return jnp.ndim(nn.unbox(leaf)) - stacked >= 2

  return jax.tree_util.tree_map_with_path(decays, params, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
