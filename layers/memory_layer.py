"""The contract that every memory layer obeys: `MemoryLayer`. `tests/test_laws.py` tests every layer of the registry."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..pallas_kernels.documents import check_segment_ids
from ..pallas_kernels.partition import varying_alike
from ..pallas_kernels.states import check_state
from .ranges import check_ranges

Dtype = Any


class MemoryLayer(nn.Module, kw_only=True):
  """A memory layer, a pure function of parameters, input and state:

      y, state = layer.apply(params, x, state=None, segment_ids=None)

  Args:
    x: [B, T, D], floats.
    state: a NamedTuple of arrays with a leading batch axis, of shapes that never change; `None` for a fresh memory.
    segment_ids: int32 [B, T]. Equal neighbours belong to one document; a change forgets everything; 0 is padding, which
      leaves the state untouched and yields zeros. The first token of a call continues the state that came in.

  Returns:
    y [B, T, D], and the state after the last token. Fed to the next call it continues the sequence exactly, whatever the
    split; generation is the same call with T = 1.

  Memories are float32 whatever `dtype` is (float64 where the inputs are); caches of activations have the activations' dtype.
  A layer defines `__call__` and `initial_state`; both may be called on an unbound module through `apply`.

  Attributes:
    dtype: dtype of the activations; `None` for the wider of the input's and the parameters'.
    param_dtype: dtype of the parameters.

  Raises:
    ValueError: for sizes out of range (`ranges.py`) or invalid arguments; see `begin`.
  """

  # Whether the output already contains the input (and the norms that the layer needs). A stack then passes its residual
  # stream to the layer unchanged, and the output is the new residual stream.
  adds_input: ClassVar[bool] = False

  # Whether the memory only adds and never forgets, so that new tokens of a long document count for less and less.
  fills_up: ClassVar[bool] = False

  # The value of the field `implementation`, if there is one, that stands for the reference.
  reference: ClassVar[str] = "recurrent"

  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  def initial_state(self, batch_size: int) -> Any:
    """A fresh memory: what `state=None` means. Every leaf has a leading axis of `batch_size`."""
    raise NotImplementedError(f"{type(self).__name__} must define initial_state(batch_size)")

  def state_bytes(self, batch_size: int, length: int) -> int:
    """Bytes that the state of `batch_size` sequences takes after `length` tokens.

    The size of a state never changes, so the result is the same for every `length`.
    """
    del length
    state = jax.eval_shape(lambda: self.apply({}, batch_size, method="initial_state"))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

  def matrices(self, state: Any) -> dict[str, jax.Array]:
    """The matrices in `state` from which a key reads a value, [B, H, K, V] each, by name; none unless a layer overrides this.

    `memzoo.zoo.inspect` shows them.
    """
    del state
    return {}

  def activation_dtype(self, x: jax.Array | None = None) -> Dtype:
    """`dtype`; if it is `None`, that of `x`, or `param_dtype` without `x`."""
    if self.dtype is not None:
      return jnp.dtype(self.dtype)
    return jnp.dtype(self.param_dtype) if x is None else x.dtype

  @nn.nowrap
  def check_settings(self) -> None:
    """Raises `ValueError` for fields that are out of range or do not fit together. Configurations check it too."""
    check_ranges(self)

  def begin(self, x: jax.Array, state: Any | None, segment_ids: jax.Array | None) -> Any:
    """Checks sizes and the arguments of a call, and returns the state to start from, on the device.

    Raises:
      ValueError: if a field is out of range (`check_settings`), `x` is not [batch, tokens, width] of floats, `segment_ids` does
        not match it, or `state` is not one of this layer's for this batch.
    """
    self.check_settings()
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"x is {x.dtype}{list(x.shape)}; expected floats of shape [batch, tokens, width].")
    if 0 in x.shape[:2]:
      raise ValueError(f"x has shape {list(x.shape)}, no {'tokens' if x.shape[0] else 'rows'}; expected at least one.")
    check_segment_ids(segment_ids, x.shape[:2])
    fresh = varying_alike(x, self.initial_state(x.shape[0]))
    if state is None:
      return fresh
    check_state("state", type(self).__name__, state, fresh)
    return jax.tree.map(jnp.asarray, state)


def from_template(template: nn.Module, dtype: Dtype, param_dtype: Dtype, width: int | None = None) -> nn.Module:
  """`template`, not bound to parameters, with these for what it does not set: its dtypes, and its `width` if that is `None`."""
  field = type(template).__dataclass_fields__.get("param_dtype")
  own = getattr(template, "param_dtype", None)
  types = {"dtype": getattr(template, "dtype", None) or dtype, "param_dtype": own}
  if field is None or own == field.default:
    types["param_dtype"] = param_dtype
  if getattr(template, "width", template) is None:
    types["width"] = width
  return template.clone(parent=None, name=None, **{name: value for name, value in types.items() if hasattr(template, name)})


def silence_padding(y: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """`y` [B, T, D] with zeros at padding, where `segment_ids` [B, T] are 0."""
  return y if segment_ids is None else jnp.where(segment_ids[..., None] != 0, y, 0)


def count_key_heads(num_heads: int, num_key_heads: int | None) -> int:
  """The number of key heads: `num_key_heads`, a divisor of `num_heads`; if `None`, `num_heads`."""
  heads = num_key_heads or num_heads
  if num_heads % heads:
    raise ValueError(f"num_heads={num_heads} is not a multiple of num_key_heads={heads}.")
  return heads
