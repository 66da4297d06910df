"""The one table of tolerances, for the laws and for every test. Errors are ratios of root mean squares."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VALUES = {"float64": 1e-10, "float32": 5e-5, "bfloat16": 2e-2}
GRADIENTS = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 4e-2}


def tolerance(dtype: Any, gradients: bool = False) -> float:
  """The relative error allowed in `dtype`, for values or for gradients."""
  return (GRADIENTS if gradients else VALUES)[jnp.dtype(dtype).name]


def relative_errors(actual: Any, expected: Any) -> list[tuple[str, float, float]]:
  """(path, relative error, size) of every leaf of two trees of arrays.

  A leaf's error is divided by its size: its root mean square, or a thousandth of the largest leaf's where the leaf is smaller
  than that, since a gradient that is exactly zero on paper is rounding in practice. The error of a leaf that is not
  finite is infinite.

  Raises:
    AssertionError: if the trees differ in structure or in a shape.
  """
  assert jax.tree.structure(actual) == jax.tree.structure(expected), (
    f"the structure is {jax.tree.structure(actual)}; expected {jax.tree.structure(expected)}"
  )
  scale = max((rms(leaf) for leaf in jax.tree.leaves(expected)), default=0.0)
  errors = []
  for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
    name = jax.tree_util.keystr(path)
    assert np.shape(a) == np.shape(e), f"{name}: shape {np.shape(a)}; expected {np.shape(e)}"
    size = max(rms(e), 1e-3 * scale)
    error = rms(wide(a) - wide(e)) if np.all(np.isfinite(wide(a))) else np.inf
    errors.append((name, error and (error / size if size else np.inf), size))
  return errors


def assert_close(actual: Any, expected: Any, dtype: Any = jnp.float64, *, gradients: bool = False) -> None:
  """Asserts that two trees of arrays are equal to the precision of `dtype`; see `relative_errors`."""
  allowed = tolerance(dtype, gradients)
  for name, error, _ in relative_errors(actual, expected):
    assert error < np.inf, f"{name} is not finite"
    assert error <= allowed, f"{name}: relative error {error:.1e} > {allowed:.0e}"


def assert_finite(tree: Any) -> None:
  """Asserts that every number of a tree is finite."""
  for path, leaf in jax.tree.leaves_with_path(tree):
    assert np.all(np.isfinite(wide(leaf))), f"{jax.tree_util.keystr(path)} is not finite"


def wide(x: Any) -> np.ndarray:
  """An array of any dtype as NumPy's float64."""
  return np.asarray(x).astype(np.float64)


def rms(x: Any) -> float:
  """The root mean square; 0 for an empty array."""
  return float(np.sqrt(np.mean(np.square(wide(x))))) if np.size(x) else 0.0
