"""Rotary positions (Su et al. 2021, arXiv:2104.09864): pairs of channels turned by the position; scalings for longer texts."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ..pallas_kernels.numerics import accumulator
from .ranges import check_ranges

KINDS = ("none", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are changed for texts longer than those of the first training.

  With wavelengths in tokens, frequencies f become

  - "linear": f / factor (Chen et al. 2023, arXiv:2306.15595);
  - "llama3": f / factor for wavelengths above length / low, f for those below length / high, and between them in between
    (Llama 3, arXiv:2407.21783, and its code);
  - "yarn": between f / factor and f by a ramp over the channels, from the one that turns `low` times in `length` tokens to the
    one that turns `high` times; queries and keys are multiplied by `magnitude` (Peng et al. 2023, arXiv:2309.00071).

  Attributes:
    kind: "none", "linear", "llama3" or "yarn".
    factor: how much longer texts become.
    length: tokens of a text in the first training.
    low, high: see above. In the papers 1 and 4 ("llama3"), 1 and 32 ("yarn").
    magnitude: of "yarn"; `None` for 0.1 log(factor) + 1.
    whole_channels: whether the ends of "yarn"'s ramp are rounded outwards to channels, as in most code.

  Raises:
    ValueError: for fields that are out of range or do not fit together.
  """

  kind: str = "none"
  factor: float = 1.0
  length: int = 8192
  low: float = 1.0
  high: float = 4.0
  magnitude: float | None = None
  whole_channels: bool = True

  def __post_init__(self):
    check_ranges(self)
    if self.kind not in KINDS:
      raise ValueError(f"RopeScaling.kind={self.kind!r}; expected one of {list(KINDS)}.")
    if self.kind in ("llama3", "yarn") and not self.low < self.high:
      raise ValueError(f"RopeScaling.low={self.low} and high={self.high}; expected low to be less.")


def frequencies(width: int, base: float, scaling: RopeScaling = RopeScaling()) -> tuple[np.ndarray, float]:
  """Radians per token of the pairs of `width` channels, float64 [width / 2], and what rotated channels are multiplied by."""
  half = width // 2
  plain = base ** -(np.arange(half) / half)
  slow = plain / scaling.factor
  match scaling.kind:
    case "none":
      return plain, 1.0
    case "linear":
      return slow, 1.0
    case "llama3":
      turns = scaling.length * plain / (2 * math.pi)
      share = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
      return share * plain + (1 - share) * slow, 1.0

  def channel(turns):
    return half * math.log(scaling.length / (turns * 2 * math.pi)) / math.log(base)

  first, last = channel(scaling.high), channel(scaling.low)
  if scaling.whole_channels:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, width - 1)
  share = 1 - np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)
  magnitude = 0.1 * math.log(scaling.factor) + 1 if scaling.magnitude is None else scaling.magnitude
  return share * plain + (1 - share) * slow, magnitude


def rotate(
  x: jax.Array, position: jax.Array, base: float, width: int | None = None, scaling: RopeScaling = RopeScaling()
) -> jax.Array:
  """Rotates the pairs (x_i, x_{i + w/2}) of the first w = `width` channels of x [B, T, H, d] by position * frequency_i.

  Args:
    x: queries or keys.
    position: int32 [B, T].
    base: frequency_i is base^(-2i/w), before scaling.
    width: `None` for d.
    scaling: see there.
  """
  width = x.shape[-1] if width is None else width
  check_rotated(x.shape[-1], width)
  half, wide = width // 2, accumulator(x)
  frequency, magnitude = frequencies(width, base, scaling)
  angle = position[..., None, None].astype(wide) * jnp.asarray(frequency, wide)[None, None, None]
  sin, cos = magnitude * jnp.sin(angle), magnitude * jnp.cos(angle)
  first, second = x[..., :half].astype(wide), x[..., half:width].astype(wide)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
  return rotated if width == x.shape[-1] else jnp.concatenate([rotated, x[..., width:]], axis=-1)


def check_rotated(head_dim: int, width: int | None = None) -> None:
  """Raises `ValueError` for a width that rotary positions cannot rotate."""
  if width is None and head_dim % 2:
    raise ValueError(f"head_dim={head_dim} is odd; expected an even width, because rotary positions rotate pairs.")
  if width is not None and (width % 2 or width > head_dim):
    raise ValueError(f"rope_dim={width}; expected an even number of at most head_dim={head_dim}.")
