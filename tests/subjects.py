"""What the laws are tried on: every layer of the registry at a small size, and language models of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from memzoo.zoo.language_model import LanguageModel
from memzoo.zoo.registry import LAYERS

WIDTH = 8
CHUNK = 4

# A layer is built from those of these that it has fields for: one size for all, odd where it can be.
SMALL = {
  "num_heads": 4,
  "num_key_heads": 2,
  "head_dim": 6,
  "key_dim": 6,
  "value_dim": 5,
  "window": 5,
  "channels": 6,
  "chunk_size": CHUNK,
  "segment": 6,
  "negative_eigenvalues": True,
}


@dataclasses.dataclass(frozen=True)
class Subject:
  """A module that keeps the contract, and inputs for it."""

  name: str
  module: nn.Module
  width: int = WIDTH

  def __str__(self) -> str:
    return self.name

  @property
  def takes_tokens(self) -> bool:
    return isinstance(self.module, LanguageModel)

  def inputs(self, batch: int, tokens: int, seed: int = 0) -> jax.Array:
    """Integers for a model; for a layer, floats with a common direction, so that keys are correlated as trained ones are."""
    key = jax.random.key(seed)
    if self.takes_tokens:
      return jax.random.randint(key, (batch, tokens), 0, self.module.vocab_size, jnp.int32)
    common, own = jax.random.split(key)
    dtype = self.module.param_dtype
    x = jax.random.normal(own, (batch, tokens, self.width), dtype)
    return x + jax.random.normal(common, (1, 1, self.width), dtype)

  @functools.cached_property
  def fresh_params(self) -> Any:
    """Parameters as initialised."""
    return jax.jit(self.module.init)(jax.random.key(7), self.inputs(1, 2))

  def params(self, scale: float = 8.0) -> Any:
    """Parameters `scale` times as large as fresh ones where they are matrices: gates and keys as varied as trained ones."""
    return jax.tree.map(lambda p: p * jnp.asarray(scale, p.dtype) if p.ndim > 1 else p, self.fresh_params)

  def apply(self, params, x, state=None, segment_ids=None):
    return self.module.apply(params, x, state, segment_ids)

  @functools.cached_property
  def run(self):
    """`apply`, compiled: once for all tests that call it with equal shapes, for compilation is most of their time."""
    return jax.jit(self.apply)

  def fresh(self, params, batch: int):
    return self.module.apply(params, batch, method="initial_state")

  def used(self, params, batch: int):
    """A state that has seen something."""
    return self.run(params, self.inputs(batch, 7, seed=11))[1]

  def one_by_one(self, params, x, state):
    """The same call, a token at a time."""

    def step(state, x):
      y, state = self.apply(params, x[:, None], state)
      return state, y[:, 0]

    state, y = jax.lax.scan(step, state, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(y, 0, 1), state


# Tried by `make check` too: it has decays, an erase, convolutions and a matrix for its state.
QUICK = ("EraseThenDelta",)


def layer(name: str, **fields: Any) -> nn.Module:
  """A small layer of the registry."""
  known = {field.name for field in dataclasses.fields(LAYERS[name])}
  return LAYERS[name](**{k: v for k, v in (SMALL | fields).items() if k in known})


def subjects(dtype=jnp.float64, width: int = WIDTH, **fields: Any) -> list[Subject]:
  """Every layer, and a hybrid model, with parameters and activations of `dtype`."""
  types = {"dtype": dtype, "param_dtype": dtype}
  layers = [Subject(name, layer(name, **types, **fields), width) for name in LAYERS]
  mixers = layer("EraseThenDelta", **fields), layer("Attention", **fields)
  return [*layers, Subject("LanguageModel", LanguageModel(vocab_size=11, width=width, depth=3, mixers=mixers, **types), width)]


def cases(*args: Any, **fields: Any) -> list[Any]:
  """`subjects` as parameters of a test; those of one name share a process, and so what is compiled."""

  def marks(name: str) -> list[Any]:
    return [pytest.mark.xdist_group(name), *([] if name in QUICK else [pytest.mark.slow])]

  return [pytest.param(s, id=s.name, marks=marks(s.name)) for s in subjects(*args, **fields)]
