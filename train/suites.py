"""The suites that come with memzoo, by name; `memzoo compare --suite memory` runs one."""

from .suite import Challenge, Suite
from .vmapped_runs import Budget

_PAIRS = ("MultiQueryRecall.filler=False", "MultiQueryRecall.vocabulary=64")
_TWO = ("LanguageModel.depth=4",)  # two layers of the kind that is compared, each after a short convolution

MEMORY = Suite(
  challenges=(
    Challenge("recall", "8 pairs, each asked once", "mqar",
              settings=(*_PAIRS, "MultiQueryRecall.tokens=32", "MultiQueryRecall.pairs=8")),
    Challenge("more recall", "16 pairs", "mqar",
              settings=(*_PAIRS, "MultiQueryRecall.tokens=64", "MultiQueryRecall.pairs=16")),
    Challenge("overwriting", "the last of three values of a key", "overwriting",
              settings=("Overwriting.pairs=4", "Overwriting.writes=3", "Overwriting.vocabulary=64")),
  ),
  layers=(
    "Attention", "LocalLinearAttention", "LinearAttention", "Based", "DeltaNet", "GatedDeltaNet", "GatedDeltaNet2",
    "KimiDeltaAttention", "DeltaProduct", "EraseThenDelta", "Comba", "MixtureOfMemories", "Mamba", "Mamba2", "MemMamba",
    "BMojo", "TitansMemory", "TTTLinear", "HierarchicalMemory",
  ),
  settings=("Optimizer.final_fraction=1.0",),
  budget=Budget(
    learning_rates=(0.001, 0.003, 0.01),
    warmup_steps=(50, 100, 200),
    seeds=3,
    steps=6000,
    stop_at=0.98,
    halve_every=1000,
  ),
)  # fmt: skip

SUITES = {"memory": MEMORY}
