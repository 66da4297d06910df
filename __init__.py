"""Memory layers for sequence models in JAX.

    from memzoo.layers import EraseThenDelta            # a Flax module: (params, x, state) -> (y, state)
    from memzoo.pallas_kernels import delta_rule        # the operation underneath, a pure function
    model = memzoo.build("quickstart").model            # a whole language model, from a config by name

Three floors, each importing only from those below: `zoo` and `train`, `layers`, `pallas_kernels`.
"""

__version__ = "0.1.0"

_LAZY = {
  "build": "memzoo.train.config",
  "LanguageModel": "memzoo.zoo.language_model",
  "check_layer": "memzoo.layers.laws",
  "generate": "memzoo.zoo.generate",
  "init": "memzoo.zoo.parameters",
  "describe": "memzoo.zoo.describe",
  "from_pretrained": "memzoo.train.pretrained",
  "split_over": "memzoo.pallas_kernels.partition",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
  if name not in _LAZY:
    raise AttributeError(f"module 'memzoo' has no attribute {name!r}; it has {', '.join(__all__)}")
  from importlib import import_module

  return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
  return __all__
