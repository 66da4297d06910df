"""Memory layers: pure functions of (params, x, state), each a thin Flax module over an operation with an oracle."""

from .attention import Attention
from .delta_net import DeltaNet, DeltaProduct, GatedDeltaNet, KimiDeltaAttention
from .erase_then_delta import EraseThenDelta
from .gated_conv import GatedConv
from .linear_attention import LinearAttention
from .memory_layer import MemoryLayer
from .titans import Memora, Moneta, TitansMemory, Yaad
from .titans_wirings import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from .ttt import TTTMLP, TTTLinear

__all__ = [
  "TTTMLP",
  "Attention",
  "DeltaNet",
  "DeltaProduct",
  "EraseThenDelta",
  "GatedConv",
  "GatedDeltaNet",
  "KimiDeltaAttention",
  "LinearAttention",
  "Memora",
  "MemoryAsContext",
  "MemoryAsGate",
  "MemoryAsLayer",
  "MemoryLayer",
  "Moneta",
  "TTTLinear",
  "TitansMemory",
  "Yaad",
]
