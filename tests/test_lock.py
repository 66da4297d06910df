"""A run's folder has one owner at a time, and a dead owner is replaced."""

import json
import os
import shutil
import subprocess
import sys
import time

import jax
import pytest
from memzoo.train import lock as module
from memzoo.train.lock import Lock, check_free
from tiny_run import import_path, write_text


@pytest.fixture
def quick(monkeypatch):
  """Short waits."""
  monkeypatch.setattr(module, "BEAT", 0.05)
  monkeypatch.setattr(module, "PATIENCE", 1.0)
  monkeypatch.setattr(module, "_POLL", 0.01)


def owner_of(directory) -> dict:
  (path,) = (directory / ".lock").iterdir()
  return json.loads(path.read_text())


def pretend(directory, **changes) -> None:
  """Rewrites what the lock's file says about its owner."""
  (path,) = (directory / ".lock").iterdir()
  path.write_text(json.dumps(owner_of(directory) | changes))


def leave_lock(directory, **changes) -> None:
  """Leaves the lock of a killed process, which is this one unless `changes` say otherwise."""
  lock = Lock(directory)
  lock._stop.set()
  lock._beats.join()
  pretend(directory, **changes)


def take(directory) -> list[str]:
  """Takes and releases the lock; returns what was said."""
  said = []
  Lock(directory, said.append).release()
  return said


def test_a_held_lock_refuses_a_second_owner_and_names_the_first(tmp_path):
  lock = Lock(tmp_path)
  words = rf"{tmp_path} is in use by process {os.getpid()} on {module.socket.gethostname()}, since .*; expected a folder of"
  with pytest.raises(ValueError, match=words) as refusal:
    Lock(tmp_path)
  assert "\n" not in str(refusal.value)
  check_free(tmp_path)  # it does not count itself
  pretend(tmp_path, process=os.getppid(), started=module._start(os.getppid()))
  with pytest.raises(ValueError, match=f"is in use by process {os.getppid()}"):
    check_free(tmp_path)
  pretend(tmp_path, process=os.getpid())
  lock.release()
  assert take(tmp_path) == []
  check_free(tmp_path / "new")


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path):
  with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
    leave_lock(tmp_path, process=other.pid, started=module._start(other.pid))
    with pytest.raises(ValueError, match=f"in use by process {other.pid}"):
      take(tmp_path)
    other.kill()
    while module._start(other.pid) != "dead":  # a zombie, since nobody has waited for it
      time.sleep(0.01)
    assert take(tmp_path) == [f"Process {other.pid}, which trained in {tmp_path} before, has died; this one takes over."]
  leave_lock(tmp_path, process=other.pid, started="1")
  assert len(take(tmp_path)) == 1


def test_a_process_with_a_dead_owners_number_is_another_one(tmp_path):
  leave_lock(tmp_path, started="1")
  check_free(tmp_path)
  assert "has died" in take(tmp_path)[0]


def test_an_owner_on_another_machine_is_known_by_its_beats(tmp_path, quick):
  lock = Lock(tmp_path)
  lock._owner["machine"] = ["elsewhere"]
  pretend(tmp_path, machine=["elsewhere"], host="elsewhere")
  check_free(tmp_path)
  said = []
  with pytest.raises(ValueError, match="is in use by process"):
    Lock(tmp_path, said.append)
  assert said == [f"Waiting to see whether process {os.getpid()} on elsewhere still trains in {tmp_path}."]
  assert owner_of(tmp_path)["beats"] > 0
  lock._stop.set()
  lock._beats.join()
  began = time.monotonic()
  assert take(tmp_path)[1] == f"No process has shown life in {tmp_path} for 1 s; this one takes over."
  assert time.monotonic() - began > 1.0


@pytest.mark.parametrize("content", ["", '{"held": tr', "3"])
def test_a_file_without_an_owner_is_waited_for(tmp_path, quick, content):
  leave_lock(tmp_path)
  (tmp_path / ".lock" / "1").write_text(content)
  check_free(tmp_path)
  began = time.monotonic()
  assert "No process has shown life" in take(tmp_path)[0]
  assert time.monotonic() - began > 1.0


def test_a_lock_that_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
  assert take(tmp_path) == []

  def fail(_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(module.json, "dumps", fail)
    with pytest.raises(OSError, match="No space left"):
      Lock(tmp_path)
  assert owner_of(tmp_path)["held"] is False
  assert take(tmp_path) == []


def test_the_copy_of_a_folder_in_use_becomes_free(tmp_path, quick):
  (tmp_path / "run").mkdir()
  lock = Lock(tmp_path / "run")
  shutil.copytree(tmp_path / "run", tmp_path / "copy")
  assert "No process has shown life" in take(tmp_path / "copy")[-1]
  lock.check()
  lock.release()


def test_an_owner_that_was_taken_for_dead_notices(tmp_path, quick):
  lock = Lock(tmp_path)
  lock.check()
  pretend(tmp_path, started="1")
  lock._owner["started"] = "1"
  other = Lock(tmp_path)
  with pytest.raises(OSError, match=rf"another process has taken over {tmp_path}, because this one was halted"):
    lock.check()
  lock.release()
  other.check()
  assert owner_of(tmp_path)["held"], "the release of a lost lock leaves the new one alone"
  other.release()


@pytest.mark.parametrize("numbers", [(7,), (6, 7)])
def test_a_number_older_than_the_newest_gives_no_lock(tmp_path, monkeypatch, numbers):
  """A process looked, paused while others took the lock and gave it back, and goes on with what it saw."""
  for _ in range(7):
    take(tmp_path)
  seen = iter([*(number - 2 for number in numbers), 7, 7])
  monkeypatch.setattr(module, "_newest", lambda folder: next(seen))
  lock = Lock(tmp_path)
  assert lock._path.name == "8"
  lock.release()


SCRIPT = """
import sys, time
from pathlib import Path
from memzoo.train.lock import Lock
directory = Path(sys.argv[1])
print("ready", flush=True)
while not (directory / "go").exists():
  time.sleep(0.001)
try:
  lock = Lock(directory)
  print("holds", flush=True)
  input()
  lock.release()
except ValueError as error:
  print(error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True])
def test_of_processes_that_start_at_once_one_gets_the_lock(tmp_path, stale):
  if stale:
    leave_lock(tmp_path, started="1")
  command, environment = [sys.executable, "-c", SCRIPT, str(tmp_path)], os.environ | {"PYTHONPATH": import_path()}
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  started = [subprocess.Popen(command, env=environment, **pipes) for _ in range(6)]
  assert [process.stdout.readline() for process in started] == ["ready\n"] * 6
  (tmp_path / "go").touch()
  said = [_verdict(process) for process in started]
  (winner,) = [process for process, line in zip(started, said, strict=True) if line == "holds\n"]
  assert sum(f"is in use by process {winner.pid} on " in line for line in said) == 5
  for process in started:
    process.communicate("\n")


RUN = """
import sys, time
from pathlib import Path
import jax
from memzoo.train import finish, loop
from tiny_run import tiny_experiment
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
finish.matmul_rate = lambda: 1e11
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
experiment = tiny_experiment(folder, steps=steps, checkpoint_every=20, evaluate_every=0)
print("ready", flush=True)
while not (folder / "go").exists():
  time.sleep(0.001)
try:
  print(loop.train(experiment, folder / "run", progress=False).step, flush=True)
except ValueError as error:
  print(error, flush=True)
"""


@pytest.mark.slow
def test_of_runs_that_start_at_once_one_goes_on_and_after_its_kill_another(tmp_path):
  write_text(tmp_path / "text")
  environment, rows = os.environ | {"PYTHONPATH": import_path()}, tmp_path / "run" / "metrics.jsonl"

  def start(steps):
    command = [sys.executable, "-c", RUN, str(tmp_path), str(steps), jax.config.jax_compilation_cache_dir]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process

  def wait_for_rows(count):
    while not rows.exists() or rows.read_bytes().count(b"\n") < count:
      assert any(process.poll() is None for process in both)
      time.sleep(0.01)

  both = [start(10**6), start(10**6)]
  (tmp_path / "go").touch()
  wait_for_rows(25)
  while all(process.poll() is None for process in both):
    time.sleep(0.01)
  (refused,) = [process for process in both if process.poll() is not None]
  (first,) = [process for process in both if process is not refused]
  assert f"{tmp_path / 'run'} is in use by process {first.pid} on " in refused.communicate()[0]
  wait_for_rows(45)
  first.kill()
  second = start(100)
  assert second.communicate()[0] == "100\n"
  first.communicate()
  assert [json.loads(line)["step"] for line in rows.read_text().splitlines()] == list(range(1, 101))


def _verdict(process) -> str:
  """The first line that does not report a dead owner."""
  return next(line for line in iter(process.stdout.readline, "") if "takes over" not in line)
