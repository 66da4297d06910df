"""Small wrong edits of the code, each with the test that must notice it.

    python tests/mutants.py                  # all of them, in scratch copies; exit status 1 if one survives
    python tests/mutants.py attention loop   # those whose path or description has one of these words
    python tests/mutants.py --list

The mutants are in `mutants.toml`. Each is applied to a copy of the repository, in which its test must fail; without a mutant
all tests pass (`make test`). Add mutants with every new operation.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*_cache", ".git", ".venv", "*.egg-info", "__pycache__", "runs", "compare", "site")


class Mutant(NamedTuple):
  """One wrong edit.

  Attributes:
    what: what is wrong with it, in a few words.
    path: path of the file, relative to the repository.
    old, new: text that occurs once in the file, and what takes its place.
    test: what must fail: a file in `tests`, with `::name` or ` -k expression`.
  """

  what: str
  path: str
  old: str
  new: str
  test: str


def load() -> list[Mutant]:
  """The mutants of `mutants.toml`."""
  listed = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["mutant"]
  return [Mutant(**entry) for entry in listed]


@contextmanager
def scratch_copy():
  """A folder that holds a copy of the repository under the package's name."""
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "memzoo"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    (ROOT / ".jax_cache").mkdir(exist_ok=True)
    (copy / ".jax_cache").symlink_to(ROOT / ".jax_cache")  # programs that a mutant does not change are not compiled again
    yield copy


def try_mutant(mutant: Mutant) -> tuple[Mutant, str, float]:
  """Applies a mutant to a copy and runs its test: the first test that noticed it, or "", and the seconds that it took."""
  began = time.perf_counter()
  with scratch_copy() as copy:
    file = copy / mutant.path
    file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    test = shlex.split(f"tests/{mutant.test}")
    done = subprocess.run([*command, *test], cwd=copy, env=environment, capture_output=True, text=True)
  failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+::\S+)", done.stdout, re.MULTILINE)
  if done.returncode and not failed:
    raise RuntimeError(f"{shlex.join([*command, *test])} ran no test:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
  return mutant, failed[0] if failed else "", time.perf_counter() - began


def misplaced(mutants: list[Mutant]) -> list[str]:
  """A line for each mutant whose text does not occur once in its file."""
  counts = ((mutant, (ROOT / mutant.path).read_text(encoding="utf-8").count(mutant.old)) for mutant in mutants)
  return [f"{mutant.path}: {mutant.old!r} occurs {count} times, expected once" for mutant, count in counts if count != 1]


def main() -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("words", nargs="*", help="only mutants whose path or description has one of these words")
  parser.add_argument("--list", action="store_true", help="print the mutants and stop")
  parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants to try at once (default: one per core)")
  arguments = parser.parse_args()
  mutants = [m for m in load() if not arguments.words or any(word in f"{m.path} {m.what}" for word in arguments.words)]
  if arguments.list:
    print("\n".join(f"{m.path}: {m.what} ({m.test})" for m in mutants))
    return 0
  if wrong := misplaced(mutants):
    print("\n".join(wrong))
    return 1
  survived = 0
  with ThreadPoolExecutor(arguments.jobs) as pool:
    for mutant, noticed_by, seconds in pool.map(try_mutant, mutants):
      survived += not noticed_by
      verdict = f"noticed by {noticed_by}" if noticed_by else f"SURVIVED {mutant.test}"
      print(f"{mutant.path}: {mutant.what}: {verdict} ({seconds:.0f} s)", flush=True)
  print(f"{len(mutants) - survived} of {len(mutants)} mutants noticed")
  return 1 if survived else 0


if __name__ == "__main__":
  sys.exit(main())
