"""The parts of the site that MkDocs asks for: generated pages, the navigation, what pages include, and pictures.

`site_pages.py` makes their Markdown, from READMEs and docstrings.
"""

import functools
import tempfile
from contextlib import contextmanager
from pathlib import Path

import jax
from memzoo.zoo.registry import LAYERS, SUBLAYERS
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from readmes import ROOT, expanded, pictures_of
from reference import FOLDERS
from site_pages import generated, written

PACKAGE = ("__init__.py", "configs", *FOLDERS)


def on_startup(command, dirty):
  """States are traced, on no accelerator; looking for one prints warnings."""
  jax.config.update("jax_platforms", "cpu")


def on_config(config):
  """Adds the pages of layers to the navigation, and shows mkdocstrings the package."""
  for entry in config.nav:
    if "Layers" in entry:
      entry["Layers"] = ["layers/index.md", *({name: f"layers/{name}.md"} for name in LAYERS | SUBLAYERS)]
  config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(_package().parent)]
  return config


@functools.cache
def _package() -> Path:
  """A folder `memzoo` with links to the package's files: the repository is the package, whatever its folder is called."""
  folder = Path(_scratch().name) / "memzoo"
  folder.mkdir()
  for name in PACKAGE:
    (folder / name).symlink_to(ROOT / name, target_is_directory=(ROOT / name).is_dir())
  return folder


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="memzoo-docs-")


def on_files(files, config):
  """Adds the generated pages, and the pictures that pages show."""
  with mistakes():
    pages, texts = generated(), written()
  for page, text in pages.items():
    files.append(File.generated(config, page, content=text))
  texts = [*pages.values(), *texts.values()]
  for picture in sorted({name for text in texts for name in pictures_of(text)}):
    files.append(File.generated(config, f"files/{picture}", abs_src_path=str(ROOT / picture)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Replaces what a page includes."""
  with mistakes():
    return expanded(markdown, page.file.src_uri)


@contextmanager
def mistakes():
  """Ends the build at a broken link or include with one line."""
  try:
    yield
  except ValueError as error:
    raise PluginError(str(error)) from error
