"""The shell commands on the site, and a script that runs them all with less work.

    python tests/site_commands.py --out FOLDER           # all pages; two hours on one core
    python tests/site_commands.py training.md --out FOLDER

It runs them page by page in a copy of the repository, with fewer steps, smaller models and fewer operations, and prints how
each ended. What has run (`done.txt` in the folder), on any page, is not run again. Exits with 1 if one failed.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "docs")]  # as conftest.py does

import site_pages  # noqa: E402

PAGES = site_pages.written() | site_pages.generated()

TINY = ["LanguageModel.width=16", "LanguageModel.depth=1", "LanguageModel.mixers=[@GatedConv]", "GatedConv.channels=8"]
BRIEF = ["TextData.sequence_length=32", "TextData.batch_size=4", "TextData.sources=['text']", "Trainer.steps=2"]
BRIEF += ["Trainer.evaluation_batches=1", "Trainer.final_evaluation_batches=1", "Trainer.sample_tokens=4"]
BRIEF += ["Trainer.evaluate_every=2", "Trainer.checkpoint_every=2"]
SMALL = TINY + BRIEF


def code(page: str, language: str) -> list[str]:
  """The blocks of a page in a language."""
  found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", PAGES[page], re.MULTILINE | re.DOTALL)
  return [textwrap.dedent(block) for block in found]


def commands(page: str) -> list[list[str]]:
  """The shell commands of a page: all in blocks, and those in running text whose options have values.

  Those with words in capitals, which a reader fills in, are left out.
  """
  text = "\n".join(code(page, "sh")).replace("\\\n", " ")
  prose = re.sub(r"^ *```.*?^ *```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
  inline = re.findall(r"`(memzoo [^`]+ --[\w-]+ [^`]+|(?:python|make|pip install) [^`]+)`", prose)
  lines = text.split("\n") + [" ".join(line.split()) for line in inline if not re.search(r"(?<![\w=.])[A-Z]{3,}\b", line)]
  return [words for line in lines if (words := shlex.split(line.removesuffix("&"), comments=True))]


def shortened(words: list[str]) -> list[str]:
  """A command that does the same with less work."""
  program, *rest = words
  if program in ("pip", "make"):
    return [*words, "--dry-run"]
  text = shlex.join(LOCAL.get(word, word) for word in rest if word != "--open")
  rest = shlex.split(re.sub(r"(?<=steps[= ])\d+", lambda steps: str(max(2, int(steps[0]) // 20)), text))
  if program == "python":
    return [program, *rest, *next((less for script, less in SCRIPTS.items() if script in words), [])]
  name, *rest = rest
  if name == "bench" and (not rest or rest[0].startswith("--")):
    rest = ["gated_delta_rule", *rest]
  if name in ("train", "describe") and not rest[0].startswith("runs/"):
    own = rest[0] != "quickstart" or "mixers" in text or "EraseThenDelta" in text  # these layers stay
    settings = [*BRIEF, "TextData.batch_size=1"] if own else SMALL
    rest[1:1] = [f"--set={setting}" for setting in settings]  # before what the page sets, which counts
  elif name == "train" and "--steps" not in rest:
    rest += ["--steps=2"]
  less = LESS.get("suite" if "--suite" in rest else name, [])
  return [program, name, *rest, *less, *(["--tiny"] if "--gpu" in rest else [])]


# Options that replace those of a command, or are added to them.
LESS = {
  "compare": ["--steps=2", "--seeds=1", "--batch-size=4"],
  "suite": ["--steps=2", "--seeds=1", "--layers=DeltaNet", "--tasks=recall"],
  "compile": ["--set=LanguageModel.depth=2"],
  "bench": ["--length=256", "--heads=2", "--batch=1"],
}
SCRIPTS = {
  "docs/pictures.py": ["--steps=2"],
  "memzoo.train.tasks.routing": ["--steps=100", "--seeds=1"],
  "memzoo.train.bench_decoding": ["--lengths=64", "--seconds=0.5"],
  "memzoo.train.bench_overhead": ["--rounds=1"],
  "memzoo.pallas_kernels.gpu_bench": ["--tiny"],
}
# What is somewhere else, or is the reader's own, and what stands for it; `prepare` makes these.
LOCAL = {"Qwen/Qwen3.5-0.8B": "llama", "models/Qwen3.5": "llama", "runs/attention": "runs/qwen", "MyLayer": "DeltaNet"}
# Of libraries that neither memzoo nor its tests install: commands that are run only where the library is.
NEEDS = {
  "harness": "lm_eval",
  "tests/compare_lm_eval": "lm_eval",
  "tests/compare_": "torch",
  "tests/bench_torch": "torch",
  "memzoo.pallas_kernels.gpu_cost": "jax_cuda12_plugin",
}


def main() -> None:
  """Runs what the arguments say."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("pages", nargs="*", help="such as training.md; all by default")
  parser.add_argument("--out", type=Path, required=True, help="folder for the copy and for what the commands print")
  parser.add_argument("--minutes", type=float, default=15.0, help="the longest that a command may take (default %(default)s)")
  given = parser.parse_args()
  place = prepare(given.out)
  first = ["extend/task.md", "reference/command.md"]  # others speak of what these make
  pages = given.pages or [*first, *(page for page in PAGES if page not in first)]
  failed = sum(run_page(page, place, given.minutes) for page in pages)
  print(f"{failed} failed" if failed else "all ran")
  sys.exit(bool(failed))


def prepare(out: Path) -> Path:
  """A copy of the repository with the files that the pages speak of, and the home folder of the commands."""
  place = out / "memzoo"
  listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
  for name in filter(None, listed):
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, place / name)
  words = "\n\n".join(f"Line {i} of a small text; its square is {i * i}." for i in range(2000))
  sizes = "".join(f"  {name}: int = 2\n" for name in ("num_heads", "key_dim", "value_dim"))
  layer = f"from memzoo.layers import DeltaNet\n\n\nclass MyLayer(DeltaNet):\n{sizes}"
  files = dict.fromkeys(("text", "texts/one.txt", "my_texts/one.txt", "../home/books/one.txt"), words)
  for name, text in {**files, "my_layers.py": layer, "my.gin": "include 'quickstart.gin'\n"}.items():
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_text(text)
  write_parquet(place / "corpus/one.parquet", words)
  write_model(place / "llama")
  return place


def write_parquet(path: Path, text: str) -> None:
  """A parquet file with a column of documents."""
  import pyarrow
  from pyarrow import parquet

  path.parent.mkdir(exist_ok=True)
  parquet.write_table(pyarrow.table({"text": text.split("\n\n")}), path)


def write_model(folder: Path) -> None:
  """A model as `transformers` saves it, of bytes."""
  import numpy as np
  from safetensors.numpy import load_file, save_file

  kept = ROOT / "tests/pretrained/llama"
  config = json.loads((kept / "config.json").read_text()) | {"vocab_size": 256}
  tensors = load_file(kept / "model.safetensors")
  tables = {name: np.resize(table, (256, table.shape[1])) for name, table in tensors.items() if len(table) == 32}
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(tensors | tables, folder / "model.safetensors", {"format": "pt"})


def run_page(page: str, place: Path, minutes: float) -> int:
  """Runs the commands of a page in order, and prints how each ended. Returns how many failed."""
  path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
  environment = {**os.environ, "HOME": str(place.parent / "home"), "PATH": path}
  log, done = place.parent / "logs" / f"{page.replace('/', '_')}.log", place.parent / "done.txt"
  log.parent.mkdir(exist_ok=True)
  done.touch()
  waiting, failed = [], 0
  for words in commands(page):
    line = shlex.join(words)
    if words[0] in ("export", "unset"):
      name, _, value = words[1].partition("=")
      environment[name] = value
    elif library := _missing(words):
      print(f"not run, without {library}: {page}: {line}", flush=True)
    elif line not in done.read_text().split("\n"):
      started = time.monotonic()
      process = _start(shortened(words), place, environment, log)
      if "--process" in words and words[words.index("--process") + 1] != "0":  # it waits for process 0
        waiting.append(process)
        continue
      status = _status(process, minutes)
      failed += status != "0"
      print(f"{status:>7} {time.monotonic() - started:5.0f} s  {page}: {line}", flush=True)
      if status == "0":
        done.write_text(f"{done.read_text()}{line}\n")
  return failed + sum(_status(process, 1) != "0" for process in waiting)


def _missing(words: list[str]) -> str | None:
  """The library that a command needs and that is not installed."""
  needed = (library for start, library in NEEDS.items() if any(word.startswith(start) for word in words))
  return next((library for library in needed if find_spec(library) is None), None)


def _start(words: list[str], place: Path, environment: dict[str, str], log: Path) -> subprocess.Popen:
  with log.open("a") as file:
    print(f"\n$ {shlex.join(words)}", file=file, flush=True)
    return subprocess.Popen(words, cwd=place, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _status(process: subprocess.Popen, minutes: float) -> str:
  """The exit status of a process, or "timeout"."""
  try:
    return str(process.wait(60 * minutes))
  except subprocess.TimeoutExpired:
    process.kill()
    return "timeout"


if __name__ == "__main__":
  main()
