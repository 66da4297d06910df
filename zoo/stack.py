"""A stack of residual sublayers in a repeating pattern: the body of every model here.

    x <- x + sublayer(norm(x))        for the sublayers of each block, bottom to top

A sublayer is anything that keeps the contract of `memzoo.layers.MemoryLayer`. A layer that needs more than its input (the
token ids, what lower layers stored, a way to feed later blocks) inherits from `memzoo.layers.ContextLayer`.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..layers.context import Context, ContextLayer, Notes
from ..layers.memory_layer import from_template
from ..layers.norms import RMSNorm
from ..layers.ranges import check_ranges
from ..layers.swiglu import SwiGLU
from ..pallas_kernels import delta_rule, selective_scan
from ..pallas_kernels.partition import placed_like
from ..pallas_kernels.states import check_state

REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "memory": jax.checkpoint_policies.save_only_these_names(
    delta_rule.OUTPUT, delta_rule.KEPT, selective_scan.OUTPUT, selective_scan.KEPT
  ),
}
PERIODS = "periods"  # the parameters of a scanned stack's repeats


class Block(nn.Module):
  """Pre-norm residual sublayers, one after the other.

  Attributes:
    sublayers: the layers. The parameters of a `SwiGLU` are called "mlp" and those of any other layer "mixer", with a number
      where a block has several; its norm's "mixer_norm" and so on.
    norm: the norm of a sublayer, by its name.
  """

  sublayers: tuple[nn.Module, ...]
  norm: Callable[..., nn.Module] = RMSNorm

  @nn.compact
  def __call__(
    self, x: jax.Array, states: tuple[Any, ...] | None, segment_ids: jax.Array | None, context: Context
  ) -> tuple[jax.Array, tuple[Any, ...], Context]:
    """Maps x [B, T, D], the sublayers' states and the context to the same after this block."""
    x, context = context.next_block(x)
    after = []
    for i, (name, template) in enumerate(zip(sublayer_names(self.sublayers), self.sublayers, strict=True)):
      layer = template.clone(parent=self, name=name)
      adds_input, norm_after = getattr(layer, "adds_input", False), getattr(layer, "norm_after", False)
      norm = None if adds_input else self.norm(name=f"{name}_norm")
      normed = x if adds_input or norm_after else norm(x)
      state = None if states is None else states[i]
      if isinstance(layer, ContextLayer):
        y, state, context = layer.in_stack(normed, state, segment_ids, context)
      else:
        y, state = layer(normed, state, segment_ids)
      y = (norm(y) if norm_after else y).astype(x.dtype)
      x = y if adds_input else x + y
      after.append(state)
    return x, tuple(after), context


def sublayer_names(sublayers: Sequence[nn.Module]) -> list[str]:
  """Names of a block's sublayers in its parameters: "mixer", "mlp", then "mixer_1" and so on."""
  names: list[str] = []
  for layer in sublayers:
    kind = "mlp" if isinstance(layer, SwiGLU) else "mixer"
    count = sum(name.split("_")[0] == kind for name in names)
    names.append(f"{kind}_{count}" if count else kind)
  return names


class _Period(nn.Module):
  """One repeat of the pattern, as the body of a scan."""

  blocks: tuple[tuple[nn.Module, ...], ...]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, carry, states, segment_ids):
    x, context = carry
    incoming, after = x, []
    for i, sublayers in enumerate(self.blocks):
      block = Block(sublayers, self.norm, name=f"blocks_{i}")
      x, state, context = block(x, None if states is None else states[i], segment_ids, context)
      after.append(state)
    return (placed_like(x, incoming), context), tuple(after)


class Stack(nn.Module, kw_only=True):
  """Residual blocks in a repeating pattern, and a norm. It keeps the contract of a layer, with a tuple of states.

  Attributes:
    mixers: the pattern, as templates: the blocks are made of its entries in turn. An entry that is a layer stands for that
      layer followed by a `SwiGLU` of `mlp_ratio`; an entry that is a sequence of layers is a block of just these sublayers.
      `[[a, SwiGLU()], [b]]` is a pattern in which every second block has no MLP.
    first: blocks before those of the pattern, entries like its own.
    depth: number of blocks, those of `first` included.
    mlp_ratio: `ratio` of the `SwiGLU` after each entry that is a single layer; 0 for none.
    norm_epsilon: epsilon of all norms of the residual stream.
    zero_centred_norms: whether the factors of these norms are 1 + scale.
    remat: what the backward pass recomputes: "none", everything but the inputs of blocks ("full"), everything but the products
      of activations with weights ("dots"), or all but the inputs of blocks and what delta rules and selective
      scans keep ("memory").
    scan: run the repeats of the pattern as one `jax.lax.scan`, so that compile time does not grow with `depth`. Parameters
      of the repeats are then stacked on a leading axis (named "layers") under "periods", states on their second axis; see
      `unroll_params` and `scan_params`. Blocks beyond the last whole repeat follow unrolled.
    dtype: dtype of activations, in every layer that does not set its own.
    param_dtype: dtype of parameters, except in layers that set another one than their default.
  """

  mixers: tuple[nn.Module | tuple[nn.Module, ...], ...]
  depth: int
  first: tuple[nn.Module | tuple[nn.Module, ...], ...] = ()
  mlp_ratio: float = 8 / 3
  norm_epsilon: float = 1e-6
  zero_centred_norms: bool = False
  remat: str = "none"
  scan: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def block(self, index: int) -> tuple[nn.Module, ...]:
    """The sublayers of block `index`, not bound to parameters."""
    before = len(self.first)
    entry = self.first[index] if index < before else self.mixers[(index - before) % len(self.mixers)]
    if isinstance(entry, nn.Module):
      entry = (entry, SwiGLU(ratio=self.mlp_ratio, parent=None)) if self.mlp_ratio else (entry,)
    width = getattr(self, "width", None)
    return tuple(from_template(template, self.dtype, self.param_dtype, width) for template in entry)

  def sublayers(self) -> list[nn.Module]:
    """All sublayers, bottom to top, not bound to parameters."""
    return [layer for i in range(self.depth) for layer in self.block(i)]

  def mixer(self, index: int) -> nn.Module:
    """The first sublayer of block `index`, not bound to parameters."""
    return self.block(index)[0]

  @property
  def repeats(self) -> int:
    """How many whole repeats of the pattern are scanned; 0 without `scan`."""
    return (self.depth - len(self.first)) // len(self.mixers) if self.scan else 0

  def initial_state(self, batch_size: int) -> tuple[tuple[Any, ...], ...]:
    """The blocks' fresh states, each a tuple of its sublayers' states.

    With `scan` the `len(mixers)` of them after those of `first` hold all repeats of a block, [B, repeats, ...].
    """

    def fresh(index: int) -> tuple[Any, ...]:
      return tuple(layer.apply({}, batch_size, method="initial_state") for layer in self.block(index))

    def stacked(leaf: jax.Array) -> jax.Array:
      return jnp.broadcast_to(jnp.expand_dims(leaf, 1), (leaf.shape[0], self.repeats, *leaf.shape[1:]))

    first, period, rest = self._parts()
    return (*map(fresh, first), *(jax.tree.map(stacked, fresh(i)) for i in period), *map(fresh, rest))

  def state_bytes(self, batch_size: int, length: int) -> int:
    """Bytes of the states of `batch_size` sequences after `length` tokens."""
    return sum(layer.state_bytes(batch_size, length) for layer in self.sublayers())

  def _parts(self) -> tuple[range, range, range]:
    """Indices of the blocks before the pattern, of those in one scanned repeat, and of those that follow unrolled."""
    before, size = len(self.first), len(self.mixers) if self.repeats else 0
    return range(before), range(before, before + size), range(before + size * self.repeats, self.depth)

  def __call__(
    self, x: jax.Array, state: tuple[Any, ...] | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """Maps x [B, T, D] to (y [B, T, D], state); arguments as in `MemoryLayer`."""
    return self.with_notes(x, state, segment_ids)[:2]

  @nn.compact
  def with_notes(
    self, x: jax.Array, state: tuple[Any, ...] | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[Any, ...], dict[str, Notes]]:
    """The results of `__call__`, and what the layers published through their `Context`, by name."""
    self.check_state(state, x.shape[0])
    return self.residual(x.astype(self.dtype), state, segment_ids)

  @nn.nowrap
  def residual(
    self, x: jax.Array, state: tuple[Any, ...] | None, segment_ids: jax.Array | None, tokens: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[Any, ...], dict[str, Notes]]:
    """The blocks and the final norm: x [B, T, D] to the same, the state, and the notes. Part of a model's `with_notes`."""
    context = Context.start(self.sublayers(), x, tokens)
    first, period, rest = self._parts()
    given, states = iter(state or itertools.repeat(None)), []

    def run(i: int, x: jax.Array, context: Context) -> tuple[jax.Array, Context]:
      block = self._checkpointed(Block)(self.block(i), self.norm, name=f"blocks_{i}")
      x, after, context = block(x, next(given), segment_ids, context)
      states.append(after)
      return x, context

    for i in first:
      x, context = run(i, x, context)
    if period:
      blocks = tuple(self.block(i) for i in period)
      scan = nn.scan(
        self._checkpointed(_Period, prevent_cse=False),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(1, nn.broadcast),
        out_axes=1,
        length=self.repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(blocks, self.norm, name=PERIODS)
      own = tuple(next(given) for _ in period)
      (x, context), after = scan((x, context), None if state is None else own, segment_ids)
      states.extend(after)
    for i in rest:
      x, context = run(i, x, context)
    return self.norm(name="final_norm")(x), tuple(states), context.notes

  @property
  def norm(self) -> Callable[..., nn.Module]:
    """The norm of the residual stream, by its name."""
    return partial(RMSNorm, self.norm_epsilon, self.param_dtype, zero_centred=self.zero_centred_norms)

  def _checkpointed(self, module: type[nn.Module], **options: Any) -> type[nn.Module]:
    """`module`, recomputed in the backward pass as `remat` says."""
    if self.remat == "none":
      return module
    return nn.remat(module, policy=REMAT_POLICIES[self.remat], **options)

  def check_state(self, state: tuple[Any, ...] | None, batch_size: int) -> None:
    """Raises `ValueError` for invalid settings, or for a state that does not belong to this stack."""
    self.check_settings()
    if state is None:
      return
    count = sum(map(len, self._parts()))
    if not isinstance(state, tuple) or len(state) != count:
      raise ValueError(f"state is a {type(state).__name__} of {len(state)}; expected a tuple of {count}, one per block.")
    check_state("state", type(self).__name__, state, jax.eval_shape(lambda: self.initial_state(batch_size)))

  def check_settings(self) -> None:
    """Raises `ValueError` for invalid settings."""
    check_ranges(self)
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"remat={self.remat!r}; expected one of {list(REMAT_POLICIES)}.")
    if not self.mixers:
      raise ValueError("mixers is empty; expected at least one entry.")
    for name, entries in (("mixers", self.mixers), ("first", self.first)):
      if () in entries:
        raise ValueError(f"{name}[{entries.index(())}] is (); expected at least one layer in each entry.")
    if len(self.first) > self.depth:
      raise ValueError(f"depth={self.depth}; expected at least the {len(self.first)} blocks of `first`.")


def unroll_params(model: Stack, params: Any) -> tuple[Stack, Any]:
  """The same model without `scan`, and its parameters: one "blocks_i" per block, without axis names.

  Args:
    model: a stack, or a model built on one. One without `scan` comes back as it is, with its parameters.
    params: its variables, as `model.init` returns them.
  """
  if not model.scan:
    return model, params
  variables = nn.unbox(params)
  own = dict(variables["params"])
  for j, block in _numbered(own.pop(PERIODS, {})):
    for repeat in range(model.repeats):
      own[f"blocks_{len(model.first) + repeat * len(model.mixers) + j}"] = jax.tree.map(lambda leaf, r=repeat: leaf[r], block)
  return model.clone(scan=False), {**variables, "params": own}


def unroll_state(model: Stack, state: tuple[Any, ...]) -> tuple[Any, ...]:
  """The state of `model` in its form without `scan`: a tuple of the blocks' states."""
  before, size = len(model.first), len(model.mixers) if model.repeats else 0
  period = state[before : before + size]
  repeats = (jax.tree.map(lambda leaf, r=r: leaf[:, r], block) for r in range(model.repeats) for block in period)
  return (*state[:before], *repeats, *state[before + size :])


def scan_params(model: Stack, params: Any) -> tuple[Stack, Any]:
  """The inverse of `unroll_params`: the same model with `scan`, and its parameters, stacked over repeats.

  Args:
    model: a stack, or a model built on one. One with `scan` comes back as it is, with its parameters.
    params: its variables, as `model.init` returns them.
  """
  if model.scan:
    return model, params
  scanned, variables = model.clone(scan=True), nn.unbox(params)
  own, size = dict(variables["params"]), len(model.mixers)
  periods = {}
  for j in range(size if scanned.repeats else 0):
    blocks = [own.pop(f"blocks_{len(model.first) + repeat * size + j}") for repeat in range(scanned.repeats)]
    periods[f"blocks_{j}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
  return scanned, {**variables, "params": own | ({PERIODS: periods} if periods else {})}


def _numbered(blocks: dict[str, Any]) -> list[tuple[int, Any]]:
  """(index, parameters) for each "blocks_<index>"."""
  return [(int(name.removeprefix("blocks_")), block) for name, block in blocks.items()]
