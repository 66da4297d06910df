"""Pages from READMEs: a page includes whole files or sections of them, so their text exists once.

    <!-- include train/README.md -->              the whole file, without its title
    <!-- include zoo/README.md top -->            what is before its first section
    <!-- include README.md Training -->           the section with this heading, without the heading

Links between READMEs become links between pages; a link to another file of the repository leads to its address, if
`pyproject.toml` has one, and is shown as code otherwise. Names of layers become links to their pages. Paragraphs that begin
with bold words get an anchor, as headings do.
"""

import posixpath
import re
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "pages"

_INCLUDE = re.compile(r"^<!-- include (\S+)(?: (.+?))? -->$", re.MULTILINE)
_FENCE = re.compile(r"^( *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`[^`\n]+`)")
_LINK = re.compile(r"(!?)\[((?:`[^`]*`|[^\[\]])*)\]\(([^()\s]+)\)")
_LEAD = re.compile(r"^\*\*(.+?)\*\*", re.MULTILINE)


def expanded(text: str, page: str) -> str:
  """The text of a page, such as "extend/layer.md", with what it includes.

  Raises:
    ValueError: for a file or a section that does not exist.
  """
  return _INCLUDE.sub(lambda match: for_page(part(match[1], match[2]), match[1], page), text)


def part(path: str, name: str | None = None) -> str:
  """A file of the repository without its title; with `name` one section, or "top", what is before the first section."""
  file = ROOT / path
  if not file.is_file():
    raise ValueError(f"A page includes {path}; there is no such file.")
  text = re.sub(r"\A# .*\n", "", file.read_text(encoding="utf-8"))
  if name is None:
    return text
  top, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
  found = {"top": top} | {heading: body for heading, _, body in (section.partition("\n") for section in sections)}
  if name not in found:
    raise ValueError(f"A page includes {path} {name}; expected one of {', '.join(found)}.")
  return found[name]


def for_page(text: str, source: str, page: str) -> str:
  """`text` of the file `source` with links for `page`."""
  pieces = _FENCE.split(text)
  pieces[::2] = [_linked(piece, source, page) for piece in pieces[::2]]
  return with_anchors("".join(pieces)) if source == FINDINGS else "".join(pieces)


def _linked(text: str, source: str, page: str) -> str:
  text = _LINK.sub(lambda match: _link(*match.groups(), source, page), text)
  return re.sub(r"(?<!\[)`(\w+)`(?!\])", lambda match: _layer(match, page), text)


def _link(image: str, label: str, target: str, source: str, page: str) -> str:
  if re.match(r"\w+:|#", target):
    return f"{image}[{label}]({target})"
  path, hash_, anchor = target.partition("#")
  path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
  if not (ROOT / path).exists():
    raise ValueError(f"{source} links to {target}; there is no such file.")
  if image:
    return f"![{label}]({relative(f'files/{path}', page)})"
  readme = f"{path}/README.md" if (ROOT / path).is_dir() else path
  if readme in page_of():
    return f"[{label}]({relative(page_of()[readme], page)}{hash_}{anchor})"
  if repository():
    return f"[{label}]({repository()}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path})"
  return f"`{path}`" if label.strip("`") == path else f"{label} (`{path}`)"


def _layer(match: re.Match, page: str) -> str:
  own = f"layers/{match[1]}.md"
  return f"[{match[0]}]({relative(own, page)})" if match[1] in layer_names() and own != page else match[0]


def relative(target: str, page: str) -> str:
  """The path of one page as seen from another."""
  return posixpath.relpath(target, posixpath.dirname(page) or ".")


def slug(title: str) -> str:
  """The anchor of a heading, as Markdown makes it."""
  return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


FINDINGS = "train/tasks/README.md"


def with_anchors(text: str) -> str:
  """`text` with an anchor at each paragraph that begins with bold words."""
  return _LEAD.sub(lambda match: f'<span id="{_lead_anchors(text)[match.start()]}"></span>{match[0]}', text)


@cache
def _lead_anchors(text: str) -> dict[int, str]:
  """The anchor of each such paragraph, by its place in `text`; a title that comes again has a number."""
  anchors, seen = {}, {}
  for match in _LEAD.finditer(text):
    name = f"result-{slug(match[1])}"
    seen[name] = seen.get(name, 0) + 1
    anchors[match.start()] = name if seen[name] == 1 else f"{name}-{seen[name]}"
  return anchors


def blocks(text: str) -> list[tuple[str, str, str]]:
  """The paragraphs of a README outside of code: (anchor of the heading or bold title above, that title, paragraph)."""
  leads, found, place = _lead_anchors(text), [], ("", "")
  code = [range(*match.span()) for match in _FENCE.finditer(text)]
  for match in re.finditer(r"(?:^.+\n?)+", text, re.MULTILINE):
    if any(match.start() in span for span in code):
      continue
    heading = re.match(r"#+ (.+)", match[0])
    if heading:
      place = slug(heading[1]), heading[1]
    elif match.start() in leads:
      place = leads[match.start()], _LEAD.match(match[0])[1]
    found.append((*place, match[0]))
  return found


@cache
def page_of() -> dict[str, str]:
  """The page of each README: the first that includes all of it, or its top."""
  found: dict[str, str] = {}
  for path in sorted(PAGES.rglob("*.md")):
    for source, name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
      if name in ("", "top"):
        found.setdefault(source, path.relative_to(PAGES).as_posix())
  return found


def pictures_of(text: str) -> list[str]:
  """The files that an expanded page shows from `files/`."""
  return re.findall(r"\]\((?:\.\./)*files/([^()\s]+)\)", text)


@cache
def repository() -> str:
  """The repository's address, or ""."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  return project.get("urls", {}).get("Repository", "")


@cache
def layer_names() -> frozenset[str]:
  from memzoo.zoo.registry import LAYERS, SUBLAYERS

  return frozenset(LAYERS | SUBLAYERS)
