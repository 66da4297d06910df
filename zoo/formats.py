"""Numbers as every report writes them."""


def thousands(number: float) -> str:
  """Three significant digits and a decimal unit: 1234567 is "1.23 M"."""
  for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if number >= size:
      return f"{number / size:.3g} {unit}"
  return f"{number:.3g} "


def binary(count: int) -> str:
  """Bytes in the largest binary unit that they fill: 1536 is "1.5 KiB"."""
  for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if count >= size:
      return f"{count / size:,.1f} {unit}"
  return f"{count} bytes"
