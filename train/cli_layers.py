"""Commands about layers and operations: laws, comparisons, benchmarks, and compilation for TPUs."""

import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .cli_shared import Config, Set, app, new_console, start, start_on_cpu

_OTHER = "On accelerators"
_SUITE = "Suites"


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
  start()
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
  context: typer.Context,
  task: Annotated[
    str | None, typer.Argument(help="A task (mqar, word_problem, ...; see `memzoo list`), or a config with one.")
  ] = None,
  layers: Annotated[
    str | None, typer.Option(help="Layers to compare, separated by commas; one of your own is my_layers.MyLayer.")
  ] = None,
  overrides: Set = None,
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
  suite: Annotated[
    str | None, typer.Option(help="Instead of one task: all tasks and layers of a suite (memory).", rich_help_panel=_SUITE)
  ] = None,
  tasks: Annotated[
    str | None, typer.Option(metavar="NAME,...", help="Only these of its tasks.", rich_help_panel=_SUITE)
  ] = None,
  table: Annotated[
    bool, typer.Option("--table", help="Train nothing; make table and pictures from the results there.", rich_help_panel=_SUITE)
  ] = False,
) -> None:
  """Train and test several memories on one task. Finished trials are kept, so a stopped comparison continues.

  [bold]memzoo compare mqar --layers DeltaNet,LinearAttention,Attention[/bold]

  [bold]memzoo compare mqar --layers DeltaNet,LinearAttention --state-bytes 2048,4096,8192[/bold]

  [bold]memzoo compare word_problem --layers DeltaNet,reflecting/DeltaNet
  --set reflecting/DeltaNet.negative_eigenvalues=True[/bold]

  [bold]memzoo compare --suite memory[/bold] (hours; several may run at once; only layers and tasks: --layers ..., --tasks ...)
  """
  if suite is not None or table or tasks is not None:
    _refuse(context, "task", "learning_rates", "batch_size", "stop_at", "state_bytes", "parameters")
    given = {name: value for name, value in (("steps", steps), ("seeds", seeds)) if _is_given(context, name)}
    return _compare_suite(suite, _words(layers), _words(tasks), overrides or [], given, out, table)
  if task is None or layers is None:
    raise ValueError(f"{'TASK' if task is None else '--layers'} is missing; expected `memzoo compare TASK --layers NAME,...`.")
  start()
  from rich.live import Live

  from .compare import Budget, enter
  from .compare import compare as run
  from .compare_report import Board, draw, markdown
  from .files import write_text

  rates = _numbers("--learning-rates", learning_rates, float)
  budget = Budget(tuple(rates), seeds, steps, batch_size, stop_at)
  sizes = None if state_bytes is None else _numbers("--state-bytes", state_bytes, int)
  entrants = enter(task, _words(layers), overrides or (), state_bytes=sizes, parameters=parameters)
  folder = out or Path("compare") / Path(task).stem
  console, board = new_console(), Board(entrants)

  def report(entrant, progress):
    board(entrant, progress)
    if not console.is_terminal:
      _print_progress(entrant, progress)

  with Live(board, console=console, refresh_per_second=1, transient=True) if console.is_terminal else nullcontext():
    comparison = run(entrants, budget, folder, report)
  console.print(board)
  replace(comparison, command=shlex.join(["memzoo", *sys.argv[1:]])).save(folder / "results.json")
  write_text(folder / "table.md", markdown(comparison))
  pictures = draw(comparison, folder)
  print(f"Wrote {', '.join(str(path) for path in (folder / 'table.md', folder / 'results.json', *pictures))}.")


def _words(text: str | None) -> list[str]:
  return [word.strip() for word in (text or "").split(",") if word.strip()]


def _is_given(context: typer.Context, name: str) -> bool:
  return context.get_parameter_source(name).name != "DEFAULT"


def _refuse(context: typer.Context, *names: str) -> None:
  """Raises `ValueError` if one of these options was given."""
  for name in names:
    if _is_given(context, name):
      option = name.upper() if name == "task" else f"--{name.replace('_', '-')}"
      raise ValueError(f"{option} is {context.params[name]!r}; expected --suite NAME without it, since a suite has its own.")


def _compare_suite(
  name: str | None, layers: list[str], tasks: list[str], overrides: list[str], given: dict, out: Path | None, table: bool
) -> None:
  """`compare --suite`: makes the missing cells, then the table and the pictures."""
  from . import suite_report
  from .suite import run
  from .suites import SUITES
  from .values import did_you_mean

  if name not in SUITES:
    raise ValueError(f"--suite is {name!r}{did_you_mean(name or '', SUITES)} Expected one of {', '.join(SUITES)}.")
  suite = SUITES[name].selected(layers, tasks)
  suite = replace(suite, settings=(*suite.settings, *overrides), budget=replace(suite.budget, **given))
  folder = out or Path("compare") / name
  if not table:
    start()
    folder.mkdir(parents=True, exist_ok=True)
    run(suite, folder, _print_cell)
  print(f"Wrote {', '.join(str(path) for path in suite_report.write(suite, folder))}.")


def _print_cell(challenge, layer: str, progress: dict) -> None:
  if cell := progress.get("cell"):
    end = f"learned it in {cell.steps:,} steps" if cell.learned else f"has not learned it in {cell.steps:,} steps"
    print(f"{challenge.name}: {layer} {end}, {cell.seconds:.0f} s", flush=True)
  else:
    print("{}: {}: step {step}, loss {loss:.3f}, score {score:.3f}".format(challenge.name, layer, **progress), flush=True)


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
    start_on_cpu()
  else:
    start(cache=False)  # so that compilation is measured
  from ..pallas_kernels.workloads import DIRECTIONS, Shape
  from .bench_commands import estimate, measure_gpu, time_here

  out.mkdir(parents=True, exist_ok=True)
  names, directions = operations or (), DIRECTIONS[:1] if forward else DIRECTIONS
  if tpu:
    shapes = [Shape(each, length or 4096, heads or 16, width, width) for each in batch or (1, 8)]
    estimate(new_console(), out, names, tpu.split(","), shapes, directions, "float32" if float32 else "bfloat16")
  elif gpu:
    measure_gpu(out, names, minutes, tiny)
  else:
    (each,) = batch or (1,)
    time_here(new_console(), out, names, Shape(each, length or 2048, heads or 4, width, width), directions, long)


@app.command("compile", no_args_is_help=True)
def compile_(
  config: Config,
  topology: Annotated[str, typer.Option(help="Chips to compile for, such as v5e:4x4 or v5p:2x2x1.")] = "v5e:2x2",
  mesh: Annotated[
    list[str] | None,
    typer.Option(metavar="DxFxT", help="Devices along data, fsdp and tensor; repeatable.", show_default="MeshShape"),
  ] = None,
  generate: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Compile a step that makes a token of N sequences instead.")
  ] = None,
  overrides: Set = None,
) -> None:
  """Compile a config's training step for a TPU topology, without a TPU: does it fit, and what do the chips send each other?

  It shows the memory on each chip, FLOPs, and collectives by kind and origin. The exit status is 1 if a mesh does not fit.

  With --generate: the step of generation, and the time that a chip's memory needs to give parameters and states once.

  Large models take minutes, fewer with LanguageModel.scan=True.

  [bold]memzoo compile models/gated_delta_net_130m --topology v5e:4x4 --mesh 16x1x1 --mesh 1x16x1[/bold]

  [bold]memzoo compile models/gated_delta_net_130m --topology v5e:4x4 --mesh 4x2x2 --set LanguageModel.scan=True[/bold]

  [bold]memzoo compile models/gated_delta_net_130m --topology v5e:2x2 --mesh 4x1x1 --generate 64[/bold]
  """
  start_on_cpu()
  from .bench_commands import compile_steps
  from .config import build

  if not compile_steps(new_console(), build(config, overrides or ()), topology, mesh or (), generate):
    raise typer.Exit(1)
