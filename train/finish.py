"""The end of a run, after its last step: evaluation, pictures, a sample, and a summary."""

import shlex
import textwrap
from dataclasses import asdict
from typing import Any

import jax

from ..pallas_kernels.measure import matmul_rate, peak_bytes, whose_peak
from ..zoo.describe import forward_flops
from ..zoo.formats import binary, clock, thousands
from ..zoo.generate import generate
from .evaluation import Evaluation, evaluate, validation_row
from .files import write_record, write_text
from .report import Report, plot_losses, read_rows
from .run_folder import Result
from .runtime import Stopwatch
from .setup import Setup
from .step import TrainState


def finish(setup: Setup, state: TrainState, report: Report, watch: Stopwatch, steps: int) -> Result:
  """Evaluates `state`, writes `result.json`, `loss.png` and `sample.txt`, and prints a summary.

  Args:
    setup: the set-up of the run.
    state: the state after the last step.
    report: the report of the run.
    watch: a stopped watch that ran from the end of the first of these steps to the end of the last.
    steps: number of steps that this call of `train` has taken.
  """
  corpus = setup.corpus
  evaluation = evaluate(setup.program, state.params, corpus, setup.experiment.trainer.final_evaluation_batches)
  result = Result(
    directory=str(setup.directory),
    step=int(state.step),
    skipped=int(state.skipped),
    validation_loss=evaluation.loss,
    validation_accuracy=evaluation.accuracy,
    **(_of_text(evaluation) if corpus.measure == "bits_per_byte" else {}),
    peak_bytes=peak_bytes(),  # before `_speed` multiplies large matrices
    **_speed(setup, watch, steps - 1),
  )
  draw(setup, report, evaluation)
  _write_sample(setup, state)
  if setup.primary:
    write_record(setup.directory / "result.json", result, indent=2)
    report.finish(asdict(result))
  report.table(f"Finished: {result.step} steps", _summary(setup, result, evaluation, watch))
  for line in _next_commands(setup, result.step):
    report.say(line)
  return result


def _next_commands(setup: Setup, step: int) -> list[str]:
  """Commands to go on with."""
  run = shlex.quote(str(setup.directory))
  lines = [f"memzoo report {run}"]
  if setup.corpus.measure == "bits_per_byte":
    prompt = setup.experiment.data.decode(setup.corpus.prompt(setup.experiment.trainer.sample_prompt), special=False)
    words = textwrap.shorten(prompt.strip().partition("\n")[0], 30, placeholder="") or prompt[:20]
    lines += [f"memzoo generate {run} {shlex.quote(words)}", f"memzoo evaluate {run} --task perplexity"]
  return ["Next, for example:", *(f"  {line}" for line in (*lines, f"memzoo train {run} --steps {2 * step}"))]


def draw(setup: Setup, report: Report, evaluation: Evaluation | None = None) -> None:
  """Draws `loss.png` from all of `metrics.jsonl`. `evaluation`, if given, is its last point."""
  report.flush()
  rows = read_rows(setup.directory / "metrics.jsonl") if setup.primary else []
  if not rows:
    return
  if evaluation:
    rows[-1] |= validation_row(setup.corpus, evaluation.loss)
  title = f"{setup.directory.resolve().name}: {setup.experiment.data.source}"
  plot_losses(rows, setup.directory / "loss.png", title, evaluation and evaluation.baselines, setup.corpus.measure)


def _of_text(evaluation: Evaluation) -> dict[str, float]:
  """An evaluation on text, under the names of `Result`'s fields."""
  order_0, zlib = evaluation.baselines.values()
  return {
    "validation_bits_per_byte": evaluation.measured,
    "order_0_bits_per_byte": order_0,
    "zlib_bits_per_byte": zlib,
  }


def _speed(setup: Setup, watch: Stopwatch, steps: int) -> dict[str, Any]:
  """The rates among `Result`'s fields, over `steps` steps; empty if there are none."""
  if steps < 1:
    return {}
  data, inside = setup.experiment.data, watch.seconds["step"]
  flops = 3 * forward_flops(setup.experiment.model, data.batch_size, data.sequence_length) * steps / inside
  return {
    "tokens_per_second": steps * setup.tokens_per_step / watch.total,
    "step_share": inside / watch.total,
    "shares": watch.shares(),
    "flops_per_second": flops,
    "matmul_share": flops / (matmul_rate() * setup.mesh.size),
  }


def _write_sample(setup: Setup, state: TrainState) -> None:
  """Writes `sample.txt`: the prompt and its continuation by the model. A run of several processes writes none."""
  trainer, data = setup.experiment.trainer, setup.experiment.data
  if not trainer.sample_tokens or jax.process_count() > 1 or setup.corpus.measure != "bits_per_byte":
    return
  params = jax.device_put(state.params, jax.devices()[0])
  prompt = setup.corpus.prompt(trainer.sample_prompt)
  options = {"max_new_tokens": trainer.sample_tokens, "temperature": 0.8, "seed": trainer.seed, "stop_token": data.stop_tokens}
  tokens = generate(setup.experiment.model, params, [prompt], **options)
  write_text(setup.directory / "sample.txt", data.decode(prompt + tokens[0], special=False) + "\n")


def _summary(setup: Setup, result: Result, evaluation: Evaluation, watch: Stopwatch) -> list[tuple[str, str]]:
  """The rows of the last table."""
  measured = f"{evaluation.measured:.3f} {evaluation.measure.replace('_', ' ')}"
  others = ", ".join(f"{value:.3f}" for value in evaluation.baselines.values())
  rows = [
    ("validation", f"{measured}, on {thousands(evaluation.tokens)} tokens, {evaluation.accuracy:.1%} right"),
    (", ".join(evaluation.baselines), f"{others} on the same"),
  ]
  if result.tokens_per_second:
    shares = watch.shares()
    pauses = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if name != "step")
    arithmetic = f"{thousands(result.flops_per_second, 'FLOP/s')} in matrix products"
    rows += [
      ("speed", f"{thousands(result.tokens_per_second)} tokens/s, in {clock(watch.total)} after the first step"),
      ("time", f"{shares['step']:.1%} in the compiled step; {pauses}"),
      ("arithmetic", f"{arithmetic}, {result.matmul_share:.0%} of one large float32 product"),
    ]
  rows.append(("memory", f"{binary(result.peak_bytes)} at the peak, of {whose_peak()}"))
  if result.skipped:
    rows.append(("skipped", f"{result.skipped} steps, not finite"))
  names = ("loss.png", "sample.txt", "metrics.jsonl", "tensorboard", "wandb", "mlflow", "checkpoints")
  written = ", ".join(name for name in names if (setup.directory / name).exists())
  return [*rows, (str(setup.directory), written)]
