"""Ways to damage a checkpoint's folder."""

import shutil


def truncate(folder):
  for path in _stored(folder):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bits(folder):
  """Flips a bit in every 199th byte."""
  for path in _stored(folder):
    content = bytearray(path.read_bytes())
    content[::199] = bytes(byte ^ 16 for byte in content[::199])
    path.write_bytes(content)


def empty_every_file(folder):
  for path in folder.rglob("*"):
    if path.is_file():
      path.write_bytes(b"")


def lose_the_position(folder):
  shutil.rmtree(folder / "data")


def lose_the_state(folder):
  shutil.rmtree(folder / "state")


def lose_the_facts(folder):
  (folder / "facts" / "metadata").unlink()


def _stored(folder):
  """All files with arrays. Which file holds which array varies, and some hold data that is no longer in use."""
  return [path for path in (folder / "state").rglob("d/*") if path.is_file()]
