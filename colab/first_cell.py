# Installs memzoo and its dependencies if it is missing. The JAX of this runtime stays as it is.
REPOSITORY = ""  # from [project.urls] in pyproject.toml
SOURCE = ""  # instead: a folder with memzoo's source, or an address for pip ("git+https://...")

import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement


def pip_install(*what):
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *what], check=True)


if importlib.util.find_spec("memzoo") is None:
  project = Path("../pyproject.toml")
  beside = project.is_file() and 'name = "memzoo"' in project.read_text()
  source = SOURCE or (str(project.resolve().parent) if beside else REPOSITORY and f"git+{REPOSITORY}") or "memzoo"
  if source == "memzoo":
    print("Installing memzoo from the package index; for its newest source, set SOURCE above.")
  pip_install("--no-deps", source)
  needed = [line.partition(";")[0].strip() for line in requires("memzoo") if "colab" in line.partition(";")[2]]
  with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
    kept.writelines(f"{name}=={version(name)}\n" for name in ("jax", "jaxlib") if importlib.util.find_spec(name))
    kept.flush()
    pip_install("--constraint", kept.name, *needed)
  importlib.invalidate_caches()

import memzoo

tested = next(Requirement(line) for line in requires("memzoo") if Requirement(line).name == "jax")
untested = "" if version("jax") in tested.specifier else f"; memzoo is tested with {tested}: if it fails, use a newer runtime"
print(f"memzoo {memzoo.__version__}, jax {version('jax')}{untested}")
