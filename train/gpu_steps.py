"""Times one training step of a config on the device at hand, for `memzoo bench --gpu`.

    python -m memzoo.train.gpu_steps models/gated_delta_net_130m

Batches are random tokens, so neither text nor Grain's workers are needed.
"""

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax

from ..pallas_kernels.gpu_bench import Task, device_rates

CONFIGS = ("models/gated_delta_net_130m", "models/erase_then_delta_130m", "models/titans_memory_130m", "models/attention_130m")

_TINY = (
  "LanguageModel.width=16",
  "LanguageModel.depth=1",
  "LanguageModel.mixers=[@GatedConv]",
  "GatedConv.channels=8",
  "TextData.sequence_length=32",
)


def step_tasks(configs: Sequence[str] = CONFIGS, *, tiny: bool = False) -> list[Task]:
  """A task for each config; with `tiny` its model has one narrow block."""
  return [Task("step", config, partial(time_step, config, _TINY if tiny else ())) for config in configs]


def time_step(config: str, overrides: Sequence[str] = (), rows: int = 8, steps: int = 5) -> Iterator[dict[str, Any]]:
  """Milliseconds of a training step of `rows` rows, tokens per second, and the share of the device's bfloat16 rate (MFU).

  The rate counts the matrix products of the model, forward and backward, and not what `LanguageModel.remat` computes again.

  Raises:
    ImportError: if gin or Grain is not installed.
  """
  from ..zoo.describe import forward_flops
  from .config import build
  from .experiment_report import abstract_batch
  from .sharding import MeshShape
  from .step import experiment_program

  experiment = build(config, [f"TextData.batch_size={rows}", "LanguageModel.scan=True", *overrides])
  data, model = experiment.data, experiment.model
  mesh = MeshShape(data=1).build(jax.devices()[:1])
  program = experiment_program(experiment, mesh)
  batch = {name: _filled(name, leaf) for name, leaf in abstract_batch(data, program.batch_sharding).items()}
  began = time.perf_counter()
  state, metrics = program.train(program.create(), batch)
  jax.block_until_ready(metrics)
  compile_seconds, times = time.perf_counter() - began, []
  for _ in range(steps):
    began = time.perf_counter()
    state, metrics = program.train(state, batch)
    jax.block_until_ready(metrics)
    times.append(time.perf_counter() - began)
  seconds = statistics.median(times)
  shape = data.batch_size, data.sequence_length
  numbers = {"ms": 1e3 * seconds, "tokens/s": shape[0] * shape[1] / seconds, "compile": compile_seconds}
  if rates := device_rates():
    numbers["mfu"] = 3 * forward_flops(model, *shape) / seconds / rates.flops
  yield numbers


def _filled(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Random tokens in one document without padding."""
  if name in ("tokens", "targets"):
    return jax.device_put(jax.random.randint(jax.random.key(0), like.shape, 0, 256, like.dtype), like.sharding)
  return jax.device_put(jax.numpy.ones(like.shape, like.dtype), like.sharding)


if __name__ == "__main__":
  for config in sys.argv[1:] or CONFIGS:
    print(config, *time_step(config))
