"""The suites that come with memzoo, by name; `memzoo compare --suite memory` runs one."""

from .suite import Challenge, Suite
from .vmapped_runs import Budget

_PAIRS = ("MultiQueryRecall.filler=False", "MultiQueryRecall.vocabulary=64")
_TWO = ("LanguageModel.depth=4",)  # two layers of the kind that is compared, each after a short convolution

MEMORY = Suite(
  challenges=(
    Challenge("recall", "the values of 8 keys", "mqar",
              settings=(*_PAIRS, "MultiQueryRecall.tokens=32", "MultiQueryRecall.pairs=8")),
    Challenge("more recall", "the values of 16 keys", "mqar",
              settings=(*_PAIRS, "MultiQueryRecall.tokens=64", "MultiQueryRecall.pairs=16")),
    Challenge("noised recall", "8 keys with noise between the tokens", "noised_mqar"),
    Challenge("fuzzy recall", "6 keys and values of one to three tokens each", "fuzzy_recall"),
    Challenge("overwriting", "the last of three values of 4 keys", "overwriting",
              settings=("Overwriting.pairs=4", "Overwriting.writes=3", "Overwriting.vocabulary=64")),
    Challenge("stale facts", "whether any of 4 facts was superseded under another key", "stale_facts",
              settings=(*_TWO, "StaleFacts.facts=4", "StaleFacts.superseded=2", "StaleFacts.vocabulary=64")),
    Challenge("facts", "where people and what they carry are", "facts"),
    Challenge("chains", "the number at the end of a chain of names", "variable_tracking"),
    Challenge("compression", "any of 16 tokens by its position", "compression"),
    Challenge("copying", "8 tokens in order, from among blanks", "selective_copying",
              settings=(*_TWO, "SelectiveCopying.tokens=32", "SelectiveCopying.data=8"),
              tests={"copying": "", "copying, 2x as long": "64"}),
    Challenge("induction", "the token after an earlier marker", "induction", "LinearAttention",
              settings=("Induction.tokens=64",), tests={"induction": "", "induction, 4x as long": "256"}),
    Challenge("parity", "the parity of all bits so far", "word_problem", "DeltaProduct",
              settings=("WordProblem.group=parity", "WordProblem.tokens=32"),
              tests={"parity": "", "parity, 4x as long": "128"}),
    Challenge("swaps", "what lies where after 8 swaps of 4 things", "swaps", "DeltaProduct",
              settings=("Swaps.places=4", "Swaps.swaps=8"), tests={"swaps": "", "swaps, 2x as many": "16"}),
    Challenge("equal counts", "as many b as there were a", "anbn", "DeltaProduct",
              tests={"equal counts": "", "equal counts, 2x as long": "12"}),
    Challenge("brackets", "which of three kinds of brackets are open", "shuffle", "DeltaProduct"),
    Challenge("regression", "the value of a new key, under a linear map that changes", "regression", "LocalLinearAttention",
              settings=("Regression.tokens=32", "Regression.piece=16", "Regression.key_dim=4", "Regression.value_dim=4")),
  ),
  layers=(
    "Attention", "LocalLinearAttention", "LinearAttention", "Based", "DeltaNet", "GatedDeltaNet", "GatedDeltaNet2",
    "KimiDeltaAttention", "DeltaProduct", "EraseThenDelta", "Comba", "MixtureOfMemories", "Mamba", "Mamba2", "MemMamba",
    "BMojo", "TitansMemory", "TTTLinear", "HierarchicalMemory",
  ),
  # With a constant rate a larger budget continues a trial. Attention beside a memory sees few tokens, to leave it the work.
  settings=(
    "Optimizer.final_fraction=1.0", "Attention.max_length=256", "LocalLinearAttention.max_length=256",
    "Based.window=None", "Based.feature_dim=8", "BMojo.window=8", "BMojo.max_length=64", "Comba.read_correction=0.02",
  ),
  budget=Budget(
    learning_rates=(0.001, 0.003, 0.01),
    warmup_steps=(50, 100, 200),
    seeds=3,
    steps=6000,
    stop_at=0.97,
    halve_every=1000,
  ),
)  # fmt: skip

SUITES = {"memory": MEMORY}
