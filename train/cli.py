"""The `memzoo` command. Whatever is slow to import is imported by the command that needs it."""

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, TextIO

import typer

app = typer.Typer(
  help="Memory layers for sequence models: train, evaluate and generate from one config file.",
  epilog="Start with:  memzoo train quickstart   then:  memzoo generate runs/quickstart 'def '",
  no_args_is_help=True,
  add_completion=False,
  pretty_exceptions_enable=False,
  rich_markup_mode="rich",
  context_settings={"help_option_names": ["-h", "--help"]},
)

_Config = Annotated[str, typer.Argument(help="A shipped config (see `memzoo list`) or the path of a .gin file.")]
_Set = Annotated[
  list[str] | None,
  typer.Option("--set", metavar="X.FIELD=VALUE", help="Change a field of the config; may be repeated."),
]
_Best = Annotated[bool, typer.Option("--best", help="The checkpoint with the lowest validation loss, not the newest.")]
_SEVERAL = "One run in several processes, started with the same command but for --process"
_Run = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/quickstart.")]


def main() -> None:
  """Runs the command line. A caller's mistake is one line on the error stream and exit status 2."""
  debug = "--debug" in sys.argv
  arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
  try:
    app(arguments)
  except BrokenPipeError:  # `memzoo list | head`
    _silence(sys.stdout)
  except (ValueError, OSError, ArithmeticError) as error:
    if debug:
      raise
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if type(error) is OSError:  # what a failed save leaves unfinished complains while the interpreter shuts down
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
  debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
  del version, debug  # acted upon before: by the callback, and by `main`, wherever on the line it stands


@app.command(no_args_is_help=True)
def train(
  config: _Config,
  overrides: _Set = None,
  steps: Annotated[int | None, typer.Option(help="Short for --set Trainer.steps=N.")] = None,
  out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME unless given.")] = None,
  coordinator: Annotated[
    str | None,
    typer.Option(
      metavar="HOST:PORT",
      envvar="JAX_COORDINATOR_ADDRESS",
      help="Where process 0 is.",
      rich_help_panel=_SEVERAL,
    ),
  ] = None,
  processes: Annotated[
    int | None, typer.Option(min=1, envvar="JAX_NUM_PROCESSES", help="How many there are.", rich_help_panel=_SEVERAL)
  ] = None,
  process: Annotated[
    int | None,
    typer.Option(min=0, envvar="JAX_PROCESS_ID", help="Which this is, from 0.", rich_help_panel=_SEVERAL),
  ] = None,
  distributed: Annotated[
    bool,
    typer.Option(
      "--distributed", help="Find these out from SLURM, Open MPI, Kubernetes or the TPU pod.", rich_help_panel=_SEVERAL
    ),
  ] = False,
) -> None:
  """Train a model, or go on with a run that was stopped.

  [bold]memzoo train quickstart[/bold]

  [bold]memzoo train quickstart --set LanguageModel.depth=6 --set EraseThenDelta.num_heads=4 --out runs/deeper[/bold]

  [bold]memzoo train quickstart --set TextData.sources=~/books --steps 5000 --out runs/books[/bold]
  """
  from .processes import join

  join(coordinator, processes, process, detect=distributed)
  _start()
  from .config import build
  from .loop import train as train_experiment

  experiment = build(config, [*(overrides or ()), *([f"Trainer.steps={steps}"] if steps is not None else [])])
  result = train_experiment(experiment, out or Path("runs") / experiment.name)
  if result.interrupted:
    import signal

    raise typer.Exit(128 + signal.Signals[result.interrupted])


@app.command(no_args_is_help=True)
def evaluate(
  run: _Run,
  batches: Annotated[int, typer.Option(min=0, help="Batches to evaluate on; 0 is all validation text.")] = 0,
  best: _Best = False,
  task: Annotated[
    str | None, typer.Option(help="Instead: perplexity (by position), needle (by length and depth), or speed (over length).")
  ] = None,
) -> None:
  """Evaluate the newest checkpoint of a run on its validation text, or ask what it remembers.

  [bold]memzoo evaluate runs/quickstart[/bold]

  [bold]memzoo evaluate runs/quickstart --task perplexity[/bold]
  """
  _start()
  if task is not None:
    _probe(run, task, best)
    return
  from .evaluation import evaluate_run

  evaluation, step = evaluate_run(run, batches=batches, best=best)
  unit = evaluation.measure.replace("_", " ")
  print(f"step {step}: {evaluation.measured:.4f} {unit} (loss {evaluation.loss:.4f}), {evaluation.accuracy:.1%} right")
  others = ", ".join(f"{name} takes {value:.3f}" for name, value in evaluation.baselines.items())
  print(f"on {evaluation.tokens:,} predictions, for which {others}")


def _probe(run: Path, task: str, best: bool) -> None:
  from .probes import draw, probe, table

  found, step = probe(task, run, best=best)
  _console().print(table(found))
  folder = run / "evaluation"
  folder.mkdir(exist_ok=True)
  found.save(folder / f"{task}-{step}.json")
  draw(found, folder / f"{task}-{step}.png")
  print(f"step {step}; wrote {folder / f'{task}-{step}.json'} and .png")


@app.command(no_args_is_help=True)
def generate(
  run: _Run,
  prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
  tokens: Annotated[int, typer.Option(min=1, help="How many to generate.")] = 400,
  temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 draws as the model does.")] = 0.8,
  top_k: Annotated[int | None, typer.Option(help="Draw among the K likeliest.")] = None,
  top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest P of probability.")] = None,
  seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0,
  best: _Best = False,
) -> None:
  """Generate text with the newest checkpoint of a run, shown as it comes.

  [bold]memzoo generate runs/quickstart "def "[/bold]

  [bold]memzoo generate runs/quickstart "class Memory:" --tokens 1000 --temperature 0.5 --seed 7[/bold]
  """
  _start()
  import time

  from ..zoo.generate import as_text, stream
  from .evaluation import load_run

  experiment, params, _ = load_run(run, best=best)
  options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
  steps = stream(experiment.model, params, [experiment.data.encode(prompt)], max_new_tokens=tokens, **options)
  times = []

  def single_row():
    for step in steps:
      times.append(time.perf_counter())
      yield int(step[0])

  print(prompt, end="", flush=True)
  for text in as_text(single_row(), experiment.data.decode):
    print(text, end="", flush=True)
  print()
  if len(times) > 2:  # the first two wait for compilation
    print(f"{(len(times) - 2) / (times[-1] - times[1]):,.0f} tokens/s", file=sys.stderr)


@app.command(no_args_is_help=True)
def tokenizer(
  sources: Annotated[list[str], typer.Argument(help="Files, folders, globs, or stdlib, as for TextData.sources.")],
  vocab_size: Annotated[int, typer.Option(help="Tokens, the 256 bytes among them.")] = 8192,
  text_field: Annotated[str, typer.Option(help="Of JSONL objects, the field that holds the text.")] = "text",
  out: Annotated[Path, typer.Option(help="File to write.")] = Path("tokenizer.json"),
) -> None:
  """Learn a tokenizer (byte pairs) from text, for TextData.tokenizer.

  [bold]memzoo tokenizer stdlib --vocab-size 4096[/bold]

  [bold]memzoo train quickstart --set TextData.tokenizer=tokenizer.json --set LanguageModel.vocab_size=4096[/bold]
  """
  from .sources import train_tokenizer

  count = train_tokenizer(sources, vocab_size, out, text_field)
  print(f"Wrote {out}: {count:,} tokens. Train with --set TextData.tokenizer={out} --set LanguageModel.vocab_size={count}")


@app.command(no_args_is_help=True)
def describe(
  config: _Config,
  overrides: _Set = None,
  length: Annotated[int | None, typer.Option(min=1, help="Tokens; TextData.sequence_length unless given.")] = None,
  peak: Annotated[bool, typer.Option("--peak", help="Compile a step, and predict its memory at the peak.")] = False,
) -> None:
  """Show what a config makes: parameters, bytes of memory and work, block by block. Nothing is allocated.

  [bold]memzoo describe quickstart[/bold]

  [bold]memzoo describe models/gated_delta_net_130m --length 65536[/bold]

  [bold]memzoo describe quickstart --set TextData.batch_size=64 --peak[/bold]
  """
  _start()
  from ..zoo.describe import describe as describe_model
  from .config import build
  from .experiment_report import predicted_peak, render

  experiment, console = build(config, overrides or ()), _console()
  predicted = None
  if peak:
    with console.status("Compiling the training step"):
      predicted = predicted_peak(experiment)
  description = describe_model(experiment.model, length or experiment.data.sequence_length)
  for part in render(experiment, description, predicted):
    console.print(part)


@app.command("list")
def list_() -> None:
  """List the memory layers, with what each computes and where it is from, the tasks, and the shipped configs."""
  _start()
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
  _console().print(table)
  table = Table.grid(padding=(0, 2))
  for name, task in TASKS.items():
    table.add_row(Text(name, style="bold"), Text(inspect.getdoc(task).partition(":")[0].partition(" (")[0]))
  print("\nTasks, for `memzoo compare`:\n")
  _console().print(table)
  print("\nConfigs: " + ", ".join(shipped()))


@app.command(no_args_is_help=True)
def compare(
  task: Annotated[str, typer.Argument(help="A task (mqar, word_problem, ...; see `memzoo list`), or a config that has one.")],
  layers: Annotated[str, typer.Option(help="Names, separated by commas.")],
  overrides: _Set = None,
  learning_rates: Annotated[str, typer.Option(help="Each layer tries them all; its best counts.")] = "0.003,0.01",
  seeds: Annotated[int, typer.Option(help="Of parameters and examples.")] = 2,
  steps: Annotated[int, typer.Option(help="At most; fewer where a layer has learnt it all.")] = 1000,
  batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 32,
  stop_at: Annotated[float, typer.Option(help="A share of right answers that is enough; above 1 for never.")] = 0.995,
  state_bytes: Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Each layer at each of these sizes of its state.")
  ] = None,
  parameters: Annotated[int | None, typer.Option(help="Every model at so many, by its width.")] = None,
  out: Annotated[Path | None, typer.Option(help="Folder for tables and pictures; compare/TASK unless given.")] = None,
) -> None:
  """Train and test several memories on one task, side by side. What is done is not done again.

  [bold]memzoo compare mqar --layers DeltaNet,LinearAttention,Attention[/bold]

  [bold]memzoo compare mqar --layers DeltaNet,LinearAttention --state-bytes 2048,4096,8192[/bold]

  [bold]memzoo compare word_problem --layers DeltaNet,reflecting/DeltaNet
  --set reflecting/DeltaNet.negative_eigenvalues=True[/bold]
  """
  _start()
  from rich.live import Live

  from .compare import Budget, enter
  from .compare import compare as run
  from .compare_report import Board, draw, markdown

  rates = _numbers("--learning-rates", learning_rates, float)
  budget = Budget(tuple(rates), seeds, steps, batch_size, stop_at)
  sizes = None if state_bytes is None else _numbers("--state-bytes", state_bytes, int)
  names = [name.strip() for name in layers.split(",")]
  entrants = enter(task, names, overrides or (), state_bytes=sizes, parameters=parameters)
  folder = out or Path("compare") / Path(task).stem
  console, board = _console(), Board(entrants)

  def say(entrant, news):
    board(entrant, news)
    if not console.is_terminal:
      _print_news(entrant, news)

  with Live(board, console=console, refresh_per_second=1, transient=True) if console.is_terminal else nullcontext():
    comparison = run(entrants, budget, folder, say)
  console.print(board)
  comparison.save(folder / "results.json")
  (folder / "table.md").write_text(markdown(comparison))
  pictures = draw(comparison, folder)
  print(f"Wrote {', '.join(str(path) for path in (folder / 'table.md', folder / 'results.json', *pictures))}.")


def _print_news(entrant, news: dict) -> None:
  if "trial" in news:
    print(f"{entrant.title}: done, {news['trial'].steps} steps in {news['trial'].seconds:.0f} s", flush=True)
  else:
    print(f"{entrant.title}: step {news['step']}, loss {news['loss']:.3f}, score {news['score']:.3f}", flush=True)


def _numbers(option: str, text: str, kind: type) -> list:
  try:
    return [kind(part) for part in text.split(",")]
  except ValueError:
    raise ValueError(f"{option} is {text!r}; want numbers separated by commas.") from None


@app.command()
def bench(
  operations: Annotated[list[str] | None, typer.Argument(help="Which operations; all unless given.")] = None,
  length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 2048,
  batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
  heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 4,
  width: Annotated[int, typer.Option(min=2, help="Of a head's keys and values; test_time_mlp has half of it.")] = 128,
  forward: Annotated[bool, typer.Option("--forward", help="No gradients, whose oracles take long and much memory.")] = False,
  long: Annotated[bool, typer.Option("--long", help="Also from 4,096 to 65,536 tokens: time and peak memory.")] = False,
  out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench"),
) -> None:
  """Time every operation, forward and gradient, against its oracle and against this machine's floor.

  [bold]memzoo bench[/bold]

  [bold]memzoo bench gated_delta_rule --long[/bold]

  [bold]memzoo bench test_time_mlp --width 512 --forward[/bold]
  """
  _start(cache=False)  # so that the compile times are true
  from ..pallas_kernels.bench import DIRECTIONS, Shape
  from ..pallas_kernels.bench import bench as measure
  from .bench_report import draw, tables

  console = _console()
  with console.status("") as status:
    shape = Shape(batch, length, heads, width, width)
    directions = DIRECTIONS[:1] if forward else DIRECTIONS
    report = measure(operations or None, shape, directions=directions, long=long, say=status.update)
  for table in tables(report):
    console.print(table)
  out.mkdir(parents=True, exist_ok=True)
  report.save(out / "bench.json")
  draw(report, out / "bench.png")
  print(f"Wrote {out / 'bench.json'} and {out / 'bench.png'}.")


def _start(cache: bool = True) -> None:
  """Brings JAX up quietly; compiled programs are kept for the next time."""
  import jax

  from .runtime import start_quietly

  start_quietly()
  warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
  if cache and not jax.config.jax_compilation_cache_dir:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "memzoo" / "compiled"))


def _console():
  from rich.console import Console

  return Console(width=None if sys.stdout.isatty() else 140)


if __name__ == "__main__":
  main()
