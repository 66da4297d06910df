"""Pages of reference: the commands, the shipped configs, and the modules."""

import importlib
import inspect
import re
from collections.abc import Iterator

import typer
from memzoo.train import cli
from memzoo.train.config import shipped
from memzoo.zoo.registry import LAYERS, SUBLAYERS
from readmes import ROOT

FOLDERS = ("layers", "pallas_kernels", "zoo", "train")
# Modules without an interface of their own: the commands, which have a page, and those that print reports.
LEFT_OUT = re.compile(r"(^|/)(cli|bench|gpu_bench|tpu_bench)(_|\.)|_report\.py$|(^|/)(old_configs|families)")


def command_page() -> str:
  """Every command with its arguments and options, from the application itself."""
  application = typer.main.get_command(cli.app)
  context = typer.Context(application, info_name="memzoo")
  text = ["# Command line", f"```text\nmemzoo {' '.join(application.collect_usage_pieces(context))}\n```", application.help]
  text += list(_parameters(application, context))
  for name in application.list_commands(context):
    command = application.get_command(context, name)
    own = typer.Context(command, info_name=name, parent=context)
    usage = " ".join(command.collect_usage_pieces(own))
    text += [f"## memzoo {name}", f"```text\nmemzoo {name} {usage}\n```", *_help(command.help), *_parameters(command, own)]
  return "\n\n".join(text) + "\n"


def _help(text: str) -> Iterator[str]:
  """The help of a command: its paragraphs, and its examples as shell code."""
  examples = []
  for paragraph in re.split(r"\n{2,}", inspect.cleandoc(text)):
    example = re.fullmatch(r"\[bold\](.*)\[/bold\]", paragraph, re.DOTALL)
    if example:
      examples.append(" \\\n  ".join(line.strip() for line in example[1].split("\n")))
    else:
      yield _cell(paragraph.replace("\n", " "))
  if examples:
    yield "```sh\n" + "\n".join(examples) + "\n```"


def _parameters(command, context) -> Iterator[str]:
  """A table of the arguments and options of a command."""
  records = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
  if records:
    rows = [f"| `{name.replace('|', '/')}` | {_cell(text)} |" for name, text in records]
    yield "\n".join(["| argument or option | |", "|---|---|", *rows])


def _cell(text: str) -> str:
  return re.sub(r"([|<\[\]*])", r"\\\1", re.sub(r"\s+", " ", text))


def configs_page() -> str:
  """Every shipped config: what it is, and its text."""
  text = [
    "# Shipped configs",
    "`memzoo train NAME` trains one; `memzoo describe NAME` shows its model. [Configs](../configs.md) says what they can set.",
  ]
  for name in shipped():
    source = (ROOT / "configs" / f"{name}.gin").read_text(encoding="utf-8").strip()
    comment = " ".join(line.lstrip("# ") for line in re.match(r"(?:#.*\n)*", source)[0].strip().split("\n"))
    text += [f"## {name}", _cell(comment), f"```gin\n{source}\n```"]
  text += ["## Parts", "Files that these include."]
  for path in sorted((ROOT / "configs" / "parts").glob("*.gin")):
    text += [f"### parts/{path.stem}", f"```gin\n{path.read_text(encoding='utf-8').strip()}\n```"]
  return "\n\n".join(text) + "\n"


def modules_page(folder: str) -> str:
  """The public names of every module of a folder."""
  text = [f"# memzoo.{folder}"]
  if folder == "layers":
    text.append("Every layer has [a page of its own](../layers/index.md). Here is what they are made of.")
  for path in sorted((ROOT / folder).rglob("*.py")):
    name = path.relative_to(ROOT / folder).as_posix()
    module = ".".join(["memzoo", folder, *name.removesuffix(".py").split("/")]).removesuffix(".__init__")
    if not _shown(name):
      continue
    names = public(module)
    if names != []:
      members = "" if names is None else f"      members: [{', '.join(names)}]\n"
      text.append(f"::: {module}\n    options:\n      heading_level: 2\n      show_root_full_path: true\n{members}")
  return "\n\n".join(text) + "\n"


def _shown(name: str) -> bool:
  """Whether a module has a place in the reference: not the forms of an operation, which its package describes."""
  operation = "/" in name and not name.endswith("__init__.py") and not name.startswith("tasks/")
  return not operation and not LEFT_OUT.search(name)


def public(module: str) -> list[str] | None:
  """The names that a module defines, or that its `__all__` has, but for layers; `None` if it needs an extra that is missing."""
  try:
    found = importlib.import_module(module)
  except ImportError:
    return None
  names = getattr(found, "__all__", None) or [name for name, value in vars(found).items() if _own(name, value, module)]
  return [] if module == "memzoo.layers" else list(names)


def _own(name: str, value: object, module: str) -> bool:
  if not (inspect.isfunction(value) or inspect.isclass(value)) or value in (LAYERS | SUBLAYERS).values():
    return False
  return not name.startswith("_") and value.__module__ == module and bool(inspect.getdoc(value))
