"""Copies `first_cell.py` and the repository's address (pyproject.toml) to the notebooks, and links to Colab to the READMEs.

It also stores each notebook without outputs, in the layout of `nbformat`. Run it after a change of any of these.
"""

import re
import tomllib
from pathlib import Path

import nbformat

COLAB = Path(__file__).parent
ROOT = COLAB.parent
_BEGIN, _END = "<!-- badges -->", "<!-- end of badges -->"
_OPEN = "https://colab.research.google.com"


def address() -> str:
  """The repository's address, or "" if the project does not have one yet."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  return project.get("urls", {}).get("Repository", "")


def refresh_notebook(path: Path, cell: str) -> None:
  """Puts `cell` into the first code cell, and clears outputs and metadata."""
  notebook = nbformat.read(path, as_version=4)
  code = [each for each in notebook.cells if each.cell_type == "code"]
  code[0].source = cell.strip()
  for each in notebook.cells:
    each.metadata = {}
  for each in code:
    each.outputs, each.execution_count = [], None
  kept = ("kernelspec", "language_info")
  notebook.metadata = {name: value for name, value in notebook.metadata.items() if name in kept}
  nbformat.write(notebook, path)


def badges(repository: str, names: list[str]) -> str:
  """Links that open the notebooks in Colab, which knows repositories on GitHub only."""
  on_github = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(\.git)?/?", repository)
  if not on_github:
    return ""
  at = f"{_OPEN}/github/{on_github[1]}/blob/main/colab"
  return "".join(f"[![{name}]({_OPEN}/assets/colab-badge.svg)]({at}/{name}.ipynb) `{name}`\n" for name in names)


def main() -> None:
  repository, notebooks = address(), sorted(COLAB.glob("*.ipynb"))
  first = COLAB / "first_cell.py"
  cell = re.sub(r'^REPOSITORY = ".*?"', f'REPOSITORY = "{repository}"', first.read_text(encoding="utf-8"), flags=re.MULTILINE)
  first.write_text(cell, encoding="utf-8")
  for path in notebooks:
    refresh_notebook(path, cell)
  links = badges(repository, [path.stem for path in notebooks])
  for readme in (ROOT / "README.md", COLAB / "README.md"):
    before, _, rest = readme.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    readme.write_text(f"{before}{_BEGIN}\n{links}{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
  main()
