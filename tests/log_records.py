"""Reads what loggers have written: TensorBoard's event files, Weights & Biases' .wandb files, MLflow's local store.

Each function returns the last value of every name at every step: {(step, name): value}.
"""

import json
import struct
from pathlib import Path

Numbers = dict[tuple[int, str], float]


def in_metrics(run: Path) -> Numbers:
  """The numbers of `metrics.jsonl`, for comparison."""
  found = {}
  for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
    groups = row.pop("group_norms", {})
    numbers = row | {f"group_norms/{name}": value for name, value in groups.items()}
    found |= {(row["step"], name): float(value) for name, value in numbers.items() if name != "step" and value is not None}
  return found


def in_tensorboard(run: Path) -> Numbers:
  """As TensorBoard reads them: a writer that starts at a step takes the place of what was written for it and later steps."""
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  found: Numbers = {}
  for path in sorted((run / "tensorboard").glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
    for message in _tensorboard_messages(path.read_bytes()):
      event = Event.FromString(message)
      if event.session_log.status == SessionLog.START:
        found = {key: value for key, value in found.items() if key[0] < event.step}
      found |= {(event.step, v.tag): v.simple_value for v in event.summary.value if v.WhichOneof("value") == "simple_value"}
  return found


def _tensorboard_messages(data: bytes):
  at = 0
  while at + 12 <= len(data):
    (length,) = struct.unpack_from("<Q", data, at)
    yield data[at + 12 : at + 12 + length]
    at += 16 + length


def in_wandb(run: Path) -> tuple[Numbers, list]:
  """The numbers by the metric "step", and all records, of the offline parts of a run in their order."""
  from wandb.proto.wandb_internal_pb2 import Record

  found: Numbers = {}
  records = []
  for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
    for message in _wandb_messages(path.read_bytes()):
      records.append(record := Record.FromString(message))
      if record.WhichOneof("record_type") == "history":
        row = {key_of(item): json.loads(item.value_json) for item in record.history.item}
        found |= {(row["step"], name): value for name, value in row.items() if name != "step" and not name.startswith("_")}
  return found, records


def key_of(item) -> str:
  """The name in an item of a record of wandb."""
  return item.key or "/".join(item.nested_key)


def _wandb_messages(data: bytes):
  """A .wandb file is a log of LevelDB: blocks of 32 KiB, of pieces with a checksum, a length and a type."""
  at, message = 7, b""  # after the file's header
  while at + 7 <= len(data):
    if 32768 - at % 32768 < 7:  # too little of the block is left for a piece
      at += 32768 - at % 32768
      continue
    length, kind = struct.unpack_from("<HB", data, at + 4)
    if not kind or at + 7 + length > len(data):
      return  # a kill left it incomplete
    message += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or the last piece
      yield message
      message = b""


def in_mlflow(run: Path):
  """The numbers in a run's local store, and MLflow's own object of the run."""
  from mlflow import MlflowClient

  client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
  (experiment,) = client.search_experiments(filter_string="name = 'memzoo'")
  (entry,) = client.search_runs([experiment.experiment_id])
  found: Numbers = {}
  for name in entry.data.metrics:
    history = client.get_metric_history(entry.info.run_id, name)
    found |= {(point.step, name): point.value for point in sorted(history, key=lambda point: point.timestamp)}
  return found, entry
