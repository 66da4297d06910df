"""The site: every layer has a page, made of docstrings and READMEs, and every link leads somewhere."""

import dataclasses
import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import layer_pages
import pytest
import readmes
import reference
import site_pages
import typer
from memzoo.train import cli
from memzoo.zoo.describe import summary
from memzoo.zoo.registry import LAYERS, SUBLAYERS

ROOT = Path(__file__).parent.parent
each_layer = pytest.mark.parametrize("name", LAYERS | SUBLAYERS)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
  return site_pages.written() | site_pages.generated()


# Pages.


@each_layer
def test_a_layer_has_a_page_with_its_equation_options_and_interface(name):
  layer, page = (LAYERS | SUBLAYERS)[name], layer_pages.layer_page(name)
  assert page.startswith(f"# {name}\n")
  assert summary(layer)[1] in page
  assert f"::: {layer.__module__}.{name}\n" in page
  fields = {field.name for field in dataclasses.fields(layer)} - {"parent", "name"}
  described = re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| \S.*\|$", page, re.MULTILINE)
  assert fields - set(described) == set()


@pytest.mark.parametrize("name", LAYERS)
def test_the_table_of_a_state_adds_up_to_its_bytes(name):
  page = layer_pages.layer_page(name)
  table = page.partition("| array | shape | dtype | bytes |")[2].partition("\n\n")[0]
  sizes = [int(size.replace(",", "")) for size in re.findall(r"\| ([\d,]+) \|$", table, re.MULTILINE)]
  _, example = layer_pages.example_of(name, LAYERS[name])
  assert sum(sizes) == example.state_bytes(1, 1)
  assert f"Together {sum(sizes):,} bytes" in page


def test_a_layer_of_the_zoo_is_shown_as_in_its_config():
  config, layer = layer_pages.example_of("GatedDeltaNet2", LAYERS["GatedDeltaNet2"])
  assert (config, type(layer)) == ("models/gated_delta_net_2_10m", LAYERS["GatedDeltaNet2"])
  assert [name for name in LAYERS if layer_pages.example_of(name, LAYERS[name])[0] is None] == ["GatedConv"]


def test_every_layer_has_pictures_and_all_are_small():
  folder = ROOT / "docs" / "pictures"
  index = json.loads((folder / "pictures.json").read_text())
  assert list(index) == list(LAYERS)
  named = {f"{name}-{kind}.png" for name, one in index.items() for kind in one["pictures"]}
  assert {path.name for path in folder.glob("*.png")} == named
  assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000


def test_what_the_paper_leaves_open_is_a_list_of_its_own():
  page = layer_pages.layer_page("EraseThenDelta")
  before, _, after = page.partition("## What the paper leaves open\n\n")
  assert after.startswith("The paper leaves open → we do:\n\n- initial gamma → sigmoid")
  assert "leaves open" not in before
  assert "\n- output gate → sigmoid, full rank\n" in after


def test_results_are_the_rows_of_a_layer_and_of_no_other():
  rows = [line for line in "\n".join(layer_pages.results("Mamba")).split("\n") if line.startswith("| ")]
  assert any(row.startswith("| Mamba | 19,456 |") for row in rows)
  assert not [row for row in rows if "MemMamba" in row or "Mamba2" in row]
  text = "**A**, b.\n\n| layer | x |\n|---|---|\n| A | 1 |\n| | 2 |\n| 9 notes | 3 |\n| B | 4 |\n| without memory | 5 |\n"
  (found,) = layer_pages._rows(text, lambda cell: cell == "A", goes_on=r"$|[a-z\d]", also="without memory")
  assert [row[-3] for row in found.rows] == ["1", "2", "3", "5"]
  assert (found.anchor, found.title) == ("result-a", "A")


def test_speed_is_that_of_the_operation_that_a_layer_calls():
  assert layer_pages.operations(LAYERS["GatedDeltaNet"]) == {"gated_delta_rule"}
  text = "\n".join(layer_pages.speed("KimiDeltaAttention", LAYERS["KimiDeltaAttention"]))
  assert "| `kimi_delta_rule` |" in text
  assert "| in float32: Kimi delta rule, bounded decay |" in text, "a heading within a table goes on"
  assert not re.search(r"^\| (`gated_delta_rule`|gated delta rule)", text, re.MULTILINE)


def test_every_readme_is_on_a_page():
  listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
  readmes_ = {name for name in listed if not name.startswith("docs/")}
  assert readmes_ - readmes.page_of().keys() == set()
  sections = re.findall(r"^## (.+)", (ROOT / "README.md").read_text(), re.MULTILINE)
  written = "".join(path.read_text() for path in readmes.PAGES.rglob("*.md"))
  assert [name for name in sections if f"include README.md {name} -->" not in written] == ["The folders"]


def test_links_lead_to_pages_and_to_the_repository(monkeypatch):
  def shown(text, page="extend/layer.md"):
    return readmes.for_page(text, "zoo/README.md", page)

  assert shown("[a](../train/README.md#b)") == "[a](../inside/train.md#b)"
  assert shown("[a](../layers/)") == "[a](../inside/layers.md)"
  assert shown("![a](../train/decoding.png)", "speed.md") == "![a](files/train/decoding.png)"
  assert shown("`Mamba` and `x`\n```\n`Mamba`\n```") == "[`Mamba`](../layers/Mamba.md) and `x`\n```\n`Mamba`\n```"
  assert shown("[a](https://b.org/c.md), [laws](../layers/laws.py)") == "[a](https://b.org/c.md), laws (`layers/laws.py`)"
  monkeypatch.setattr(readmes, "repository", lambda: "https://example.org/memzoo")
  assert shown("[laws](../layers/laws.py)") == "[laws](https://example.org/memzoo/blob/main/layers/laws.py)"
  with pytest.raises(ValueError, match=r"zoo/README.md links to \.\./nowhere.md; there is no such file"):
    shown("[a](../nowhere.md)")


@pytest.mark.parametrize(
  ("include", "words"),
  [
    ("train/README.txt", "includes train/README.txt; there is no such file"),
    ("README.md Trainings", "includes README.md Trainings; expected one of top, As a library"),
  ],
)
def test_an_include_of_nothing_is_an_error(include, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    readmes.expanded(f"<!-- include {include} -->", "x.md")


def test_equal_titles_have_different_anchors():
  shown = readmes.with_anchors("**A key**, x\n\n**B**\n\n**A key**: y")
  assert re.findall(r'id="(.*?)"', shown) == ["result-a-key", "result-b", "result-a-key-2"]


def test_the_page_of_commands_has_all_commands_and_options(pages):
  page, application = pages["reference/command.md"], typer.main.get_command(cli.app)
  for name, command in application.commands.items():
    section = page.partition(f"## memzoo {name}\n")[2].partition("\n## ")[0]
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
    assert [option for option in options if f"`{option}" not in section and f" {option}" not in section] == []
  assert "[bold]" not in page


def test_the_reference_has_every_public_operation(pages):
  for folder in ("delta_rule", "selective_scan", "local_linear", "short_conv", "test_time_memory", "note_pool"):
    assert f"::: memzoo.pallas_kernels.{folder}\n" in pages["reference/pallas_kernels.md"]
  assert reference.public("memzoo.pallas_kernels.selective_scan") == ["KEPT", "OUTPUT", "explain", "selective_scan"]


# The site.


class Links(html.parser.HTMLParser):
  """The anchors of a page, what it links to, and what a browser loads with it."""

  def __init__(self, text: str):
    super().__init__()
    self.anchors, self.links, self.loaded = set(), set(), set()
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    given = dict(attributes)
    self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
    if tag == "a" and given.get("href"):
      self.links.add(given["href"])
    if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
      self.loaded.add(given["href"])
    if tag in ("img", "script", "iframe") and given.get("src"):
      self.loaded.add(given["src"])


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_all_its_links_lead_somewhere(tmp_path):
  pytest.importorskip("mkdocs")
  pytest.importorskip("material")
  pytest.importorskip("mkdocstrings")
  site = tmp_path / "site"
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/mkdocs.yml", "--site-dir", str(site)]
  environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "WARNING" not in done.stderr
  pages = {path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
  assert {f"{name}.html" for name in LAYERS | SUBLAYERS} <= {path.name for path in (site / "layers").iterdir()}
  links = [(path, link) for path, page in pages.items() for link in page.links | page.loaded]
  broken = [f"{path.relative_to(site)}: {link}" for path, link in links if not leads_somewhere(path, link, pages)]
  assert broken == []
  assert [link for page in pages.values() for link in page.loaded if ":" in link] == [], "loaded from the network"
  assert not [path for path in site.rglob("*.css") if re.search(r"(url\(|@import ).?https?:", path.read_text())]
  assert "EraseThenDelta" in (site / "search" / "search_index.js").read_text()


def leads_somewhere(page: Path, link: str, pages: dict[Path, Links]) -> bool:
  """Whether a link is external, or leads to a file, and to an anchor that it has."""
  if re.match(r"(https?|mailto|data):", link):
    return True
  path, _, anchor = unquote(link).partition("#")
  target = (page.parent / path).resolve() if path else page
  return target.is_file() and (not anchor or anchor == "__top" or target not in pages or anchor in pages[target].anchors)
