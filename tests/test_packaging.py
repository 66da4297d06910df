"""What is in the repository is what is installed, and importing it is light."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_list_of_packages_is_the_folders():
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
  parts = ("configs/", "layers/", "pallas_kernels/", "train/", "zoo/", "__init__.py")
  assert held == {f"memzoo/{name}" for name in tracked if name.startswith(parts) and name.endswith((".py", ".gin"))}


@pytest.mark.compat
def test_layers_need_only_jax_and_flax():
  code = "import sys, memzoo.layers; print(*{name.partition('.')[0] for name in sys.modules})"
  loaded = set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
  assert not loaded & {"gin", "grain", "typer", "matplotlib", "tensorboardX", "tokenizers", "safetensors"}


def test_imports_run_downwards():
  """`layers` knows nothing of the floors above it, `pallas_kernels` nothing of `layers`; `zoo` meets `train` late."""
  forbidden = {"pallas_kernels": ("layers", "zoo", "train"), "layers": ("zoo", "train")}
  for floor, above in forbidden.items():
    for path in (ROOT / floor).rglob("*.py"):
      lines = [line.split() for line in path.read_text().splitlines() if line.lstrip().startswith(("from ", "import "))]
      imported = {part for line in lines for part in line[1].split(".")}
      assert not imported & set(above), path
