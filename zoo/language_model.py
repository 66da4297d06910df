"""A language model from any pattern of memory layers: embedding, pre-norm residual blocks, norm, head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..layers.axes import named
from ..layers.norms import RMSNorm
from ..layers.projections import INIT, dense
from ..pallas_kernels.numerics import accumulator
from .blocks import Block

REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class LanguageModel(nn.Module):
  """A causal language model. It obeys the contract of its layers, with tokens for inputs and a tuple of their states.

  Attributes:
    vocab_size: tokens known.
    width: of the residual stream.
    depth: number of blocks.
    mixers: memory layers as templates, a repeating pattern: block i has a copy of `mixers[i % len(mixers)]`.
    mlp_ratio: hidden width of the SwiGLUs over `width`, rounded up to a multiple of 32; 0 leaves them out.
    tie_embeddings: the head is the transposed embedding.
    norm_epsilon: of all norms of the residual stream.
    remat: what the backward pass recomputes: "none", all but the inputs of blocks ("full"), or all but the products of
      activations with weights ("dots").
    dtype: of activations, in every mixer that does not set its own. Logits are float32.
    param_dtype: of parameters, likewise.
  """

  vocab_size: int
  width: int
  depth: int
  mixers: tuple[nn.Module, ...]
  mlp_ratio: float = 8 / 3
  tie_embeddings: bool = True
  norm_epsilon: float = 1e-6
  remat: str = "none"
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def mixer(self, block: int) -> nn.Module:
    """The memory layer of a block, not bound to parameters."""
    template = self.mixers[block % len(self.mixers)]
    return template.clone(parent=None, name=None, dtype=template.dtype or self.dtype, param_dtype=self.param_dtype)

  def initial_state(self, batch_size: int) -> tuple[Any, ...]:
    """The blocks' fresh states."""
    return tuple(self.mixer(i).apply({}, batch_size, method="initial_state") for i in range(self.depth))

  def state_bytes(self, batch_size: int, length: int) -> int:
    """Bytes that the states of `batch_size` sequences take after `length` tokens."""
    return sum(self.mixer(i).state_bytes(batch_size, length) for i in range(self.depth))

  @nn.compact
  def __call__(
    self, tokens: jax.Array, state: tuple[Any, ...] | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """Logits for the token after each.

    Args:
      tokens: int32 [B, T].
      state: of an earlier call, to continue it; `None` for a fresh start.
      segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding.

    Returns:
      Logits [B, T, vocab_size], float32 (float64 for a float64 model), and the state.

    Raises:
      ValueError: for tokens that are not integers [B, T], a state of another depth, or anything a layer objects to.
    """
    self._check(tokens, state)
    embedding = self.param("embedding", named(INIT, "vocab", "embed"), (self.vocab_size, self.width), self.param_dtype)
    x = jnp.take(embedding, tokens, axis=0).astype(self.dtype)
    x, state = self.residual(x, state, segment_ids)
    if self.tie_embeddings:
      logits = jax.lax.dot_general(
        x,
        embedding.astype(x.dtype),
        (((2,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulator(x),
      )
    else:
      logits = dense(
        self.vocab_size, ("embed", "vocab"), name="head", dtype=self.dtype, param_dtype=self.param_dtype
      )(x)
    return logits.astype(accumulator(x)), state

  @nn.nowrap
  def residual(
    self, x: jax.Array, state: tuple[Any, ...] | None, segment_ids: jax.Array | None
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """The blocks and the final norm: [B, T, width] to the same, and the state. Part of `__call__`."""
    policy = REMAT_POLICIES[self.remat]
    block_type = Block if self.remat == "none" else nn.remat(Block, policy=policy)
    hidden = -(-int(self.width * self.mlp_ratio) // 32) * 32
    states = []
    for i in range(self.depth):
      block = block_type(self.mixer(i), hidden, self.norm_epsilon, self.dtype, self.param_dtype, name=f"blocks_{i}")
      x, block_state = block(x, None if state is None else state[i], segment_ids)
      states.append(block_state)
    return RMSNorm(self.norm_epsilon, self.param_dtype, name="final_norm")(x), tuple(states)

  def _check(self, tokens: jax.Array, state: tuple[Any, ...] | None) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(f"tokens is {tokens.dtype}{list(tokens.shape)}; want integers [batch, tokens].")
    self._check_state(state)

  def _check_state(self, state: tuple[Any, ...] | None) -> None:
    if state is not None and (not isinstance(state, tuple) or len(state) != self.depth):
      raise ValueError(f"state is a {type(state).__name__} of {len(state)}; want a tuple of {self.depth}, one a block.")
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"remat={self.remat!r}; want one of {list(REMAT_POLICIES)}.")


class VectorModel(LanguageModel):
  """A causal map from vectors to vectors: a `LanguageModel` whose embedding and head are linear maps.

  Attributes:
    vocab_size: none; leave it.
    input_dim, output_dim: of the vectors that go in, and of those that come out.

  Further attributes are `LanguageModel`'s; of these `tie_embeddings` means nothing here.
  """

  vocab_size: int = 0
  width: int = 64
  depth: int = 2
  mixers: tuple[nn.Module, ...] = ()
  input_dim: int = 1
  output_dim: int = 1

  @nn.compact
  def __call__(
    self, vectors: jax.Array, state: tuple[Any, ...] | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """vectors, floats [B, T, input_dim], to ([B, T, output_dim], state); else as `LanguageModel`."""
    if vectors.ndim != 3 or vectors.shape[2] != self.input_dim or not jnp.issubdtype(vectors.dtype, jnp.floating):
      raise ValueError(f"vectors is {vectors.dtype}{list(vectors.shape)}; want floats [batch, tokens, {self.input_dim}].")
    self._check_state(state)
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = dense(self.width, (None, "embed"), name="embedding", **types)(vectors)
    x, state = self.residual(x, state, segment_ids)
    return dense(self.output_dim, ("embed", None), name="head", **types)(x).astype(accumulator(x)), state
