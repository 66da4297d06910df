"""The layers, by the names that configs and the command line use."""

from ..layers import (
  TTTMLP,
  Attention,
  DeltaNet,
  DeltaProduct,
  EraseThenDelta,
  GatedConv,
  GatedDeltaNet,
  KimiDeltaAttention,
  LinearAttention,
  LocalLinearAttention,
  Mamba,
  Mamba2,
  Memora,
  MemoryAsContext,
  MemoryAsGate,
  MemoryAsLayer,
  MemoryLayer,
  Moneta,
  Parallax,
  SwiGLU,
  TitansMemory,
  TTTLinear,
  Yaad,
)

LAYERS: dict[str, type[MemoryLayer]] = {
  "LinearAttention": LinearAttention,
  "DeltaNet": DeltaNet,
  "GatedDeltaNet": GatedDeltaNet,
  "KimiDeltaAttention": KimiDeltaAttention,
  "DeltaProduct": DeltaProduct,
  "EraseThenDelta": EraseThenDelta,
  "TitansMemory": TitansMemory,
  "MemoryAsContext": MemoryAsContext,
  "MemoryAsGate": MemoryAsGate,
  "MemoryAsLayer": MemoryAsLayer,
  "Moneta": Moneta,
  "Yaad": Yaad,
  "Memora": Memora,
  "TTTLinear": TTTLinear,
  "TTTMLP": TTTMLP,
  "Mamba": Mamba,
  "Mamba2": Mamba2,
  "Attention": Attention,
  "LocalLinearAttention": LocalLinearAttention,
  "Parallax": Parallax,
  "GatedConv": GatedConv,
}

# Sublayers without a memory, for the blocks of a model.
SUBLAYERS: dict[str, type[MemoryLayer]] = {"SwiGLU": SwiGLU}
