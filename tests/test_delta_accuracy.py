"""The error of the delta rules on an accelerator, whose products are emulated, against float64.

    python tests/test_delta_accuracy.py [bfloat16 | highest | float32]        prints the errors of all cases

Inputs are rounded to their dtype first. The rounding of a bfloat16 output alone is an error of 1.7e-3. "highest" is bfloat16
with `precision="highest"`.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import passes
import pytest
from delta_variants import Variant, cotangents, values_and_gradients
from memzoo.pallas_kernels import delta_rule as ops

GATED = Variant(ops.gated_delta_rule, "scalar")
KIMI = Variant(ops.kimi_delta_rule, "channel")
PRODUCT = Variant(ops.delta_product, "scalar", 2)
ERASE = Variant(ops.erase_then_delta_rule, "channel")
GATED_2 = Variant(ops.gated_delta_rule_2, "channel")
COMBA = Variant(ops.comba_rule, "scalar")
VARIANTS = GATED, KIMI, PRODUCT, ERASE, GATED_2, COMBA
SUMS = Variant(ops.linear_attention, "scalar")
# Largest relative errors of output and gradient, by root mean square.
LIMITS = {"bfloat16": (2.5e-3, 5e-3), "highest": (1.75e-3, 2.4e-3), "float32": (1e-5, 5e-5)}
BOUND = -5.0
TOKENS = 160
SEGMENTS = np.repeat([1, 2, 3, 4, 0, 5], [37, 27, 1, 65, 9, 21])[None].astype(np.int32)
# Mean cosine of keys, strength (`None`: from 0 to 2), log-decays, bound on them.
CASES = {
  "random": (0.0, None, "weak", BOUND),
  "cosine 0.8, strength 1": (0.8, 1.0, "none", BOUND),
  "cosine 0.95, strength 0.95": (0.95, 0.95, "none", BOUND),
  "cosine 0.95, strength 1.9": (0.95, 1.9, "none", BOUND),
  "cosine 0.99, strength 1.9": (0.99, 1.9, "none", BOUND),
  "equal keys, strength 1.9": (1.0, 1.9, "none", BOUND),
  "decays -3 to -5": (0.0, None, "bounded", BOUND),
  "decays -8 to -16": (0.0, None, "strong", None),
  "decays 0 or -20 to -60": (0.5, None, "mixed", None),
  "a burst of -150": (0.5, None, "burst", None),
  "documents": (0.0, None, "weak", BOUND),
}


def inputs(variant, case, dtype, width=32, value_dim=None):
  cosine, strength, decay, _ = CASES[case]
  args = variant.inputs(TOKENS, dtype=jnp.float32, batch=1, key_dim=width, value_dim=value_dim or width, cosine=cosine)
  args = {name: np.asarray(x) for name, x in args.items()}
  if "log_decay" in args:
    args["log_decay"] = _log_decays(decay, args["log_decay"].shape)
  if strength is not None:
    args |= {name: np.full_like(args[name], strength) for name in ("beta", "erase_gate") if name in args}
  narrow = ("q", "k", "v", "erase_key", "feedback_key")
  return {name: jnp.asarray(x, dtype if name in narrow else jnp.float32) for name, x in args.items()}


def _log_decays(kind, shape):
  rng = np.random.default_rng(1)
  return {
    "none": np.full(shape, -1e-3),
    "weak": -0.1 * np.exp(0.4 * rng.normal(size=shape) - 1),
    "bounded": -rng.uniform(3, 5, shape),
    "strong": -rng.uniform(8, 16, shape),
    "burst": np.where((np.arange(TOKENS) == 70).reshape(1, -1, *[1] * (len(shape) - 2)), -150.0, np.full(shape, -1e-3)),
    "mixed": np.where(rng.uniform(size=shape) < 0.1, -rng.uniform(20, 60, shape), -1e-3),
  }[kind]


def relative_error(actual, expected):
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def errors(variant, case, kind="bfloat16", platform="tpu"):
  """The relative errors of the output and of the worst gradient, of the form in XLA for a platform."""
  args = inputs(variant, case, jnp.float32 if kind == "float32" else jnp.bfloat16)
  segments = jnp.asarray(SEGMENTS if case == "documents" else np.ones_like(SEGMENTS))
  options = {"decay_bound": CASES[case][3], "precision": "highest" if kind == "highest" else None, "implementation": "xla"}
  with passes.of_a_tpu():
    (out, _), gradients = values_and_gradients(variant, args, segments, platform=platform, **options)
  wide, weights = (jax.tree.map(lambda x: x.astype(jnp.float64), x) for x in (args, cotangents(args)))
  (exact, _), exact_gradients = _exact(variant, wide, segments, weights)
  return relative_error(out, exact), max(relative_error(gradients[name], exact_gradients[name]) for name in gradients)


@functools.partial(jax.jit, static_argnums=0)
def _exact(variant, args, segments, weights):
  out, pull_back = jax.vjp(lambda args: variant.function(**args, segment_ids=segments, implementation="recurrent"), args)
  return out, pull_back(weights)[0]


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.parametrize(
  ("variant", "case", "kind"),
  [
    (GATED, "cosine 0.95, strength 1.9", "bfloat16"),
    (KIMI, "decays -8 to -16", "bfloat16"),
    (PRODUCT, "cosine 0.99, strength 1.9", "bfloat16"),
    (SUMS, "decays -8 to -16", "bfloat16"),
    (SUMS, "documents", "float32"),
    (ERASE, "cosine 0.95, strength 1.9", "bfloat16"),
    (ERASE, "decays -3 to -5", "bfloat16"),
    (GATED_2, "cosine 0.95, strength 1.9", "bfloat16"),
    (COMBA, "decays -8 to -16", "bfloat16"),
    (GATED, "cosine 0.95, strength 1.9", "highest"),
    (ERASE, "cosine 0.95, strength 1.9", "float32"),
  ],
  ids=str,
)
def test_errors_on_an_accelerator_are_small(variant, case, kind):
  error, limit = errors(variant, case, kind), LIMITS[kind]
  assert error[0] <= limit[0]
  assert error[1] <= limit[1]


if __name__ == "__main__":
  jax.config.update("jax_enable_x64", True)
  print(f"{'':30s}" + "".join(f"{variant!s:>32s}" for variant in VARIANTS))
  for case in CASES:
    found = [errors(variant, case, *sys.argv[1:]) for variant in VARIANTS]
    print(f"{case:30s}" + "".join(f"{output:>19.1e} / {gradient:.1e}   " for output, gradient in found), flush=True)
