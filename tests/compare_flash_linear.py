"""Language models of flash-linear-attention read by memzoo, compared, written, and read by it again.

    python tests/compare_flash_linear.py              # all families; exit status 1 if a bound is passed
    python tests/compare_flash_linear.py kda          # some of them, by name

It needs what `compare_transformers.py` needs, and `flash-linear-attention`, whose own kernels run without a GPU, by Triton's
interpreter. They are float32. The columns are those of `compare_transformers.py`, and so is `--write`.
"""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from compare_transformers import main, perturbed
from triton.runtime import autotuner

COMMON = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48}
COMMON |= {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False}
HEADS = COMMON | {"head_dim": 8}
CASES = {
  "delta_net": ("DeltaNet", COMMON | {"expand_k": 0.5, "use_gate": True}),
  "delta_net, no gate": ("DeltaNet", COMMON | {"tie_word_embeddings": True, "allow_neg_eigval": True}),
  "gated_deltanet": ("GatedDeltaNet", HEADS | {"num_v_heads": 4}),
  "kda": ("KDA", HEADS | {"expand_v": 2.0}),
  "kda, bounded": ("KDA", HEADS | {"safe_gate": True, "lower_bound": -5.0, "allow_neg_eigval": True}),
  "gated_deltaproduct": ("GatedDeltaProduct", HEADS | {"num_householder": 2, "use_forget_gate": True}),
  "deltaproduct": ("GatedDeltaProduct", HEADS | {"num_householder": 3, "use_output_gate": False, "allow_neg_eigval": True}),
}


SMALL = {"hidden_size": 16, "head_dim": 4, "vocab_size": 32, "intermediate_size": 24}


def make(case: str, small: bool = False) -> torch.nn.Module:
  """A model whose every parameter is random."""
  import fla.models  # it reads the environment, and chooses kernels

  name, settings = CASES[case]
  if small:
    settings = settings | {key: value for key, value in SMALL.items() if key in settings}
  torch.manual_seed(0)
  config = getattr(fla.models, f"{name}Config")(**settings)
  return perturbed(getattr(fla.models, f"{name}ForCausalLM")(config))


if __name__ == "__main__":
  # The fastest of several kernels is not needed, and cannot be found without a GPU.
  autotuner.Autotuner._bench = lambda self, *args, config, **meta: [1.0, 1.0, 1.0]
  sys.exit(main(__doc__, CASES, make, wide=False))
