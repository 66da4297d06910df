"""How close is equal: the one table. Errors are ratios of root mean squares; no test has tolerances of its own."""

import jax
import jax.numpy as jnp
import numpy as np

VALUES = {"float64": 1e-10, "float32": 5e-5, "bfloat16": 2e-2}
GRADIENTS = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 4e-2}


def assert_close(actual, expected, dtype=jnp.float64, *, gradients: bool = False) -> None:
  """Asserts that two trees of arrays are equal to the precision of `dtype`.

  A leaf's error is compared with the leaf, or with a thousandth of the tree where the leaf is smaller than that: a
  gradient that vanishes exactly on paper is rounding in practice.
  """
  tolerance = (GRADIENTS if gradients else VALUES)[jnp.dtype(dtype).name]
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  scale = max((_rms(leaf) for leaf in jax.tree.leaves(expected)), default=0.0)
  for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    assert a.shape == e.shape, f"{jax.tree_util.keystr(path)}: shape {a.shape}, want {e.shape}"
    assert np.all(np.isfinite(_wide(a))), f"{jax.tree_util.keystr(path)} is not finite"
    error, size = _rms(_wide(a) - _wide(e)), max(_rms(e), 1e-3 * scale)
    assert error <= tolerance * size, f"{jax.tree_util.keystr(path)}: relative error {error / size:.1e} > {tolerance:.0e}"


def assert_finite(tree) -> None:
  """Asserts that every number of a tree is finite."""
  for path, leaf in jax.tree.leaves_with_path(tree):
    assert np.all(np.isfinite(_wide(leaf))), f"{jax.tree_util.keystr(path)} is not finite"


def _wide(x) -> np.ndarray:
  return np.asarray(x).astype(np.float64)


def _rms(x) -> float:
  return float(np.sqrt(np.mean(np.square(_wide(x))))) if np.size(x) else 0.0
