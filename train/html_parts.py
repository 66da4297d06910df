"""Building blocks of a page that is one HTML file: sections, tables, notes, folded parts.

Every function returns HTML. Arguments that are named `text`, and cells of tables, are plain text and are escaped here; those
named `parts` or `content` are HTML already. The page loads nothing: its style is inline, pictures are inline SVG
(`html_figures.py`), and the one script, which unfolds everything for print, may be missing.
"""

import html
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SHADES = 10  # of a shaded cell or word

# Colours of light and dark pages: eight for lines, which pictures use by name, then those of text, rules and backgrounds. The
# last is the red, green and blue of shades.
_NAMES = ("c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "ink", "faint", "line", "paper", "panel", "hot")
_LIGHT = "#1f6feb #c2410c #0b7a53 #8b3fc7 #946000 #0e7490 #be185d #4d5b6b #1b1f24 #59636e #d8dee4 #ffffff #f6f8fa 217,72,15"
_DARK = "#6cb0ff #ff9a57 #4fd1a1 #cfa2ff #e8c34a #56d4e8 #ff8fc0 #b6c2cf #e6edf3 #9aa6b2 #343d47 #11161c #1a2129 255,140,60"


def _variables(colours: str) -> str:
  return "".join(f"--{name}:{colour};" for name, colour in zip(_NAMES, colours.split(), strict=True))


_SHADED = "".join(f".s{i}{{background:rgba(var(--hot),{0.06 * i:.2f})}}" for i in range(SHADES))
_STYLE = f"""
:root{{color-scheme:light dark;{_variables(_LIGHT)}}}
@media(prefers-color-scheme:dark){{:root{{{_variables(_DARK)}}}}}
@media print{{:root{{color-scheme:light;{_variables(_LIGHT)}}}}}
{_SHADED}
""" + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,nav,footer{max-width:1120px;margin:0 auto;padding:0 16px}
header{padding-top:28px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:40px 0 10px;padding-bottom:4px;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:22px 0 6px}
p{margin:6px 0;max-width:75ch}
.lead{font-size:1.08rem}
.faint,figcaption,caption{color:var(--faint);font-size:.87rem}
.badge{display:inline-block;margin-top:4px;padding:1px 9px;border-radius:99px;border:1px solid currentColor}
.badge{font-size:.8rem;color:var(--c1)}
.badge.done{color:var(--c2)}
a{color:var(--c0)}
nav ul{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:14px 0 0;padding:0;font-size:.9rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:18px 0 0;padding:0}
.tiles div{background:var(--panel);border-radius:8px;padding:10px 12px}
.tiles dt{color:var(--faint);font-size:.8rem}
.tiles dd{margin:0;font-size:1.25rem;font-weight:600;line-height:1.3}
.tiles dd small{display:block;font-size:.78rem;font-weight:400;color:var(--faint)}
.facts{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:4px 16px;margin:8px 0}
.facts dt{color:var(--faint)}
.facts dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:10px 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:4px 0;caption-side:bottom}
th,td{padding:4px 12px 4px 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
td.s,td[class^=s]{padding-left:12px}
th{font-weight:600}
tbody th{font-weight:400}
.w{text-align:left}
td.w{white-space:normal;min-width:9ch}
.code td,.code th{font-family:ui-monospace,Consolas,monospace;font-size:.82rem}
.code td{min-width:14ch;white-space:pre-wrap;overflow-wrap:anywhere;text-align:left}
tfoot td,tfoot th{font-weight:600;border-bottom:0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:22px 20px;margin:14px 0}
figure{margin:0;min-width:0;break-inside:avoid}
figure h3{margin:0}
figure svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-family:inherit!important}
svg image{image-rendering:pixelated}
.wide{grid-column:1/-1}
.wide svg.small{display:none}
.legend{display:flex;flex-wrap:wrap;gap:0 12px;list-style:none;margin:0;padding:0;font-size:.82rem;min-height:1.5em}
.legend i{display:inline-block;width:18px;border-top:3px solid;margin-right:5px;vertical-align:middle}
.ramp{display:flex;align-items:center;gap:8px;font-size:.82rem}
.ramp i{flex:0 1 160px;height:9px;border-radius:2px}
.note{border-left:3px solid var(--c1);padding:2px 12px;margin:10px 0}
pre{background:var(--panel);border-radius:8px;padding:12px;overflow-x:auto;font:.82rem/1.5 ui-monospace,Consolas,monospace}
pre.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:32em;overflow-y:auto}
pre span{border-radius:2px}
details{margin:10px 0}
summary{cursor:pointer;color:var(--c0)}
footer{margin-top:48px;padding-bottom:32px}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
@media screen and (max-width:760px){
.wide svg.large{display:none}
.wide svg.small{display:block}
.facts{grid-template-columns:1fr;gap:0}
.facts dd{margin-bottom:6px}
}
@media print{
body{font-size:11pt}
nav{display:none}
pre.text{max-height:none}
.scroll{overflow:visible}
h2,h3{break-after:avoid}
tr{break-inside:avoid}
tfoot{display:table-row-group}
}
"""

_UNFOLD = "addEventListener('beforeprint',()=>document.querySelectorAll('details').forEach(d=>d.open=true))"


class Section(NamedTuple):
  """A part of a page with a heading; `parts` are HTML."""

  title: str
  parts: Sequence[str]


def escaped(text: object) -> str:
  """`text` as HTML, also within an attribute."""
  return html.escape(str(text), quote=True)


def page(title: str, lead: str, head: Sequence[str], sections: Iterable[Section], footer: str) -> str:
  """A whole page.

  Args:
    title: the heading, plain text.
    lead: the result in a sentence, plain text.
    head: HTML after the lead.
    sections: those without parts are left out.
    footer: plain text.
  """
  shown = [section for section in sections if section.parts]
  links = "".join(f'<li><a href="#{_anchor(section.title)}">{escaped(section.title)}</a></li>' for section in shown)
  body = "".join(
    f'<section id="{_anchor(title)}" aria-labelledby="{_anchor(title)}-h"><h2 id="{_anchor(title)}-h">{escaped(title)}</h2>'
    f"{''.join(parts)}</section>\n"
    for title, parts in shown
  )
  return (
    f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>\n'
    '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="generator" content="memzoo">\n'
    f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body>'  # without the icon, browsers ask a server for one
    f'<header><h1>{escaped(title)}</h1><p class="lead">{escaped(lead)}</p>{"".join(head)}</header>\n'
    f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n{body}</main>\n'
    f'<footer><p class="faint">{escaped(footer)}</p></footer><script>{_UNFOLD}</script></body></html>\n'
  )


def _anchor(title: str) -> str:
  return re.sub(r"\W+", "-", title.lower()).strip("-")


def paragraph(text: str, kind: str = "") -> str:
  return f'<p class="{kind}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>"


def note(text: str) -> str:
  """A line about something that is missing."""
  return f'<p class="note">{escaped(text)}</p>'


def badge(text: str, done: bool) -> str:
  return f'<span class="badge{" done" * done}">{escaped(text)}</span>'


def heading(text: str) -> str:
  return f"<h3>{escaped(text)}</h3>"


def folded(text: str, content: str) -> str:
  """`content` behind a line that opens it."""
  return f"<details><summary>{escaped(text)}</summary>{content}</details>"


def preformatted(text: str) -> str:
  return f'<pre class="text" tabindex="0">{escaped(text)}</pre>'


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
  """Numbers in large type: a name, a value and a remark each."""
  cells = (
    f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}{f'<small>{escaped(remark)}</small>' if remark else ''}</dd></div>"
    for name, value, remark in values
  )
  return f'<dl class="tiles">{"".join(cells)}</dl>'


def facts(values: Iterable[tuple[str, str]]) -> str:
  """Names and values, as a list of two columns."""
  cells = (f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in values)
  return f'<dl class="facts">{"".join(cells)}</dl>'


class Shaded(NamedTuple):
  """A cell of a table whose background is the stronger the larger `share`, from 0 to 1."""

  text: str
  share: float


def table(
  columns: Sequence[str],
  rows: Iterable[Sequence[str | Shaded]],
  *,
  words: int = 1,
  footer: Sequence[str] = (),
  caption: str = "",
  code: bool = False,
) -> str:
  """A table that scrolls sideways where it does not fit. The first cell of a row is its heading.

  Args:
    columns: headings.
    rows: cells of plain text; a row may be shorter than `columns`.
    words: number of leading columns that hold words, aligned left; the others hold numbers, aligned right.
    footer: a last row, of sums.
    caption: a line below.
    code: whether cells are code, in letters of equal width.
  """
  head = "".join(f'<th scope="col"{_left(i, words)}>{escaped(name)}</th>' for i, name in enumerate(columns))
  body = "".join(f"<tr>{_cells(row, len(columns), words)}</tr>" for row in rows)
  foot = f"<tfoot><tr>{_cells(footer, len(columns), words)}</tr></tfoot>" if footer else ""
  below = f"<caption>{escaped(caption)}</caption>" if caption else ""
  kind = ' class="code"' if code else ""
  label = escaped(caption or f"Table of {', '.join(filter(None, columns))}")
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table{kind}>{below}<thead><tr>{head}</tr></thead>'
    f"<tbody>{body}</tbody>{foot}</table></div>"
  )


def _cells(row: Sequence[str | Shaded], count: int, words: int) -> str:
  first, *rest = [*row, *[""] * (count - len(row))]
  cells = [f'<th scope="row" class="w">{escaped(first)}</th>']
  for i, cell in enumerate(rest, start=1):
    if isinstance(cell, Shaded):
      cells.append(f'<td class="{shade(cell.share)}">{escaped(cell.text)}</td>')
    else:
      cells.append(f"<td{_left(i, words)}>{escaped(cell)}</td>")
  return "".join(cells)


def _left(column: int, words: int) -> str:
  return ' class="w"' if column < words else ""


def shade(share: float) -> str:
  """The class of a background as strong as `share`, from 0 to 1; nan is 0."""
  return f"s{min(SHADES - 1, max(0, int(share * SHADES)))}" if share == share else "s0"


def shaded_text(pieces: Iterable[tuple[str, float]]) -> str:
  """Text whose pieces have backgrounds as strong as their shares, from 0 to 1."""
  merged: list[list[str]] = []
  for text, share in pieces:
    kind = shade(share)
    if merged and merged[-1][0] == kind:
      merged[-1][1] += text
    else:
      merged.append([kind, text])
  words = (f'<span class="{kind}">{escaped(text)}</span>' if kind != "s0" else escaped(text) for kind, text in merged)
  return f'<pre class="text" tabindex="0">{"".join(words)}</pre>'


def grid(figures: Iterable[str]) -> str:
  """Figures beside each other, as many as fit."""
  return f'<div class="grid">{"".join(figures)}</div>'


def figure(title: str, pictures: str, *, caption: str = "", legend: str = "", wide: bool = False) -> str:
  """A picture (SVG) with a title above and a caption below; `legend` is HTML."""
  below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
  kind = ' class="wide"' if wide else ""
  return f"<figure{kind}><h3>{escaped(title)}</h3>{legend}{pictures}{below}</figure>"


def legend(lines: Iterable[tuple[str, str, str]]) -> str:
  """The names of lines: a label, a CSS colour and a CSS border style each."""
  marks = (
    f'<li><i style="border-top-color:{colour};border-top-style:{style}"></i>{escaped(label)}</li>'
    for label, colour, style in lines
  )
  return f'<ul class="legend">{"".join(marks)}</ul>'


def ramp(low: str, high: str, colours: Sequence[str]) -> str:
  """The key of a map's colours, from the one of `low` to the one of `high`."""
  return (
    f'<div class="ramp"><span>{escaped(low)}</span><i style="background:linear-gradient(to right,{",".join(colours)})"></i>'
    f"<span>{escaped(high)}</span></div>"
  )
