"""Models on a stack: tokens to logits (`LanguageModel`), and vectors to vectors (`VectorModel`)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..layers.axes import named
from ..layers.context import Notes
from ..layers.projections import INIT, dense, embed, unembed
from ..pallas_kernels.numerics import accumulator
from .stack import Stack


class LanguageModel(Stack, kw_only=True):
  """A causal language model: embedding, stack, head. It keeps the contract of a layer, with token ids for inputs.

  Attributes:
    vocab_size: number of tokens.
    width: width of the residual stream.
    tie_embeddings: whether the head is the transposed embedding.

  The other attributes are those of `Stack`. Logits are float32 (float64 for a float64 model).
  """

  vocab_size: int
  width: int
  tie_embeddings: bool = True

  def example(self, batch_size: int, length: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an input."""
    return jax.ShapeDtypeStruct((batch_size, length), jnp.int32)

  def __call__(
    self, tokens: jax.Array, state: tuple[Any, ...] | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """Returns logits for the token after each token.

    Args:
      tokens: int32 [B, T].
      state: state of an earlier call, to continue it; `None` for a fresh start.
      segment_ids: int32 [B, T]; equal neighbours are one document, 0 is padding.

    Returns:
      Logits [B, T, vocab_size], and the state.

    Raises:
      ValueError: for tokens that are not integers [B, T], a state of another model, or arguments that a layer refuses.
    """
    return self.with_notes(tokens, state, segment_ids)[:2]

  @nn.compact
  def with_notes(
    self, tokens: jax.Array, state: tuple[Any, ...] | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[Any, ...], dict[str, Notes]]:
    """See `Stack.with_notes`."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(f"tokens is {tokens.dtype}{list(tokens.shape)}; expected integers [batch, tokens].")
    self.check_state(state, tokens.shape[0])
    embedding = self.param("embedding", named(INIT, "vocab", "embed"), (self.vocab_size, self.width), self.param_dtype)
    x = embed(embedding, tokens).astype(self.dtype)
    x, state, notes = self.residual(x, state, segment_ids, tokens)
    if self.tie_embeddings:
      logits = unembed(x, embedding.astype(x.dtype))
    else:
      types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
      logits = dense(self.vocab_size, ("embed", "vocab"), name="head", **types)(x)
    return logits.astype(accumulator(x)), state, notes


class VectorModel(Stack, kw_only=True):
  """A causal map from vectors to vectors: a linear map, a stack, a linear map.

  Attributes:
    width: width of the residual stream.
    input_dim, output_dim: widths of the input and output vectors.

  The other attributes are those of `Stack`.
  """

  width: int
  input_dim: int
  output_dim: int

  def example(self, batch_size: int, length: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an input."""
    return jax.ShapeDtypeStruct((batch_size, length, self.input_dim), jnp.float32)

  def __call__(
    self, vectors: jax.Array, state: tuple[Any, ...] | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """Maps vectors, floats [B, T, input_dim], to ([B, T, output_dim], state); otherwise as `LanguageModel`."""
    return self.with_notes(vectors, state, segment_ids)[:2]

  @nn.compact
  def with_notes(
    self, vectors: jax.Array, state: tuple[Any, ...] | None = None, segment_ids: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[Any, ...], dict[str, Notes]]:
    """See `Stack.with_notes`."""
    if vectors.ndim != 3 or vectors.shape[2] != self.input_dim or not jnp.issubdtype(vectors.dtype, jnp.floating):
      raise ValueError(f"vectors is {vectors.dtype}{list(vectors.shape)}; expected floats [batch, tokens, {self.input_dim}].")
    self.check_state(state, vectors.shape[0])
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = dense(self.width, (None, "embed"), name="embedding", **types)(vectors)
    x, state, notes = self.residual(x, state, segment_ids)
    return dense(self.output_dim, ("embed", None), name="head", **types)(x).astype(accumulator(x)), state, notes
