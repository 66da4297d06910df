"""A layer that reads its input segment by segment: documents begin new segments, and a segment may go on in the next call.

    layout = lay_out_segments(64, count, tokens, segment_ids, fresh, max_documents)
    state, y = scan_segments(step, module, state, x, layout)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from ..pallas_kernels.documents import documents
from ..pallas_kernels.partition import ROWS, partitioned
from ..pallas_kernels.test_time_memory.layout import Layout, lay_out


def lay_out_segments(
  size: int, count: jax.Array, tokens: int, segment_ids: jax.Array | None, fresh: bool, max_documents: int
) -> Layout:
  """The layout of an input [B, tokens] in segments of `size` tokens; `count` [B] are in the open one, none if `fresh`."""

  def lay_out_rows(count, segment_ids):
    docs = None if segment_ids is None else documents(segment_ids)
    return lay_out(count.shape[0], tokens, size, None if fresh else count, docs, max_documents)

  return partitioned(lay_out_rows, P(ROWS), P(ROWS))(count, segment_ids)


def scan_segments(
  step: Callable[..., tuple[Any, Any]], module: nn.Module, state: Any, x: jax.Array, layout: Layout
) -> tuple[Any, Any]:
  """Scans over the segments of x [B, T, D]; returns the last state, and the outputs by token, [B, T, ...] each.

  The backward pass keeps the inputs of each segment and recomputes the rest. Sown values get a leading axis of segments.

  Args:
    step: from (module, state, (x [B, C, D], is_token, position, fresh, still_open)) to the next state and a tree of outputs
      [B, C, ...]; the last four are those of a `Layout`, of one segment.
    module: the bound module that `step` uses.
    state: the first carry, split and varying as later ones are; see `aligned`.
    x: the input.
    layout: its places in segments.
  """
  scan = nn.scan(
    nn.remat(step, prevent_cse=False),
    variable_broadcast="params",
    variable_axes={"intermediates": 0},
    split_rngs={"params": False},
  )
  chunks = partitioned(lambda layout, x: layout.chunks(x), P(ROWS), P(ROWS))
  tokens = partitioned(lambda layout, y: layout.tokens(y, x.shape[1]), P(ROWS), P(ROWS))
  segments = chunks(layout, x), *layout[:4]
  state, y = scan(module, state, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), segments))
  return layout.poison(state), jax.tree.map(lambda a: tokens(layout, jnp.swapaxes(a, 0, 1)), y)
