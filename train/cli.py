"""The `memzoo` command. Each command imports what it needs, so that `--help` is fast."""

import os
import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

from .cli_shared import Best, Config, Run, Set, app, new_console, start

_ANYWHERE = ("--debug", "--no-compile-cache")  # options that may stand anywhere in the line
_SEVERAL = "Run in several processes: start each with the same command and its own --process"


def main() -> None:
  """Runs the command line. A user's mistake prints one line to stderr and exits with status 2."""
  debug = "--debug" in sys.argv
  try:
    app(sorted(sys.argv[1:], key=lambda argument: argument not in _ANYWHERE))
  except BrokenPipeError:  # `memzoo list | head`
    _silence(sys.stdout)
  except (ValueError, OSError, ArithmeticError, ImportError) as error:
    if debug or getattr(error, "name", None):  # a failed import names its module; an extra that is not installed has a message
      raise
    from .run_folder import DifferentRun

    print(f"error: {error if isinstance(error, DifferentRun) else ' '.join(str(error).split())}", file=sys.stderr)
    if type(error) is OSError:  # after a failed save, unfinished threads print tracebacks while the interpreter exits
      sys.stderr.flush()
      _silence(sys.stderr)
    sys.exit(2)


def _silence(stream: TextIO) -> None:
  os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_version(wanted: bool) -> None:
  if wanted:
    from .. import __version__

    print(f"memzoo {__version__}")
    raise typer.Exit


@app.callback()
def _options(
  version: Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
  ] = False,
  debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
  no_compile_cache: Annotated[
    bool, typer.Option("--no-compile-cache", help="Do not keep compiled programs in ~/.cache/memzoo, nor take them from there.")
  ] = False,
) -> None:
  del version, debug, no_compile_cache  # `_print_version`, `main` and `start` handle them


@app.command(no_args_is_help=True)
def train(
  config: Config,
  overrides: Set = None,
  steps: Annotated[int | None, typer.Option(help="Number of training steps; short for --set Trainer.steps=N.")] = None,
  out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/CONFIG, or the run itself")] = None,
  coordinator: Annotated[
    str | None,
    typer.Option(
      metavar="HOST:PORT",
      envvar="JAX_COORDINATOR_ADDRESS",
      help="Address of process 0.",
      rich_help_panel=_SEVERAL,
    ),
  ] = None,
  processes: Annotated[
    int | None, typer.Option(min=1, envvar="JAX_NUM_PROCESSES", help="Number of processes.", rich_help_panel=_SEVERAL)
  ] = None,
  process: Annotated[
    int | None,
    typer.Option(min=0, envvar="JAX_PROCESS_ID", help="Number of this process, from 0.", rich_help_panel=_SEVERAL),
  ] = None,
  distributed: Annotated[
    bool,
    typer.Option(
      "--distributed", help="Take all three from SLURM, Open MPI, Kubernetes or the TPU pod.", rich_help_panel=_SEVERAL
    ),
  ] = False,
) -> None:
  """Train a model, or continue a stopped run.

  The run's folder gets checkpoints, metrics, a loss curve and a sample. The same command continues a stopped run.

  [bold]memzoo train quickstart[/bold]

  [bold]memzoo train quickstart --set LanguageModel.depth=6 --set EraseThenDelta.num_heads=4 --out runs/deeper[/bold]

  [bold]memzoo train quickstart --set TextData.sources=~/books --steps 5000 --out runs/books[/bold]

  [bold]memzoo train quickstart --set Trainer.loggers=tensorboard,wandb[/bold] (also: mlflow)

  [bold]memzoo train runs/books --steps 9000[/bold]
  """
  from .processes import join

  join(coordinator, processes, process, detect=distributed)
  start()
  from .config import build
  from .loop import train as train_experiment
  from .run_folder import run_of

  experiment = build(config, [*(overrides or ()), *([f"Trainer.steps={steps}"] if steps is not None else [])])
  result = train_experiment(experiment, out or run_of(config) or Path("runs") / experiment.name)
  if result.interrupted:
    import signal

    raise typer.Exit(128 + signal.Signals[result.interrupted])


@app.command(no_args_is_help=True)
def evaluate(
  run: Run,
  batches: Annotated[int, typer.Option(min=0, help="Number of validation batches; 0 means all.")] = 0,
  best: Best = False,
  task: Annotated[
    str | None,
    typer.Option(
      help="Run a probe instead: perplexity by position, needle by length and depth, speed by length, or lifetime, the score "
      "after up to 50,000 tokens of one document."
    ),
  ] = None,
) -> None:
  """Evaluate the newest checkpoint of a run on its validation data, or probe its memory.

  [bold]memzoo evaluate runs/quickstart[/bold]

  [bold]memzoo evaluate runs/quickstart --task perplexity[/bold]
  """
  start()
  if task is not None:
    _probe(run, task, best)
    return
  from .evaluation import evaluate_run

  evaluation, step = evaluate_run(run, batches=batches, best=best)
  unit = evaluation.measure.replace("_", " ")
  print(f"step {step}: {evaluation.measured:.4f} {unit} (loss {evaluation.loss:.4f}), {evaluation.accuracy:.1%} right")
  others = ", ".join(f"{name}: {value:.3f}" for name, value in evaluation.baselines.items())
  print(f"on {evaluation.tokens:,} predictions. Baselines: {others}")


def _probe(run: Path, task: str, best: bool) -> None:
  from .probes import draw, probe, table

  result, step = probe(task, run, best=best)
  new_console().print(table(result))
  folder = run / "evaluation"
  folder.mkdir(exist_ok=True)
  result.save(folder / f"{task}-{step}.json")
  draw(result, folder / f"{task}-{step}.png")
  print(f"Probed the checkpoint of step {step}. Wrote {folder / f'{task}-{step}.json'} and .png.")


@app.command(no_args_is_help=True)
def generate(
  run: Run,
  prompt: Annotated[str, typer.Argument(help="Text to continue.")],
  tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to generate.")] = 400,
  temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples from the model as it is.")] = 0.8,
  top_k: Annotated[int | None, typer.Option(help="Sample from the K likeliest tokens.")] = None,
  top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens with total probability P.")] = None,
  seed: Annotated[int, typer.Option(help="Random seed; each seed gives another text.")] = 0,
  best: Best = False,
) -> None:
  """Continue a text with the newest checkpoint of a run; each token is shown immediately.

  It ends earlier where the model draws the token that ends documents, if its tokenizer has one.

  [bold]memzoo generate runs/quickstart "def "[/bold]

  [bold]memzoo generate runs/quickstart "class Memory:" --tokens 1000 --temperature 0.5 --seed 7[/bold]
  """
  start()
  import time

  from ..zoo.generate import as_text, stream
  from .evaluation import load_run

  experiment, params, _ = load_run(run, best=best)
  read, stops = experiment.data.encode_prompt(prompt), experiment.data.stop_tokens
  options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop_token": stops}
  steps = stream(experiment.model, params, [read], max_new_tokens=tokens, **options)
  times = []

  def single_row():
    for step in steps:
      times.append(time.perf_counter())
      if step[0] not in stops:
        yield int(step[0])

  print(prompt, end="", flush=True)
  for text in as_text(single_row(), experiment.data.decode, read):
    print(text, end="", flush=True)
  print()
  if len(times) > 2:  # the first two include compilation
    print(f"{(len(times) - 2) / (times[-1] - times[1]):,.0f} tokens/s", file=sys.stderr)


@app.command(no_args_is_help=True)
def report(
  folders: Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folder of a run, several of them, or the folder of one comparison.")
  ],
  out: Annotated[
    Path | None, typer.Option(help="File to write.", show_default="report.html in the folder; here for several runs")
  ] = None,
  open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
  memory: Annotated[
    bool, typer.Option(help="For one run, also show what its memories do over a document; needs its checkpoint and text.")
  ] = True,
  best: Best = False,
) -> None:
  """Write one HTML file about a run, about several side by side, or about a comparison.

  It needs no network and no other file. Of a run that is not finished it shows what there is.

  [bold]memzoo report runs/quickstart --open[/bold]

  [bold]memzoo report runs/quickstart runs/deeper --out both.html[/bold]

  [bold]memzoo report compare/mqar[/bold]
  """
  start()
  from ..zoo.formats import thousands
  from .html_report import write_report

  path = write_report(folders, out, memory=memory, best=best)
  print(f"Wrote {path}, {thousands(path.stat().st_size, 'B')}.")
  if open_:
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
      print("There is no browser here to open it in.", file=sys.stderr)


@app.command(no_args_is_help=True)
def tokenizer(
  sources: Annotated[list[str], typer.Argument(help="Files, folders, globs or stdlib, as in TextData.sources.")],
  vocab_size: Annotated[int, typer.Option(help="Number of tokens, including the 256 bytes.")] = 8192,
  text_field: Annotated[str, typer.Option(help="The field of JSONL objects that holds the text.")] = "text",
  out: Annotated[Path, typer.Option(help="File to write.")] = Path("tokenizer.json"),
) -> None:
  """Learn a byte-pair tokenizer from text, for TextData.tokenizer.

  [bold]memzoo tokenizer stdlib --vocab-size 4096[/bold]

  [bold]memzoo train quickstart --set TextData.tokenizer=tokenizer.json --set LanguageModel.vocab_size=4096
  --out runs/words[/bold]
  """
  from .tokenizer import train_tokenizer

  count = train_tokenizer(sources, vocab_size, out, text_field)
  print(f"Wrote {out}: {count:,} tokens. Train with --set TextData.tokenizer={out} --set LanguageModel.vocab_size={count}")


@app.command(no_args_is_help=True)
def tokenize(
  sources: Annotated[list[str], typer.Argument(help="Files, folders, globs or stdlib, as in TextData.sources.")],
  out: Annotated[Path, typer.Option(help="Folder to write.")],
  tokenizer: Annotated[str, typer.Option(help='"bytes", or a tokenizer as in TextData.tokenizer.')] = "bytes",
  text_field: Annotated[str, typer.Option(help="The field of JSONL objects, or the column of tables.")] = "text",
  end_of_document: Annotated[str, typer.Option(help="The token after each document, as in TextData.end_of_document.")] = "auto",
) -> None:
  """Write text as tokens into a folder, which TextData.sources then takes. The same command continues a stopped one.

  [bold]memzoo tokenize 'corpus/*.parquet' --tokenizer tokenizer.json --out corpus-tokens[/bold]

  [bold]memzoo train quickstart --set TextData.sources=corpus-tokens --set TextData.tokenizer=tokenizer.json
  --set LanguageModel.vocab_size=4096 --out runs/corpus[/bold]
  """
  from collections import Counter

  from .data import TextData
  from .sources import skipped_in_words
  from .token_writer import text_progress

  data = TextData(tuple(sources), tokenizer, text_field=text_field, end_of_document=end_of_document)
  index = data.tokenize(out, text_progress(print)).index
  print(
    f"Wrote {out}: {index.tokens:,} tokens of {index.documents:,} documents.{skipped_in_words(Counter(index.skipped))} "
    f"Train with --set TextData.sources={out} --set TextData.tokenizer={tokenizer}"
  )


@app.command(no_args_is_help=True)
def describe(
  config: Config,
  overrides: Set = None,
  length: Annotated[
    int | None, typer.Option(min=1, help="Sequence length in tokens.", show_default="TextData.sequence_length")
  ] = None,
  peak: Annotated[bool, typer.Option("--peak", help="Also compile a training step and predict its peak memory.")] = False,
) -> None:
  """Show a config's model block by block: parameters, bytes of state, FLOPs per token. Nothing is allocated.

  [bold]memzoo describe quickstart[/bold]

  [bold]memzoo describe models/gated_delta_net_130m --length 65536[/bold]

  [bold]memzoo describe quickstart --set TextData.batch_size=64 --peak[/bold]

  [bold]memzoo describe runs/quickstart[/bold]
  """
  start()
  from ..zoo.describe import describe as describe_model
  from .config import build
  from .experiment_report import predicted_peak, render

  experiment, console = build(config, overrides or ()), new_console()
  predicted = None
  if peak:
    with console.status("Compiling the training step"):
      predicted = predicted_peak(experiment)
  description = describe_model(experiment.model, length or experiment.data.sequence_length)
  for part in render(experiment, description, predicted):
    console.print(part)


@app.command("list")
def list_() -> None:
  """List the memory layers with their equations and sources, the tasks, and the shipped configs."""
  start()
  import inspect

  from rich.table import Table
  from rich.text import Text

  from ..zoo.describe import summary
  from ..zoo.registry import LAYERS
  from .config import shipped
  from .tasks import TASKS

  table = Table.grid(padding=(0, 2))
  for name, layer in LAYERS.items():
    title, equation = summary(layer)
    table.add_row(Text(name, style="bold"), Text(title))
    table.add_row("", Text(equation, style="cyan"))
  new_console().print(table)
  table = Table.grid(padding=(0, 2))
  for name, task in TASKS.items():
    table.add_row(Text(name, style="bold"), Text(inspect.getdoc(task).partition(":")[0].partition(" (")[0]))
  print("\nTasks, for `memzoo compare`:\n")
  new_console().print(table)
  print("\nConfigs: " + ", ".join(shipped()))


from . import cli_weights, cli_layers  # noqa: E402, F401, I001 - their commands come after these

if __name__ == "__main__":
  main()
