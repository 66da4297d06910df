"""The families of models that can be read and written, by `model_type`."""

from ..family import Family
from .flash_linear import FLASH_LINEAR
from .kimi_linear import KIMI_LINEAR
from .llama import LLAMA, QWEN3, QWEN3_MOE
from .mamba import MAMBA, MAMBA2
from .olmo_hybrid import OLMO_HYBRID
from .qwen import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT

_QWEN = QWEN3, QWEN3_MOE, QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE
_ALL = LLAMA, *_QWEN, OLMO_HYBRID, KIMI_LINEAR, MAMBA, MAMBA2, *FLASH_LINEAR
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
