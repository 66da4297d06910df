"""What tests need of the machine that they run on."""

import os
from importlib.util import find_spec

import pytest

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu, which exists for Linux on x86-64")


def flags_for_one_device() -> str:
  """`XLA_FLAGS` of this suite, for a process with one device in place of four."""
  return os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")
