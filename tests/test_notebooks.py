"""Every notebook runs from top to bottom, starts with the same cell, and is stored without outputs."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import nbformat
import pytest
from machine import flags_for_one_device
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
FIRST_CELL = (ROOT / "colab" / "first_cell.py").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_a_notebook_is_stored_without_outputs(path):
  text = path.read_text()
  notebook = nbformat.reads(text, as_version=4)
  nbformat.validate(notebook)
  assert text == nbformat.writes(notebook) + "\n", "expected nbformat's own layout: sorted keys, an indent of one"
  assert set(notebook.metadata) == {"kernelspec", "language_info"}
  for cell in notebook.cells:
    assert not cell.metadata
    assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


@each_notebook
def test_the_first_code_cell_is_first_cell_py(path):
  cells = nbformat.read(path, as_version=4).cells
  code = [cell.source for cell in cells if cell.cell_type == "code"]
  assert code[0] == FIRST_CELL.strip()
  assert cells[0].cell_type == "markdown"
  assert cells[0].source.startswith("# ")


# The tests run the same cells with less training.
SHORTER = {
  "02_compare_memories": {
    "steps=800, evaluate_every=50": "steps=25, evaluate_every=25",
    '["LinearAttention", "DeltaNet"]': '["DeltaNet"]',
    '["DeltaNet", "reflecting/DeltaNet"]': '["reflecting/DeltaNet"]',
    "steps=600": "steps=25",
    "test_examples=128": "test_examples=32",
  },
  "03_train_and_look_inside": {
    "[@EraseThenDelta, @GatedDeltaNet]": "[@GatedDeltaNet]",
    "depth=2": "depth=1",
    '  "EraseThenDelta.key_dim=32",\n  "EraseThenDelta.value_dim=32",\n': "",
    "steps=360": "steps=10",
    "steps=440": "steps=15",
    "evaluate_every=90": "evaluate_every=5",
    "final_evaluation_batches=16": 'final_evaluation_batches=2", "TextData.batch_size=4',
    "max_new_tokens=300": "max_new_tokens=50",
  },
  "04_titans": {"700, 2800, 11200": "350", "8400": "400", "16800": "800", "range(250)": "range(30)"},
  "05_two_speed_memory": {"steps=400": "steps=5", '  "with the episodic memory": decoder("fast", "fast", mix="fast"),\n': ""},
}


def shortened(path):
  notebook = nbformat.read(path, as_version=4)
  for long, short in SHORTER.get(path.stem, {}).items():
    assert any(long in cell.source for cell in notebook.cells if cell.cell_type == "code"), long
    for cell in notebook.cells:
      cell.source = cell.source.replace(long, short)
  return notebook


@pytest.mark.slow
@pytest.mark.xdist_group("notebooks")
@each_notebook
def test_a_notebook_runs_from_top_to_bottom_and_shows_pictures(path, tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", flags_for_one_device())
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
  notebook = shortened(path)
  NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
  assert not [output for output in outputs if output.output_type == "error"], "an error while drawing does not stop a notebook"
  complaints = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
  assert not complaints


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """Runs the first cell in `tmp_path / "colab"` as if memzoo were not installed; returns the arguments it gives to pip."""

  def run(source="", repository=""):
    asked = []

    def pip(command, check):
      assert check
      assert command[1:5] == ["-m", "pip", "install", "--quiet"]
      asked.append([Path(word).read_text() if word.endswith(".txt") else word for word in command[5:]])

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "memzoo" else find(name))
    monkeypatch.setattr(subprocess, "run", pip)
    lines = [f'{line}; extra == "{extra}"' for extra, lines in EXTRAS.items() for line in lines if ";" not in line]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["jax>=0.10.2", *lines])
    (tmp_path / "colab").mkdir()
    monkeypatch.chdir(tmp_path / "colab")
    cell = FIRST_CELL.replace('SOURCE = ""', f"SOURCE = {source!r}").replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    exec(compile(cell, "first_cell.py", "exec"), {})
    return asked

  return run


def test_a_checkout_beside_the_notebook_is_installed_and_jax_is_kept(elsewhere, tmp_path):
  (tmp_path / "pyproject.toml").write_text('[project]\nname = "memzoo"\n')
  package, others = elsewhere()
  assert package == ["--no-deps", str(tmp_path)]
  here = importlib.metadata.version
  assert others == ["--constraint", f"jax=={here('jax')}\njaxlib=={here('jaxlib')}\n", *EXTRAS["colab"]]
  assert not [line for line in EXTRAS["colab"] if line.startswith(("jax>", "jaxlib"))]


def test_a_source_that_the_reader_names_is_installed(elsewhere):
  assert elsewhere("git+https://example.org/memzoo")[0] == ["--no-deps", "git+https://example.org/memzoo"]


def test_without_an_address_the_package_index_is_used_by_name(elsewhere, capsys):
  assert elsewhere()[0] == ["--no-deps", "memzoo"]
  assert capsys.readouterr().out.splitlines()[0].endswith("from the package index; for its newest source, set SOURCE above.")


def test_the_address_of_the_repository_is_used(elsewhere):
  assert elsewhere(repository="https://example.org/memzoo")[0] == ["--no-deps", "git+https://example.org/memzoo"]


def test_notebooks_and_badges_have_the_address_of_the_project(tmp_path):
  """As they are nothing would be refreshed; with an address in `pyproject.toml`, the cells and both READMEs have it."""
  before = {path: path.read_bytes() for path in [*NOTEBOOKS, ROOT / "README.md", ROOT / "colab" / "README.md"]}
  for path in [*before, ROOT / "colab" / "first_cell.py", ROOT / "colab" / "refresh.py"]:
    copy = tmp_path / path.relative_to(ROOT)
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(path, copy)
  project, refresh = (ROOT / "pyproject.toml").read_text(), [sys.executable, tmp_path / "colab" / "refresh.py"]
  (tmp_path / "pyproject.toml").write_text(project)
  subprocess.run(refresh, check=True)
  for path, content in before.items():
    assert (tmp_path / path.relative_to(ROOT)).read_bytes() == content
  address = "https://github.com/somebody/memzoo"
  (tmp_path / "pyproject.toml").write_text(project.replace("[project.urls]\n", f'[project.urls]\nRepository = "{address}"\n'))
  subprocess.run(refresh, check=True)
  for path in NOTEBOOKS:
    source = nbformat.read(tmp_path / path.relative_to(ROOT), as_version=4).cells[1].source
    assert f'REPOSITORY = "{address}"' in source
    for readme in ("README.md", "colab/README.md"):
      assert f"/github/somebody/memzoo/blob/main/colab/{path.name}" in (tmp_path / readme).read_text()


def test_the_colab_extra_has_all_dependencies_except_jax():
  needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
  assert EXTRAS["colab"] == [line for line in needed if not line.startswith("jax>")]
