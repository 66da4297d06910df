"""One process at a time writes to a run's folder, also if several machines share the folder.

`RUN/.lock/` holds a numbered file. To take the lock is to create the file of the next number, which only one process can do.
The file with the highest number names its owner, and whether it still holds the lock; it is never removed before a higher one
exists, so no two processes can both replace the same owner.

An owner that was killed cannot give the lock back. A process of the same machine is looked up by its number and its start. Of
another machine, or another container, nothing can be looked up: an owner writes to its file every `BEAT` seconds, and is taken
for dead if the file has not changed for `PATIENCE` seconds. No clocks are compared.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

BEAT, PATIENCE, _POLL = 10.0, 60.0, 0.2


class Lock:
  """The lock of a folder, held from its creation until `release`.

  Args:
    directory: folder of the run; it must exist.
    say: called with a message if an earlier owner is waited for, or died.

  Raises:
    ValueError: if another process holds the lock.
  """

  def __init__(self, directory: Path, say: Callable[[str], None] = print):
    self._directory, self._folder = directory, directory / ".lock"
    self._folder.mkdir(exist_ok=True)
    self._owner = _this_process()
    self._path = self._take(say)
    self._stop = threading.Event()
    self._beats = threading.Thread(target=self._beat, name="memzoo lock", daemon=True)
    self._beats.start()

  def check(self) -> None:
    """Raises `OSError` if another process has taken the lock, since this one was taken for dead."""
    if _newest(self._folder) != int(self._path.name):
      raise OSError(
        f"another process has taken over {self._directory}, because this one was halted for more than {PATIENCE:.0f} s; "
        "expected to be the only one. Nothing more is written."
      )

  def release(self) -> None:
    """Gives the lock back."""
    self._stop.set()
    self._beats.join(timeout=PATIENCE)
    self._write(held=False)

  def _take(self, say: Callable[[str], None]) -> Path:
    while True:
      newest = _newest(self._folder)
      if newest:
        _wait_until_free(self._folder / str(newest), self._directory, say)
      path = self._folder / str(newest + 1)
      try:
        with path.open("x") as file:
          self._owner["inode"] = os.fstat(file.fileno()).st_ino
          file.write(json.dumps(self._owner))
      except FileExistsError:
        continue
      except OSError:  # such as a full disk: no file without an owner is left, for which the next would wait
        path.unlink(missing_ok=True)
        raise
      others = set(_numbers(self._folder)) - {newest + 1}
      if max(others, default=0) > newest:  # the file that was found was old, and so is the new one
        path.unlink()
        continue
      for number in others:
        (self._folder / str(number)).unlink(missing_ok=True)
      return path

  def _beat(self) -> None:
    while not self._stop.wait(BEAT):
      self._write(beats=self._owner["beats"] + 1)

  def _write(self, **changes: Any) -> None:
    """Changes the file, if it exists. A failure does no harm: the others are patient."""
    self._owner |= changes
    with suppress(OSError), self._path.open("r+") as file:
      file.write(json.dumps(self._owner))
      file.truncate()


def check_free(directory: Path) -> None:
  """Raises `ValueError` if a living process of this machine (not this one) holds the lock of `directory`."""
  folder = directory / ".lock"
  newest = _newest(folder) if folder.is_dir() else 0
  text, inode = _read(folder / str(newest)) if newest else ("", 0)
  owner = _parse(text or "")
  other = owner and owner["held"] and owner["process"] != os.getpid()
  if other and _is_here(owner, inode) and _is_alive(owner["process"], owner["started"]):
    raise _in_use(owner, directory)


def _wait_until_free(path: Path, directory: Path, say: Callable[[str], None]) -> None:
  """Returns when the owner that `path` names is dead or has released the lock; raises `ValueError` if it is alive."""
  first, began = None, time.monotonic()
  while True:
    text, inode = _read(path)
    owner = _parse(text or "")
    if text is None or (owner and not owner["held"]):
      return
    if owner and _is_here(owner, inode):
      if _is_alive(owner["process"], owner["started"]):
        raise _in_use(owner, directory)
      say(f"Process {owner['process']}, which trained in {directory} before, has died; this one takes over.")
      return
    if first is None:
      first = text
      if owner:
        say(f"Waiting to see whether process {owner['process']} on {owner['host']} still trains in {directory}.")
    elif owner and text != first:
      raise _in_use(owner, directory)
    if time.monotonic() - began > PATIENCE:
      say(f"No process has shown life in {directory} for {PATIENCE:.0f} s; this one takes over.")
      return
    time.sleep(_POLL)


def _read(path: Path) -> tuple[str | None, int]:
  """The text and the inode of a file; None if there is no file any more."""
  try:
    with path.open() as file:  # anew every time, since a network file system looks again only then
      return file.read(), os.fstat(file.fileno()).st_ino
  except FileNotFoundError:
    return None, 0


def _is_here(owner: dict[str, Any], inode: int) -> bool:
  """Whether the owner can be looked up: it is on this machine, and its file is no copy."""
  return owner["machine"] == _machine() and owner["inode"] == inode


def _in_use(owner: dict[str, Any], directory: Path) -> ValueError:
  return ValueError(
    f"{directory} is in use by process {owner['process']} on {owner['host']}, since {owner['since']}; expected a folder of its "
    "own for each run, or that process to have ended."
  )


def _numbers(folder: Path) -> list[int]:
  return [int(name) for name in os.listdir(folder) if name.isdigit()]


def _newest(folder: Path) -> int:
  """The highest number of a file in `folder`, or 0."""
  return max(_numbers(folder), default=0)


def _parse(text: str) -> dict[str, Any] | None:
  """The owner that a file names; None if its owner is about to write it."""
  with suppress(json.JSONDecodeError):
    found = json.loads(text)
    if isinstance(found, dict) and found.keys() >= {*_this_process(), "inode"}:
      return found
  return None


def _this_process() -> dict[str, Any]:
  return {
    "host": socket.gethostname(),
    "machine": _machine(),
    "process": os.getpid(),
    "started": _start(os.getpid()),
    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    "beats": 0,
    "held": True,
  }


def _machine() -> list[str]:
  """What processes share that can look each other up: the host, its last boot, and the container."""
  found = [socket.gethostname()]
  with suppress(OSError):
    found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    found.append(os.readlink("/proc/self/ns/pid"))
  return found


def _is_alive(process: int, started: str | None) -> bool:
  """Whether a process of this machine that began at `started` still runs."""
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # it belongs to another user
    pass
  now = _start(process)
  return now is None or now == started


def _start(process: int) -> str | None:
  """When a process began, in ticks since boot; "dead" for one that awaits its parent, None if the system does not tell."""
  try:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return None
  return "dead" if fields[0] in "ZX" else fields[19]
