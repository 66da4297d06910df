"""The subjects of the laws, every layer of the registry at a small size and models of them, and budgets of their cost."""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from context_layers import Feeder, NoteReader
from flax import linen as nn
from memzoo.layers import Mamba2
from memzoo.layers.law_trial import Trial, small
from memzoo.layers.laws import CHECKS, COMPILED, SHARED, TRACED, Check
from memzoo.layers.titans import Network
from memzoo.zoo.language_model import LanguageModel
from memzoo.zoo.registry import LAYERS

WIDTH, WIDE = 8, 32


class Kind(NamedTuple):
  """A kind of layer: which checks it gets, and what they may cost.

  Attributes:
    seconds: CPU seconds, on a quiet machine.
    programs: number of compiled programs; `test_laws.py` asserts it.
    costs: costs of the checks that it gets.
    without: names of checks that it does not get, because its other checks run the same code.
  """

  seconds: int
  programs: int
  costs: tuple[str, ...] = (TRACED, SHARED, COMPILED)
  without: tuple[str, ...] = ()


KINDS = {
  "simple": Kind(35, 21),
  "network": Kind(60, 20, without=("nnx_values",)),
  "routed": Kind(50, 20),
  "composite": Kind(75, 17, without=("nnx_values", "lengths")),
  # Rounding moves a score over its threshold, and then another note is read.
  "selecting": Kind(75, 17, without=("nnx_values", "lengths", "bfloat16", "hostile", "plasticity")),
  # What its layers do with their context does not depend on their arithmetic.
  "contextual": Kind(75, 17, without=("nnx_values", "lengths", "bfloat16", "plasticity")),
  "levels": Kind(120, 17, without=("nnx_values", "lengths")),
  # Its attention and its memory get the others, also together, as `MemoryAsGate`.
  "segmented": Kind(120, 17, without=("nnx_values", "lengths", "bfloat16", "plasticity")),
  # Of a layer that gets all checks, by a choice or two.
  "variant": Kind(40, 4, costs=(TRACED, SHARED), without=("fresh_state", "transformations")),
}
# Layers that are not "simple".
KIND_OF = {
  "TitansMemory": "network",
  "DeltaNet": "variant",  # of GatedDeltaNet
  "Comba": "variant",  # of GatedDeltaNet2
  "LatentAttention": "variant",  # of Attention
  "MixtureOfMemories": "routed",
  "Parallax": "variant",  # of LocalLinearAttention
  "TTTLinear": "variant",
  "MemoryAsContext": "segmented",
  "MemoryAsGate": "composite",
  "BMojo": "composite",
  "MemoryAsLayer": "variant",
  "LanguageModel": "composite",
  "PoolModel": "selecting",
  "ContextModel": "contextual",
  "Moneta": "variant",
  "Yaad": "variant",
  "Memora": "variant",
  "TTTMLP": "variant",
  "HierarchicalMemory": "levels",
}
# `make check` runs all laws for this layer, which has decays, an erase, convolutions and a matrix; for the others, those that
# compile nothing.
QUICK = "EraseThenDelta"


# What these add to a memory does not depend on it, so theirs has one matrix; that of `TitansMemory` has two.
_ONE_MATRIX = {"network": Network(depth=1)}
FIELDS = dict.fromkeys(("MemoryAsContext", "MemoryAsGate", "MemoryAsLayer"), _ONE_MATRIX)
FIELDS["BMojo"] = {"memory": small(Mamba2)}


def layer(name: str, **fields: Any) -> nn.Module:
  """A small layer of the registry, with those of `fields` that it has."""
  known = LAYERS[name].__dataclass_fields__
  fields = {"width": WIDTH} | FIELDS.get(name, {}) | fields
  return small(LAYERS[name], **{field: value for field, value in fields.items() if field in known})


def hybrid(width: int, **fields: Any) -> nn.Module:
  """A language model of memories and attention."""
  mixers = layer("EraseThenDelta", **fields), layer("Attention", **fields)
  return LanguageModel(vocab_size=11, width=width, depth=2, mixers=mixers)


def with_context(width: int, **_: Any) -> nn.Module:
  """A language model, in a scan, some of whose layers read what lower ones published or feed later blocks."""
  mixers = (NoteReader(channels=6), Feeder()), (NoteReader(channels=6),)
  return LanguageModel(vocab_size=11, width=width, depth=5, mixers=mixers, scan=True)


def with_pools(width: int, **_: Any) -> nn.Module:
  """A language model whose upper layers read the pools of lower ones, in a scan."""
  mixers = (layer("MemMamba", rule="priority"),), (layer("MemMamba", reads_below=2),)
  return LanguageModel(vocab_size=11, width=width, depth=4, mixers=mixers, scan=True)


MODELS = {
  "LanguageModel": hybrid,
  "PoolModel": with_pools,
  "ContextModel": with_context,
}
SUBJECTS = (*LAYERS, *MODELS)


def module(name: str, width: int, **fields: Any) -> nn.Module:
  """A layer or a model by name."""
  return MODELS[name](width, **fields) if name in MODELS else layer(name, width=width, **fields)


@functools.lru_cache(maxsize=1)  # the tests of one layer run in a row
def trial(name: str) -> Trial:
  """The trial of a layer in float64. In float32 its heads have a realistic width: a norm over 5 numbers magnifies rounding."""
  jax.clear_caches()
  wide = module(name, WIDE, key_dim=16, value_dim=16, head_dim=16), WIDE
  return Trial(module(name, WIDTH), WIDTH, float64=True, wide=wide)


def kind(name: str) -> Kind:
  return KINDS[KIND_OF.get(name, "simple")]


def checks(name: str) -> list[Check]:
  """The checks that a layer gets."""
  return [check for check in CHECKS if check.cost in kind(name).costs and check.name not in kind(name).without]


class Meter:
  """Counts the programs that this process compiles, and the cost of each layer.

  Attributes:
    compiled: number of programs so far.
    programs, seconds: cost by layer, of the code run within `measured`.
  """

  def __init__(self):
    self.compiled, self.programs, self.seconds = 0, Counter(), Counter()
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event: str, duration: float, **_: Any) -> None:
    self.compiled += event == "/jax/core/compile/backend_compile_duration"

  @contextlib.contextmanager
  def measured(self, name: str) -> Iterator[None]:
    """Adds the cost of the code in this context to that of `name`."""
    programs, seconds = self.compiled, time.process_time()
    yield
    self.programs[name] += self.compiled - programs
    self.seconds[name] += time.process_time() - seconds


METER = Meter()
