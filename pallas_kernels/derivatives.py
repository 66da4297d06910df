"""Identities that change how JAX differentiates what follows.

A `jax.custom_vjp` has no forward mode, and JAX's error does not tell what would do. `reverse_only` raises one that does.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_ADVICE = (
  "this form has a hand-written gradient for reverse mode (jax.grad, jax.vjp) and no forward mode (jax.jvp, jax.jacfwd, "
  "jax.hessian); expected implementation='recurrent' ('dense' for local linear attention), an argument of the operation and a "
  "field of the layers, which has both."
)


def reverse_only(tree: Any) -> Any:
  """The arrays of `tree`, unchanged. Forward-mode differentiation by its floats raises `TypeError`.

  A function with a `jax.custom_vjp` takes its arguments through it.
  """
  leaves, structure = jax.tree.flatten(tree)
  floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
  for i, x in zip(floats, _arrays_p.bind(*(leaves[i] for i in floats)), strict=True):
    leaves[i] = x
  return jax.tree.unflatten(structure, leaves)


def gradients_together(*arrays: jax.Array) -> list[jax.Array]:
  """The arrays, unchanged. Reverse mode writes their gradients to memory once, before anything reads them."""
  return _together_p.bind(*arrays)


def _differentiate(arrays, tangents):
  known = [not isinstance(t, ad.Zero) for t in tangents]
  marked = iter(_tangents_p.bind(*(t for t, is_known in zip(tangents, known, strict=True) if is_known)))
  return _arrays_p.bind(*arrays), [next(marked) if is_known else t for t, is_known in zip(tangents, known, strict=True)]


def _refuse(*_: Any, **__: Any) -> Any:
  raise TypeError(_ADVICE)


def _identity(name: str) -> Primitive:
  """A primitive that returns its arguments, without derivatives."""
  primitive = Primitive(name)
  primitive.multiple_results = True
  primitive.def_abstract_eval(lambda *avals: list(avals))
  primitive.def_impl(lambda *arrays: list(arrays))
  mlir.register_lowering(primitive, lambda context, *arrays: list(arrays))
  batching.primitive_batchers[primitive] = lambda arrays, axes: (primitive.bind(*arrays), axes)
  return primitive


_together_p = _identity("gradients_together")
ad.deflinear(_together_p, lambda cotangents: jax.lax.optimization_barrier(list(map(ad.instantiate_zeros, cotangents))))

# Of arrays, and of their tangents. Reverse mode transposes the second; anything else done to it is part of forward mode.
_arrays_p, _tangents_p = _identity("reverse_only"), _identity("reverse_only_tangents")
ad.primitive_jvps[_arrays_p] = _differentiate
_tangents_p.def_impl(_refuse)
mlir.register_lowering(_tangents_p, _refuse)
batching.primitive_batchers[_tangents_p] = _refuse
ad.primitive_jvps[_tangents_p] = _refuse
ad.primitive_transposes[_tangents_p] = lambda cotangents, *_: list(cotangents)
