"""The mixture of memories compared with flash-linear-attention's layer, with the same weights, in float64.

    python tests/compare_flash_linear_mixture.py                # compare; exit status 1 if a bound is passed
    python tests/compare_flash_linear_mixture.py --write FILE   # the numbers of test_mixture_of_memories.py

It needs `torch` and `flash-linear-attention`, which memzoo itself does not need. Errors are ratios of root mean squares, of the
output, of the final memories, and of the worst gradient by the input and the weights.

Their layer runs as for evaluation, where its convolutions stop at the borders of memories and rows; in training they do not.
Its three Triton kernels, of float32, are replaced by PyTorch of the same equations, below: the gated delta rule token by token,
the convolution, and the gated norm. Routing, sorting and mixing are theirs. They sort tokens by memory with an `argsort` that
need not keep the order of equal entries, and on a CPU does not: a memory then gets its tokens in another order than that of
time. Here it is a stable sort. During its calls `Tensor.float`, `torch.float` and `torch.float32` stand for float64.
"""

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import fla.layers.mom as theirs
import jax
import jax.numpy as jnp
import numpy as np
import torch
from memzoo.layers import MixtureOfMemories
from memzoo.layers.tolerances import relative_errors

BOUND = 1e-10
WIDTH, HEADS, KEY_DIM, EXPAND = 10, 2, 4, 2
CASES = {
  "4 memories, 2 per token, shared": {"num_memories": 4, "topk": 2, "shared_mem": True},
  "6 memories, 3 per token": {"num_memories": 6, "topk": 3, "shared_mem": False},
  "4 memories, 1 per token, shared": {"num_memories": 4, "topk": 1, "shared_mem": True},
}
WRITTEN = "4 memories, 2 per token, shared"


def gated_delta_rule(q, k, v, g, beta, cu_seqlens=None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
  """Token by token, for rows q, k [N, T, H, K], v [N, T, H, V]; or for pieces of one row, whose borders are `cu_seqlens`."""
  unit = [x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k)]
  if cu_seqlens is not None:
    borders = cu_seqlens.tolist()
    pieces = [[x[0, a:b] for x in (*unit, v, g, beta)] for a, b in itertools.pairwise(borders)]
  else:
    pieces = [[x[n] for x in (*unit, v, g, beta)] for n in range(len(q))]
  outs, states = zip(*(_of_piece(*piece) for piece in pieces), strict=True)
  return (torch.cat(outs)[None] if cu_seqlens is not None else torch.stack(outs)), torch.stack(states)


def _of_piece(q, k, v, g, beta) -> tuple[torch.Tensor, torch.Tensor]:
  state, out = torch.zeros(k.shape[1], k.shape[2], v.shape[2], dtype=k.dtype), []
  for t in range(len(q)):
    state = state * g[t].exp()[:, None, None]
    error = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
    state = state + k[t][..., None] * error[:, None]
    out.append(torch.einsum("hkv,hk->hv", state, q[t]) * q.shape[-1] ** -0.5)
  return torch.stack(out), state


def convolution(self, x, cu_seqlens=None, **options: Any) -> tuple[torch.Tensor, None]:
  """silu of a causal convolution of x [N, T, D], within pieces."""
  borders = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
  width = self.weight.shape[-1]
  pieces = []
  for a, b in itertools.pairwise(borders):
    padded = torch.nn.functional.pad(x[:, a:b], (0, 0, width - 1, 0))
    pieces.append(sum(padded[:, j : j + b - a] * self.weight[:, 0, j] for j in range(width)))
  return torch.nn.functional.silu(torch.cat(pieces, dim=1)), None


def gated_norm(self, x, gate) -> torch.Tensor:
  """Of each head."""
  return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight * torch.nn.functional.silu(gate)


@contextlib.contextmanager
def plain() -> Iterator[list[torch.Tensor]]:
  """Their layer in plain PyTorch and float64. Yields a list that gets the final states: of memories by rows, and shared."""
  states = []

  def rule(**args):
    out, state = gated_delta_rule(**args)
    states.append(state.detach())
    return out, state

  with contextlib.ExitStack() as stack:
    for target, name, value in (
      (torch, "float32", torch.float64),
      (torch, "float", torch.float64),
      (torch.Tensor, "float", torch.Tensor.double),
      (torch.Tensor, "argsort", lambda x: torch.argsort(x, stable=True)),
      (theirs, "chunk_gated_delta_rule", rule),
      (theirs.ShortConvolution, "forward", convolution),
      (theirs.FusedRMSNormGated, "forward", gated_norm),
    ):
      stack.enter_context(mock.patch.object(target, name, value))
    yield states


def make(case: str) -> torch.nn.Module:
  """Their layer, with random weights."""
  torch.manual_seed(0)
  layer = theirs.MomAttention(hidden_size=WIDTH, head_dim=KEY_DIM, num_heads=HEADS, expand_v=EXPAND, **CASES[case]).double()
  with torch.no_grad():
    for name, x in layer.named_parameters():
      x.copy_(0.5 * torch.randn_like(x) + (1 if "norm" in name else 0))
  return layer.eval()


def ours(case: str) -> MixtureOfMemories:
  s = CASES[case]
  sizes = {"num_heads": HEADS, "key_dim": KEY_DIM, "value_dim": EXPAND * KEY_DIM}
  routing = {"num_memories": s["num_memories"], "memories_per_token": s["topk"], "shared_memory": s["shared_mem"]}
  return MixtureOfMemories(**sizes, **routing, output_gate="silu", chunk_size=4, param_dtype=jnp.float64)


def converted(case: str, weights: dict[str, np.ndarray]) -> dict[str, Any]:
  """Their weights, or gradients, by the names here. Ours has a step bias for each memory, where theirs has one for all."""
  s = CASES[case]

  def sets(letter):
    names = [f"{letter}_proj.{m}.weight" for m in range(s["num_memories"])] + [f"shared_{letter}.weight"] * s["shared_mem"]
    return np.stack([weights[name].T for name in names])

  def by_head(letter):  # [D, heads * sets]
    return np.moveaxis(sets(letter), 0, -1).reshape(WIDTH, -1)

  def conv(letter):
    return {"weight": weights[f"{letter}_conv1d.weight"][:, 0].T}

  steps = np.repeat(weights["dt_bias"], s["num_memories"] + s["shared_mem"])
  return {
    "router": {"kernel": weights["gate.weight"].T},
    "query": {"kernel": weights["q_proj.weight"].T},
    "key": sets("k"),
    "value": sets("v"),
    "beta": {"logits": {"kernel": by_head("b")}},
    "decay": {"A_log": weights["A_log"], "dt_bias": steps, "step": {"full": {"kernel": by_head("a")}}},
    "query_conv": conv("q"),
    "key_conv": conv("k"),
    "value_conv": conv("v"),
    "gate": {"full": {"kernel": weights["g_proj.weight"].T}},
    "norm": {"scale": weights["o_norm.weight"]},
    "output": {"kernel": weights["o_proj.weight"].T},
  }


def by_theirs(case: str, x: np.ndarray, weight: np.ndarray) -> tuple[dict[str, Any], Any]:
  """Weights by the names here; and the output, the final memories, and the gradients of sum(output * weight).

  The gradients are by the input and by the weights. Each memory must get tokens of each row.
  """
  layer = make(case)
  given = torch.tensor(x, requires_grad=True)
  with plain() as states:
    y = layer(given)[0]
    (y * torch.tensor(weight)).sum().backward()
  named = dict(layer.named_parameters())
  params = converted(case, {name: p.detach().numpy() for name, p in named.items()})
  gradients = converted(case, {name: p.grad.numpy() for name, p in named.items()})
  memories = torch.cat([states[0].reshape(-1, len(given), *states[0].shape[1:]), *(x[None] for x in states[1:])])
  return params, (y.detach().numpy(), memories.swapaxes(0, 1).numpy(), given.grad.numpy(), gradients)


def by_ours(case: str, params: Any, x: np.ndarray, weight: np.ndarray) -> Any:
  """The same by this package."""

  @jax.jit
  def run(params, x):
    y, pull_back, state = jax.vjp(lambda params, x: ours(case).apply({"params": params}, x), params, x, has_aux=True)
    return y, state.memory, *pull_back(jnp.asarray(weight))

  y, memory, by_params, by_x = jax.tree.map(np.asarray, run(params, x))
  by_bias = by_params["decay"]["dt_bias"].reshape(HEADS, -1)  # theirs is one for all
  by_params["decay"]["dt_bias"] = np.repeat(by_bias.sum(axis=1), by_bias.shape[1])
  return y, memory, by_x, by_params


def inputs(tokens: int) -> tuple[np.ndarray, np.ndarray]:
  """An input, and weights of its output."""
  rng = np.random.default_rng(3)
  return rng.normal(size=(2, tokens, WIDTH)), rng.normal(size=(2, tokens, WIDTH))


def compare(case: str, tokens: int = 41) -> tuple[float, float, float]:
  """The errors of the output, of the memories and of the worst gradient."""
  x, weight = inputs(tokens)
  params, expected = by_theirs(case, x, weight)
  pairs = zip(by_ours(case, params, x, weight), expected, strict=True)
  output, memories, *gradients = (max(error for _, error, _ in relative_errors(a, b)) for a, b in pairs)
  return output, memories, max(gradients)


def write(path: str) -> None:
  x, weight = inputs(14)
  params, (y, memory, by_x, _) = by_theirs(WRITTEN, x, weight)
  flat = {"/".join(str(key.key) for key in where): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(params)}
  arrays = {"input": x, "weight": weight, "output": y, "memory": memory, "input_gradient": by_x}
  np.savez_compressed(path, **arrays, **{f"params/{name}": leaf for name, leaf in flat.items()})


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--write", metavar="FILE", help="write the numbers of the test instead")
  options = parser.parse_args()
  jax.config.update("jax_enable_x64", True)
  if options.write:
    write(options.write)
    return 0
  worst = 0.0
  for case in CASES:
    output, memories, gradient = errors = compare(case)
    print(f"{case:34s} output {output:.1e}  memories {memories:.1e}  worst gradient {gradient:.1e}", flush=True)
    worst = max(worst, *errors)
  return int(worst > BOUND)


if __name__ == "__main__":
  sys.exit(main())
