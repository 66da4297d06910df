"""Numbers and tables, as every report shows them."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table


def thousands(number: float, unit: str = "") -> str:
  """Three significant digits and a decimal prefix: 1234567 is "1.23M", and with the unit "B" it is "1.23 MB"."""
  space = " " if unit else ""
  for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if number >= 0.9995 * size:  # three digits of 0.9995 size round up to size
      return f"{number / size:.3g}{space}{prefix}{unit}"
  return f"{number:.3g}{space}{unit}"


def binary(count: int) -> str:
  """Bytes in the largest binary unit that they fill: 1536 is "1.5 KiB"."""
  for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if count >= size:
      return f"{count / size:,.1f} {unit}"
  return f"{count} bytes"


def clock(seconds: float) -> str:
  """Seconds as "1:05", or "2:01:05" from an hour on."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def milliseconds(seconds: float) -> str:
  """Seconds in milliseconds, without the unit: 0.0123 is "12.3"."""
  return f"{seconds * 1e3:,.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def table(
  title: str | None,
  columns: Sequence[str],
  rows: Iterable[Sequence[str]] = (),
  *,
  words: int = 1,
  footer: Sequence[str] = (),
  caption: str | None = None,
) -> Table:
  """A table for the screen. Cells are shown as they are, without rich's markup.

  Args:
    title: shown above the table.
    columns: headings; if all are empty, none are shown.
    rows: lists of cells.
    words: number of leading columns that hold words, aligned left; the others hold numbers, aligned right.
    footer: a cell for each column.
    caption: shown below the table.
  """
  shown = Table(
    title=title and escape(title),
    caption=caption and escape(caption),
    title_justify="left",
    caption_justify="left",
    show_header=any(columns),
    show_footer=bool(footer),
    box=SIMPLE,
  )
  for i, (heading, total) in enumerate(zip(columns, footer or [""] * len(columns), strict=True)):
    shown.add_column(escape(heading), footer=escape(total), justify="left" if i < words else "right")
  for row in rows:
    shown.add_row(*map(escape, row))
  return shown


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
  """A table in Markdown. The leading `words` columns are aligned left, the others right; short rows end with empty cells."""
  lines = [columns, ["---"] * words + ["---:"] * (len(columns) - words)]
  lines += ([*row, *[""] * (len(columns) - len(row))] for row in rows)
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
