"""The page of a layer, made of what is already written: docstrings, configs, and the tables of the READMEs."""

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import memzoo
from flax import linen as nn
from memzoo.layers.law_trial import small
from memzoo.train.config import shipped
from memzoo.zoo.registry import LAYERS, SUBLAYERS
from readmes import FINDINGS, ROOT, blocks, for_page, part, relative

# What the tables of speed and of results call a layer, where that is neither its name nor the name of its operation.
ALSO_CALLED = {
  "Attention": ("softmax attention",),
  "GatedConv": ("short convolution",),
  "GatedDeltaNet2": ("GDN-2",),
  "HierarchicalMemory": ("Mela",),
  "TitansMemory": ("test_time_mlp", "Titans MLP"),
}
# Files and sections with tables of speed, and the pages that show them.
SPEEDS = (
  ("README.md", "The layers", "layers/index.md"),
  ("README.md", "Speed on a CPU", "speed.md"),
  ("README.md", "Training", "training.md"),
  ("pallas_kernels/README.md", None, "inside/pallas_kernels.md"),
)
_BREAK = re.compile(r"-> we do(?: \(inferred\))?:")


def layer_page(name: str) -> str:
  """The Markdown of a layer's page, `layers/NAME.md`."""
  layer = (LAYERS | SUBLAYERS)[name]
  module = inspect.getmodule(layer)
  config, example = example_of(name, layer)
  sections = [
    f"# {name}",
    described(layer),
    f"<span class='source'>`memzoo.layers.{name}`</span>",
    *pictures(name),
    "## Equations and sources",
    *paper(inspect.getdoc(module) or ""),
    "## Shapes and state",
    *state(config, example),
    "## Options",
    options(layer),
    *results(name),
    *speed(name, layer),
    *gin(config),
    "## Interface",
    f"::: {layer.__module__}.{name}\n    options:\n      show_root_toc_entry: false\n      show_docstring_attributes: false\n"
    "      show_docstring_description: false\n      inherited_members: [initial_state, state_bytes, matrices]\n"
    "      members: [__call__, in_stack, initial_state, state_bytes, matrices]",
  ]
  return "\n\n".join(sections) + "\n"


# Docstrings.


def described(layer: type) -> str:
  """A class docstring up to its attributes, with equations and links to papers."""
  text = re.split(r"^(?:Attributes|Raises|Args):$", inspect.getdoc(layer) or "", maxsplit=1, flags=re.MULTILINE)[0]
  return prose(re.sub(r"^The (?:other )?attributes are those of .*$", "", text, flags=re.MULTILINE))


def paper(text: str) -> Iterator[str]:
  """A module's docstring, in two parts: the equations and sources, and what the paper leaves open."""
  known, marker, open_ = text.partition(next(iter(_BREAK.findall(text)), "\0"))
  if not marker:
    yield prose(text)
    return
  lead = re.split(r"(?<=[.:])\s+|\n\n", known)[-1]  # "The paper leaves open", the end of the last sentence
  yield prose(known.removesuffix(lead))
  yield "## What the paper leaves open"
  yield _inline(f"{lead.strip()} {marker}")
  yield prose(as_list(open_))


def as_list(text: str) -> str:
  """Points that are separated by " · " as a list; text that is a list already as it is."""
  first, *rest = text.strip().split("\n\n")
  if " · " not in first:
    return text.strip()
  return "\n\n".join(["\n".join(f"- {' '.join(point.split())}" for point in first.split(" · ")), *rest])


def prose(text: str) -> str:
  """A docstring's text as Markdown: equations in blocks, names of papers as links, arrows as arrows."""
  found = []
  for paragraph in re.split(r"\n{2,}", text.strip()):
    lines = paragraph.split("\n")
    plain = [line for line in lines if not line.startswith("    ")]
    if len(plain) == len(lines) or lines[0].startswith("- "):
      found.append(_inline(paragraph))
      continue
    found += [_inline("\n".join(plain)), ""] if plain else []
    found += [equation([line[4:] for line in lines if line.startswith("    ")])]
  return "\n\n".join(found)


def equation(lines: list[str]) -> str:
  return "\n".join(["```{ .text .equation }", *lines, "```"])


def _inline(text: str) -> str:
  pieces = re.split(r"(`[^`]*`)", text)
  pieces[::2] = [_plain(piece) for piece in pieces[::2]]
  return "".join(pieces)


def _plain(text: str) -> str:
  text = re.sub(r"([*_<|\[\]])(?!\s)", r"\\\1", text)
  text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
  return text.replace("->", "→")


# Sizes.


def example_of(name: str, layer: type[nn.Module]) -> tuple[str | None, nn.Module | None]:
  """The shipped config of about 10 million parameters with a layer, and the layer in it; else a small one, without a config.

  Sublayers without memory have neither.
  """
  for config in shipped():
    stem = config.removeprefix("models/")
    if stem != config and stem.removesuffix("_10m").replace("_", "") == name.lower():
      model = memzoo.build(config).model
      found = [one for one in jax.tree.leaves((model.first, model.mixers), is_leaf=_is_module) if type(one) is layer]
      unset = getattr(found[0], "width", model) is None
      return config, found[0].clone(width=model.width) if unset else found[0]
  return None, small(layer) if name in LAYERS else None


def _is_module(value: Any) -> bool:
  return isinstance(value, nn.Module)


def state(config: str | None, example: nn.Module | None) -> Iterator[str]:
  """What goes in and out, and the arrays of a state, of the layer in a config."""
  yield "```text\ny, state = layer.apply(params, x, state=None, segment_ids=None)      # x, y: [B, T, D]\n```"
  if example is None:
    yield "It has no memory: its state is empty."
    return
  shapes = [jax.eval_shape(lambda n=n: example.apply({}, n, method="initial_state")) for n in (1, 2)]
  leaves = [jax.tree_util.tree_flatten_with_path(shape)[0] for shape in shapes]
  where = f"in [`{config}`](#config)" if config else "with small sizes"
  rows = [
    f"| `{jax.tree_util.keystr(path).lstrip('.')}` | {_shape(one.shape, two.shape)} | {one.dtype} | "
    f"{one.size * one.dtype.itemsize:,} |"
    for (path, one), (_, two) in zip(*leaves, strict=True)
  ]
  yield f"The state {where}, B sequences, and the bytes of one:"
  yield "\n".join(["| array | shape | dtype | bytes |", "|---|---|---|---:|", *rows])
  yield f"Together {example.state_bytes(1, 1):,} bytes for a sequence, which do not change with the number of tokens."
  kinds = dict.fromkeys(type(one) for one in _tuples(shapes[0]))
  yield "Its parts: " + ", ".join(f"[`{kind.__name__}`][{kind.__module__}.{kind.__name__}]" for kind in kinds) + "."


def _tuples(value: Any) -> Iterator[Any]:
  """The named tuples in a state."""
  if hasattr(value, "_fields"):
    yield value
  if isinstance(value, tuple):
    for one in value:
      yield from _tuples(one)


def _shape(one: tuple[int, ...], two: tuple[int, ...]) -> str:
  return f"[{', '.join('B' if a != b else str(a) for a, b in zip(one, two, strict=True))}]"


# Options.


def options(layer: type) -> str:
  """A table of all fields, a class's own before those of its bases, and what the docstrings say of them."""
  meanings, rows = meanings_of(layer), []
  fields = [field for field in dataclasses.fields(layer) if field.name not in ("parent", "name")]
  for field in sorted(fields, key=lambda field: _depth(layer, field.name)):
    default = "required" if field.default is dataclasses.MISSING else f"`{_default(field.default)}`"
    kind = getattr(field.type, "__name__", None) if isinstance(field.type, type) else str(field.type)
    kind = re.sub(r"(?:\w+\.)+(\w+)", r"\1", kind or "").replace("|", "&#124;")
    rows.append(f"| `{field.name}` | <code>{kind}</code> | {default} | {meanings.get(field.name, '')} |")
  return "\n".join(["| field | type | default | |", "|---|---|---|---|", *rows])


def _depth(layer: type, name: str) -> int:
  """How far up the classes a field is first declared."""
  return max(i for i, each in enumerate(layer.__mro__) if name in inspect.get_annotations(each))


def _default(value: Any) -> str:
  text = getattr(value, "__name__", None) if isinstance(value, type) else repr(value)
  return re.sub(r"\s+", " ", text or repr(value)).replace("|", "/")


def meanings_of(layer: type) -> dict[str, str]:
  """What the docstrings of a class and of its bases say of each field; the class itself has the last word."""
  found: dict[str, str] = {}
  for each in reversed(layer.__mro__):
    text = (inspect.getdoc(each) if "__doc__" in each.__dict__ else "") or ""
    section = re.search(r"^Attributes:\n((?:  .*\n?|\n(?=  ))+)", text, re.MULTILINE)
    for entry in re.findall(r"^  (\w[\w, ]*): (.*(?:\n   .*)*)", section[1], re.MULTILINE) if section else ():
      found |= {name.strip(): _inline(" ".join(entry[1].split())) for name in entry[0].split(",")}
  return found


# Pictures.


def pictures(name: str) -> Iterator[str]:
  """The layer's pictures with what they show, if `docs/pictures.py` has drawn any."""
  index = ROOT / "docs" / "pictures" / "pictures.json"
  known = json.loads(index.read_text(encoding="utf-8")).get(name) if index.exists() else None
  if not known:
    return
  yield "## Its memory at work"
  for kind, caption in known["pictures"].items():
    yield f"![{caption}](../files/docs/pictures/{name}-{kind}.png)\n\n*{caption}*"
  yield (
    f"A model of a short convolution and this layer, after {known['steps']} steps of training on recall of six pairs, of which "
    f"it answers {known['right']:.0%} right; a guess among the six values would be 17% (`{known['command']}`)."
  )


# Tables.


class Rows(NamedTuple):
  """Rows of a table that are about a layer: where it stands, its header with the line below, and the rows."""

  anchor: str
  title: str
  header: tuple[str, str]
  rows: list[str]


def results(name: str) -> Iterator[str]:
  """The rows about a layer in the tables of findings."""
  page, names = f"layers/{name}.md", (name, *ALSO_CALLED.get(name, ()))

  def ours(cell: str) -> bool:
    return any(re.match(rf"{re.escape(one)}(?![\w-])", cell.strip("`")) for one in names)

  text, words = part(FINDINGS), "|".join(map(re.escape, names))
  found = list(_rows(text, ours, also=r"without memory|floor", goes_on=r"$|[a-z\d]"))
  mentioned = {
    anchor: title
    for anchor, title, paragraph in blocks(text)
    if anchor and not paragraph.startswith("#") and re.search(rf"(?<![\w/])({words})(?![\w-])", paragraph)
  }
  if mentioned:
    yield "## Results"
    yield f"From [Findings]({relative('findings.md', page)}), which have the commands and what else was compared."
  for one in found:
    mentioned.pop(one.anchor, None)
    link = f"**[{_inline(one.title)}]({relative('findings.md', page)}#{one.anchor})**"
    yield link + "\n\n" + for_page("\n".join([*one.header, *one.rows]), FINDINGS, page)
  if mentioned:
    links = ", ".join(f"[{_inline(title)}]({relative('findings.md', page)}#{anchor})" for anchor, title in mentioned.items())
    yield f"{'Also in' if found else 'In'}: {links}."


def speed(name: str, layer: type) -> Iterator[str]:
  """The rows about a layer and its operation in the tables of speed."""
  wanted = {_normal(one) for one in (name, *operations(layer), *ALSO_CALLED.get(name, ()))}
  page, shown = f"layers/{name}.md", []
  for source, section, target in SPEEDS:
    for one in _rows(part(source, section), lambda cell: _normal(cell) in wanted, goes_on=r"$"):
      title = f"**[{_inline((one.title or section).rstrip('.'))}]({relative(target, page)})**"
      shown.append(title + "\n\n" + for_page("\n".join([*one.header, *one.rows]), source, page))
  if shown:
    yield "## Speed"
    yield "The pages behind the titles say what was measured, and how."
    yield from shown


def operations(layer: type) -> set[str]:
  """The functions that the code of a layer calls, or else that of the nearest base which is a layer of the registry."""
  for each in layer.__mro__:
    if each in LAYERS.values():
      called = set(re.findall(r"(\w+)\(", inspect.getsource(each)))
      if known := called & _timed():
        return known
  return set()


@cache
def _timed() -> frozenset[str]:
  """The names of operations in tables of speed, such as `gated_delta_rule`."""
  return frozenset(re.findall(r"^\| `([a-z_\d]+)` \|", part("README.md"), re.MULTILINE))


def _normal(cell: str) -> str:
  """"`gated_delta_rule`" and "gated delta rule, in float32" -> "gateddelta"."""
  cell = cell.partition(",")[0].rpartition(": ")[2].lower()
  return re.sub(r"[\s`_-]", "", cell).removesuffix("rule")


def _rows(text: str, ours: Any, goes_on: str, also: str = r"(?!)") -> Iterator[Rows]:
  """The tables of a README with rows whose first cell is `ours`.

  Args:
    text: the README.
    ours: cell -> whether the row is about the layer.
    goes_on: a pattern of first cells of rows that belong to the row above.
    also: a pattern of first cells of rows that are shown beside any others.
  """
  for anchor, title, paragraph in blocks(text):
    if not paragraph.startswith("|"):
      continue
    header, line, *body = paragraph.strip().split("\n")
    rows, others, mine, prefix = [], [], False, ""
    for row in body:
      cell = row[1:].partition(" |")[0].strip()
      if before := re.match(r"[\w ]+: ", cell):
        prefix = before[0]
      if re.match(also, cell):
        others.append(row)
        continue
      if not re.match(goes_on, cell):
        mine = ours(cell)
      if mine:
        rows.append(row if before or not prefix or not cell else row.replace(cell, prefix + cell, 1))
    if rows:
      yield Rows(anchor, title, (header, line), rows + others)


def gin(config: str | None) -> Iterator[str]:
  """The config's text."""
  if config:
    yield "## Config"
    yield f"```gin\n{(ROOT / 'configs' / f'{config}.gin').read_text(encoding='utf-8').strip()}\n```"
    yield f"```sh\nmemzoo describe {config}\nmemzoo train {config}\n```"
