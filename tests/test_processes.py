"""One run on any number of devices and processes: the same losses, and each layout resumes another's checkpoint."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from machine import flags_for_one_device
from memzoo.train import processes
from memzoo.train.loop import train
from memzoo.train.report import read_rows
from memzoo.train.sharding import MeshShape, batch_sharding
from tiny_run import convolution_model, import_path, quick_runs, tiny_experiment
from tolerances import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures(quick_runs.__name__), pytest.mark.xdist_group("processes")]

STEPS = 20
LAYOUTS = {
  "one": MeshShape(1),
  "data": MeshShape(4),
  "both": MeshShape(1, 2, 2),
  "processes": MeshShape(2),
}
ONE_PROCESS = [name for name in LAYOUTS if name != "processes"]
# Each layout resumes the checkpoint of the one before it, and the first that of the last.
RESUMED = dict(zip(LAYOUTS, ["processes", *ONE_PROCESS], strict=True))


def experiment(folder, layout, **settings):
  settings = {"model": convolution_model(), "steps": STEPS, "checkpoint_every": 10, "evaluate_every": 0} | settings
  return tiny_experiment(folder, mesh=LAYOUTS[layout], **settings)


# What each of two processes does; its arguments are FOLDER PORT PROCESS, and the text is in FOLDER. First two runs, then
# errors and a signal in one of the processes.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import jax
import pytest
from memzoo.train import loop, processes, setup
from memzoo.train.lock import Lock
from test_processes import experiment
from test_training import Spoiled
from tiny_run import Model, make_runs_quick
make_runs_quick(pytest.MonkeyPatch())
folder, number = Path(sys.argv[1]), int(sys.argv[3])
jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
processes.join(f"localhost:{sys.argv[2]}", 2, number)
for name in ("processes", "both then processes"):
  loop.train(experiment(folder, "processes"), folder / name)

def attempt(name, **settings):
  try:
    result = loop.train(experiment(folder, "processes", **{"model": Model()} | settings), folder / name)
    print(name, "interrupted", result.interrupted, result.step)
  except (ValueError, ArithmeticError) as error:
    print(name, "failed:", error)

attempt("other config", steps=20 + number)
if not number:
  (folder / "in use").mkdir()
  lock = Lock(folder / "in use")
attempt("in use")
if not number:
  lock.release()
attempt("in use", steps=1)
if number:
  real, setup.check_writable = setup.check_writable, lambda directory: (_ for _ in ()).throw(ValueError("no disk here"))
attempt("no disk")
if number:
  setup.check_writable = real
record = loop._Run.record

def record_and_signal(run, step, *rest):
  record(run, step, *rest)
  if number and step == 5:
    os.kill(os.getpid(), signal.SIGTERM)

loop._Run.record = record_and_signal
attempt("signal")
loop._Run.record = record

attempt("not finite", model=Spoiled(), nonfinite_limit=3)
"""


def run_two_processes(folder):
  """The output of `SCRIPT` in each of two processes of one device."""
  environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_for_one_device(), "PYTHONPATH": import_path()}
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = str(probe.getsockname()[1])
  both = [
    subprocess.Popen(
      [sys.executable, "-c", SCRIPT, str(folder), port, str(number)],
      env=os.environ | environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for number in range(2)
  ]
  said = [process.communicate(timeout=300)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  return said


def losses(run):
  rows = read_rows(Path(run) / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
  return np.array([row["loss"] for row in rows])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quick_runs):
  """A folder with a run of each layout, and one of "both" that stopped halfway; and the output of two processes."""
  folder = tmp_path_factory.mktemp("layouts")
  for layout in ONE_PROCESS:
    train(experiment(folder, layout), folder / layout, progress=False)
  halfway(folder, "both", "both then processes")
  return folder, run_two_processes(folder)


def halfway(folder, run, name):
  """A copy of a run as it was halfway."""
  shutil.copytree(folder / run, folder / name)
  shutil.rmtree(folder / name / "checkpoints" / str(STEPS))
  (folder / name / "result.json").unlink()
  return folder / name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_has_the_losses_of_one_device(runs, layout):
  folder, said = runs
  assert len(losses(folder / layout)) == STEPS
  assert_close(losses(folder / layout), losses(folder / "one"), "float32")
  assert "2 cpu devices of 2 processes" in said[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_resumes_the_checkpoint_of_another(runs, layout, capsys):
  (folder, said), saved = runs, RESUMED[layout]
  run = folder / f"{saved} then {layout}"
  if layout != "processes":
    train(experiment(folder, layout), halfway(folder, saved, run.name))
  assert f"Resuming {run} after step 10" in (said[0] if layout == "processes" else capsys.readouterr().out)
  assert_close(losses(run), losses(folder / "one"), "float32")


def test_errors_and_signals_in_one_process_are_broadcast_to_all(runs):
  folder, (first, second) = runs
  for said in (first, second):
    assert "other config failed: process 1 has another config than process 0; expected the same for all." in said
  assert "in use failed: " in first
  assert "/in use is in use by process" in first
  assert "in use failed: another process failed; see its message" in second
  for said in (first, second):
    assert "in use interrupted None 1" in said, "the lock was given back"
  assert "no disk failed: another process failed; see its message" in first
  assert "no disk failed: no disk here" in second
  step = first.split("signal interrupted SIGTERM ")[1].split()[0]
  assert step in ("6", "7")
  assert f"signal interrupted SIGTERM {step}" in second
  assert (folder / "signal" / "checkpoints" / step).is_dir()
  for said in (first, second):
    assert "not finite failed: 3 steps in a row up to step 3 were not finite (loss nan; gradients" in said


# Shares of rows.


def test_shares_of_rows_are_those_of_the_devices(monkeypatch):
  sharding = batch_sharding(MeshShape(2, 2).build(), 8)
  assert processes.row_share(sharding, 8) == (0, 1)

  def share_of(*devices):
    held = {jax.devices()[i]: index for i, index in enumerate(sharding.devices_indices_map((8, 1)).values()) if i in devices}

    class Partly:
      mesh = sharding.mesh
      addressable_devices_indices_map = staticmethod(lambda shape: held)

    return processes.row_share(Partly, 8)

  assert [share_of(i) for i in range(4)] == [(i, 4) for i in range(4)]
  assert [share_of(0, 1), share_of(2, 3)] == [(0, 2), (1, 2)]
  with pytest.raises(ValueError, match="hold rows that are not contiguous"):
    share_of(0, 2)
  with pytest.raises(ValueError, match="none of process 0;"):
    share_of()


def test_processes_that_cannot_find_each_other_are_told_what_to_pass():
  with pytest.raises(ValueError, match=r"--coordinator is 'localhost'; expected HOST:PORT"):
    processes.join("localhost", 2, 0)
  with pytest.raises(ValueError, match=r"--process is 2 of --processes 2; expected 0 to 1"):
    processes.join("localhost:1", 2, 2)
  with pytest.raises(ValueError, match=r"cannot connect .*--coordinator HOST:PORT"):
    processes.join("localhost:1", 2)
  processes.join()
