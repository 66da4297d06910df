"""The layers, by the names that configs and the command line know them by."""

from ..layers import (
  Attention,
  DeltaNet,
  DeltaProduct,
  EraseThenDelta,
  GatedConv,
  GatedDeltaNet,
  KimiDeltaAttention,
  LinearAttention,
  MemoryLayer,
)

LAYERS: dict[str, type[MemoryLayer]] = {
  "LinearAttention": LinearAttention,
  "DeltaNet": DeltaNet,
  "GatedDeltaNet": GatedDeltaNet,
  "KimiDeltaAttention": KimiDeltaAttention,
  "DeltaProduct": DeltaProduct,
  "EraseThenDelta": EraseThenDelta,
  "Attention": Attention,
  "GatedConv": GatedConv,
}
