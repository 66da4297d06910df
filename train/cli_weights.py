"""Commands for models of other libraries, and for what others evaluate with."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_shared import Best, Run, Set, app, start


@app.command("import", no_args_is_help=True)
def import_(
  folder: Annotated[str, typer.Argument(help="Folder with config.json and *.safetensors, or a name on the Hugging Face hub.")],
  out: Annotated[Path, typer.Option(help="Folder of the run to begin.")],
  set_: Set = None,
) -> None:
  """Begin a run with a model of transformers, which then generates, evaluates and trains like any other.

  Parameters keep the dtype of the file; to train, give them float32. The tokenizer comes along, with its special tokens.

  [bold]memzoo import Qwen/Qwen3.5-0.8B --out runs/qwen --set Attention.max_length=4096[/bold]

  [bold]memzoo import models/Qwen3.5 --out runs/mine --set LanguageModel.param_dtype=float32 --set TextData.sources=texts[/bold]

  [bold]memzoo train runs/mine[/bold]
  """
  start()
  from .pretrained import import_run

  import_run(folder, out, set_ or ())


@app.command(no_args_is_help=True)
def export(
  run: Run,
  out: Annotated[Path, typer.Option(help="Folder to write.")],
  best: Best = False,
  config: Annotated[
    Path | None, typer.Option(help="A config.json that describes the model.", show_default="that of `memzoo import`")
  ] = None,
) -> None:
  """Write a run's model as transformers, or the library of its family, reads it.

  A run that did not begin with `memzoo import` needs the config.json of such a model: it decides the family.

  [bold]memzoo export runs/mine --out mine[/bold]

  [bold]memzoo export runs/attention --config llama/config.json --out llama-mine[/bold]
  """
  start()
  from .pretrained import export_run

  export_run(run, out, best, config)


@app.command(no_args_is_help=True)
def harness(
  run: Run,
  tasks: Annotated[str, typer.Option(metavar="NAME,NAME,...", help="Tasks of lm-evaluation-harness.")],
  shots: Annotated[int | None, typer.Option(min=0, help="Number of examples before each question.")] = None,
  limit: Annotated[int | None, typer.Option(min=1, help="Number of questions of each task.", show_default="all")] = None,
  include: Annotated[Path | None, typer.Option(help="Folder with tasks of your own.")] = None,
  begin: Annotated[bool, typer.Option("--begin", help="Put the token that begins texts before every context.")] = False,
  batch_size: Annotated[int, typer.Option(min=1, help="Rows in a call.")] = 8,
  best: Best = False,
) -> None:
  """Evaluate a run on tasks of lm-evaluation-harness, by log-likelihoods and greedy continuations.

  [bold]memzoo harness runs/mine --tasks lambada_openai,hellaswag --limit 200[/bold]

  [bold]memzoo harness runs/mine --tasks my_task --include my_tasks[/bold]
  """
  start()
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
