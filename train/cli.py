"""The `memzoo` command. Each command imports what it needs, so that `--help` is fast."""

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, TextIO

import typer

app = typer.Typer(
  help="Train, evaluate, compare and sample sequence models with memory layers. A config file describes each experiment.",
  epilog="Start with: memzoo train quickstart. Then: memzoo generate runs/quickstart 'def '. Names: memzoo list.",
  no_args_is_help=True,
  add_completion=False,
  pretty_exceptions_enable=False,
  rich_markup_mode="rich",
  context_settings={"help_option_names": ["-h", "--help"]},
)

_Config = Annotated[
  str, typer.Argument(help="Name of a shipped config (see `memzoo list`), path of a .gin file, or folder of a run.")
]
_Set = Annotated[
  list[str] | None,
  typer.Option("--set", metavar="X.FIELD=VALUE", help="Set a field of the config, such as LanguageModel.depth=4. Repeatable."),
]
_Best = Annotated[bool, typer.Option("--best", help="Use the checkpoint with the lowest validation loss, not the newest.")]
_ANYWHERE = ("--debug", "--no-compile-cache")  # options that may stand anywhere in the line
_SEVERAL = "Run in several processes: start each with the same command and its own --process"
_OTHER = "On accelerators"
_Run = Annotated[Path, typer.Argument(help="Folder of a run, such as runs/quickstart.")]


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
  del version, debug, no_compile_cache  # `_print_version`, `main` and `_start` handle them


@app.command(no_args_is_help=True)
def train(
  config: _Config,
  overrides: _Set = None,
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

  [bold]memzoo train runs/books --steps 9000[/bold]
  """
  from .processes import join

  join(coordinator, processes, process, detect=distributed)
  _start()
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
  run: _Run,
  batches: Annotated[int, typer.Option(min=0, help="Number of validation batches; 0 means all.")] = 0,
  best: _Best = False,
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
  _start()
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
  _console().print(table(result))
  folder = run / "evaluation"
  folder.mkdir(exist_ok=True)
  result.save(folder / f"{task}-{step}.json")
  draw(result, folder / f"{task}-{step}.png")
  print(f"Probed the checkpoint of step {step}. Wrote {folder / f'{task}-{step}.json'} and .png.")


@app.command(no_args_is_help=True)
def generate(
  run: _Run,
  prompt: Annotated[str, typer.Argument(help="Text to continue.")],
  tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to generate.")] = 400,
  temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples from the model as it is.")] = 0.8,
  top_k: Annotated[int | None, typer.Option(help="Sample from the K likeliest tokens.")] = None,
  top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens with total probability P.")] = None,
  seed: Annotated[int, typer.Option(help="Random seed; each seed gives another text.")] = 0,
  best: _Best = False,
) -> None:
  """Continue a text with the newest checkpoint of a run; each token is shown immediately.

  [bold]memzoo generate runs/quickstart "def "[/bold]

  [bold]memzoo generate runs/quickstart "class Memory:" --tokens 1000 --temperature 0.5 --seed 7[/bold]
  """
  _start()
  import time

  from ..zoo.generate import as_text, stream
  from .evaluation import load_run

  experiment, params, _ = load_run(run, best=best)
  options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
  read = experiment.data.encode(prompt)
  steps = stream(experiment.model, params, [read], max_new_tokens=tokens, **options)
  times = []

  def single_row():
    for step in steps:
      times.append(time.perf_counter())
      yield int(step[0])

  print(prompt, end="", flush=True)
  for text in as_text(single_row(), experiment.data.decode, read):
    print(text, end="", flush=True)
  print()
  if len(times) > 2:  # the first two include compilation
    print(f"{(len(times) - 2) / (times[-1] - times[1]):,.0f} tokens/s", file=sys.stderr)


@app.command("import", no_args_is_help=True)
def import_(
  folder: Annotated[str, typer.Argument(help="Folder with config.json and *.safetensors, or a name on the Hugging Face hub.")],
  out: Annotated[Path, typer.Option(help="Folder of the run to begin.")],
  set_: _Set = None,
) -> None:
  """Begin a run with a model of transformers, which then generates, evaluates and trains like any other.

  Parameters keep the dtype of the file; to train, give them float32. The tokenizer comes along.

  [bold]memzoo import Qwen/Qwen3.5-0.8B --out runs/qwen --set Attention.max_length=4096[/bold]

  [bold]memzoo import models/Qwen3.5 --out runs/mine --set LanguageModel.param_dtype=float32 --set TextData.sources=texts[/bold]

  [bold]memzoo train runs/mine[/bold]
  """
  _start()
  from .pretrained import import_run

  import_run(folder, out, set_ or ())


@app.command(no_args_is_help=True)
def export(
  run: _Run,
  out: Annotated[Path, typer.Option(help="Folder to write.")],
  best: _Best = False,
  config: Annotated[
    Path | None, typer.Option(help="A config.json that describes the model.", show_default="that of `memzoo import`")
  ] = None,
) -> None:
  """Write a run's model as transformers, or the library of its family, reads it.

  A run that did not begin with `memzoo import` needs the config.json of such a model: it decides the family.

  [bold]memzoo export runs/mine --out mine[/bold]

  [bold]memzoo export runs/attention --config llama/config.json --out mine[/bold]
  """
  _start()
  from .pretrained import export_run

  export_run(run, out, best, config)


@app.command(no_args_is_help=True)
def harness(
  run: _Run,
  tasks: Annotated[str, typer.Option(metavar="NAME,NAME,...", help="Tasks of lm-evaluation-harness.")],
  shots: Annotated[int | None, typer.Option(min=0, help="Number of examples before each question.")] = None,
  limit: Annotated[int | None, typer.Option(min=1, help="Number of questions of each task.", show_default="all")] = None,
  include: Annotated[Path | None, typer.Option(help="Folder with tasks of your own.")] = None,
  begin: Annotated[bool, typer.Option("--begin", help="Put the token that begins texts before every context.")] = False,
  batch_size: Annotated[int, typer.Option(min=1, help="Rows in a call.")] = 8,
  best: _Best = False,
) -> None:
  """Evaluate a run on tasks of lm-evaluation-harness, by log-likelihoods and greedy continuations.

  [bold]memzoo harness runs/mine --tasks lambada_openai,hellaswag --limit 200[/bold]

  [bold]memzoo harness runs/mine --tasks my_task --include my_tasks[/bold]
  """
  _start()
  from .files import write_text
  from .harness import as_json, evaluate_on_tasks, table

  options = {"num_fewshot": shots, "limit": limit, "include": include}
  options |= {"batch_size": batch_size, "begin_all": begin, "best": best}
  results, step = evaluate_on_tasks(run, tasks.split(","), **options)
  print(table(results))
  path = run / "evaluation" / f"harness-{step}.json"
  path.parent.mkdir(exist_ok=True)
  write_text(path, as_json(results))
  print(f"Evaluated the checkpoint of step {step}. Wrote {path}.")


@app.command(no_args_is_help=True)
def tokenizer(
  sources: Annotated[list[str], typer.Argument(help="Files, folders, globs or stdlib, as in TextData.sources.")],
  vocab_size: Annotated[int, typer.Option(help="Number of tokens, including the 256 bytes.")] = 8192,
  text_field: Annotated[str, typer.Option(help="The field of JSONL objects that holds the text.")] = "text",
  out: Annotated[Path, typer.Option(help="File to write.")] = Path("tokenizer.json"),
) -> None:
  """Learn a byte-pair tokenizer from text, for TextData.tokenizer.

  [bold]memzoo tokenizer stdlib --vocab-size 4096[/bold]

  [bold]memzoo train quickstart --set TextData.tokenizer=tokenizer.json --set LanguageModel.vocab_size=4096[/bold]
  """
  from .tokenizer import train_tokenizer

  count = train_tokenizer(sources, vocab_size, out, text_field)
  print(f"Wrote {out}: {count:,} tokens. Train with --set TextData.tokenizer={out} --set LanguageModel.vocab_size={count}")


@app.command(no_args_is_help=True)
def describe(
  config: _Config,
  overrides: _Set = None,
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
  """List the memory layers with their equations and sources, the tasks, and the shipped configs."""
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
def laws(
  layer: Annotated[str, typer.Argument(help="A layer (see `memzoo list`), or a class of your own, as my_layers.MyLayer.")],
  settings: Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the layer; may be repeated.")
  ] = None,
  width: Annotated[int, typer.Option(min=1, help="Width of the layer's input.")] = 32,
  only: Annotated[str | None, typer.Option(metavar="N,N,...", help="Numbers of the laws to check; all by default.")] = None,
) -> None:
  """Check a layer against the laws that every layer of the zoo obeys: causality, splits, documents, padding and so on.

  [bold]memzoo laws EraseThenDelta[/bold]

  [bold]memzoo laws my_layers.MyLayer --set num_heads=2 --width 64[/bold]
  """
  if "jax" not in sys.modules:  # one law needs four devices
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
  _start()
  from ..layers.law_trial import small
  from ..layers.laws import check_layer
  from ..zoo.registry import LAYERS
  from .user_modules import import_class

  fields = dict(_field(setting) for setting in settings or ())
  layer_type = LAYERS.get(layer) or import_class(layer)
  report = check_layer(small(layer_type, **fields), width, laws=None if only is None else _numbers("--only", only, int))
  print(report)
  if not report.ok:
    raise typer.Exit(1)


def _field(setting: str) -> tuple[str, object]:
  """Parses "name=value". A value that is not a Python literal is a string."""
  import ast

  name, equals, value = setting.partition("=")
  if not equals:
    raise ValueError(f"--set {setting!r}; expected FIELD=VALUE, such as num_heads=2.")
  try:
    return name.strip(), ast.literal_eval(value)
  except (SyntaxError, ValueError):
    return name.strip(), value


@app.command(no_args_is_help=True)
def compare(
  task: Annotated[str, typer.Argument(help="A task (mqar, word_problem, ...; see `memzoo list`), or a config with one.")],
  layers: Annotated[str, typer.Option(help="Layers to compare, separated by commas; one of your own is my_layers.MyLayer.")],
  overrides: _Set = None,
  learning_rates: Annotated[str, typer.Option(help="Each layer is trained at all of these; the best counts.")] = "0.003,0.01",
  seeds: Annotated[int, typer.Option(help="Number of seeds for parameters and examples.")] = 2,
  steps: Annotated[int, typer.Option(help="Largest number of training steps; see --stop-at.")] = 1000,
  batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 32,
  stop_at: Annotated[float, typer.Option(help="End training at this share of right answers; above 1: never.")] = 0.995,
  state_bytes: Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Compare each layer at each of these sizes of state.")
  ] = None,
  parameters: Annotated[int | None, typer.Option(help="Match the number of parameters of all models, by their width.")] = None,
  out: Annotated[Path | None, typer.Option(help="Folder for tables and pictures.", show_default="compare/TASK")] = None,
) -> None:
  """Train and test several memories on one task. Finished trials are kept, so a stopped comparison continues.

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
  from .files import write_text

  rates = _numbers("--learning-rates", learning_rates, float)
  budget = Budget(tuple(rates), seeds, steps, batch_size, stop_at)
  sizes = None if state_bytes is None else _numbers("--state-bytes", state_bytes, int)
  names = [name.strip() for name in layers.split(",")]
  entrants = enter(task, names, overrides or (), state_bytes=sizes, parameters=parameters)
  folder = out or Path("compare") / Path(task).stem
  console, board = _console(), Board(entrants)

  def report(entrant, progress):
    board(entrant, progress)
    if not console.is_terminal:
      _print_progress(entrant, progress)

  with Live(board, console=console, refresh_per_second=1, transient=True) if console.is_terminal else nullcontext():
    comparison = run(entrants, budget, folder, report)
  console.print(board)
  comparison.save(folder / "results.json")
  write_text(folder / "table.md", markdown(comparison))
  pictures = draw(comparison, folder)
  print(f"Wrote {', '.join(str(path) for path in (folder / 'table.md', folder / 'results.json', *pictures))}.")


def _print_progress(entrant, progress: dict) -> None:
  if trial := progress.get("trial"):
    print(f"{entrant.title}: done, {trial.steps} steps in {trial.seconds:.0f} s", flush=True)
  else:
    print("{}: step {step}, loss {loss:.3f}, score {score:.3f}".format(entrant.title, **progress), flush=True)


def _numbers(option: str, text: str, kind: type) -> list:
  try:
    return [kind(part) for part in text.split(",")]
  except ValueError:
    raise ValueError(f"{option} is {text!r}; expected numbers separated by commas.") from None


@app.command()
def bench(
  operations: Annotated[list[str] | None, typer.Argument(help="Operations to measure.", show_default="all")] = None,
  tpu: Annotated[
    str | None,
    typer.Option(
      metavar="CHIP,...", help="Estimate costs on TPUs instead, without one: v4, v5e, v5p, v6e, tpu7x.", rich_help_panel=_OTHER
    ),
  ] = None,
  float32: Annotated[
    bool, typer.Option("--float32", help="With --tpu: float32 activations, instead of bfloat16.", rich_help_panel=_OTHER)
  ] = False,
  gpu: Annotated[bool, typer.Option("--gpu", help="Check and time all on a GPU instead.", rich_help_panel=_OTHER)] = False,
  minutes: Annotated[float, typer.Option(help="With --gpu: skip what would take longer.", rich_help_panel=_OTHER)] = 8.0,
  tiny: Annotated[
    bool, typer.Option("--tiny", help="With --gpu: small shapes, to try it on any machine.", rich_help_panel=_OTHER)
  ] = False,
  length: Annotated[
    int | None, typer.Option(min=1, help="Sequence length in tokens.", show_default="2048; 4096 with --tpu")
  ] = None,
  batch: Annotated[
    list[int] | None,
    typer.Option(min=1, help="Sequences in the batch; with --tpu also several times.", show_default="1; 1 and 8 with --tpu"),
  ] = None,
  heads: Annotated[int | None, typer.Option(min=1, help="Number of heads.", show_default="4; 16 with --tpu")] = None,
  width: Annotated[int, typer.Option(min=2, help="Key and value channels of a head; test_time_mlp uses half.")] = 128,
  forward: Annotated[bool, typer.Option("--forward", help="Skip gradients, which are slow and large for the oracles.")] = False,
  long: Annotated[bool, typer.Option("--long", help="Also measure time and peak memory from 4,096 to 65,536 tokens.")] = False,
  out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bench"),
) -> None:
  """Time each operation, forward and gradient, and compare it with its oracle and the lower bound of this machine.

  With --tpu nothing is run: libtpu compiles each operation and estimates its cycles, beside the roofline of the chip.

  With --gpu: errors against the float64 oracle, then times in bfloat16, also of flash-linear-attention if it is installed.

  [bold]memzoo bench[/bold]

  [bold]memzoo bench gated_delta_rule --long[/bold]

  [bold]memzoo bench test_time_mlp --width 512 --forward[/bold]

  [bold]memzoo bench gated_delta_rule --tpu v5e,v6e --batch 1[/bold]

  [bold]memzoo bench --gpu[/bold]
  """
  if tpu and gpu:
    raise ValueError("--tpu and --gpu were both given; expected one of them.")
  if len(batch or ()) > 1 and not tpu:
    raise ValueError(f"--batch was given {len(batch)} times; expected once, except with --tpu.")
  if tpu:
    _start_on_cpu()
  else:
    _start(cache=False)  # so that compilation is measured
  from ..pallas_kernels.workloads import DIRECTIONS, Shape
  from .bench_commands import estimate, measure_gpu, time_here

  out.mkdir(parents=True, exist_ok=True)
  names, directions = operations or (), DIRECTIONS[:1] if forward else DIRECTIONS
  if tpu:
    shapes = [Shape(each, length or 4096, heads or 16, width, width) for each in batch or (1, 8)]
    estimate(_console(), out, names, tpu.split(","), shapes, directions, "float32" if float32 else "bfloat16")
  elif gpu:
    measure_gpu(out, names, minutes, tiny)
  else:
    (each,) = batch or (1,)
    time_here(_console(), out, names, Shape(each, length or 2048, heads or 4, width, width), directions, long)


@app.command("compile", no_args_is_help=True)
def compile_(
  config: _Config,
  topology: Annotated[str, typer.Option(help="Chips to compile for, such as v5e:4x4 or v5p:2x2x1.")] = "v5e:2x2",
  mesh: Annotated[
    list[str] | None,
    typer.Option(metavar="DxFxT", help="Devices along data, fsdp and tensor; repeatable.", show_default="MeshShape"),
  ] = None,
  generate: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Compile a step that makes a token of N sequences instead.")
  ] = None,
  overrides: _Set = None,
) -> None:
  """Compile a config's training step for a TPU topology, without a TPU: does it fit, and what do the chips send each other?

  It shows the memory on each chip, FLOPs, and collectives by kind and origin. The exit status is 1 if a mesh does not fit.

  With --generate: the step of generation, and the time that a chip's memory needs to give parameters and states once.

  Large models take minutes, fewer with LanguageModel.scan=True.

  [bold]memzoo compile models/gated_delta_net_130m --topology v5e:4x4 --mesh 16x1x1 --mesh 1x16x1[/bold]

  [bold]memzoo compile models/gated_delta_net_130m --topology v5e:4x4 --mesh 4x2x2 --set LanguageModel.scan=True[/bold]

  [bold]memzoo compile models/gated_delta_net_130m --topology v5e:2x2 --mesh 4x1x1 --generate 64[/bold]
  """
  _start_on_cpu()
  from .bench_commands import compile_steps
  from .config import build

  if not compile_steps(_console(), build(config, overrides or ()), topology, mesh or (), generate):
    raise typer.Exit(1)


def _start_on_cpu() -> None:
  """Like `_start`, without looking for accelerators, whose library may then be loaded to compile for them."""
  import jax

  jax.config.update("jax_platforms", "cpu")
  _start()


def _start(cache: bool = True) -> None:
  """Starts JAX without its warnings, and with a persistent cache of compiled programs."""
  import jax

  from .runtime import start_quietly

  start_quietly()
  warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
  if not cache or "--no-compile-cache" in sys.argv:
    jax.config.update("jax_enable_compilation_cache", False)
  elif not jax.config.jax_compilation_cache_dir:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "memzoo" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _console():
  from rich.console import Console

  return Console(width=None if sys.stdout.isatty() else 140)


if __name__ == "__main__":
  main()
