"""The gated delta rule compared with PyTorch's: the chunked fallback that Qwen3-Next runs where it has no kernel.

    python -m tests/bench_torch.py [--length 2048] [--json FILE]

It needs `torch` and `transformers`, which memzoo itself does not need. Both sides get the same float32 inputs and the same
number of threads, take turns in one process, and must agree before they are timed. Both the quickest call and the median are
reported: torch's threads wait for one another, so other work on the machine slows them more than it slows XLA's.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from memzoo.pallas_kernels.bench import DIRECTIONS, Shape, compile_pass, make_inputs
from memzoo.pallas_kernels.measure import take_turns

_OPERATION = "gated_delta_rule"


def compare(shape: Shape, seconds: float = 10.0) -> dict[str, dict[str, list[float]]]:
  """Seconds of every call, "forward" and "gradient" (forward and backward), by side: "memzoo" and "torch".

  Raises:
    ImportError: if torch or transformers is missing.
    ValueError: if the two sides disagree.
  """
  inputs = make_inputs(_OPERATION, shape)
  weights = np.cos(np.arange(shape.value_dim, dtype=np.float32))
  theirs = _torch_calls([np.array(x) for x in inputs], weights)
  times = {}
  for direction in DIRECTIONS:
    compiled, _ = compile_pass(_OPERATION, direction, "xla", inputs)
    ours = lambda compiled=compiled: compiled(*inputs)  # noqa: E731
    result = ours() if direction == "gradient" else ours()[:1]
    _check_equal(direction, result, theirs[direction]())
    times[direction] = take_turns({"memzoo": ours, "torch": theirs[direction]}, seconds)
  return times


def _torch_calls(inputs: list[np.ndarray], weights: np.ndarray) -> dict[str, Callable[[], list[np.ndarray]]]:
  import torch
  from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

  torch.set_num_threads(os.cpu_count())
  q, k, v, beta, log_decay = (torch.from_numpy(x) for x in inputs)
  leaves = [q, k, v, beta, log_decay]
  weights = torch.from_numpy(weights)

  def forward():
    with torch.no_grad():
      return [torch_chunk_gated_delta_rule(q, k, v, log_decay, beta, output_final_state=True)[0].numpy()]

  def gradient():
    for leaf in leaves:
      leaf.requires_grad_(True)
    output, _ = torch_chunk_gated_delta_rule(q, k, v, log_decay, beta, output_final_state=True)
    return [g.numpy() for g in torch.autograd.grad((output * weights).sum(), leaves)]

  return {"forward": forward, "gradient": gradient}


def _check_equal(direction: str, ours: tuple[jax.Array, ...], theirs: list[np.ndarray]) -> None:
  for mine, other in zip(ours, theirs, strict=True):
    error = float(jnp.linalg.norm(mine - other) / jnp.linalg.norm(mine))
    if not error < 1e-4:
      raise ValueError(f"{direction}: memzoo and torch differ by {error:.1e} of the norm; expected 1e-4 at most.")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--length", type=int, default=Shape.length, help="tokens (default %(default)s)")
  parser.add_argument("--json", type=Path, help="file to write the times to")
  arguments = parser.parse_args()
  shape = Shape(length=arguments.length)
  times = compare(shape)
  print(f"{_OPERATION}, {shape.length:,} tokens, {shape.heads} heads of {shape.key_dim}, {os.cpu_count()} threads")
  for direction, taken in times.items():
    for name, statistic in (("quickest", min), ("median", statistics.median)):
      ours, theirs = (statistic(taken[side]) * 1e3 for side in ("memzoo", "torch"))
      print(f"  {direction:8} {name:8}  memzoo {ours:8.1f} ms   torch {theirs:8.1f} ms   torch / memzoo {theirs / ours:.2f}")
  if arguments.json:
    arguments.json.write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
