"""Recurrent states: their validation, and their names in exported programs."""

import contextlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp


def exportable(state: type) -> type:
  """Registers a NamedTuple, so that `jax.export` can serialise programs that take or return one. A class decorator.

  A process that deserialises such a program must have imported the class.
  """
  with contextlib.suppress(ValueError):  # the module is loaded again
    jax.export.register_namedtuple_serialization(state, serialized_name=f"{state.__module__}.{state.__qualname__}")
  return state


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
      f"{name} does not fit {owner}: it has the structure {jax.tree.structure(state)}; expected "
      f"{jax.tree.structure(expected)}, as returned by an earlier call, or None for a fresh state."
    )
  for (path, leaf), fitting in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True):
    where = f"{name}{jax.tree_util.keystr(path)}"
    if leaf.shape != fitting.shape:
      raise ValueError(
        f"{where} has shape {list(leaf.shape)}; expected {list(fitting.shape)} for {owner} with this batch and configuration."
      )
    if jnp.issubdtype(leaf.dtype, jnp.floating) != jnp.issubdtype(fitting.dtype, jnp.floating):
      raise ValueError(f"{where} is {leaf.dtype}; expected {fitting.dtype}, as returned by an earlier call.")
