"""Mamba and Mamba-2 compared with PyTorch's: the mixers of transformers, with the same weights.

    python tests/compare_torch_mamba.py                                        # compare; exit status 1 if a bound is passed
    python tests/compare_torch_mamba.py --bench [--length 2048] [--json FILE]  # time the selective scan and the layer of Mamba
    python tests/compare_torch_mamba.py --write tests/mamba_from_torch.npz     # the numbers of test_mamba_from_torch.py

It needs `torch` and `transformers`, which memzoo itself does not need. transformers runs its plain PyTorch code on the CPU.
Where `mamba_ssm` or `causal_conv1d` is installed, it calls their CUDA kernels instead: neither may be installed.

All weights are random, also those whose initial values are constants (D, A_log, biases, the scale of the norm). They are copied
into the trees of the layers, and gradients by them are compared in the same layout. Errors are ratios of root mean squares, as
in the tests. Columns of the table:
  output    of one call.
  by token  the output of half of the tokens in one call and of the others one by one, each from the state before it.
  memory    the final state.
  gradient  the worst of the gradients by the input and by every weight.

Rows of each configuration, whose bounds are 1e-5, 1e-10 and 1e-5:
  float32   both sides in float32.
  float64   both in float64. transformers casts A_log, D, biases, writes and the gated norm to float32 whatever it is given;
            during its calls `Tensor.float` and `torch.float32` stand for float64, so that these casts round nothing.
  casts     both in float64, and transformers as it is: the error is the rounding of its casts.

--bench times the forward pass, and forward with backward. Calls take turns in one process, with the same number of threads, and
must agree before they are timed. A call of PyTorch that takes longer than --seconds is timed once. Its backward takes minutes
for 2,048 tokens: for every token it adds up an array of the size of all decays, so that its time is quadratic in the length.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from memzoo.layers import Mamba, Mamba2
from memzoo.layers.tolerances import assert_close, relative_errors
from memzoo.pallas_kernels.measure import take_turns
from memzoo.pallas_kernels.selective_scan import selective_scan

BOUNDS = {"float32": 1e-5, "float64": 1e-10, "casts": 1e-5}
ROWS = 2


class Case(NamedTuple):
  """One configuration.

  Attributes:
    layer: "Mamba" or "Mamba2".
    width: of the model.
    tokens: length of the sequence.
    settings: fields of the layer in memzoo.
    their_chunk: `chunk_size` of transformers, for Mamba2.
  """

  layer: str
  width: int
  tokens: int
  settings: dict[str, int]
  their_chunk: int = 16

  @property
  def channels(self) -> int:
    s = self.settings
    return s["channels"] if self.layer == "Mamba" else s["num_heads"] * s["head_dim"]

  def __str__(self) -> str:
    settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
    chunk = f" their_chunk={self.their_chunk}" if self.layer == "Mamba2" else ""
    return f"{self.layer}: width={self.width} tokens={self.tokens} {settings}{chunk}"


def _mamba(width: int, tokens: int, **settings: int) -> Case:
  return Case("Mamba", width, tokens, settings)


def _mamba2(width: int, tokens: int, their_chunk: int, **settings: int) -> Case:
  return Case("Mamba2", width, tokens, settings, their_chunk)


CASES = [
  _mamba(12, 37, channels=24, state_dim=16, step_rank=1, conv_width=4),
  _mamba(20, 41, channels=40, state_dim=5, step_rank=3, conv_width=2, chunk_size=16),
  _mamba(8, 19, channels=24, state_dim=1, step_rank=8, conv_width=3, chunk_size=4),
  _mamba2(12, 37, 16, num_heads=4, head_dim=6, state_dim=8, num_groups=1, conv_width=4),
  _mamba2(12, 37, 16, num_heads=4, head_dim=6, state_dim=8, num_groups=2, conv_width=4, chunk_size=16),
  _mamba2(12, 29, 7, num_heads=6, head_dim=4, state_dim=5, num_groups=3, conv_width=2, chunk_size=8),
  _mamba2(8, 23, 64, num_heads=2, head_dim=8, state_dim=16, num_groups=2, conv_width=3, chunk_size=4),
]
WRITTEN = {
  "mamba": _mamba(6, 11, channels=12, state_dim=3, step_rank=2, conv_width=4, chunk_size=4),
  "mamba2": _mamba2(8, 11, 4, num_heads=4, head_dim=4, state_dim=3, num_groups=2, conv_width=4, chunk_size=4),
}


class Numbers(NamedTuple):
  """What a mixer computes. `gradients` are by the weights, in the layout of the layer, of sum(output * output_gradient)."""

  output: Any
  input_gradient: Any
  gradients: Any
  memory: Any


def random_weights(case: Case) -> dict[str, np.ndarray]:
  """The parameters of the mixer of transformers by name, float32 numbers."""
  numbers, s = np.random.default_rng(7), case.settings
  shapes = {name: tuple(x.shape) for name, x in _mixer(case).named_parameters()}

  def fill(name, shape):
    z = numbers.standard_normal(shape)
    if name in ("dt_proj.bias", "dt_bias"):
      return z * 1.5 - 2  # steps from 0.01 to 1.5
    if name == "A_log":
      return np.log(numbers.uniform(0.3, 16, shape))
    if name == "norm.weight":
      return 1 + 0.3 * z
    if name == "conv1d.weight":
      return z * s["conv_width"] ** -0.5
    return z if len(shape) == 1 else z * shape[1] ** -0.5

  return {name: fill(name, shape).astype(np.float32) for name, shape in shapes.items()}


def in_our_layout(case: Case, theirs: dict[str, np.ndarray]) -> dict[str, Any]:
  """Parameters of transformers, or their gradients, as the tree of the layer in memzoo: parts of theirs, transposed."""
  s, inner = case.settings, case.channels
  rows, conv, conv_bias = theirs["in_proj.weight"], theirs["conv1d.weight"][:, 0].T, theirs["conv1d.bias"]
  params = {"D": theirs["D"], "A_log": theirs["A_log"].T, "output": {"kernel": theirs["out_proj.weight"].T}}
  if case.layer == "Mamba":
    inputs, gate = np.split(rows.T, [inner], axis=1)
    params |= {"input": {"kernel": inputs}, "gate": {"kernel": gate}, "conv": {"weight": conv, "bias": conv_bias}}
    step = {"kernel": theirs["dt_proj.weight"].T, "bias": theirs["dt_proj.bias"]}
    return params | {"select": {"kernel": theirs["x_proj.weight"].T}, "step": step}
  names, shared = ("input", "write", "read"), s["num_groups"] * s["state_dim"]
  gate, *streams, step = np.split(rows.T, np.cumsum([inner, inner, shared, shared]), axis=1)
  borders = np.cumsum([inner, shared])
  for name, kernel, weight, bias in zip(
    names, streams, np.split(conv, borders, axis=1), np.split(conv_bias, borders), strict=True
  ):
    params |= {name: {"kernel": kernel}, f"{name}_conv": {"weight": weight, "bias": bias}}
  step = {"kernel": step, "bias": theirs["dt_bias"]}
  return params | {"gate": {"kernel": gate}, "step": step, "norm": {"scale": theirs["norm.weight"]}}


def random_inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """The input and the gradient by the output, [B, T, width], float32 numbers."""
  x = np.random.default_rng(11).standard_normal((2, ROWS, case.tokens, case.width)).astype(np.float32)
  return x[0], x[1]


def _config(case: Case) -> Any:
  from transformers import Mamba2Config, MambaConfig

  s = case.settings
  shared = {"hidden_size": case.width, "expand": case.channels // case.width, "num_hidden_layers": 1, "vocab_size": 8}
  shared |= {"state_size": s["state_dim"], "conv_kernel": s["conv_width"]}
  if case.layer == "Mamba":
    return MambaConfig(**shared, time_step_rank=s["step_rank"])
  heads = {"num_heads": s["num_heads"], "head_dim": s["head_dim"], "n_groups": s["num_groups"]}
  return Mamba2Config(**shared, **heads, chunk_size=case.their_chunk)


def _mixer(case: Case) -> Any:
  import transformers
  from transformers.models.mamba.modeling_mamba import MambaMixer
  from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

  transformers.logging.set_verbosity_error()  # else it advises to install kernels
  mixer = {"Mamba": MambaMixer, "Mamba2": Mamba2Mixer}[case.layer]
  return mixer(_config(case), layer_idx=0).eval()


@contextlib.contextmanager
def _no_rounding() -> Iterator[None]:
  """Casts to float32 are casts to float64."""
  import torch

  with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), mock.patch.object(torch, "float32", torch.float64):
    yield


def in_torch(case: Case, precision: str) -> Numbers:
  """The mixer of transformers; `precision` is a key of `BOUNDS`."""
  import torch
  from transformers import DynamicCache

  dtype = torch.float32 if precision == "float32" else torch.float64
  mixer = _mixer(case).to(dtype)
  mixer.load_state_dict({name: torch.from_numpy(x) for name, x in random_weights(case).items()})
  x, output_gradient = (torch.from_numpy(z).to(dtype) for z in random_inputs(case))
  x.requires_grad_(True)
  names, weights = zip(*mixer.named_parameters(), strict=True)
  with _no_rounding() if precision == "float64" else contextlib.nullcontext():
    output = mixer(x)
    by_input, *by_weights = torch.autograd.grad((output * output_gradient).sum(), [x, *weights])
    cache = DynamicCache(config=_config(case))
    with torch.no_grad():
      mixer(x, cache=cache)
  gradients = {name: g.numpy() for name, g in zip(names, by_weights, strict=True)}
  memory = cache.layers[0].recurrent_states[0].numpy().swapaxes(-1, -2)
  return Numbers(output.detach().numpy(), by_input.numpy(), in_our_layout(case, gradients), memory)


def in_memzoo(case: Case, dtype: str) -> tuple[Numbers, jax.Array]:
  """The layer of memzoo, and the output of half of the tokens in one call, followed by the others one by one."""
  layer = {"Mamba": Mamba, "Mamba2": Mamba2}[case.layer](**case.settings, param_dtype=jnp.dtype(dtype))
  params = jax.tree.map(lambda w: jnp.asarray(w, dtype), in_our_layout(case, random_weights(case)))
  x, output_gradient = (jnp.asarray(z, dtype) for z in random_inputs(case))
  own = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))["params"]
  shapes, expected = (jax.tree.map(lambda w: w.shape, tree) for tree in (params, own))
  if shapes != expected:
    raise ValueError(f"{case} has parameters {expected}; those of transformers give {shapes}.")

  @jax.jit
  def call(params, x, state=None):
    return layer.apply({"params": params}, x, state)

  @jax.jit
  def gradients(params, x):
    (_, state), pull_back = jax.vjp(lambda params, x: layer.apply({"params": params}, x), params, x)
    return pull_back((output_gradient, jax.tree.map(jnp.zeros_like, state)))

  output, state = call(params, x)
  by_weights, by_input = gradients(params, x)
  half = case.tokens // 2
  first, handed = call(params, x[:, :half])
  pieces = [first]
  for token in range(half, case.tokens):
    piece, handed = call(params, x[:, token : token + 1], handed)
    pieces.append(piece)
  return Numbers(output, by_input, by_weights, state.memory), jnp.concatenate(pieces, axis=1)


def _worst(actual: Any, expected: Any) -> tuple[float, str]:
  return max((error, name) for name, error, _ in relative_errors(actual, expected))


def compare() -> bool:
  """Prints the table. Returns whether every error is within its bound."""
  fine = True
  for case in CASES:
    print(case, flush=True)
    ours = {}
    for dtype in ("float32", "float64"):
      with jax.enable_x64(dtype == "float64"):
        ours[dtype] = in_memzoo(case, dtype)
    for precision, bound in BOUNDS.items():
      numbers, pieces = ours.get(precision, ours["float64"])
      theirs = in_torch(case, precision)
      values, decoded, memory = (
        _worst(*pair)[0]
        for pair in ((numbers.output, theirs.output), (pieces, theirs.output), (numbers.memory, theirs.memory))
      )
      gradient, name = _worst((numbers.input_gradient, numbers.gradients), (theirs.input_gradient, theirs.gradients))
      name = name.removeprefix("[1]") if name.startswith("[1]") else "the input"
      good = max(values, decoded, memory, gradient) <= bound
      fine &= good
      print(
        f"  {precision:8} output {values:7.1e}   by token {decoded:7.1e}   memory {memory:7.1e}   "
        f"gradient {gradient:7.1e}   {'' if good else 'ABOVE '}{bound:.0e}   worst gradient: by {name}",
        flush=True,
      )
  return fine


def write(path: Path) -> None:
  """Writes the settings, weights, input and results of `WRITTEN`, computed in float64."""
  arrays = {}
  for name, case in WRITTEN.items():
    x, output_gradient = random_inputs(case)
    theirs = in_torch(case, "float64")
    weights = jax.tree_util.tree_leaves_with_path(in_our_layout(case, random_weights(case)))
    parts = {f"params/{'/'.join(key.key for key in keys)}": w for keys, w in weights}
    parts |= {f"settings/{field}": value for field, value in case.settings.items()}
    parts |= {"input": x, "output_gradient": output_gradient, "output": theirs.output, "input_gradient": theirs.input_gradient}
    arrays |= {f"{name}/{part}": np.asarray(a) for part, a in parts.items()}
  np.savez_compressed(path, **arrays)
  print(f"{path}: {len(arrays)} arrays, {path.stat().st_size:,} bytes")


def bench(length: int, seconds: float) -> dict[str, dict[str, list[float]]]:
  """Prints and returns the seconds of every call, by what is timed and by side, "memzoo" and "torch".

  Raises:
    AssertionError: if the two sides disagree.
  """
  import torch
  from transformers.models.mamba.modeling_mamba import mamba_selective_scan

  torch.set_num_threads(_threads())
  width, channels, states = 256, 512, 16
  case = _mamba(width, length, channels=channels, state_dim=states, step_rank=width // 16, conv_width=4)
  numbers = np.random.default_rng(3)

  def normal(*shape):
    return numbers.standard_normal(shape).astype(np.float32)

  step = np.log1p(np.exp(normal(1, length, channels) - 3))
  a = -np.exp(0.5 * normal(states, channels) + 1)
  operands = [normal(1, length, channels), step, a, normal(1, length, states), normal(1, length, states)]
  mixer = _mixer(case)
  mixer.load_state_dict({name: torch.from_numpy(x) for name, x in random_weights(case).items()})
  layer, params = Mamba(**case.settings), in_our_layout(case, random_weights(case))
  x = normal(1, length, width)

  def their_scan(x, step, a, b, c):
    x, step, a, b, c = (z.mT for z in (x, step, a, b, c))
    return mamba_selective_scan(x, step, a, b, c).mT

  def their_layer(x, *weights):
    return mixer(x)

  ours = {
    "selective scan": (lambda *operands: selective_scan(*operands)[0], [jnp.asarray(z) for z in operands]),
    "layer": (lambda x, params: layer.apply({"params": params}, x)[0], [jnp.asarray(x), jax.tree.map(jnp.asarray, params)]),
  }
  theirs = {
    "selective scan": (their_scan, [torch.from_numpy(z).requires_grad_(True) for z in operands]),
    "layer": (their_layer, [torch.from_numpy(x).requires_grad_(True), *mixer.parameters()]),
  }
  times = {}
  for what in ours:
    calls = zip(_our_calls(*ours[what]).items(), _their_calls(*theirs[what]).values(), strict=True)
    for (direction, mine), other in calls:
      began = time.perf_counter()
      expected = other()[0].numpy()
      taken = time.perf_counter() - began
      # The gradient by the first argument; the rows of the table compare those by the weights.
      assert_close(np.asarray(mine()[0]), expected, jnp.float32, gradients=direction != "forward")
      slow = taken > seconds
      turns = take_turns({"memzoo": mine} if slow else {"memzoo": mine, "torch": other}, seconds)
      times[f"{what}, {direction}"] = turns | ({"torch": [taken]} if slow else {})
      _print_times(f"{what}, {direction}", times[f"{what}, {direction}"])
  return times


def _print_times(what: str, times: dict[str, list[float]]) -> None:
  for name, statistic in (("quickest", min), ("median", statistics.median)):
    mine, other = (statistic(times[side]) * 1e3 for side in ("memzoo", "torch"))
    ratio = f"torch / memzoo {other / mine:.2f}"
    print(f"  {what:36} {name:8}  memzoo {mine:8.1f} ms   torch {other:9.1f} ms   {ratio}", flush=True)


def _our_calls(function: Callable, arguments: list) -> dict[str, Callable[[], Any]]:
  def loss(*arguments):
    y = function(*arguments)
    return jnp.sum(y * jnp.cos(jnp.arange(y.shape[-1], dtype=y.dtype)))

  forward = jax.jit(function)
  backward = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))
  return {"forward": lambda: [forward(*arguments)], "forward and backward": lambda: backward(*arguments)}


def _their_calls(function: Callable, arguments: list) -> dict[str, Callable[[], Any]]:
  import torch

  def forward():
    with torch.no_grad():
      return [function(*arguments)]

  def backward():
    y = function(*arguments)
    return torch.autograd.grad((y * torch.cos(torch.arange(y.shape[-1], dtype=y.dtype))).sum(), arguments)

  return {"forward": forward, "forward and backward": backward}


def _threads() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main() -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--write", type=Path, metavar="FILE", help="write the numbers of the tests to FILE (.npz) and stop")
  parser.add_argument("--bench", action="store_true", help="time memzoo beside transformers and stop")
  parser.add_argument("--length", type=int, default=2048, help="tokens that --bench times (default %(default)s)")
  parser.add_argument("--seconds", type=float, default=10, help="seconds of each timing of --bench (default %(default)s)")
  parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the times of --bench to")
  arguments = parser.parse_args()
  if arguments.write:
    write(arguments.write)
    return 0
  if arguments.bench:
    sizes = f"1 row of {arguments.length:,} tokens, width 256, 512 channels of 16 states"
    print(f"Mamba, {sizes}, float32, {_threads()} threads", flush=True)
    times = bench(arguments.length, arguments.seconds)
    if arguments.json:
      arguments.json.write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")
    return 0
  return 0 if compare() else 1


if __name__ == "__main__":
  sys.exit(main())
