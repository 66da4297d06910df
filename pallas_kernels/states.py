"""Validation of recurrent states."""

from typing import Any

import jax
import jax.numpy as jnp


def check_state(name: str, owner: str, state: Any, expected: Any) -> None:
  """Raises `ValueError` if `state` differs from `expected` in structure, in a shape, or in floats versus integers.

  Args:
    name: the argument's name, for the message.
    owner: the name of the layer or operation that the state belongs to, for the message.
    state: the state that was given.
    expected: a state that fits: arrays, or their shapes as `jax.eval_shape` returns them.
  """
  if jax.tree.structure(state) != jax.tree.structure(expected):
    raise ValueError(
      f"{name} is not one of {owner}'s: it has the structure {jax.tree.structure(state)}; want "
      f"{jax.tree.structure(expected)}, as an earlier call returns it, or none for a fresh one."
    )
  for (path, leaf), want in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True):
    if leaf.shape != want.shape:
      raise ValueError(
        f"{name}{jax.tree_util.keystr(path)} has shape {list(leaf.shape)}; want {list(want.shape)} for {owner} with this "
        "batch and configuration."
      )
    if jnp.issubdtype(leaf.dtype, jnp.floating) != jnp.issubdtype(want.dtype, jnp.floating):
      raise ValueError(f"{name}{jax.tree_util.keystr(path)} is {leaf.dtype}; want {want.dtype}, as an earlier call returns it.")
