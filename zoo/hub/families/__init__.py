"""The families of models that can be read and written, by `model_type`."""

from ..family import Family
from .kimi_linear import KIMI_LINEAR
from .llama import LLAMA, QWEN3
from .mamba import MAMBA, MAMBA2
from .olmo_hybrid import OLMO_HYBRID
from .qwen import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT

_ALL = LLAMA, QWEN3, QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE, OLMO_HYBRID, KIMI_LINEAR, MAMBA, MAMBA2
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
