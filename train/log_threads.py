"""Copies the rows of `metrics.jsonl` to loggers, each in a thread of its own, so that a slow or broken one costs no step.

The file is the queue: a thread remembers how far it has read, and what a logger could not take is read again later, so nothing
is lost. `loggers/NAME.json` in the run's folder holds the name of the record and its last step. A resumed run goes on from
there, and a logger that was added later, or failed for a while, gets all steps that it lacks.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .files import read_record, write_record
from .loggers import LoggedRun, Logger, Row, find_loggers

_PAUSE = 1.0  # seconds between two looks at the file
_RETRY = 60.0  # seconds from a failure to the next attempt
_PATIENCE = 15.0  # seconds that a run waits for its loggers at its end
_ROWS = 200  # in one call of a logger
_RATES = 1000  # that are kept for loggers that are behind
_ATTACHED = ("config.gin", "result.json", "sample.txt", "loss.png")


@dataclass(frozen=True)
class Position:
  """What is known of a logger's record: its name and the last step that it has had."""

  record: str = ""
  step: int = 0


class LogThreads:
  """The loggers of a run. A context manager, whose end waits for them, but not for long.

  Args:
    directory: folder of the run.
    names: of the loggers; see `find_loggers`.
    settings: the settings of the run, as name -> text.
    first_step: number of steps taken before; with 0 all records are new.
    say: prints a line.
  """

  def __init__(
    self, directory: Path, names: Sequence[str], settings: Mapping[str, str], first_step: int, say: Callable[[str], None]
  ):
    self._directory, self._status, self._result = directory, "interrupted", {}
    self._rates: dict[int, float] = {}
    folder = directory / "loggers"
    if not first_step:
      for path in folder.glob("*.json"):
        path.unlink()
    if names:
      folder.mkdir(exist_ok=True)
    run = LoggedRun(directory.resolve(), settings)
    loggers = {name: logger() for name, logger in find_loggers(names).items()}
    self._threads = [_LogThread(name, logger, run, first_step, self._rates, say) for name, logger in loggers.items()]

  def __enter__(self) -> "LogThreads":
    for thread in self._threads:
      thread.start()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    if kind and not issubclass(kind, KeyboardInterrupt):
      self._status = "failed"
    files = [self._directory / name for name in _ATTACHED if (self._directory / name).exists()]
    end = _End(self._status, self._result, files)
    for thread in self._threads:
      thread.end(end)
    deadline = time.monotonic() + _PATIENCE
    for thread in self._threads:
      thread.join(max(0.0, deadline - time.monotonic()))
      thread.leave()

  def rate(self, step: int, tokens_per_second: float) -> None:
    """Adds a rate to the row of a step. It is not in `metrics.jsonl`, which is the same for equal runs."""
    self._rates[step] = tokens_per_second
    if len(self._rates) > _RATES:
      del self._rates[next(iter(self._rates))]

  def wake(self) -> None:
    """Tells the loggers that there are new rows."""
    for thread in self._threads:
      thread.wake()

  def finish(self, result: Mapping[str, Any]) -> None:
    """Takes the result of a run that has no steps left, for the end of the `with` block."""
    self._status, self._result = "finished", result


@dataclass(frozen=True)
class _End:
  """How a run ended: see `Logger.finish` and `Logger.close`."""

  status: str
  result: Mapping[str, Any]
  files: Sequence[Path]


class _LogThread(threading.Thread):
  """Copies the rows of a run to one logger."""

  def __init__(
    self,
    name: str,
    logger: Logger,
    run: LoggedRun,
    first_step: int,
    rates: Mapping[int, float],
    say: Callable[[str], None],
  ):
    super().__init__(name=f"logger {name}", daemon=True)  # the interpreter does not wait for it
    self._called, self._logger, self._run, self._rates, self._say = name, logger, run, rates, say
    self._kept = run.directory / "loggers" / f"{name}.json"
    remedy = "remove it, and the run gets a new record"
    kept = read_record(Position, self._kept, remedy) if self._kept.exists() else Position()
    self._position = replace(kept, step=min(kept.step, first_step))  # the steps after a checkpoint are taken again
    self._unsafe_seconds = getattr(logger, "unsafe_seconds", 0.0)
    self._taken: deque[tuple[float, Position]] = deque()  # positions that are not written down yet, with their times
    self._offset, self._begun, self._error = 0, False, ""
    self._awake, self._ending, self._left = threading.Event(), threading.Event(), False
    self._end: _End | None = None

  def wake(self) -> None:
    """New rows are in the file."""
    self._awake.set()

  def end(self, end: _End) -> None:
    """No more rows will come."""
    self._end = end
    self._ending.set()
    self._awake.set()

  def leave(self) -> None:
    """Reports what the logger lacks. If it is still busy, it is not waited for."""
    self._left = True
    why = self._error or (f"no answer in {_PATIENCE:.0f} s" if self.is_alive() else "")
    if why:
      self._say(f"{self._called}: the record may end at step {self._position.step} ({why}). metrics.jsonl has every step.")

  def run(self) -> None:
    ended = False
    while not ended and not self._left:
      ended = self._ending.is_set()  # before reading, so that the last rows are read
      self._try(ended)
      if not ended:
        self._ending.wait(_RETRY if self._error else _PAUSE)
        self._awake.wait()
        self._awake.clear()

  def _try(self, ended: bool) -> None:
    """Copies what is new, and closes the record if the run has ended. Says so if that fails, and if it works again."""
    try:
      self._copy()
      if ended:
        self._close()
    except Exception as error:  # whatever a library or a server does wrong, the run goes on
      self._fail(error)
    else:
      if self._error:
        self._say(f"{self._called}: works again, and has every step up to {self._position.step}.")
      self._error = ""

  def _fail(self, error: Exception) -> None:
    new, self._error = not self._error, _in_a_line(error)
    if new and not self._ending.is_set():
      self._say(f"{self._called} failed ({self._error}). The run goes on; the logger is tried again every {_RETRY:.0f} s.")

  def _copy(self) -> None:
    """Begins if that has not happened yet, and gives the logger all rows that it has not had."""
    if not self._begun:
      last = self._position
      record, where = self._logger.begin(self._run._replace(record=last.record, last_step=last.step)) or ("", "")
      self._begun, self._position = True, replace(last, record=record)
      write_record(self._kept, self._position)
      if where:
        self._say(f"{self._called}: {where}")
    for rows, offset in self._unread():
      if rows:
        self._logger.log(rows)
        self._keep(replace(self._position, step=int(rows[-1]["step"])))
      self._offset = offset
      if self._left:
        return

  def _close(self) -> None:
    if self._end.status != "failed":
      self._logger.finish(self._end.result, self._end.files)
    self._logger.close(self._end.status)
    write_record(self._kept, self._position)

  def _keep(self, position: Position) -> None:
    """Notes what the logger has taken, and writes down what a kill would not lose."""
    now, safe = time.monotonic(), None
    self._position = position
    self._taken.append((now, position))
    while self._taken and self._taken[0][0] <= now - self._unsafe_seconds:
      safe = self._taken.popleft()[1]
    if safe:
      write_record(self._kept, safe)

  def _unread(self) -> Iterator[tuple[list[Row], int]]:
    """Rows that the logger has not had, a few at a time, and the place in the file after them."""
    rows, offset = [], self._offset
    with (self._run.directory / "metrics.jsonl").open("rb") as metrics:
      metrics.seek(offset)
      for line in metrics:
        if not line.endswith(b"\n"):
          break  # the rest is not written yet
        offset += len(line)
        row = flat(json.loads(line))
        if row["step"] > self._position.step:
          rate = self._rates.get(row["step"])
          rows.append(row if rate is None else row | {"tokens_per_second": rate})
        if len(rows) == _ROWS:
          yield rows, offset
          rows = []
    yield rows, offset


def flat(row: Mapping[str, Any], prefix: str = "") -> Row:
  """A row with the numbers of its groups as "group_norms/NAME", without those that were not finite, which are null."""
  found: Row = {}
  for name, value in row.items():
    if isinstance(value, Mapping):
      found |= flat(value, f"{prefix}{name}/")
    elif value is not None:
      found[prefix + name] = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
  return found


def _in_a_line(error: Exception) -> str:
  """The kind of an error and the beginning of its message."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
