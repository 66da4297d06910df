"""What can befall a checkpoint's folder."""

import shutil


def truncate(folder):
  for path in _stored(folder):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bits(folder):
  """Here and there."""
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
  """The files with the arrays. All: which has what, and where it has what nobody refers to any more, is left to chance."""
  return [path for path in (folder / "state").rglob("d/*") if path.is_file()]
