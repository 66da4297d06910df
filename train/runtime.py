"""What a run needs from its process: a quiet start, signals that wait until a step has ended, and a stopwatch."""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils


def start_quietly() -> None:
  """Starts JAX's backends without their libraries' warnings about absent accelerators.

  Some warnings come from C++ and do not pass through Python's streams, so the file descriptors are redirected. If the start
  fails, the redirected output is shown.
  """
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  saved = [os.dup(1), os.dup(2)]
  with tempfile.TemporaryFile() as aside:
    for descriptor in (1, 2):
      os.dup2(aside.fileno(), descriptor)
    try:
      jax.devices()
      multihost_utils.sync_global_devices("started")  # the first collective prints a message too
    except Exception:
      aside.seek(0)
      os.write(saved[1], aside.read())
      raise
    finally:
      for descriptor, before in zip((1, 2), saved, strict=True):
        os.dup2(before, descriptor)
        os.close(before)


class Stopwatch:
  """Measures the time of each activity in a loop: `with watch("step"): ...` adds to `watch.seconds["step"]`."""

  def __init__(self):
    self.restart()

  def restart(self) -> None:
    """Sets all times to zero and starts again."""
    self.seconds = dict.fromkeys(("step", "evaluation", "checkpoints", "input", "reporting"), 0.0)
    self._began, self.total = time.perf_counter(), 0.0

  def stop(self) -> None:
    """Sets `total`, the seconds since the start."""
    self.total = time.perf_counter() - self._began

  def shares(self) -> dict[str, float]:
    """Each activity's share of `total`."""
    return {name: seconds / self.total for name, seconds in self.seconds.items()}

  @contextmanager
  def __call__(self, activity: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    self.seconds[activity] += time.perf_counter() - began


@contextmanager
def interruptions() -> Iterator[list[signal.Signals]]:
  """Catches SIGTERM and SIGINT inside a `with` block. Yields a list to which they are appended.

  A second SIGINT raises `KeyboardInterrupt` as usual. Outside the main thread Python delivers no signals, and the list
  stays empty.
  """
  caught: list[signal.Signals] = []
  if threading.current_thread() is not threading.main_thread():
    yield caught
    return

  def catch(number: int, frame: Any) -> None:
    caught.append(signal.Signals(number))
    signal.signal(signal.SIGINT, signal.default_int_handler)

  before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield caught
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
