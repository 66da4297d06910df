"""The benchmark: its reports, on tiny shapes, and the measurements that it is made of."""

import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memzoo.layers.tolerances import tolerance
from memzoo.pallas_kernels import bench as module
from memzoo.pallas_kernels import gpu_bench as gpu_bench_module
from memzoo.pallas_kernels.bench import bench
from memzoo.pallas_kernels.gpu_bench import Results, Task, gpu_bench
from memzoo.pallas_kernels.measure import matmul_rate, peak_bytes, seconds_in_flight, seconds_per_call, whose_peak
from memzoo.pallas_kernels.workloads import (
  ON_ACCELERATORS,
  OPERATIONS,
  VARIANTS,
  Shape,
  Work,
  case_inputs,
  cases,
  find,
  least_work,
  make_inputs,
)
from memzoo.train.bench_decoding import main
from memzoo.train.bench_report import draw, tables
from memzoo.train.files import write_record
from memzoo.train.gpu_steps import CONFIGS, step_tasks

TINY = Shape(batch=1, length=32, heads=2, key_dim=8, value_dim=8)


@pytest.mark.parametrize("operation", OPERATIONS | VARIANTS)
def test_every_operation_accepts_its_inputs(operation):
  inputs = jax.eval_shape(lambda: make_inputs(operation, TINY))
  output, _ = jax.eval_shape(find(operation), *inputs)
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
  write_record(tmp_path / "bench.json", report)
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
  calls.clear()
  assert seconds_in_flight(lambda: calls.append(None), seconds=0, rounds=5) >= 0
  assert len(calls) == 4 + 5


def test_the_gpu_bench_loads_neither_flax_nor_the_trainer():
  code = "import sys, memzoo.pallas_kernels.gpu_bench; print(*{name.partition('.')[0] for name in sys.modules})"
  loaded = set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
  assert not loaded & {"flax", "gin", "grain", "optax", "rich", "torch", "typer"}


@pytest.mark.slow
def test_the_gpu_bench_runs_to_its_end_on_a_cpu(tmp_path):
  lines, path = [], tmp_path / "gpu.json"
  names = ["gated_delta_rule", "short_conv"]
  gpu_bench(Results(path, 60, lines.append), names, tiny=True, steps=step_tasks(CONFIGS[:1], tiny=True))
  rows = json.loads(path.read_text())["rows"]
  assert len(rows) == len(lines)
  by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("accuracy", "time", "fla", "jla", "step")}
  counts = {"accuracy": 2 * (7 + 2), "time": 4, "fla": 2, "jla": 2, "step": 1}
  assert {kind: len(found) for kind, found in by_kind.items()} == counts
  assert [row for row in rows if "error" in row and row["kind"] not in ("fla", "jla")] == []
  for row in by_kind["accuracy"]:
    dtype = row["what"].rpartition(" ")[2]
    assert max(row["output"], row["state"]) < tolerance(dtype), row
    assert row["gradient"] < tolerance(dtype, gradients=True), row
  assert max(row["output"] for row in by_kind["accuracy"]) > 1e-4, "outputs of bfloat16 calls are rounded"
  assert all(row["ns"] > 0 for row in by_kind["time"])
  assert by_kind["step"][0]["tokens/s"] > 0
  for package in ("fla", "jla"):
    assert all("No module named" in row["error"] for row in by_kind[package]) or find_spec(package)


def test_on_a_hopper_gpu_kernels_are_measured_beside_xla(monkeypatch):
  """Names are those of operations; anything else would be an error only there."""
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H200")])
  assert set(gpu_bench_module._WITH_KERNELS) <= set(ON_ACCELERATORS)
  tasks = [*gpu_bench_module.accuracy_tasks(["delta_rule", "short_conv"], "bfloat16")]
  tasks += gpu_bench_module.accuracy_tasks(["delta_rule"], "float32")
  tasks += gpu_bench_module.time_tasks(["delta_rule"], gpu_bench_module.SHAPES[0])
  assert [task.what for task in tasks if "kernels" in task.what] == [
    "delta_rule (kernels), bfloat16",
    "delta_rule (kernels), forward, 4 x 2048 x 16 x 128",
    "delta_rule (kernels), both, 4 x 2048 x 16 x 128",
  ]


def test_results_survive_errors_and_the_end_of_time(tmp_path):
  lines, path = [], tmp_path / "gpu.json"
  results = Results(path, 1, lines.append)

  def half():
    yield {"ns": 1.5}
    assert len(json.loads(path.read_text())["rows"]) == 1, "a row is on disk before the next is measured"
    raise RuntimeError("out of\nmemory")

  results.run(Task("time", "half", half))
  results.taken["step"] = [100.0, 200.0]
  results.run(Task("step", "late", lambda: pytest.fail("it would end too late")))
  assert [{**row, "kind": "", "what": ""} for row in json.loads(path.read_text())["rows"]] == [
    {"kind": "", "what": "", "ns": 1.5},
    {"kind": "", "what": "", "error": "RuntimeError: out of memory"},
    {"kind": "", "what": "", "skipped": "60 s left, and such a task took 150 s"},
  ]
  assert "ns 1.5" in lines[0]


@pytest.mark.parametrize("operation", ON_ACCELERATORS)
def test_cases_fit_their_operation(operation):
  like = jax.eval_shape(lambda: make_inputs(operation, TINY))
  for case in cases(operation):
    inputs, segment_ids = case_inputs(operation, case, TINY)
    assert [x.shape for x in inputs] == [x.shape for x in like], case
    assert all(np.array_equal(x, x.astype(np.float32)) for x in inputs)
    assert len(set(segment_ids[0])) == (9 if case == "documents" else 1)
  assert ("decays -8 to -16" in cases(operation)) == (operation in _ANY_DECAY)


_ANY_DECAY = (
  "linear_attention",
  "linear_attention_shared_keys",
  "gated_delta_rule",
  "gated_delta_rule_packed",
  "delta_product",
  "kimi_delta_rule_unbounded",
  "gated_delta_rule_2",
  "comba_rule",
  "mixture_of_memories",
  "erase_then_delta_rule_unbounded",
)


def test_cases_are_what_their_names_say():
  q, k, v, beta, log_decay = case_inputs("gated_delta_rule", "cosine 0.95, beta 1.9", TINY)[0]
  units = k[0, :, 0] / np.linalg.norm(k[0, :, 0], axis=-1, keepdims=True)
  cosines = (units @ units.T)[~np.eye(len(units), dtype=bool)]
  assert 0.93 < cosines.mean() < 0.97
  assert beta == pytest.approx(1.9)
  assert all(np.array_equal(x, x.astype(jnp.bfloat16).astype(np.float64)) for x in (q, k, v))
  *_, log_decay = case_inputs("gated_delta_rule", "decays -8 to -16", TINY)[0]
  assert (log_decay.min() >= -16, log_decay.max() <= -8) == (True, True)
  *_, log_decay = case_inputs("gated_delta_rule", "decays -20 to -60 at times", TINY)[0]
  assert 0 < (log_decay < -20).mean() < 0.3
  assert np.unique(log_decay[log_decay > -20]) == pytest.approx(-0.001)


def test_the_least_work_counts_inputs_results_and_the_recurrence():
  inputs = jax.eval_shape(lambda: make_inputs("gated_delta_rule", TINY, dtype=jnp.bfloat16))
  read = 32 * 2 * (3 * 8 * 2 + 2 * 4)  # q, k, v in bfloat16, beta and log_decay in float32
  assert least_work("gated_delta_rule", "forward", *inputs).bytes == read + 32 * 2 * 8 * 2 + 2 * 8 * 8 * 4
  assert least_work("gated_delta_rule", "gradient", *inputs).bytes == 2 * read
  forward, gradient = (least_work("gated_delta_rule", each, *inputs).flops for each in ("forward", "gradient"))
  assert 32 * 2 * 2 * 2 * 8 * 8 <= forward <= 32 * 2 * 2 * 3 * 8 * 8
  assert gradient == 3 * forward
  softmax, local_linear = (
    least_work(f"{name}_attention", "forward", *jax.eval_shape(lambda name=name: make_inputs(f"{name}_attention", TINY))).flops
    for name in ("softmax", "local_linear")
  )
  pairs = 2 * 32 * 33 // 2  # heads, and keys that each query sees
  assert softmax == pairs * 2 * 2 * 8  # scores and values
  assert local_linear == pairs * 2 * (4 + 16 * 2) * 8  # and the mean, k . x, and two products an iteration
  assert Work(100, 10).seconds(10, 10) == 10
  assert Work(10, 100).seconds(10, 10) == 10


def test_inputs_have_the_dtype_of_activations_and_float32_gates():
  inputs = jax.eval_shape(lambda: make_inputs("erase_then_delta_rule", TINY, dtype=jnp.bfloat16))
  assert [x.dtype.name for x in inputs] == ["bfloat16"] * 3 + ["float32", "bfloat16", "float32", "float32"]


@pytest.mark.slow
def test_the_bench_of_generation_prints_a_table_and_draws_it(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "tiny.gin").write_text(
    "include 'parts/language_model.gin'\nlength = 64\nLanguageModel.width = 32\nLanguageModel.depth = 1\n"
    "LanguageModel.mixers = [@Attention]\nAttention.num_heads = 2\nAttention.head_dim = 16\nAttention.window = %length\n"
  )
  main(["tiny.gin", "--lengths", "16,64", "--seconds", "0"])
  rows = [line.split() for line in capsys.readouterr().out.splitlines() if "tiny.gin" in line and "Compiling" not in line]
  assert [row[1] for row in rows] == ["16", "64"]
  assert all(float(row[2].replace(",", "")) <= float(row[3].replace(",", "")) for row in rows), "none is faster than its floor"
  assert [row[4:6] for row in rows] == [["4.0", "KiB"], ["16.0", "KiB"]], "keys and values of two heads, 16 wide, in float32"
  assert Path("decoding.png").read_bytes().startswith(b"\x89PNG")
