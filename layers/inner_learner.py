"""The base class of layers whose memory is a network that learns at test time."""

from typing import Any

import jax
from flax import linen as nn

from ..pallas_kernels import test_time_memory as ttm
from .memory_layer import MemoryLayer


class InnerLearner(MemoryLayer, kw_only=True):
  """A layer over `memzoo.pallas_kernels.test_time_memory`.

  Attributes:
    max_documents: largest number of documents in a row; rows with more return NaN, unless their chunks fit; see `ttm.run`.
    implementation: of the operation and of the convolutions: "auto", "xla" or "recurrent" (the oracle: slow, but with
      derivatives of every mode and order).
    precision: of the operation and the gates: `None`, or "highest" to multiply bfloat16 activations as float32.
  """

  max_documents: int = 16
  implementation: str = "auto"
  precision: str | None = None

  @property
  def spec(self) -> ttm.Spec:
    """The arguments of the operation."""
    raise NotImplementedError(f"{type(self).__name__} must define spec")

  @nn.nowrap
  def check_settings(self) -> None:
    """See `MemoryLayer`."""
    super().check_settings()
    _ = self.spec  # which checks its own

  def matrices(self, state: Any) -> dict[str, jax.Array]:
    """The differences of the inner matrices from their initial values, biases as a last row: "memory 0", ..."""
    return {f"memory {name}": change for name, change in state.memory.weights.items()}

  def learn(
    self,
    initial: ttm.InitialWeights,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: ttm.Gates,
    state: ttm.State | None,
    segment_ids: jax.Array | None,
    max_documents: int | None = None,
  ) -> ttm.Result:
    """Writes and reads every token; arguments as in `ttm.run`. `memzoo.zoo.inspect` intercepts this method."""
    return ttm.run(
      self.spec,
      initial,
      q,
      k,
      v,
      gates,
      initial_state=state,
      segment_ids=segment_ids,
      max_documents=max_documents or self.max_documents,
      implementation=self.implementation,
      precision=self.precision,
    )
