"""Nothing is printed about accelerators that a machine lacks, also where libtpu is installed."""

import os
import subprocess
import sys

import jax
import pytest
from jax.experimental import multihost_utils
from memzoo.train.runtime import start_quietly

# JAX starts its backends at a program's first array, and libtpu may then complain; an import must not cause it.
LIBRARY = """
import memzoo, memzoo.layers, memzoo.zoo.language_model, memzoo.train.loop
memzoo.build("quickstart")
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
COMMAND = "from memzoo.train.cli import main; main()"


def run(folder, *arguments):
  """What a Python process that may choose its platform prints, to its output and to its errors."""
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "XLA_"))}
  done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True)
  return done.stdout, done.stderr


def test_imports_print_nothing_and_start_no_backend(tmp_path):
  assert run(tmp_path, "-c", LIBRARY) == ("", "")


@pytest.mark.slow
def test_a_command_prints_only_its_results(tmp_path):
  options = "--tpu", "v5e", "--length", "64", "--batch", "1", "--forward"
  out, err = run(tmp_path, "-c", COMMAND, "bench", "short_conv", *options)
  assert err == ""
  assert "short_conv" in out
  assert not [line for line in out.splitlines() if "WARNING" in line or "libtpu" in line.lower()]


def noisy(monkeypatch, error=None):
  """Makes JAX's start write to both descriptors, as C++ code does, and then raise."""

  def devices():
    os.write(1, b"no TPU here\n")
    os.write(2, b"no GPU here\n")
    if error:
      raise error

  monkeypatch.setattr(jax, "devices", devices)
  monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda name: os.write(2, b"connected\n"))


def test_what_libraries_write_at_the_start_is_not_shown(monkeypatch, capfd):
  noisy(monkeypatch)
  start_quietly()
  os.write(1, b"after\n")
  assert capfd.readouterr() == ("after\n", "")


def test_what_libraries_write_before_an_error_is_shown(monkeypatch, capfd):
  noisy(monkeypatch, RuntimeError("no devices"))
  with pytest.raises(RuntimeError, match="no devices"):
    start_quietly()
  assert capfd.readouterr().err == "no TPU here\nno GPU here\n"
