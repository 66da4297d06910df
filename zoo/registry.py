"""The layers, by the names that configs and the command line know them by."""

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
  Memora,
  MemoryLayer,
  Moneta,
  TitansMemory,
  TTTLinear,
  Yaad,
)
from .titans_blocks import MemoryAsContext, MemoryAsGate, MemoryAsLayer

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
  "Attention": Attention,
  "GatedConv": GatedConv,
}
