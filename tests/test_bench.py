"""The benchmark: its reports, on tiny shapes, and the measurements that it is made of."""

import io
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.pallas_kernels import bench as module
from memzoo.pallas_kernels.bench import OPERATIONS, Shape, bench, make_inputs
from memzoo.pallas_kernels.measure import matmul_rate, peak_bytes, seconds_per_call, whose_peak
from memzoo.train.bench_report import draw, tables

TINY = Shape(batch=1, length=32, heads=2, key_dim=8, value_dim=8)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_accepts_its_inputs(operation):
  inputs = jax.eval_shape(lambda: make_inputs(operation, TINY))
  output, _ = jax.eval_shape(OPERATIONS[operation], *inputs)
  assert output.shape[:2] == (1, 32)
  assert all(x.dtype == jnp.float32 for x in inputs)


@pytest.mark.slow
def test_a_report_has_all_timings_and_is_written(tmp_path, monkeypatch):
  from rich.console import Console

  report = bench(["delta_rule", "short_conv"], TINY, seconds=0.01)
  assert [(t.operation, t.direction) for t in report.timings] == [
    (operation, direction) for operation in ("delta_rule", "short_conv") for direction in ("forward", "gradient")
  ]
  for timing in report.timings:
    assert set(timing.seconds) == set(timing.compile_seconds) == {"xla", "recurrent"}
    assert all(seconds > 0 for seconds in timing.seconds.values())
  assert report.timings[0].floor_seconds > 0
  report.save(tmp_path / "bench.json")
  assert json.loads((tmp_path / "bench.json").read_text())["shape"]["length"] == 32
  draw(report, tmp_path / "bench.png")
  assert (tmp_path / "bench.png").stat().st_size > 10_000
  console = Console(width=140, record=True, file=io.StringIO())
  for table in tables(report):
    console.print(table)
  assert "delta_rule" in console.export_text()


def test_one_direction_alone_is_timed_and_drawn(tmp_path):
  report = bench(["short_conv"], TINY, directions=["forward"], seconds=0.01)
  assert [(t.operation, t.direction) for t in report.timings] == [("short_conv", "forward")]
  draw(report, tmp_path / "bench.png")
  (table,) = tables(report)
  assert list(table.columns[0].cells) == ["short_conv"]


@pytest.mark.slow
def test_long_runs_report_time_per_token_and_peak_memory(monkeypatch):
  monkeypatch.setattr(module, "LONG", (32, 64))
  (long,) = bench(["short_conv"], TINY, directions=["forward"], seconds=0.01, long=True).long
  assert set(long.forward_seconds) == set(long.gradient_seconds) == {32, 64}
  assert long.input_bytes == 4 * (64 + 4) * 2 * 8
  assert long.peak_bytes > 50 * 2**20, "a process with JAX in it"


def test_an_unknown_operation_or_direction_is_refused():
  with pytest.raises(ValueError, match="expected some of linear_attention"):
    bench(["delta_ruel"], TINY)
  with pytest.raises(ValueError, match="expected one of linear_attention"):
    make_inputs("delta_ruel", TINY)
  with pytest.raises(ValueError, match="expected some of forward, gradient"):
    bench(["delta_rule"], TINY, directions=["backward"])


def test_the_machine_multiplies_at_a_plausible_rate():
  assert 1e8 < matmul_rate(0.05) < 1e16


def test_the_peak_is_that_of_the_fullest_device_or_else_of_the_process(monkeypatch):
  before = peak_bytes()
  assert 50 * 2**20 < before < 2**40
  assert whose_peak() == "this process"
  held = []
  while peak_bytes() <= before and 2**26 * len(held) < before:
    held.append(np.ones(2**23))
  assert peak_bytes() > before
  devices = [SimpleNamespace(memory_stats=lambda count=count: count) for count in (None, {"peak_bytes_in_use": 7}, {})]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  assert (peak_bytes(), whose_peak()) == (7, "the fullest device")


def test_timing_takes_the_median_of_warm_calls():
  calls = []
  assert seconds_per_call(lambda: calls.append(None), seconds=0, at_least=5) >= 0
  assert len(calls) == 6
