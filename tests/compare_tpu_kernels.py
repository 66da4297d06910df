"""The errors of kernels for TPUs, ours and those of two other packages, against a float64 recurrence.

    python tests/compare_tpu_kernels.py             # all cases
    python tests/compare_tpu_kernels.py documents   # some of them, by name

It needs `tokamax` (0.0.17, for Python >= 3.12) and `deltanet-tpu` (0.3.0), which memzoo itself does not need, and pytest, which
the tests import. It needs no TPU: Pallas interprets all kernels.

Rows are the cases of test_delta_accuracy.py, with keys and values of 128 channels: one row of 160 tokens and two heads, which
share their queries and keys. These and values are bfloat16, gates and states float32. All get the same numbers, the same first
state and the same cotangents of output and final state. Errors are ratios of root mean squares, output / worst gradient. The
rounding of a bfloat16 output alone is an error of 1.7e-3. Columns:
  gated     the gated delta rule, one decay for every token and head: ours, and `chunk_gdn` of deltanet-tpu.
  Kimi      with a decay for every channel: ours, with the bound on decays that the case has, and the KDA of tokamax.
Both others ask for strengths up to 1, and tokamax leaves the range of decays to its caller. Of the cases, only those that name
a strength up to 1 are within these bounds.

Products are a TPU's, in interpreted kernels too: operands of float32 are rounded to bfloat16 at the default precision (see
`as_on_a_tpu`). For tokamax this decides: at full precision its errors of "cosine 0.95, strength 1.9" would be hundreds of times
smaller. XLA keeps every rounding that a program asks for. Exponentials and the order of sums are a CPU's.

In "documents", padding between documents is removed before the calls of the others: tokamax takes padding at the end only.
"""

import argparse
import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

# Before jax is imported. tokamax interprets its kernels where PALLAS_INTERPRET says so, deltanet-tpu wherever there is no TPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PALLAS_INTERPRET"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_allow_excess_precision=false"

import jax
import jax.numpy as jnp
import numpy as np
import passes
from delta_variants import Variant, cotangents
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import mlir
from memzoo.pallas_kernels import numerics
from test_delta_accuracy import CASES, GATED, KIMI, SEGMENTS, inputs, relative_error
from test_delta_tpu import exact, kernels

WIDTH = 128  # deltanet-tpu takes no other


@contextlib.contextmanager
def as_on_a_tpu() -> Iterator[None]:
  """`passes.of_a_tpu`, which refuses products of float32 at the default precision, with these: of operands in bfloat16.

  The size of a chip's memory, which tokamax reads, is that of a TPU v6e.
  """
  product, chip = jax.lax.dot_general_p, pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V6E, 1)
  with passes.of_a_tpu():
    table = mlir._platform_specific_lowerings["cpu"]
    others = table[product].rule

    def lower(context, x, y, *, precision, **params):
      wide = jnp.float32 in (aval.dtype for aval in context.avals_in)
      if not wide or precision not in (None, (jax.lax.Precision.DEFAULT,) * 2):
        return others(context, x, y, precision=precision, **params)

      def rounded(x, y):
        x, y = (numerics.rounded(z.astype(jnp.float32)) for z in (x, y))
        return product.bind(x, y, precision=(numerics.FULL,) * 2, **params)

      return mlir.lower_fun(rounded, multiple_results=False)(context, x, y)

    with mock.patch.dict(table), mock.patch.object(pltpu, "get_tpu_info", return_value=chip):
      mlir.register_lowering(product, lower, platform="cpu")
      yield


def of_tokamax(args, segments, count):
  """Its KDA. Heads come first, and every document has a state. It would refuse a CPU without `bypass_device_check`."""
  from tokamax._src.ops.kda.pallas_mosaic_tpu import PallasMosaicTpuKimiDeltaAttention

  heads = args["v"].shape[2]
  q, k = (jnp.repeat(args[name], heads, axis=2) for name in "qk")
  operands = (jnp.moveaxis(x, 2, 0) for x in (q, k, args["v"], args["log_decay"], args["beta"]))
  later = jnp.zeros((1, count - 1, *args["initial_state"].shape[1:]), jnp.float32)
  state = jnp.concatenate([args["initial_state"][:, None], later], axis=1)
  call = PallasMosaicTpuKimiDeltaAttention(bypass_device_check=True)
  out, states = call(*operands, initial_state=state, output_final_state=True, segment_ids=segments)
  return jnp.moveaxis(out, 0, 2), states[:, -1]


def of_deltanet_tpu(args, segments, count):
  """Its gated delta rule, with arguments like ours."""
  from deltanet_tpu import chunk_gdn

  q, k, v, beta, decay, state = (args[name] for name in ("q", "k", "v", "beta", "log_decay", "initial_state"))
  return chunk_gdn(q, k, v, decay, beta, segment_ids=segments, initial_state=state, output_final_state=True)


def segments_of(packed: bool) -> np.ndarray:
  return SEGMENTS if packed else np.ones_like(SEGMENTS)


@functools.partial(jax.jit, static_argnums=(0, 1))
def theirs(function: Callable, packed: bool, args, weights):
  """Output, final state and gradients of a function of another package, as `kernels` has them. Padding is read as zero."""
  segments = segments_of(packed)
  kept = np.flatnonzero(segments[0])
  ids, count = jnp.asarray(segments[:, kept]), int(segments.max())  # from 1, without gaps

  def call(args):
    tokens = {name: x if name == "initial_state" else x[:, kept] for name, x in args.items()}
    out, state = function(tokens, ids, count)
    return {"output": jnp.zeros_like(args["v"]).at[:, kept].set(out), "state": state}

  results, pull_back = jax.vjp(call, args)
  return results, pull_back(dict(zip(("output", "state"), weights, strict=True)))[0]


def errors(variant: Variant, case: str, function: Callable | None = None) -> tuple[float, float]:
  """The relative errors of the output and of the worst gradient: of our kernels, or of `function`."""
  args, packed = inputs(variant, case, jnp.bfloat16, WIDTH), case == "documents"
  weights, segments = cotangents(args), jnp.asarray(segments_of(packed))
  if function is None:
    bound = CASES[case][3] if variant is KIMI else None
    results, gradients = kernels(variant, args, segments, weights, decay_bound=bound)
  else:
    results, gradients = theirs(function, packed, args, weights)
  with jax.enable_x64(True):
    expected, by_expected = exact(variant, args, segments, weights)
  by_argument = [relative_error(gradients[name], by_expected[name]) for name in args]
  return relative_error(results["output"], expected["output"]), float(np.max(by_argument))  # NaN if any is


COLUMNS = {
  "ours, gated": (GATED, None),
  "deltanet-tpu, gated": (GATED, of_deltanet_tpu),
  "ours, Kimi": (KIMI, None),
  "tokamax, Kimi": (KIMI, of_tokamax),
}


def main() -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of: {'; '.join(CASES)} (default: all)")
  cases = parser.parse_args().cases
  if unknown := set(cases) - set(CASES):
    parser.error(f"unknown cases: {'; '.join(sorted(unknown))}")
  print(f"{'':28}" + "".join(f"{name:>22}" for name in COLUMNS))
  with as_on_a_tpu():
    for case in cases or CASES:
      found = (errors(variant, case, function) for variant, function in COLUMNS.values())
      print(f"{case:28}" + "".join(f"{f'{output:.1e} / {gradient:.1e}':>22}" for output, gradient in found), flush=True)
  return 0


if __name__ == "__main__":
  logging.getLogger("absl").setLevel(logging.ERROR)  # that tokamax has no tuned sizes for a CPU
  warnings.filterwarnings("ignore", "deltanet-tpu: running on non-TPU backend")
  sys.exit(main())
