"""The settings of a run besides its model, data, optimiser and mesh."""

from dataclasses import dataclass

from .checks import at_least, check_seed
from .loggers import logger_names


@dataclass(frozen=True)
class Trainer:
  """How long to train, and what to write and print on the way.

  Everything here except `seed` may be changed when a run is resumed.

  Attributes:
    steps: batches to train on in total, including those before a resumption.
    log_every: steps between two printed lines. `metrics.jsonl` and the loggers have every step.
    loggers: what else shows the run: "tensorboard", "wandb", "mlflow" or a class of your own, "my_module.MyLogger"; several as
      a tuple, or in one string with commas; () for none. See `loggers.py`.
    evaluate_every: steps between two evaluations on the validation text; 0 evaluates only at the end.
    evaluation_batches: batches in such an evaluation, spread evenly over the validation text; 0 means all of it.
    final_evaluation_batches: the same for the evaluation at the end, which gives the reported numbers.
    checkpoint_every: steps between two checkpoints; 0 saves only at the end and when interrupted.
    checkpoints_kept: how many of the newest checkpoints stay on disk, in addition to the best one.
    save_best: also save after each evaluation that is the best so far.
    log_group_norms: write the gradient norm of every group of parameters to `metrics.jsonl`.
    nonfinite_limit: number of non-finite steps in a row that ends the run. Each is skipped: it does not change the parameters.
    sample_prompt: the text that the sample at the end of the run continues; `None` takes the beginning of the validation text.
    sample_tokens: length of that sample in tokens; 0 writes none.
    seed: random seed of the parameters, and of any randomness in the model.
  """

  steps: int = 1000
  log_every: int = 20
  loggers: str | tuple[str, ...] = ("tensorboard",)
  evaluate_every: int = 200
  evaluation_batches: int = 16
  final_evaluation_batches: int = 256
  checkpoint_every: int = 200
  checkpoints_kept: int = 2
  save_best: bool = True
  log_group_norms: bool = False
  nonfinite_limit: int = 5
  sample_prompt: str | None = None
  sample_tokens: int = 400
  seed: int = 0

  def __post_init__(self):
    at_least(1, self, "steps", "log_every", "checkpoints_kept", "nonfinite_limit")
    at_least(0, self, "evaluate_every", "evaluation_batches", "final_evaluation_batches", "checkpoint_every", "sample_tokens")
    if self.sample_tokens and self.sample_prompt == "":
      raise ValueError("Trainer.sample_prompt is ''; expected at least one character, or None, or Trainer.sample_tokens=0.")
    object.__setattr__(self, "loggers", logger_names(self.loggers))
    check_seed(self)
