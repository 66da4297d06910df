"""Rules of flash-linear-attention, in its plain PyTorch references, compared with the operations here, in float64.

    python tests/compare_flash_linear_rules.py                # compare; exit status 1 if a bound is passed
    python tests/compare_flash_linear_rules.py --write FILE   # the numbers of test_flash_linear_rules.py

It needs `torch` and `flash-linear-attention`, which memzoo itself does not need. Errors are ratios of root mean squares: of the
output, of the final state, and of the worst gradient by an input, the initial state included. The references cast to float32;
during their calls `Tensor.float` and `torch.float32` stand for float64.

- gated_delta_rule_2 and comba_rule: token by token, and in chunks. Comba's reference by token feeds back the decayed state, and
  its chunks the state before the decay, as the paper has it; only these are compared.
- taylor_attention: by the matrix of scores. The references have no state.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from delta_variants import Variant
from fla.ops.based.naive import naive_parallel_based
from fla.ops.comba.naive import naive_chunk_comba
from fla.ops.gdn2.naive import naive_chunk_gdn2, naive_recurrent_gdn2
from memzoo.layers.tolerances import relative_errors
from memzoo.pallas_kernels import delta_rule
from memzoo.pallas_kernels.taylor_attention import taylor_attention

BOUND = 1e-10
GATED_2, COMBA = Variant(delta_rule.gated_delta_rule_2, "channel"), Variant(delta_rule.comba_rule, "scalar")
SIZES = {"key_heads": 3, "heads": 3, "key_dim": 6, "value_dim": 4}
# Their names of our arguments.
THEIRS = {"log_decay": "g", "erase_gate": "b", "write_gate": "w", "feedback_key": "p"}


def gated_2(reference: Callable[..., Any], **args: torch.Tensor) -> Any:
  return reference(**{THEIRS.get(name, name): x for name, x in args.items()}, output_final_state=True)


def comba(**args: torch.Tensor) -> Any:
  return gated_2(naive_chunk_comba, **args, chunk_size=16)


def based(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
  """Its epsilon is not ours: the quotient is taken here."""
  q, k, v = (x.transpose(1, 2) for x in (q, k, v))
  total, weight = (naive_parallel_based(q, k, x, use_norm=False) for x in (v, torch.ones_like(v[..., :1])))
  return (total / weight).transpose(1, 2), None


def based_inputs(tokens: int) -> dict[str, jax.Array]:
  rng = np.random.default_rng(5)
  return {name: jnp.asarray(rng.normal(size=(2, tokens, 3, 5))) for name in ("q", "k", "v")}


# Our function, its inputs by their number of tokens, and the references.
CASES: dict[str, tuple[Callable[..., Any], Callable[[int], dict[str, jax.Array]], dict[str, Callable[..., Any]]]] = {
  "gated_delta_rule_2": (
    GATED_2.function,
    lambda tokens: GATED_2.inputs(tokens, **SIZES),
    {
      "by token": lambda **args: gated_2(naive_recurrent_gdn2, **args),
      "in chunks": lambda **args: gated_2(naive_chunk_gdn2, **args, chunk_size=16),
    },
  ),
  "comba_rule": (COMBA.function, lambda tokens: COMBA.inputs(tokens, **SIZES), {"in chunks": comba}),
  "taylor_attention": (taylor_attention, based_inputs, {"by scores": based}),
}


def cotangents(out: Any) -> list[np.ndarray]:
  """Of the output and, if there is one, of the final state."""
  return [np.cos(np.arange(x.size)).reshape(x.shape) for x in out if x is not None]


def ours(function: Callable[..., Any], args: dict[str, jax.Array], *, state: bool) -> tuple[Any, Any]:
  """The output and the final state, and the gradients by argument."""

  @jax.jit
  def run(args):
    out, pull_back = jax.vjp(lambda args: function(**args) if state else function(**args)[:1], args)
    return out, pull_back(tuple(map(jnp.asarray, cotangents(out))))[0]

  return jax.tree.map(np.asarray, run(args))


def theirs(reference: Callable[..., Any], args: dict[str, jax.Array]) -> tuple[Any, Any]:
  given = {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in args.items()}
  with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
    out = [x for x in reference(**given) if x is not None]
  sum((x * torch.tensor(w)).sum() for x, w in zip(out, cotangents([x.detach().numpy() for x in out]), strict=True)).backward()
  return tuple(x.detach().numpy() for x in out), {name: x.grad.numpy() for name, x in given.items()}


def compare(name: str, tokens: int = 75) -> dict[str, list[float]]:
  """The errors by reference: of the output, of the state if there is one, and of the worst gradient."""
  function, inputs, references = CASES[name]
  args, errors = inputs(tokens), {}
  for kind, reference in references.items():
    out, gradients = theirs(reference, args)
    found, found_gradients = ours(function, args, state=len(out) > 1)
    pairs = [*zip(found, out, strict=True), (found_gradients, gradients)]
    errors[kind] = [max(error for _, error, _ in relative_errors(a, b)) for a, b in pairs]
  return errors


def write(path: str) -> None:
  """Inputs, outputs and gradients of a few tokens, of the first reference of each rule."""
  arrays = {}
  for name, (_, inputs, references) in CASES.items():
    args = inputs(9)
    out, gradients = theirs(next(iter(references.values())), args)
    arrays |= {f"{name}/input/{key}": np.asarray(x) for key, x in args.items()}
    arrays |= {f"{name}/gradient/{key}": x for key, x in gradients.items()}
    arrays |= {f"{name}/{key}": x for key, x in zip(("output", "state"), out, strict=False)}
  np.savez_compressed(path, **arrays)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--write", metavar="FILE", help="write the numbers of the test instead")
  options = parser.parse_args()
  jax.config.update("jax_enable_x64", True)
  if options.write:
    write(options.write)
    return 0
  worst = 0.0
  for name in CASES:
    for kind, errors in compare(name).items():
      *of_out, gradient = errors
      state = f"{of_out[1]:.1e}" if len(of_out) > 1 else "none"
      print(f"{name:20s} {kind:10s} output {of_out[0]:.1e}  state {state:8s} worst gradient {gradient:.1e}", flush=True)
      worst = max(worst, *errors)
  return int(worst > BOUND)


if __name__ == "__main__":
  sys.exit(main())
