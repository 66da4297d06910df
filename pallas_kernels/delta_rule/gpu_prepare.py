"""P and (I + A)^-1 of all chunks in one kernel for Hopper GPUs, for decays that are one number per token; see `chunked`.

Chunks do not depend on each other here: a block of threads takes one chunk of one head.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..compat import varying_shape
from .gpu_inverse import inverse_of
from .gpu_sources import Place, Rows, Size
from .gpu_tiles import BY_LANES, COLUMNS, by_column, by_row, operand, product, put, transposed
from .gpu_tiles import rows as rows_times

# Vectors of a chunk: cumulative log-decays and documents, of tokens and of rows; strengths of rows.
_DECAY, _DOCUMENT, _ROW_DECAY, _ROW_DOCUMENT, _STRENGTH = range(5)


def scores_and_inverse(
  queries: Rows,
  keys: Rows,
  scale: float,
  vectors: jax.Array,
  size: Size,
  *,
  updates: int,
  erases: bool,
  interpret: Any = False,
) -> list[jax.Array]:
  """P, and (I + A)^-1 if there is one, in parts: bfloat16 [n * B * H, 2, 64, 64].

  Args:
    queries, keys: of all chunks.
    scale: of P.
    vectors: float32 [n * B * H, 5, 64]: cumulative log-decays of tokens, their documents, the same of rows, and strengths.
    size: of the call.
    updates: rows of a token.
    erases: whether there is an (I + A)^-1.
    interpret: as for `plgpu.kernel`.
  """
  count, whole = size.chunks * size.matrices, (COLUMNS, COLUMNS)

  def delta_rule_prepare(q_ref, k_ref, vectors_ref, *refs):
    results, (q_tile, k_tile, vectors, *working, arrived) = refs[: 1 + erases], refs[1 + erases :]
    at = Place(size, lax.axis_index("chunk"), lax.axis_index("matrix"))
    for rows, ref, tile in ((queries, q_ref, q_tile), (keys, k_ref, k_tile)):
      plgpu.copy_gmem_to_smem(rows.place(ref, at, pl.ds(0, rows.width)), tile.at[pl.ds(0, rows.rows)], arrived)
    plgpu.copy_gmem_to_smem(vectors_ref.at[at.index], vectors, arrived)
    plgpu.barrier_wait(arrived)
    working = [[ref.at[part] for part in range(2)] for ref in working]
    row, column = (plgpu.broadcasted_iota(jnp.int32, whole, axis, layout=plgpu.Layout.WGMMA) for axis in range(2))

    def decays(earlier, decay, document):
      """e^{G_i - G_j} for rows j that are earlier and of the same document, and else 0."""
      seen = earlier & (by_row(vectors.at[document], whole) == by_column(vectors.at[_ROW_DOCUMENT], whole))
      between = by_row(vectors.at[decay], whole) - by_column(vectors.at[_ROW_DECAY], whole)
      return jnp.where(seen, jnp.exp(jnp.where(seen, between, 0.0)), 0.0)

    def give(ref, tile, parts):
      put(parts, tile)
      for i, part in enumerate(parts):
        plgpu.copy_smem_to_gmem(part, ref.at[at.index * 2 + i])

    overlaps = product([k_tile], transposed([k_tile])) if erases else None
    token_of_column = lax.shift_right_logical(column, updates.bit_length() - 1)
    scores = product([q_tile], transposed([k_tile])) * decays(row >= token_of_column, _DECAY, _DOCUMENT)
    if erases:
      a = rows_times(vectors.at[_STRENGTH], overlaps) * decays(row > column, _ROW_DECAY, _ROW_DOCUMENT)
      give(results[1], inverse_of(a, *working), working[1])
    give(results[0], scale * scores, working[0])
    plgpu.wait_smem_to_gmem(0)

  arrays = queries.given(), keys.given(), vectors
  out = varying_shape((count * 2, *whole), jnp.bfloat16, like=arrays)
  found = plgpu.kernel(
    delta_rule_prepare,
    out_type=[out] * (1 + erases),
    scratch_types=[
      operand(COLUMNS, queries.width),
      operand(COLUMNS, keys.width),
      plgpu.SMEM(vectors.shape[1:], jnp.float32),
      *[operand(2, *whole)] * 3,
      plgpu.Barrier(num_arrivals=3),
    ],
    grid=(size.matrices, size.chunks),
    grid_names=("matrix", "chunk"),
    compiler_params=BY_LANES,
    interpret=interpret,
  )(*arrays)
  return [x.reshape(count, 2, *whole) for x in found]
