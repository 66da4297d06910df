"""Memory layers: pure functions of (params, x, state), each a thin Flax module over an operation with an oracle."""

from .attention import Attention
from .based import Based
from .bmojo import BMojo
from .context import Context, ContextLayer
from .delta_net import Comba, DeltaNet, DeltaProduct, GatedDeltaNet, GatedDeltaNet2, KimiDeltaAttention
from .erase_then_delta import EraseThenDelta
from .experts import MixtureOfExperts
from .gated_conv import GatedConv
from .hierarchical_memory import HierarchicalMemory
from .latent_attention import LatentAttention
from .linear_attention import LinearAttention
from .local_linear_attention import LocalLinearAttention, Parallax
from .mamba import Mamba, Mamba2
from .mem_mamba import MemMamba
from .memory_layer import MemoryLayer
from .mixture_of_memories import MixtureOfMemories
from .swiglu import SwiGLU
from .titans import Gating, Loss, Memora, Moneta, Network, Retention, TitansMemory, Update, Yaad
from .titans_wirings import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from .ttt import TTTMLP, TTTLinear

__all__ = [
  "TTTMLP",
  "Attention",
  "BMojo",
  "Based",
  "Comba",
  "Context",
  "ContextLayer",
  "DeltaNet",
  "DeltaProduct",
  "EraseThenDelta",
  "GatedConv",
  "GatedDeltaNet",
  "GatedDeltaNet2",
  "Gating",
  "HierarchicalMemory",
  "KimiDeltaAttention",
  "LatentAttention",
  "LinearAttention",
  "LocalLinearAttention",
  "Loss",
  "Mamba",
  "Mamba2",
  "MemMamba",
  "Memora",
  "MemoryAsContext",
  "MemoryAsGate",
  "MemoryAsLayer",
  "MemoryLayer",
  "MixtureOfExperts",
  "MixtureOfMemories",
  "Moneta",
  "Network",
  "Parallax",
  "Retention",
  "SwiGLU",
  "TTTLinear",
  "TitansMemory",
  "Update",
  "Yaad",
]
