"""Loggers: they show a run elsewhere, in TensorBoard, Weights & Biases, MLflow, or a class of the user's own.

`metrics.jsonl` has every number of a run; a logger copies its rows. Each works in a thread of its own (`log_threads.py`), so it
may wait for a server, or fail. This file imports the libraries of the loggers only where they are used.
"""

import netrc
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol
from urllib.parse import urlsplit

from .user_modules import import_class
from .values import did_you_mean

Row = dict[str, float]
_MLFLOW_BATCH, _MLFLOW_LENGTH = 1000, 500  # metrics in one request; characters of a parameter


class LoggedRun(NamedTuple):
  """What a logger is told about a run when it begins.

  Attributes:
    directory: folder of the run, an absolute path.
    settings: every setting of the run's config, as name -> text.
    record: the name of the record to go on with, as an earlier `begin` for this run returned it; "" begins a new one.
    last_step: the last step that this record has had; 0 for a new record.
  """

  directory: Path
  settings: Mapping[str, str]
  record: str = ""
  last_step: int = 0


class Logger(Protocol):
  """The interface of loggers. A class of the user's own derives from it, or has the same methods; it takes no arguments.

  All methods are called in one thread, in this order. An exception is reported once, and the call is repeated later.
  """

  libraries: ClassVar[Sequence[str]] = ()  # modules that must be installed
  extra: ClassVar[str] = ""  # the extra of memzoo that installs them
  environment: ClassVar[Mapping[str, str]] = {}  # variables set before they are imported, unless the user has set them
  unsafe_seconds: ClassVar[float] = 0.0  # for which a kill can still lose rows that `log` has taken

  def begin(self, run: LoggedRun) -> tuple[str, str] | None:
    """Opens the record of a run. Returns its name, and a few words that say where it is, or "" or None for nothing to say."""

  def log(self, rows: Sequence[Row]) -> None:
    """Takes rows of `metrics.jsonl`: "step" and numbers, those of groups as "group_norms/...".

    After a kill, rows since the last checkpoint, and those that a kill may have lost, come a second time; the later row of a
    step counts.
    """

  def finish(self, result: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Takes what a run leaves at its end.

    Args:
      result: the object in `result.json`; empty if the run was interrupted.
      files: those of `config.gin`, `result.json`, `sample.txt` and `loss.png` that there are.
    """

  def close(self, status: str) -> None:
    """Closes the record. `status` is "finished", "interrupted" (to be resumed) or "failed"."""


class TensorBoardLogger(Logger):
  """Event files in the run's folder. Steps that come again replace the earlier ones when they are read."""

  libraries = ("tensorboardX",)

  def begin(self, run: LoggedRun) -> tuple[str, str]:
    from tensorboardX import SummaryWriter

    folder = run.directory / "tensorboard"
    self._writer = SummaryWriter(str(folder), purge_step=run.last_step + 1)
    self._step = run.last_step
    return "", ""  # the summary of a run names the folder

  def log(self, rows: Sequence[Row]) -> None:
    for row in rows:
      self._step = row["step"]
      for name, value in _numbers(row).items():
        self._writer.add_scalar(name, value, self._step)
    self._writer.flush()

  def finish(self, result: Mapping[str, Any], files: Sequence[Path]) -> None:
    for path in files:
      if path.suffix == ".png":
        from matplotlib.image import imread

        self._writer.add_image(path.stem, imread(path), self._step, dataformats="HWC")
      else:
        text = path.read_text(encoding="utf-8").splitlines()
        self._writer.add_text(path.name, "\n".join(f"    {line}" for line in text), self._step)  # indented: Markdown's code

  def close(self, status: str) -> None:
    self._writer.close()


class WandbLogger(Logger):
  """A run of Weights & Biases.

  The variables of wandb hold: WANDB_PROJECT (default "memzoo"), WANDB_ENTITY, WANDB_MODE and others. Without WANDB_MODE it is
  online if there is a key in WANDB_API_KEY or `~/.netrc`, else offline. The axis of its charts is "step"; after a kill
  some steps are in the record twice.
  """

  libraries = ("wandb",)
  extra = "wandb"
  environment: ClassVar = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
  unsafe_seconds = 20.0  # wandb writes every 15 seconds, and ends at once when the process does

  def begin(self, run: LoggedRun) -> tuple[str, str]:
    import wandb

    record = run.record or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", "memzoo"),
      name=os.environ.get("WANDB_NAME", run.directory.name),
      id=record,
      resume="allow",
      dir=os.environ.get("WANDB_DIR", str(run.directory)),
      mode=os.environ.get("WANDB_MODE") or _wandb_mode(),
      reinit="create_new",  # beside a run of the user's own in this process
      # The terminal is the run's own. The limits keep a process from waiting at its exit for a server that is gone.
      settings=wandb.Settings(silent=True, console="off", init_timeout=20, finish_timeout=10, finish_timeout_raises=True),
    )
    self._directory, self._next = run.directory, self._run.step
    self._run.define_metric("step", hidden=True)
    self._run.define_metric("*", step_metric="step")
    self._run.config.update(dict(run.settings), allow_val_change=True)
    return record, self._run.url or f"offline, in {Path(self._run.dir).parent}"

  def log(self, rows: Sequence[Row]) -> None:
    for row in rows:
      # wandb drops what is not after its own last step, also of a step that was taken again; so its own step goes on.
      at = max(self._next, int(row["step"]))
      self._run.log(row, step=at, commit=True)
      self._next = at + 1

  def finish(self, result: Mapping[str, Any], files: Sequence[Path]) -> None:
    self._run.summary.update({f"result/{name}": value for name, value in result.items()})
    for path in files:
      self._run.save(str(path), base_path=str(self._directory), policy="now")

  def close(self, status: str) -> None:
    self._run.finish(exit_code={"finished": 0, "interrupted": 255}.get(status, 1))


def _wandb_mode() -> str:
  """Whether the user has given wandb a key, and so wants it to upload. Without one it would ask on the terminal."""
  if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
    return "online"
  host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
  try:
    return "online" if netrc.netrc(os.environ.get("NETRC")).authenticators(host) else "offline"
  except (OSError, netrc.NetrcParseError):
    return "offline"


class MlflowLogger(Logger):
  """A run of MLflow.

  It is at MLFLOW_TRACKING_URI, or in `mlflow/` in the run's folder. The experiment is MLFLOW_EXPERIMENT_NAME, or "memzoo".
  MLflow never changes a parameter: settings that differ when the run is resumed become tags. The history of a metric has
  the steps that are taken again after a kill twice, and the value of the later time counts.
  """

  libraries = ("mlflow", "sqlalchemy", "alembic")  # the last two are those of its local store
  extra = "mlflow"
  # A request to a server that is gone ends soon; it is repeated later.
  environment: ClassVar = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
  }
  _STATUS: ClassVar = {"finished": "FINISHED", "interrupted": "KILLED"}

  def __init__(self):
    self._id = ""

  def begin(self, run: LoggedRun) -> tuple[str, str]:
    from mlflow import MlflowClient

    own, uri = run.directory / "mlflow", os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
      own.mkdir(exist_ok=True)
    self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{own / 'mlflow.db'}")
    self._step = run.last_step
    self._id = self._id or run.record or os.environ.get("MLFLOW_RUN_ID", "")
    self._id = self._id or self._create(run, None if uri else own / "artifacts")
    self._client.update_run(self._id, status="RUNNING")
    self._log_settings(run.settings)
    return self._id, f"run {self._id} at {uri}" if uri else f"in {own / 'mlflow.db'}"

  def _create(self, run: LoggedRun, artifacts: Path | None) -> str:
    """Makes a new run, and the experiment if there is none."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "memzoo")
    found = self._client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else self._client.create_experiment(name, artifacts and artifacts.as_uri())
    tags = {"mlflow.source.name": str(run.directory)}
    return self._client.create_run(experiment, run_name=run.directory.name, tags=tags).info.run_id

  def _log_settings(self, settings: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    there = self._client.get_run(self._id).data.params
    shortened = {name: value[:_MLFLOW_LENGTH] for name, value in settings.items()}
    params = [Param(name, value) for name, value in shortened.items() if name not in there]
    tags = [RunTag(name, value) for name, value in shortened.items() if there.get(name, value) != value]
    for start in range(0, max(len(params), len(tags)), 100):  # at most 100 in one request
      self._client.log_batch(self._id, params=params[start : start + 100], tags=tags[start : start + 100])

  def log(self, rows: Sequence[Row]) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    metrics = [Metric(name, value, now, int(row["step"])) for row in rows for name, value in _numbers(row).items()]
    for start in range(0, len(metrics), _MLFLOW_BATCH):
      self._client.log_batch(self._id, metrics=metrics[start : start + _MLFLOW_BATCH])
    self._step = rows[-1]["step"]

  def finish(self, result: Mapping[str, Any], files: Sequence[Path]) -> None:
    numbers = {f"result/{name}": value for name, value in result.items() if isinstance(value, (int, float))}
    self.log([{"step": self._step} | numbers])
    for path in files:
      self._client.log_artifact(self._id, str(path))

  def close(self, status: str) -> None:
    self._client.set_terminated(self._id, self._STATUS.get(status, "FAILED"))


def _numbers(row: Row) -> Row:
  return {name: value for name, value in row.items() if name != "step"}


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger, "mlflow": MlflowLogger}


def logger_names(names: str | Sequence[str]) -> tuple[str, ...]:
  """The names of loggers in `Trainer.loggers`, a tuple or a string with commas.

  Raises:
    ValueError: if a name is neither in `LOGGERS` nor has the form "my_module.MyLogger", which is not imported here.
  """
  parts = names.split(",") if isinstance(names, str) else names
  found = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
  for name in found:
    if name not in LOGGERS and "." not in name:
      raise ValueError(
        f"Trainer.loggers has {name!r}{did_you_mean(name, LOGGERS)} Expected some of {', '.join(LOGGERS)}, or a class of your "
        "own, my_module.MyLogger."
      )
  return found


def find_loggers(names: Sequence[str]) -> dict[str, type]:
  """The classes of loggers by name: one of `LOGGERS`, or "my_module.MyLogger".

  Raises:
    ValueError: if there is none of that name, or a library that it needs is not installed.
  """
  found = {}
  for name in names:
    found[name] = LOGGERS.get(name) or import_class(name, "logger", f"one of {', '.join(LOGGERS)}")
    _check(name, found[name])
  return found


def _check(name: str, logger: type) -> None:
  if missing := [method for method in ("begin", "log", "finish", "close") if not hasattr(logger, method)]:
    raise ValueError(f"Trainer.loggers has {name!r}, which has no method {missing[0]}; expected a class like memzoo's Logger.")
  for library in getattr(logger, "libraries", ()):
    spec = find_spec(library)
    if spec is None or spec.origin is None:  # a folder of that name, such as wandb's own output, is no library
      extra = getattr(logger, "extra", "")
      remedy = f'"memzoo[{extra}]"' if extra else library
      raise ValueError(f"Trainer.loggers has {name!r}, which needs {library}: pip install {remedy}.")
  for variable, value in getattr(logger, "environment", {}).items():
    os.environ.setdefault(variable, value)
