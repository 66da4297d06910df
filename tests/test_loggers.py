"""Loggers: they hold what `metrics.jsonl` holds, across kills, and cost a run no step when they fail."""

import json
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fake_loggers import FakeMlflow, FakeWandb, Recorder
from log_records import in_metrics, in_mlflow, in_tensorboard, in_wandb, key_of
from memzoo.train import log_threads, loggers
from memzoo.train.config import build, build_text
from memzoo.train.log_threads import LogThreads
from memzoo.train.loggers import LOGGERS, MlflowLogger, WandbLogger, find_loggers
from memzoo.train.loop import train
from memzoo.train.report import Report
from memzoo.train.trainer import Trainer
from tiny_run import convolution_model, import_path, quick_runs, tiny_experiment

pytestmark = [pytest.mark.usefixtures(quick_runs.__name__), pytest.mark.xdist_group("training")]


@pytest.fixture
def recorder(monkeypatch):
  """The logger "recorder", the same one in all runs of a test."""
  found = Recorder()
  monkeypatch.setitem(LOGGERS, "recorder", found.__class__)
  monkeypatch.setattr(Recorder, "__new__", lambda cls: found)
  monkeypatch.setattr(Recorder, "__init__", lambda self: None)
  for name, seconds in (("_PAUSE", 0.0), ("_RETRY", 0.05), ("_PATIENCE", 20.0)):
    monkeypatch.setattr(log_threads, name, seconds)
  return found


class Run:
  """The folder of a run without the run."""

  def __init__(self, folder: Path):
    self.folder, self.said = folder, []
    (folder / "metrics.jsonl").touch()

  def write(self, *steps: int, end: str = "\n", **more) -> None:
    with (self.folder / "metrics.jsonl").open("a") as file:
      file.write("".join(json.dumps({"step": step, "loss": 1 / step} | more) + end for step in steps))

  def threads(self, *names: str, first_step: int = 0) -> LogThreads:
    return LogThreads(self.folder, names, {"Trainer.steps": "9"}, first_step, self.said.append)


@pytest.fixture
def run(tmp_path):
  return Run(tmp_path)


def wait_for(condition):
  """Waits until `condition()` holds."""
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end, "this took too long"
    time.sleep(0.002)


# Names.


def test_loggers_are_named_in_a_tuple_or_in_a_string():
  assert Trainer().loggers == ("tensorboard",)
  assert Trainer(loggers="wandb").loggers == ("wandb",)
  assert Trainer(loggers="mlflow, tensorboard,mlflow").loggers == ("mlflow", "tensorboard")
  assert Trainer(loggers=("my_module.Mine", "wandb")).loggers == ("my_module.Mine", "wandb")
  assert Trainer(loggers=()).loggers == ()


def test_loggers_are_set_on_the_command_line():
  for text in ("tensorboard,wandb", "('tensorboard', 'wandb')", "['tensorboard', 'wandb']"):
    experiment = build("quickstart", [f"Trainer.loggers={text}"])
    assert experiment.trainer.loggers == ("tensorboard", "wandb")
    assert build_text(experiment.text, "again").trainer == experiment.trainer
  assert build("quickstart", ["Trainer.loggers=()"]).trainer.loggers == ()


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ("wand", "has 'wand': did you mean 'wandb'? Expected some of tensorboard, wandb, mlflow, or a class"),
    (("tensorboard", "comet"), "has 'comet'. Expected some of"),
  ],
)
def test_an_unknown_logger_is_refused_with_the_names_that_there_are(names, message):
  with pytest.raises(ValueError, match=r"Trainer\.loggers has") as error:
    Trainer(loggers=names)
  assert message in str(error.value)


def test_a_logger_whose_library_is_missing_is_refused_before_the_first_step(tmp_path, monkeypatch):
  missing = {"wandb": None, "sqlalchemy": SimpleNamespace(origin=None), "mlflow": SimpleNamespace(origin="mlflow.py")}
  monkeypatch.setattr(loggers, "find_spec", lambda name: missing.get(name, find_spec(name)))
  with pytest.raises(ValueError, match=r"has 'wandb', which needs wandb: pip install \"memzoo\[wandb\]\"\.$"):
    train(tiny_experiment(tmp_path, loggers=("tensorboard", "wandb")), tmp_path / "run")
  assert not (tmp_path / "run" / "config.gin").exists()
  with pytest.raises(ValueError, match=r"needs sqlalchemy: pip install \"memzoo\[mlflow\]\""):
    find_loggers(["mlflow"])  # there is a folder of that name, and no library


def test_a_logger_may_be_a_class_of_the_users_own(run, monkeypatch):
  (run.folder / "own_logger.py").write_text(
    "from memzoo.train.loggers import Logger\n"
    "class Mine(Logger):\n"
    "  rows = []\n"
    "  def log(self, rows):\n    self.rows += rows\n"
    "class Half:\n  def log(self, rows): ...\n"
    "class Needy(Mine):\n  libraries = ('no_such_library',)\n"
  )
  monkeypatch.chdir(run.folder)
  mine = find_loggers(["own_logger.Mine"])["own_logger.Mine"]
  with run.threads("own_logger.Mine"):
    run.write(1, 2)
  assert [row["step"] for row in mine.rows] == [1, 2]
  assert run.said == []
  messages = {"Half": "no method begin", "Needy": "needs no_such_library: pip install no_such_library", "No": "nor a class"}
  for name, message in messages.items():
    with pytest.raises(ValueError, match=message):
      find_loggers([f"own_logger.{name}"])


# Rows.


def test_a_logger_gets_every_row_with_its_groups_and_rate_and_without_what_is_not_finite(run, recorder):
  with run.threads("recorder") as threads:
    run.write(1, 2, group_norms={"blocks_0/mixer": 0.5, "head": None}, skipped=True, other=None)
    threads.rate(2, 99.5)
    threads.wake()
    wait_for(lambda: recorder.steps == [1, 2])
    run.write(3, end="")
    threads.wake()
    time.sleep(0.05)
    assert recorder.steps == [1, 2], "the third row is not complete"
    run.write(4, end="\n")  # not a row, as the third has no end
    (run.folder / "metrics.jsonl").write_text((run.folder / "metrics.jsonl").read_text().replace("}{", "}\n{"))
  assert recorder.rows[0] == {"step": 1, "loss": 1.0, "group_norms/blocks_0/mixer": 0.5, "skipped": 1.0}
  assert recorder.rows[1] == recorder.rows[0] | {"step": 2, "loss": 0.5, "tokens_per_second": 99.5}
  assert recorder.steps == [1, 2, 3, 4]
  assert recorder.runs[0] == (run.folder, {"Trainer.steps": "9"}, "", 0)
  assert run.said == ["recorder: over there"]


def test_rows_come_in_pieces_and_their_position_is_kept(run, recorder, monkeypatch):
  monkeypatch.setattr(log_threads, "_ROWS", 10)
  kept = run.folder / "loggers" / "recorder.json"
  calls = []
  recorder.broken = lambda method: calls.append((method, json.loads(kept.read_text())["step"] if kept.exists() else None))
  with run.threads("recorder"):
    run.write(*range(1, 26))
  assert calls == [("begin", None), ("log", 0), ("log", 10), ("log", 20), ("finish", 25), ("close", 25)]
  assert json.loads(kept.read_text()) == {"format": 1, "record": "record 1", "step": 25}


def test_rows_that_a_kill_may_still_lose_come_again(run, recorder, monkeypatch):
  monkeypatch.setattr(Recorder, "unsafe_seconds", 0.3, raising=False)
  kept = run.folder / "loggers" / "recorder.json"

  def kept_step():
    return json.loads(kept.read_text())["step"]

  with run.threads("recorder") as threads:
    run.write(*range(1, 6))
    threads.wake()
    wait_for(lambda: recorder.steps == [1, 2, 3, 4, 5])
    assert kept_step() == 0
    time.sleep(0.4)
    run.write(6)
    threads.wake()
    wait_for(lambda: kept_step() == 5)
    assert recorder.steps[-1] == 6
  assert kept_step() == 6, "a logger that is closed loses nothing"


def test_a_resumed_run_goes_on_in_its_record_and_a_new_one_begins_another(run, recorder):
  with run.threads("recorder"):
    run.write(*range(1, 38))
  rows = (run.folder / "metrics.jsonl").read_text().splitlines(True)
  (run.folder / "metrics.jsonl").write_text("".join(rows[:30]))  # as a report does that resumes after step 30
  with run.threads("recorder", first_step=30):
    run.write(*range(31, 41))
  assert recorder.runs[1][2:] == ("record 1", 30)
  assert recorder.steps == [*range(1, 38), *range(31, 41)], "steps that are taken again come again"
  (run.folder / "metrics.jsonl").write_text("")
  with run.threads("recorder"):
    run.write(1)
  assert recorder.runs[2][2:] == ("", 0)
  assert json.loads((run.folder / "loggers" / "recorder.json").read_text())["record"] == "record 3"


def test_a_logger_that_is_behind_or_new_gets_the_steps_that_it_lacks(run, recorder):
  (run.folder / "loggers").mkdir()
  (run.folder / "loggers" / "recorder.json").write_text('{"record": "old", "step": 22}')
  run.write(*range(1, 31))
  with run.threads("recorder", first_step=30):
    run.write(31)
  assert recorder.runs[0][2:] == ("old", 22)
  assert recorder.steps == list(range(23, 32))
  (run.folder / "loggers" / "recorder.json").unlink()
  with run.threads("recorder", first_step=31):
    pass
  assert recorder.steps[9:] == list(range(1, 32))
  (run.folder / "loggers" / "recorder.json").write_text("{")
  with pytest.raises(ValueError, match=r"recorder\.json is not JSON .*; remove it, and the run gets a new record"):
    run.threads("recorder", first_step=31)


def test_the_end_of_a_run_has_its_result_its_files_and_how_it_ended(run, recorder):
  (run.folder / "loss.png").touch()
  (run.folder / "other.txt").touch()
  with run.threads("recorder") as threads:
    threads.finish({"step": 9})
  assert recorder.ended == [({"step": 9}, ["loss.png"]), "finished"]
  with run.threads("recorder"):
    pass
  assert recorder.ended[2:] == [({}, ["loss.png"]), "interrupted"]
  with pytest.raises(KeyboardInterrupt), run.threads("recorder"):
    raise KeyboardInterrupt
  with pytest.raises(ValueError, match="loss"), run.threads("recorder"):
    raise ValueError("loss")
  assert recorder.ended[5:] == ["interrupted", "failed"]


# Failures.


@pytest.mark.parametrize("method", ["begin", "log"])
def test_a_logger_that_fails_says_so_once_and_has_every_row_when_it_works_again(run, recorder, method):
  failures = iter(range(3))

  def broken(called):
    if called == method and next(failures, None) is not None:
      raise ConnectionError("refused\nby the server")

  recorder.broken = broken
  with run.threads("recorder") as threads:
    for step in range(1, 10):
      run.write(step)
      threads.wake()
      time.sleep(0.02)
    wait_for(lambda: any("works again" in line for line in run.said) or threads.wake())
  assert recorder.steps == list(range(1, 10))
  assert sum("ConnectionError" in line for line in run.said) == 1
  (failed,) = [line for line in run.said if "failed" in line]
  assert failed.startswith("recorder failed (ConnectionError: refused by the server). The run goes on; ")


def test_a_logger_that_never_works_is_reported_at_the_end(run, recorder):
  def broken(method):
    if method != "begin":
      raise OSError("no space")

  recorder.broken = broken
  with run.threads("recorder"):
    run.write(1, 2, 3)
  last = "recorder: the record may end at step 0 (OSError: no space). metrics.jsonl has every step."
  assert run.said[-1] == last
  assert sum("OSError" in line for line in run.said[:-1]) <= 1


def test_a_logger_that_hangs_stops_neither_the_run_nor_the_other_loggers(run, recorder, monkeypatch):
  monkeypatch.setattr(log_threads, "_PATIENCE", 0.5)
  forever = threading.Event()
  recorder.broken = lambda method: forever.wait() if method == "log" else None
  began = time.monotonic()
  with run.threads("tensorboard", "recorder") as threads:
    for step in range(1, 200):
      run.write(step)
      threads.wake()
    wrote = time.monotonic() - began
  assert time.monotonic() - began - wrote < 5
  assert "recorder: the record may end at step 0 (no answer in 0 s). metrics.jsonl has every step." in run.said
  assert len([name for _, name in in_tensorboard(run.folder) if name == "loss"]) == 199
  forever.set()


def test_rows_do_not_wait_for_loggers(tmp_path, recorder):
  forever = threading.Event()
  recorder.broken = lambda method: forever.wait()
  row = {"loss": 1.0, "targets": 4.0, "bits_per_byte": 2.0}
  options = {"first_step": 0, "last_step": 1000, "tokens_per_step": 1, "log_every": 1, "progress": False}
  with Report(tmp_path, loggers=["recorder"], **options) as report:
    began = time.monotonic()
    for step in range(1, 1001):
      report.row({"step": step} | row)
    assert time.monotonic() - began < 5
    forever.set()
  assert recorder.steps == list(range(1, 1001)), "all of them come when it goes on"
  assert "tokens_per_second" in recorder.rows[-1] or "tokens_per_second" in recorder.rows[1]


# Whole runs.


def test_a_run_of_several_loggers_has_equal_numbers_in_each(tmp_path, recorder):
  directory = tmp_path / "run"
  experiment = tiny_experiment(tmp_path, loggers=("tensorboard", "recorder"), log_group_norms=True)
  train(experiment, directory, progress=False)
  expected = in_metrics(directory)
  got = {(row["step"], name): value for row in recorder.rows for name, value in row.items() if name != "step"}
  rates = {key for key in got if key[1] == "tokens_per_second"}
  assert {key: got[key] for key in got.keys() - rates} == expected
  assert {step for step, _ in rates} >= {4, 8, 12}
  assert_equal(in_tensorboard(directory), expected)
  assert recorder.ended[0][0]["step"] == 12
  assert recorder.ended[0][1] == ["config.gin", "result.json"]
  assert recorder.ended[1] == "finished"
  assert recorder.runs[0].settings["Trainer.steps"] == "12"


def assert_equal(found, expected):
  """Equality up to float32, without rates and what is about the end of a run."""
  found = {key: value for key, value in found.items() if key[1] != "tokens_per_second" and not key[1].startswith("result/")}
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, rtol=1e-6, err_msg=str(key))


INSTALLED = ["tensorboard", *(name for name in ("wandb", "mlflow") if all(map(find_spec, LOGGERS[name].libraries)))]
SETTINGS = {"steps": 45, "checkpoint_every": 10, "evaluate_every": 20, "log_every": 8, "loggers": tuple(INSTALLED)}
KILLED = """
import jax, json, os, signal, sys, time
from pathlib import Path
from memzoo.train import loop
from tiny_run import convolution_model, tiny_experiment

jax.config.update("jax_compilation_cache_dir", sys.argv[2])
folder, settings, record = Path(sys.argv[1]), json.loads(sys.argv[3]), loop._Run.record

def record_and_die(run, step, *rest):
  record(run, step, *rest)
  if step == 37:
    run.report.flush()
    run.checkpoints.wait()
    while {thread._position.step for thread in run.report._loggers._threads} != {37}:
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

loop._Run.record = record_and_die
loop.train(tiny_experiment(folder, model=convolution_model(), **settings), folder / "run")
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, quick_runs):
  """A run that was killed after step 37, when all loggers had that step, and resumed from step 30; and its metrics before."""
  folder = tmp_path_factory.mktemp("killed")
  with pytest.MonkeyPatch.context() as patch:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID", "MLFLOW_RUN_ID"):
      patch.delenv(name, raising=False)
    patch.setenv("WANDB_MODE", "offline")
    command = [sys.executable, "-c", KILLED, str(folder), str(jax.config.jax_compilation_cache_dir), json.dumps(SETTINGS)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": import_path()}, capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr
    before = in_metrics(folder / "run")
    train(tiny_experiment(folder, model=convolution_model(), **SETTINGS | {"steps": 50}), folder / "run", progress=False)
  assert max(before)[0] == 37
  assert max(in_metrics(folder / "run"))[0] == 50
  return folder / "run"


real = pytest.mark.filterwarnings("default")  # other libraries' own


@pytest.mark.slow
@real
def test_tensorboard_holds_what_metrics_holds_across_a_kill(resumed):
  assert_equal(in_tensorboard(resumed), in_metrics(resumed))


@pytest.mark.slow
@real
def test_an_offline_run_of_wandb_holds_what_metrics_holds_across_a_kill(resumed):
  wandb = pytest.importorskip("wandb")
  numbers, records = in_wandb(resumed)
  assert_equal(numbers, in_metrics(resumed))
  runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
  assert {run.run_id for run in runs} == {json.loads((resumed / "loggers" / "wandb.json").read_text())["record"]}
  assert {run.project for run in runs} == {"memzoo"}
  settings = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
  assert settings["Trainer.steps"] == "50"
  assert "result/validation_loss" in {key_of(item) for record in records for item in record.summary.update}
  saved = {path.name for path in resumed.glob("wandb/offline-run-*/files/*")}
  assert saved >= {"config.gin", "result.json"}
  wandb.teardown()


@pytest.mark.slow
@real
def test_a_local_store_of_mlflow_holds_what_metrics_holds_across_a_kill(resumed):
  pytest.importorskip("mlflow")
  numbers, run = in_mlflow(resumed)
  assert_equal(numbers, in_metrics(resumed))
  assert run.info.status == "FINISHED"
  assert run.info.run_name == "run"
  assert run.data.params["Trainer.steps"] == "45"
  assert run.data.tags["Trainer.steps"] == "50", "MLflow changes no parameter"
  assert run.data.metrics["result/validation_loss"] > 0
  assert {path.name for path in resumed.glob("mlflow/artifacts/*/artifacts/*")} >= {"config.gin", "result.json"}


# Without the libraries: what their loggers ask of them.


def test_wandbs_own_step_goes_on_where_steps_are_taken_again(run, monkeypatch):
  fake = FakeWandb(step=38)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  monkeypatch.delenv("WANDB_PROJECT", raising=False)
  monkeypatch.setattr(loggers, "find_spec", lambda name: SimpleNamespace(origin="wandb.py"))
  (run.folder / "loggers").mkdir()
  (run.folder / "loggers" / "wandb.json").write_text('{"record": "abc", "step": 37}')
  run.write(*range(1, 31))
  (run.folder / "config.gin").touch()
  with run.threads("wandb", first_step=30) as threads:
    run.write(*range(31, 61))
    threads.finish({"step": 60})
  assert fake.options["id"] == "abc"
  assert (fake.options["resume"], fake.options["project"]) == ("allow", "memzoo")
  assert [row["step"] for row in fake.kept] == list(range(31, 61))
  assert fake.config == {"Trainer.steps": "9"}
  assert (fake.summary, fake.files, fake.code) == ({"result/step": 60}, ["config.gin"], 0)
  assert run.said == ["wandb: offline, in /w/offline-run-1"]


def test_mlflow_gets_large_batches_in_parts_and_changed_settings_as_tags(run, monkeypatch):
  fake = FakeMlflow()
  monkeypatch.setitem(sys.modules, "mlflow", fake)
  monkeypatch.setitem(sys.modules, "mlflow.entities", fake.entities)
  monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere.example")
  monkeypatch.setattr(loggers, "find_spec", lambda name: SimpleNamespace(origin="mlflow.py"))
  settings = {f"Layer.field_{i}": "x" * 900 for i in range(150)}
  groups = {f"block_{i}": 1.0 for i in range(60)}
  with LogThreads(run.folder, ["mlflow"], settings, 0, run.said.append):
    run.write(*range(1, 41), group_norms=groups)
  with LogThreads(run.folder, ["mlflow"], settings | {"Layer.field_3": "y"}, 40, run.said.append) as threads:
    run.write(41)
    threads.finish({"step": 41, "interrupted": None})
  assert fake.runs == 1
  assert [step for name, _, step in fake.metrics if name == "group_norms/block_9"] == list(range(1, 41))
  assert len(fake.metrics) == 40 * 61 + 2
  assert ("loss", 1 / 41, 41) in fake.metrics
  assert ("result/step", 41, 41) in fake.metrics
  assert len(fake.params) == 150
  assert fake.tags == {"Layer.field_3": "y"}
  assert fake.ended == ["KILLED", "FINISHED"]
  assert run.said == ["mlflow: run run 1 at http://somewhere.example"] * 2


@real
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_server_that_is_gone_costs_a_message(run, monkeypatch, name):
  pytest.importorskip(name)
  monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
  monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
  monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
  monkeypatch.setenv("WANDB_MODE", "online")
  monkeypatch.setattr(log_threads, "_PATIENCE", 4.0)
  began = time.monotonic()
  with run.threads(name) as threads:
    run.write(1, 2, 3)
    threads.wake()
  assert time.monotonic() - began < 10
  assert run.said[-1].startswith(f"{name}: the record may end at step 0 (")


def test_wandb_uploads_only_with_a_key_of_the_users(tmp_path, monkeypatch):
  for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
  assert loggers._wandb_mode() == "offline"
  (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 123\n")
  assert loggers._wandb_mode() == "online"
  monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
  assert loggers._wandb_mode() == "offline"
  monkeypatch.setenv("WANDB_API_KEY", "1")
  assert loggers._wandb_mode() == "online"
  for logger in (WandbLogger, MlflowLogger):
    assert set(logger.environment) & {"WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"}, "nor do the libraries' reports"
