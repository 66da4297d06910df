"""What layers have in common whose memory is a network that learns at test time."""

from typing import Any

import jax

from ..pallas_kernels import test_time_memory as ttm
from .memory_layer import MemoryLayer


class InnerLearner(MemoryLayer, kw_only=True):
  """A layer over `memzoo.pallas_kernels.test_time_memory`.

  Attributes:
    max_documents: that a row may hold; rows with more come out as nan, unless they fit all the same. See `run`.
    implementation: of the operation.
  """

  max_documents: int = 16
  implementation: str = "auto"

  @property
  def spec(self) -> ttm.Spec:
    """The memory, as the operation knows it."""
    raise NotImplementedError(f"{type(self).__name__} must define spec")

  def matrices(self, state: Any) -> dict[str, jax.Array]:
    """By how much each inner matrix differs from what a document begins with, biases as a last row: "memory 0", ..."""
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
    """Reads and writes every token; arguments as of `run`. `memzoo.zoo.inspect` listens here."""
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
    )
