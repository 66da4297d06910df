"""Checks and times every operation on a GPU, in one call that needs nothing but JAX and loses nothing when it is cut off.

    python -m memzoo.pallas_kernels.gpu_bench --minutes 8 --out gpu.json

First the errors against the oracle, which runs in float64 on the CPU; then the times of the XLA forms, on a Hopper GPU of the
kernels, and of other packages where they are installed: flash-linear-attention (with torch) and jax-linear-attention. Every
result is printed at once, and the file is written again after each.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .measure import seconds_in_flight
from .workloads import (
  ON_ACCELERATORS,
  Shape,
  case_inputs,
  cases,
  find,
  function,
  least_work,
  make_inputs,
  timed_inputs,
  with_pull_back,
)


class Rates(NamedTuple):
  """Published rates of a device: bfloat16 FLOP/s, and bytes per second to and from its memory."""

  flops: float
  bandwidth: float


_RATES = {"H100": Rates(989e12, 3350e9), "H200": Rates(989e12, 4800e9)}

_ACCURACY = Shape(1, 256, 2, 128, 128)


def device_rates() -> Rates | None:
  """The rates of the default device, if known."""
  return next((rates for kind, rates in _RATES.items() if kind in jax.devices()[0].device_kind), None)


_TINY = Shape(1, 48, 2, 16, 16)
# Operations that have kernels for Hopper GPUs.
_WITH_KERNELS = (
  "linear_attention",
  "delta_rule",
  "gated_delta_rule",
  "kimi_delta_rule",
  "delta_product",
  "erase_then_delta_rule",
  "linear_attention_without_decay",
  "linear_attention_shared_keys",
  "gated_delta_rule_packed",
  "kimi_delta_rule_unbounded",
  "erase_then_delta_rule_unbounded",
)
# Most telling first: shapes of flash-linear-attention's own benchmark, and operations that it has too.
SHAPES = (
  Shape(4, 2048, 16, 128, 128),
  Shape(1, 8192, 96, 128, 128),
  Shape(2, 16384, 16, 128, 128),
  Shape(4, 4096, 64, 128, 128),
  Shape(8, 1024, 8, 64, 64),
)


def _print(line: str) -> None:
  print(line, flush=True)


class Task(NamedTuple):
  """One program, and what is measured with it.

  Attributes:
    kind: "accuracy", "time" or "step"; tasks of a kind take about as long as each other.
    what: what is measured, in words.
    measure: yields a row of numbers for each measurement.
  """

  kind: str
  what: str
  measure: Callable[[], Iterable[dict[str, Any]]]


class Results:
  """The rows so far, in a file that is complete at any time.

  Args:
    path: the file.
    minutes: tasks that would probably end later are skipped.
    say: called with a line for each row.
  """

  def __init__(self, path: Path, minutes: float, say: Callable[[str], None] = _print):
    self.path, self.seconds, self.say = path, 60 * minutes, say
    self.began, self.taken = time.perf_counter(), {}
    self.facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version()}
    self.rows: list[dict[str, Any]] = []

  def run(self, task: Task) -> None:
    """Runs a task, if there is time for one of its kind. An error is a result too."""
    start, taken = time.perf_counter(), self.taken.setdefault(task.kind, [])
    left, needed = self.seconds - (start - self.began), statistics.mean(taken or [0.0])
    if left < needed:
      self.add(task, {"skipped": f"{max(0, left):.0f} s left, and such a task took {needed:.0f} s"})
      return
    try:
      for numbers in task.measure():
        self.add(task, numbers)
    except Exception as error:  # a missing library, or too little memory
      self.add(task, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
    taken.append(time.perf_counter() - start)

  def add(self, task: Task, numbers: dict[str, Any]) -> None:
    """Adds a row: prints it, and replaces the file in one step."""
    self.rows.append({"kind": task.kind, "what": task.what} | numbers)
    aside = self.path.with_name(f"{self.path.name}.new")
    aside.write_text(json.dumps(self.facts | {"rows": self.rows}, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, self.path)
    self.say(f"{task.kind:8}  {task.what:48}  " + "  ".join(f"{name} {_shown(value)}" for name, value in numbers.items()))


def forms(name: str, dtype: str = "bfloat16") -> list[tuple[str, str]]:
  """The implementations of an operation that are measured here, with what is added to its name."""
  hopper = str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
  kernels = name in _WITH_KERNELS and dtype == "bfloat16" and hopper
  return [("xla", ""), *[("pallas", " (kernels)")] * kernels]


def accuracy_tasks(names: Sequence[str], dtype: str, shape: Shape = _ACCURACY) -> list[Task]:
  """The errors of these operations on each of their `cases`."""
  return [
    Task("accuracy", f"{name}{note}, {dtype}", partial(accuracy, name, dtype, shape, form))
    for name in names
    for form, note in forms(name, dtype)
  ]


def time_tasks(names: Sequence[str], shape: Shape) -> list[Task]:
  """The times of these operations, and of those that flash-linear-attention has too."""
  found = []
  size = " x ".join(map(str, (shape.batch, shape.length, shape.heads, shape.key_dim)))
  for name in names:
    for direction in ("forward", "both"):
      for form, note in forms(name):
        found.append(Task("time", f"{name}{note}, {direction}, {size}", partial(time_form, name, direction, shape, form)))
      for kind, others, time_other in (("fla", _FLA, time_fla), ("jla", _JLA, time_jla)):
        if name in others:
          found.append(Task(kind, f"{name}, {direction}, {size}", partial(time_other, name, direction, shape)))
  return found


def accuracy(name: str, dtype: str, shape: Shape = _ACCURACY, form: str = "xla") -> Iterator[dict[str, Any]]:
  """Relative RMS errors of a form in each case: of the output, of the final state, and the worst of all gradients."""
  like = jax.eval_shape(lambda: make_inputs(name, shape, dtype=jnp.dtype(dtype)))
  state = _initial_state(name, like)
  for case in cases(name):
    inputs, segment_ids = case_inputs(name, case, shape)
    inputs = [jnp.asarray(x, a.dtype) for x, a in zip(inputs, like, strict=True)]
    ours = jax.device_get(_pass(name, form)(inputs, state, segment_ids))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
      wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (inputs, state))
      exact = jax.device_get(_pass(name, "recurrent")(*wide, segment_ids))
    yield {"case": case} | {part: _worst_error(ours[part], exact[part]) for part in ours}


@cache
def _pass(name: str, implementation: str) -> Callable[..., Any]:
  """Maps inputs, state and segment ids to the output, parts of the final state, and gradients of a fixed sum of these."""

  def forward(inputs, state, segment_ids):
    options = {} if state is None else {"initial_state": state}
    output, final = find(name)(*inputs, segment_ids=segment_ids, implementation=implementation, **options)
    return output, [leaf for leaf in jax.tree.leaves(final) if jnp.issubdtype(leaf.dtype, jnp.floating)]

  def both(inputs, state, segment_ids):
    values, pull = jax.vjp(lambda *differentiated: forward(*differentiated, segment_ids), inputs, state)
    return {"output": values[0], "state": values[1], "gradient": pull(jax.tree.map(_fixed, values))}

  return jax.jit(both)


def _initial_state(name: str, inputs: Sequence[jax.ShapeDtypeStruct]) -> jax.Array | None:
  """A state for operations that have a single array for one."""
  _, final = jax.eval_shape(find(name), *inputs)
  return _fixed(final) if isinstance(final, jax.ShapeDtypeStruct) else None


def _fixed(like: Any) -> jax.Array:
  """Numbers between -1 and 1, exact in bfloat16 and equal on every platform."""
  return jnp.asarray(np.cos(np.arange(like.size)).astype(jnp.bfloat16).reshape(like.shape), like.dtype)


def _worst_error(ours: Any, exact: Any) -> float:
  """The largest relative error (root mean square) of an array. Its size counts as at least a 1000th of the largest array's."""
  pairs = list(zip(map(_wide, jax.tree.leaves(ours)), map(_wide, jax.tree.leaves(exact)), strict=True))
  sizes = [_rms(b) for _, b in pairs]
  return float(np.max([_rms(a - b) / (max(size, 1e-3 * max(sizes)) or 1.0) for (a, b), size in zip(pairs, sizes, strict=True)]))


def _wide(x: Any) -> np.ndarray:
  return np.asarray(x).astype(np.float64)


def _rms(x: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(x))))


def time_form(name: str, direction: str, shape: Shape, form: str = "xla") -> Iterator[dict[str, float]]:
  """The time of a form in bfloat16, per token-head, and its share of the roofline."""
  yield _timed(name, direction, shape, function(name, direction, form))


def _timed(name: str, direction: str, shape: Shape, call: Callable[..., Any]) -> dict[str, float]:
  """The time of `call` in place of `function(name, direction)`."""
  inputs = timed_inputs(name, direction, shape)
  start = time.perf_counter()
  compiled = jax.jit(call).lower(*inputs).compile()
  compile_seconds = time.perf_counter() - start
  seconds = seconds_in_flight(lambda: compiled(*inputs))
  return _per_token_head(name, direction, shape, seconds) | {"compile": compile_seconds}


def _per_token_head(name: str, direction: str, shape: Shape, seconds: float) -> dict[str, float]:
  arguments = jax.eval_shape(lambda: timed_inputs(name, direction, shape))
  numbers = {"ns": 1e9 * seconds / shape.token_heads}
  if rates := device_rates():
    numbers["roofline"] = least_work(name, direction, *arguments).seconds(*rates) / seconds
  return numbers


# The same operations in flash-linear-attention: module, function, and its names for our inputs.
_FLA = {
  "linear_attention": ("fla.ops.simple_gla", "chunk_simple_gla", ("q", "k", "v", "g")),
  "delta_rule": ("fla.ops.delta_rule", "chunk_delta_rule", ("q", "k", "v", "beta")),
  "gated_delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", ("q", "k", "v", "beta", "g")),
  "kimi_delta_rule": ("fla.ops.kda", "chunk_kda", ("q", "k", "v", "beta", "g")),
}


def time_fla(name: str, direction: str, shape: Shape) -> Iterator[dict[str, float]]:
  """The time of flash-linear-attention's operation on the same inputs, and its output's difference from ours.

  Raises:
    ImportError: if torch or flash-linear-attention is not installed.
  """
  module, attribute, names = _FLA[name]
  run, torch = getattr(import_module(module), attribute), import_module("torch")
  inputs = timed_inputs(name, "both", shape)
  cotangent, *leaves = (torch.from_dlpack(x).clone() for x in inputs)
  keywords = dict(zip(names, leaves, strict=True))

  def forward():
    with torch.no_grad():
      return run(**keywords)[0]

  def both():
    return torch.autograd.grad(run(**keywords)[0], leaves, cotangent)

  ours = jax.jit(function(name, "forward", "xla"))(*inputs[1:])[0]
  difference = _worst_error(forward().float().cpu().numpy(), ours)
  if direction == "both":
    for leaf in leaves:
      leaf.requires_grad_()
  seconds = _cuda_seconds(torch, forward if direction == "forward" else both)
  yield _per_token_head(name, direction, shape, seconds) | {"difference": difference}


# The same operations in jax-linear-attention: its kind, and its names for our inputs.
_JLA = {
  "linear_attention": ("simple_gla", ("q", "k", "v", "g")),
  "delta_rule": ("deltanet", ("q", "k", "v", "beta")),
  "gated_delta_rule": ("gated_deltanet", ("q", "k", "v", "beta", "g")),
  "kimi_delta_rule": ("kda", ("q", "k", "v", "beta", "g")),
}


def time_jla(name: str, direction: str, shape: Shape) -> Iterator[dict[str, float]]:
  """The time of jax-linear-attention's operation on the same inputs, and its output's difference from ours.

  Raises:
    ImportError: if it is not installed.
  """
  kind, names = _JLA[name]
  run = import_module("jla.ops").linear_attention

  def forward(*inputs):
    return run(kind, **dict(zip(names, inputs, strict=True)))[0]

  call = forward if direction == "forward" else with_pull_back(forward)
  inputs = timed_inputs(name, "forward", shape)
  difference = _worst_error(jax.jit(forward)(*inputs), jax.jit(function(name, "forward", "xla"))(*inputs)[0])
  yield _timed(name, direction, shape, call) | {"difference": difference}


def _cuda_seconds(torch: Any, call: Callable[[], Any], calls: int = 20) -> float:
  """Median seconds of a call between CUDA events, after a warm-up that lets Triton tune its kernels."""
  for _ in range(3):
    call()
  times = []
  for _ in range(calls):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(end) / 1e3)
  return statistics.median(times)


def _shown(value: Any) -> str:
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def gpu_bench(
  results: Results, operations: Sequence[str] = (), *, tiny: bool = False, steps: Sequence[Task] = ()
) -> Results:
  """Runs all measurements, the most telling first.

  Args:
    results: where they go.
    operations: names of operations; all by default.
    tiny: small shapes, to try it on any machine.
    steps: further tasks, for which time is left after the first shape.
  """
  names = list(operations) or list(ON_ACCELERATORS)
  (first, *others), accurate = ((_TINY,), _TINY) if tiny else (SHAPES, _ACCURACY)
  tasks = [*accuracy_tasks(names, "bfloat16", accurate), *time_tasks(names, first), *steps]
  tasks += accuracy_tasks(names, "float32", accurate)
  for shape in others:
    tasks += time_tasks(names, shape)
  for task in tasks:
    results.run(task)
  return results


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("operations", nargs="*", help="operations to measure (default: all)")
  parser.add_argument("--minutes", type=float, default=8.0, help="skip what would take longer (default %(default)s)")
  parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file to write (default %(default)s)")
  parser.add_argument("--tiny", action="store_true", help="small shapes, to try it on any machine")
  options = parser.parse_args()
  gpu_bench(Results(options.out, options.minutes), options.operations, tiny=options.tiny)


if __name__ == "__main__":
  main()
