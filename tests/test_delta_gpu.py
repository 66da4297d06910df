"""The kernels for Hopper GPUs: lowered for CUDA, and run by Pallas' interpreter against the recurrence in float64.

    python tests/test_delta_gpu.py        prints the errors of all cases; needs JAX 0.11

The interpreter of JAX 0.10 has no transposed operands, and no layouts of arrays in registers.
"""

import contextlib
import functools
import os
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_variants import Variant, cotangents, values_and_gradients
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not exported
from machine import flags_for_one_device
from memzoo.layers import GatedDeltaNet
from memzoo.pallas_kernels import delta_rule as ops
from memzoo.pallas_kernels.delta_rule import gpu
from test_delta_accuracy import CASES, ERASE, GATED, KIMI, PRODUCT, SEGMENTS, inputs
from test_delta_tpu import NARROW, exact, relative_error

DELTA, LINEAR, CHANNELS = Variant(ops.delta_rule), Variant(ops.linear_attention), Variant(ops.linear_attention, "channel")
FACES = DELTA, LINEAR, CHANNELS, GATED, KIMI, PRODUCT, ERASE
# The rounding of a bfloat16 array alone is 1.7e-3.
LIMITS = {jnp.dtype(jnp.bfloat16): 2.2e-3, jnp.dtype(jnp.float32): 6e-4}
# A variant, a case of inputs, channels of keys and values. Two warp groups share 128 channels of values.
TRIED = {
  "gated": (GATED, "equal keys, strength 1.9", 64, 128),
  "kimi": (KIMI, "decays -8 to -16", 64, 64),
  "product": (PRODUCT, "cosine 0.99, strength 1.9", 64, 64),
  "erase": (ERASE, "documents", 64, 64),
  "padded": (GATED, "a burst of -150", 40, 72),
  "sums": (CHANNELS, "decays 0 or -20 to -60", 64, 64),
  "linear": (LINEAR, "documents", 64, 64),
}


def lowered(variant, dtype=jnp.bfloat16, **sizes):
  """The program for CUDA of values and gradients."""
  args = variant.inputs(100, dtype=jnp.float32, **sizes)
  args |= {name: args[name].astype(dtype) for name in NARROW if name in args}
  run = functools.partial(values_and_gradients, variant, implementation="pallas")
  return jax.jit(run).trace(args, jnp.ones((2, 100), jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.compat
@pytest.mark.parametrize("variant", FACES, ids=str)
def test_every_face_is_lowered_for_cuda(variant):
  """Two kernels walk through the chunks, one prepares them, where decays are per channel only if there are inverses."""
  text = lowered(variant, key_dim=64, value_dim=128)
  assert text.count("@mosaic_gpu_v2") == (2 if variant is CHANNELS else 3)


def test_a_layer_that_asks_for_kernels_has_them_but_for_its_convolutions_and_single_tokens():
  layer = GatedDeltaNet(num_heads=2, key_dim=64, value_dim=64, dtype=jnp.bfloat16, implementation="pallas")

  def kernels(tokens):
    x = jax.ShapeDtypeStruct((1, tokens, 32), jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    return jax.jit(layer.apply).trace(params, x).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2")

  assert [kernels(tokens) for tokens in (64, 1)] == [2, 0]


def test_what_no_kernel_computes_is_refused_when_it_is_lowered_for_a_gpu():
  with pytest.raises(ValueError, match=r"in a program for GPUs: .* in bfloat16 and compute in float32, not float32\."):
    lowered(GATED, jnp.float32)
  with pytest.raises(ValueError, match=r"at most 128 channels, not 136"):
    lowered(GATED, key_dim=136)


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of this JAX has no transposed operands")
@pytest.mark.parametrize("names", [("gated", "padded", "sums", "linear"), ("kimi", "product", "erase")], ids=str)
def test_errors_in_the_interpreter_are_those_of_rounding(names):
  """In a process of its own, because every warp group waits in a thread of XLA, which has as many as there are cores."""
  environment = os.environ | {"NPROC": "8", "XLA_FLAGS": flags_for_one_device()}
  done = subprocess.run([sys.executable, __file__, *names], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  assert done.stdout.count(" / ") == len(names)


@contextlib.contextmanager
def interpreted():
  """Calls in this context run the kernels in the interpreter, which raises an error for a race."""
  parameters = InterpretGPUParams(detect_races=True)
  run = {name: functools.partial(getattr(gpu, name), interpret=parameters) for name in ("forward", "backward")}
  with mock.patch.multiple(gpu, **run):
    yield


def errors(variant, case, key_dim, value_dim):
  """Each result and gradient with its relative error and the limit of that."""
  segments = jnp.asarray(SEGMENTS if case == "documents" else np.ones_like(SEGMENTS))
  args = inputs(variant, case, jnp.bfloat16, key_dim, value_dim)
  with interpreted():
    found, by_found = values_and_gradients(variant, args, segments, implementation="pallas", platform="cuda")
  with jax.enable_x64(True):
    expected, by_expected = exact(variant, args, segments, cotangents(args))
    found = dict(zip(("output", "state"), found, strict=True)) | {f"by {name}": x for name, x in by_found.items()}
    expected |= {f"by {name}": x for name, x in by_expected.items()}
    return {name: (relative_error(x, expected[name]), LIMITS[x.dtype]) for name, x in found.items()}


if __name__ == "__main__":
  too_large = False
  every = [(variant, case, 64, 64) for variant in (GATED, KIMI, PRODUCT, ERASE) for case in CASES]
  for one in [TRIED[name] for name in sys.argv[1:]] or every:
    found = errors(*one)
    large = {name: f"{error:.1e}" for name, (error, limit) in found.items() if not error <= limit}
    too_large |= bool(large)
    output, *others = (error for error, _ in found.values())
    print(*one, f"{output:.1e} / {max(others):.1e}", large or "", flush=True)
  sys.exit(too_large)
