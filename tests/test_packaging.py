"""The wheel holds what the repository holds, imports run one way, and importing the layers is light."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_list_of_packages_names_every_folder():
  parts = ("configs", "layers", "pallas_kernels", "train", "zoo")
  found = {path.parent for part in parts for path in (ROOT / part).rglob("__init__.py")}
  names = {".".join(("memzoo", *folder.relative_to(ROOT).parts)) for folder in found} | {"memzoo"}
  assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_config_and_nothing_at_the_top_but_memzoo(tmp_path):
  copy = tmp_path / "source"
  subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
  build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)]
  subprocess.run(build, check=True, capture_output=True)
  (wheel,) = tmp_path.glob("memzoo-*.whl")
  held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  tracked = subprocess.run(["git", "ls-files"], cwd=copy, check=True, capture_output=True, text=True).stdout.split()
  parts = ("configs/", "layers/", "pallas_kernels/", "train/", "zoo/", "__init__.py", "py.typed")
  assert held == {f"memzoo/{name}" for name in tracked if name.startswith(parts) and name.endswith((".py", ".gin", "py.typed"))}


@pytest.mark.compat
def test_layers_need_only_jax_and_flax():
  code = "import sys, memzoo.layers; print(*{name.partition('.')[0] for name in sys.modules})"
  loaded = set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
  assert not loaded & {"gin", "grain", "typer", "matplotlib", "tensorboardX", "tokenizers", "safetensors"}


FLOORS = ("pallas_kernels", "layers", "zoo", "train")  # each imports from itself and from those before it


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_run_downwards(floor):
  """Also the imports inside functions and under TYPE_CHECKING."""
  allowed = {*FLOORS[: FLOORS.index(floor) + 1], "__version__"}
  upward = [
    f"{path.relative_to(ROOT)} imports {name}"
    for path in sorted((ROOT / floor).rglob("*.py"))
    for name in imported_modules(path)
    if name.split(".")[0] == "memzoo" and name.split(".")[1:2] not in [[part] for part in allowed]
  ]
  assert upward == []


def imported_modules(path: Path) -> list[str]:
  """Full names of all that a file of the package imports, such as "memzoo.layers.norms.RMSNorm"."""
  names: list[str] = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      package = ("memzoo", *path.relative_to(ROOT).parent.parts)
      start = package[: len(package) - node.level + 1] if node.level else ()
      names += [".".join((*start, *filter(None, [node.module]), alias.name)) for alias in node.names]
  return names


def test_the_dependencies_are_what_the_package_imports():
  files = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
  imported = {name.split(".")[0] for path in files for name in imported_modules(path)} - sys.stdlib_module_names - {"memzoo"}
  distributions = {"gin": "gin-config", "orbax": "orbax-checkpoint", "mlflow": "mlflow-skinny"}
  extras = PROJECT["project"]["optional-dependencies"]
  optional = {line.partition(">")[0] for extra in extras.keys() - {"test", "colab"} for line in extras[extra]}
  needed = {distributions.get(name, name) for name in imported} - optional - {"numpy"}  # of jax
  assert {line.partition(">")[0] for line in PROJECT["project"]["dependencies"]} == needed


def test_imports_of_every_form_are_found(tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
  path = tmp_path / "layers" / "a.py"
  path.parent.mkdir()
  path.write_text(
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from ..zoo.stack import Stack\n"
    "def f():\n  import memzoo.train.loop\n  from .. import zoo\n  from . import norms\n"
  )
  found = {"typing.TYPE_CHECKING", "memzoo.zoo.stack.Stack", "memzoo.train.loop", "memzoo.zoo", "memzoo.layers.norms"}
  assert set(imported_modules(path)) == found


@pytest.mark.xdist_group("together")
def test_tests_of_a_group_share_a_process(request):
  """Tests that share compiled programs are marked so; pytest-xdist moves the group into the test's id."""
  grouped = getattr(request.config.option, "loadgroup", False)
  assert not grouped or request.node.nodeid.endswith("@together")
