"""The code on the site: Python is run, with less training, and every command is one that memzoo takes."""

import re
import shlex
import tomllib
from pathlib import Path

import jax
import pytest
import site_commands
import typer
from memzoo.pallas_kernels.workloads import find
from memzoo.train import cli
from memzoo.train.compare import enter
from memzoo.train.config import build, shipped
from memzoo.train.loop import train
from memzoo.train.probes import PROBES
from memzoo.train.suites import SUITES
from memzoo.zoo.registry import LAYERS
from site_commands import PAGES, SMALL, code, commands

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
APPLICATION = typer.main.get_command(cli.app)

SMALL_RUN = ["Trainer.steps=2", "TextData.sources=['text']"]

# Every piece of text on the left is in a block of the page; the test runs the block with what stands on the right.
SHORTER = {
  "getting_started.md": {'["Trainer.steps=100"]': str(SMALL)},
  "inside/train.md": {'memzoo.build("quickstart")': f'memzoo.build("quickstart", {SMALL})'},
  "inside/zoo.md": {
    '["LanguageModel.depth=6"]': str([*SMALL, "LanguageModel.depth=2"]),
    "max_new_tokens=100": "max_new_tokens=4",
    "lags=(1, 4, 16, 64)": "lags=(1, 4)",
    "(16, 256)": "(8, 80)",
    "gaps=(1, 2)": "gaps=(1,)",
    "probes=4": "probes=2",
  },
  "weights.md": {'"Qwen3.5-0.8B"': repr(str(ROOT / "tests/pretrained/llama")), "max_length=4096": "max_length=64"},
  "findings.md": {
    "for rule in": "for rule in (\"priority\",) if rule in",  # one pool of six
    "for slots in (8, 50, 200)": "for slots in (8,)",
    '["Mamba", *pools]': "[*pools]",
    "((64, 32, 1500, 0.95), (256, 8, 200, 0.95), (1024, 4, 200, 2.0))": "((64, 2, 2, 0.0),)",
    "runs.step + 50": "runs.step + 2",
    "(64, 1024, 4096, 16384)": "(64,)",
    "test_examples=32": "test_examples=2",
    "range(0, 64 * 4000, 4000)": "range(0, 8 * 100, 100)",
    "i + 2048": "i + 600",
    '"Trainer.steps=400"': "*SMALL_RUN",
    "in runs.items()": "in list(runs.items())[:1]",
    "range(3)": "range(1)",
    "factor=16, rows=16": "factor=2, rows=1",
    "in enter(\"needle\", layers, settings)": "in enter(\"needle\", layers, settings)[:1]",
    "runs.train(400)": "runs.train(2)",
    "test_examples=64": "test_examples=2",
    "steps=1500)": "steps=2, batch_size=2, test_examples=2)",
    "(0.003, 0.03, 0.1)": "(0.03,)",
    "task.tests().items()": "task.tests().items() if name == '64 tokens'",
    "before=(0, 500, 50_000), rows=8": "before=(0,), rows=1",
  },
}  # fmt: skip
# What the page's text says is there.
GIVEN = {
  "weights.md": "import jax.numpy as jnp, memzoo; tokens, context, continuation = jnp.array([[1, 2, 3]]), [1, 2], [3]",
}
ELSEWHERE = {"extend/layer.md": "test_check_layer.py runs the guide"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The current folder, with a text to train on."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "text").write_text("\n\n".join(f"Line {i} of a small text; its square is {i * i}." for i in range(2000)))
  return tmp_path


PYTHON = [page for page in PAGES if code(page, "python") and page not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PYTHON if page != "findings.md"])
def test_the_python_code_of_a_page_runs(page, folder):
  names, changes = {}, SHORTER.get(page, {})
  exec(GIVEN.get(page, ""), names)
  check_changes(page)
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    for block in code(page, "python"):
      exec(changed(block, changes), names)


FINDINGS = {
  "MemMamba": "pools = {",
  "what is left of a token": "draw_etmf",
  "a hierarchical memory": "mela = [",
  "where a Titans memory decays to": "zero_plain/",
  "half-lives": "initial_step_bias",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", FINDINGS)
def test_a_script_of_the_findings_runs(script, folder):
  """All settings are built; one model of each script is trained, for a few steps."""
  check_changes("findings.md")
  (block,) = [block for block in code("findings.md", "python") if FINDINGS[script] in block]
  names = {"SMALL_RUN": SMALL_RUN}
  if script == "what is left of a token":
    train(build("quickstart", [*SMALL, "LanguageModel.depth=2", "TextData.sources=stdlib"]), "runs/mamba")
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    exec(changed(block, SHORTER["findings.md"]), names)
  for config, settings in names.get("runs", {}).values() if script == "a hierarchical memory" else ():
    build(config, [*names["common"], *settings])


def test_every_script_of_the_findings_is_run():
  long = [block for block in code("findings.md", "python") if "TASKS[" not in block]
  assert [sum(words in block for words in FINDINGS.values()) for block in long] == [1] * len(FINDINGS)


def check_changes(page: str) -> None:
  missing = [long for long in SHORTER.get(page, {}) if not any(long in block for block in code(page, "python"))]
  assert missing == [], f"{page} does not have these any more"


def changed(block: str, changes: dict[str, str]) -> str:
  for long, short in changes.items():
    block = block.replace(long, short)
  return block


# Commands.


SHELL = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", SHELL)
def test_the_commands_of_a_page_exist(page):
  for words in commands(page):
    try:
      CHECKS[words[0]](words[1:])
    except Exception as error:
      raise AssertionError(f"{page}: {shlex.join(words)}: {error}") from error


def check_memzoo(words: list[str]) -> None:
  """Parses a command as memzoo does, and builds the config or the layers that it names."""
  name, *arguments = words
  command, yours = APPLICATION.commands[name], re.search(r"\bmy[._]\w+", " ".join(arguments))
  if not arguments:  # the command is only mentioned
    return
  given = command.make_context(name, arguments).params
  config, overrides = given.get("config"), list(given.get("overrides") or ())
  if name in ("train", "describe", "compile") and config not in shipped():
    assert yours or config.startswith("runs/"), f"{config} is neither a shipped config nor a run"
  elif name in ("train", "describe", "compile"):
    build(config, overrides)
  elif name == "compare" and given["suite"]:
    SUITES[given["suite"]].selected((given["layers"] or "Attention").split(","), (given["tasks"] or "recall").split(","))
  elif name == "compare" and not yours:
    enter(given["task"], given["layers"].split(","), overrides)
  elif name == "laws" and not yours:
    assert given["layer"] in LAYERS
  elif name == "bench":
    for operation in given["operations"] or ():
      find(operation)
  elif name == "evaluate":
    assert given["task"] in (None, *PROBES)


def check_make(words: list[str]) -> None:
  assert set(words) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_pip(words: list[str]) -> None:
  assert words[0] == "install"
  assert {extra for word in words for extra in re.findall(r"\[(\w+)\]", word)} <= EXTRAS.keys()


def check_python(words: list[str]) -> None:
  path = words[1].removeprefix("memzoo.").replace(".", "/") + ".py" if words[0] == "-m" else words[0]
  assert (ROOT / path).is_file(), f"there is no file {path}"


CHECKS = {
  "memzoo": check_memzoo,
  "make": check_make,
  "pip": check_pip,
  "python": check_python,
  "export": lambda words: None,
  "unset": lambda words: None,
}


@pytest.mark.slow
@pytest.mark.xdist_group("site_commands")
@pytest.mark.parametrize("page", ["getting_started.md", "training.md"])
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch, capfd):
  """As `python tests/site_commands.py` runs those of all pages; without `pip`, and a compilation for a TPU of minutes."""
  kept = [words for words in commands(page) if words[0] not in ("pip", "make") and words[1] != "compile"]
  monkeypatch.setattr(site_commands, "commands", lambda page: kept)
  assert site_commands.run_page(page, site_commands.prepare(tmp_path), minutes=10) == 0, capfd.readouterr().out
