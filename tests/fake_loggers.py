"""A logger that keeps what it is told, and stand-ins for wandb and mlflow."""

import os
from pathlib import Path
from types import SimpleNamespace


class Recorder:
  """Keeps what it is told. `broken` is called first in every method, with the method's name."""

  def __init__(self):
    self.broken, self.runs, self.rows, self.ended = lambda method: None, [], [], []

  def begin(self, run):
    self.broken("begin")
    self.runs.append(run)
    return run.record or f"record {len(self.runs)}", "over there"

  def log(self, rows):
    self.broken("log")
    self.rows += rows

  def finish(self, result, files):
    self.broken("finish")
    self.ended.append((result, [path.name for path in files]))

  def close(self, status):
    self.broken("close")
    self.ended.append(status)

  @property
  def steps(self):
    return [row["step"] for row in self.rows]


class FakeWandb:
  """What `WandbLogger` uses of wandb. Like it, it drops rows that are not after its own last step."""

  Settings = SimpleNamespace

  def __init__(self, step):
    self.step, self.kept, self.options, self.files, self.code = step, [], None, [], None
    self.config, self.summary, self.url, self.dir = MergedDict(), {}, None, "/w/offline-run-1/files"

  def init(self, **options):
    self.options = options
    return self

  def define_metric(self, *_, **__): ...

  def log(self, row, *, step, commit):
    assert commit
    if step >= self.step:
      self.kept.append(row)
      self.step = step + 1

  def save(self, path, *, base_path, policy):
    self.files.append(os.path.relpath(path, base_path))

  def finish(self, exit_code):
    self.code = exit_code


class MergedDict(dict):
  def update(self, values, allow_val_change):
    assert allow_val_change
    super().update(values)


class FakeMlflow(SimpleNamespace):
  """What `MlflowLogger` uses of mlflow, with its limits: batches of 1,000 metrics, and parameters that never change."""

  def __init__(self):
    named = SimpleNamespace(Metric=lambda *fields: fields, Param=lambda *fields: fields, RunTag=lambda *fields: fields)
    super().__init__(entities=named, MlflowClient=lambda tracking_uri: self, params={}, tags={}, metrics=[], runs=0, ended=[])

  def get_experiment_by_name(self, name):
    return SimpleNamespace(experiment_id="7")

  def create_run(self, experiment, run_name, tags):
    self.runs += 1
    return SimpleNamespace(info=SimpleNamespace(run_id=f"run {self.runs}"))

  def get_run(self, run_id):
    return SimpleNamespace(data=SimpleNamespace(params=self.params))

  def update_run(self, run_id, status): ...

  def log_batch(self, run_id, metrics=(), params=(), tags=()):
    assert (run_id, len(metrics) <= 1000, len(params) <= 100) == ("run 1", True, True)
    assert not {name for name, _ in params} & self.params.keys()
    self.metrics += [(name, value, step) for name, value, _, step in metrics]
    self.params |= dict(params)
    self.tags |= dict(tags)

  def log_artifact(self, run_id, path):
    self.ended.append(Path(path).name)

  def set_terminated(self, run_id, status):
    self.ended.append(status)
