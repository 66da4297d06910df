"""What the folder of a run holds, finished or not, read for a report. What cannot be read becomes a line that says why."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from .config import Experiment, build_text
from .files import read_record, read_text
from .lock import check_free
from .report import MEASURES, Row, read_rows
from .run_folder import Result, complete_checkpoints, run_of, settings

_HEAD, _TAIL = 12, 4  # bytes before and after an event: its length and its checksum, and that of its content


@dataclass(frozen=True)
class RunRecord:
  """The folder of a run.

  Attributes:
    directory: the folder.
    text: its operative configuration, as it is in the file.
    experiment: built from it; `None` if this version of memzoo cannot.
    rows: those of `metrics.jsonl`.
    result: of a run that has taken all its steps; else `None`.
    checkpoints: the steps of the complete checkpoints, ascending.
    running: whether a process trains in the folder now.
    sample: the text of `sample.txt`, or "".
    rates: tokens per second by step, from the events for TensorBoard.
    missing: lines about what is not there, or cannot be read.
  """

  directory: Path
  text: str
  experiment: Experiment | None
  rows: list[Row]
  result: Result | None
  checkpoints: list[int]
  running: bool
  sample: str
  rates: dict[int, float]
  missing: list[str] = field(default_factory=list)

  @property
  def name(self) -> str:
    return self.directory.resolve().name

  @property
  def settings(self) -> dict[str, str]:
    return settings(self.text)

  @property
  def steps(self) -> int | None:
    """The number of steps that the run is to take, if the configuration says it."""
    text = self.settings.get("Trainer.steps", "")
    return int(text) if text.isdigit() else None

  @property
  def step(self) -> int:
    """The number of steps that it has taken."""
    return self.rows[-1]["step"] if self.rows else self.result.step if self.result else 0

  @property
  def measure(self) -> str:
    """The number in each row besides the loss, one of `MEASURES`, or "loss"."""
    return next((name for name in MEASURES if self.rows and name in self.rows[0]), "loss")

  def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps of the rows that have a number `name`, and the numbers; nan for those that were not finite."""
    found = [(row["step"], row[name]) for row in self.rows if name in row]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, int), np.array(values, float)


def read_run(directory: Path) -> RunRecord:
  """Reads the folder of a run.

  Raises:
    ValueError: if it is no run, or its configuration is empty.
  """
  if run_of(directory) is None:
    raise ValueError(
      f"{directory} is no run: it has no config.gin; expected a folder that `memzoo train` has written, or one of `memzoo "
      "compare` with a results.json."
    )
  missing: list[str] = []
  text = read_text(directory / "config.gin", "a checkpoint's facts hold it as well")
  rows = _attempt(lambda: _rows(directory), [], "No curves", missing)
  checkpoints = complete_checkpoints(directory)
  if not checkpoints:
    missing.append("No checkpoint: the run has saved none yet, or they were removed.")
  name = directory.resolve().name
  return RunRecord(
    directory=directory,
    text=text,
    experiment=_attempt(lambda: build_text(text, name, directory), None, "No description of the model", missing),
    rows=rows,
    result=_attempt(lambda: _result(directory), None, "No result", missing),
    checkpoints=checkpoints,
    running=_is_running(directory),
    sample=_sample(directory),
    rates=read_scalars(directory / "tensorboard", "tokens_per_second"),
    missing=missing,
  )


def _attempt(read: Callable[[], Any], otherwise: Any, what: str, missing: list[str]) -> Any:
  """`read()`; if it fails, `otherwise`, and `what` is missing."""
  try:
    return read()
  except (ValueError, OSError) as error:
    missing.append(f"{what}: {error}")
    return otherwise


def _rows(directory: Path) -> list[Row]:
  path = directory / "metrics.jsonl"
  rows = read_rows(path) if path.exists() else []
  if not rows:
    raise ValueError("metrics.jsonl has no steps yet.")
  return rows


def _result(directory: Path) -> Result | None:
  path = directory / "result.json"
  return read_record(Result, path, "remove it, and `memzoo train` on the folder writes it again") if path.exists() else None


def _is_running(directory: Path) -> bool:
  try:
    check_free(directory)
  except (ValueError, OSError):
    return True
  return False


def _sample(directory: Path) -> str:
  path = directory / "sample.txt"
  return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def read_scalars(folder: Path, name: str) -> dict[int, float]:
  """The values of a scalar by step, from TensorBoard's event files in `folder`; those of a later file win.

  A file is a series of events, each between its length and a checksum. An event that is cut or damaged ends its file.
  """
  found: dict[int, float] = {}
  for path in sorted(folder.glob("events.out.tfevents.*")):  # their names begin with the time
    data, place = path.read_bytes(), 0
    while place + _HEAD <= len(data):
      (length,) = struct.unpack_from("<Q", data, place)
      event = _parsed(data[place + _HEAD : place + _HEAD + length])
      place += _HEAD + length + _TAIL
      if place > len(data) or event is None:
        break
      for value in event.summary.value:
        if value.tag == name:
          found[event.step] = value.simple_value
  return dict(sorted(found.items()))


def _parsed(data: bytes) -> Any:
  try:
    return Event.FromString(data)
  except Exception:  # protobuf raises an exception of its own package
    return None
