"""What the commands of `memzoo` share: the application, options, and how JAX is started."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

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

Config = Annotated[
  str, typer.Argument(help="Name of a shipped config (see `memzoo list`), path of a .gin file, or folder of a run.")
]
Set = Annotated[
  list[str] | None,
  typer.Option("--set", metavar="X.FIELD=VALUE", help="Set a field of the config, such as LanguageModel.depth=4. Repeatable."),
]
Best = Annotated[bool, typer.Option("--best", help="Use the checkpoint with the lowest validation loss, not the newest.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run, such as runs/quickstart.")]


def start_on_cpu() -> None:
  """Like `start`, without looking for accelerators, whose library may then be loaded to compile for them."""
  import jax

  jax.config.update("jax_platforms", "cpu")
  start()


def start(cache: bool = True) -> None:
  """Starts JAX without its warnings, and with a persistent cache of compiled programs."""
  import jax

  from .files import cache_folder
  from .runtime import start_quietly

  start_quietly()
  warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
  if not cache or "--no-compile-cache" in sys.argv:
    jax.config.update("jax_enable_compilation_cache", False)
  elif not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def new_console():
  from rich.console import Console

  return Console(width=None if sys.stdout.isatty() else 140)
