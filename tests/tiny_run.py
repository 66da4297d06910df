"""A run small enough for tests: a little text, a little model."""

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from memzoo.layers import DeltaNet
from memzoo.train.data import TextData
from memzoo.train.optimizer import Optimizer
from memzoo.train.sharding import MeshShape
from memzoo.train.trainer import Trainer
from memzoo.zoo.language_model import LanguageModel


def memory_model() -> LanguageModel:
  """A language model with a memory, for what must hold for the real thing; it takes seconds to compile."""
  return LanguageModel(vocab_size=256, width=16, depth=1, mixers=(DeltaNet(num_heads=2, key_dim=8, value_dim=8),))


class Model(nn.Module):
  """The interface of `LanguageModel` and no more, for all that does not depend on what the model is."""

  vocab_size: int = 256
  width: int = 16
  remat: str = "none"
  dtype: Any = jnp.float32

  def initial_state(self, batch_size):
    return jnp.zeros((batch_size, 1), jnp.float32)

  @nn.compact
  def __call__(self, tokens, state=None, segment_ids=None):
    initial = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    table = self.param("embedding", initial, (self.vocab_size, self.width), jnp.float32)
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    x = table[tokens]
    x = x + nn.Dense(self.width, kernel_init=kernel, name="blocks_0")(x)
    state = self.initial_state(len(tokens)) if state is None else state
    return jnp.einsum("btd,vd->btv", x, table), state


def write_text(folder: Path, documents: int = 12, words: int = 80) -> str:
  """Writes documents of random words and returns the folder's name."""
  chance = random.Random(0)
  vocabulary = ["memory", "state", "decay", "key", "value", "erase", "then", "write", "gate", "chunk"]
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(documents):
    (folder / f"{i}.txt").write_text(" ".join(chance.choices(vocabulary, k=words)))
  return str(folder)


def tiny_experiment(folder: Path, **settings) -> SimpleNamespace:
  """An experiment on text under `folder`. `settings` are fields of `Trainer`, or whole parts by name."""
  parts = {
    "model": Model(),
    "data": TextData(write_text(folder / "text"), sequence_length=32, batch_size=4, validation_fraction=0.2),
    "optimizer": Optimizer(learning_rate=1e-2),
    "mesh": MeshShape(data=1),
  }
  parts |= {name: settings.pop(name) for name in list(settings) if name in parts}
  defaults = {"steps": 12, "log_every": 4, "evaluate_every": 5, "checkpoint_every": 4, "sample_tokens": 0}
  parts["trainer"] = Trainer(**(defaults | settings))
  return SimpleNamespace(name="tiny", text="".join(map(_as_gin, parts.values())), **parts)


def _as_gin(part) -> str:
  names = [field.name for field in dataclasses.fields(part) if field.name not in ("parent", "name")]
  return "".join(f"{type(part).__name__}.{name} = {getattr(part, name)!r}\n" for name in names)
