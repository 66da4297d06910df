"""A run small enough for tests: little text, a small model, and programs that are compiled once."""

import dataclasses
import os
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from memzoo.layers import DeltaNet, GatedConv
from memzoo.train import finish, setup
from memzoo.train.data import TextData
from memzoo.train.optimizer import Optimizer
from memzoo.train.sharding import MeshShape
from memzoo.train.step import Program, build_program
from memzoo.train.trainer import Trainer
from memzoo.zoo.language_model import LanguageModel


def memory_model() -> LanguageModel:
  """A language model with a memory, for tests that need one. It takes seconds to compile."""
  return LanguageModel(vocab_size=256, width=16, depth=1, mixers=(DeltaNet(num_heads=2, key_dim=8, value_dim=8),))


def convolution_model(**settings) -> LanguageModel:
  """A language model that compiles fast."""
  return LanguageModel(**({"vocab_size": 256, "width": 16, "depth": 1, "mixers": (GatedConv(channels=8),)} | settings))


class Model(nn.Module):
  """The interface of `LanguageModel` and no more, for tests that do not depend on the model."""

  vocab_size: int = 256
  width: int = 16
  remat: str = "none"
  dtype: Any = jnp.float32

  def initial_state(self, batch_size):
    return jnp.zeros((batch_size, 1), jnp.float32)

  def example(self, batch_size, length):
    return jax.ShapeDtypeStruct((batch_size, length), jnp.int32)

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
  return SimpleNamespace(name="tiny", ignored=(), text="".join(map(_as_gin, parts.values())), **parts)


def program_of(experiment, steps: int | None = None) -> Program:
  """An experiment's program. Equal experiments share it, and what it has compiled."""
  mesh, batch_size = experiment.mesh.build(), experiment.data.batch_size
  return _program(experiment.model, experiment.optimizer, mesh, steps=steps or experiment.trainer.steps, batch_size=batch_size)


@cache
def _program(model, optimizer, mesh, *, steps, batch_size) -> Program:
  return build_program(model, optimizer, mesh, steps=steps, batch_size=batch_size)


@pytest.fixture(scope="module")
def quick_runs():
  """See `make_runs_quick`."""
  with pytest.MonkeyPatch.context() as patch:
    make_runs_quick(patch)
    yield


def make_runs_quick(patch: pytest.MonkeyPatch) -> None:
  """Makes runs take programs from `program_of`, draw no picture and measure no machine. Their seed must be 0."""

  def build(experiment, mesh):
    assert experiment.trainer.seed == 0
    sizes = {"steps": experiment.trainer.steps, "batch_size": experiment.data.batch_size}
    return _program(experiment.model, experiment.optimizer, mesh, **sizes)

  patch.setattr(setup, "experiment_program", build)
  patch.setattr(finish, "plot_losses", lambda *_: None)
  patch.setattr(finish, "matmul_rate", lambda: 1e11)


def import_path() -> str:
  """PYTHONPATH for another process: the folder of the tests, then this process's own."""
  return os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def _as_gin(part) -> str:
  names = [field.name for field in dataclasses.fields(part) if field.name not in ("parent", "name")]
  return "".join(f"{type(part).__name__}.{name} = {getattr(part, name)!r}\n" for name in names)
