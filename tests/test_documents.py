"""Documents and positions from segment ids, against a loop that reads the ids one at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from memzoo.pallas_kernels.documents import check_segment_ids, documents, positions

BATCH, TOKENS = 3, 12  # one shape, so that nothing compiles twice
few_examples = settings(max_examples=60, deadline=None, derandomize=True)
segment_ids = arrays(np.int32, (BATCH, TOKENS), elements=st.integers(0, 3))
offsets = arrays(np.int32, BATCH, elements=st.integers(0, 9))


def by_loop(ids, offset):
  """Document and position of each token of a row; padding is in the document before it and has no position."""
  index, position, previous, document, count = [], [], None, 0, offset
  for segment in ids:
    if segment != 0:
      if previous is not None and segment != previous:
        document, count = document + 1, 0
      previous = segment
      position.append(count)
      count += 1
    else:
      position.append(None)
    index.append(document)
  return index, position


@given(segment_ids)
@few_examples
def test_documents_are_runs_of_equal_neighbours_around_padding(ids):
  docs = documents(jnp.asarray(ids))
  assert docs.index.dtype == jnp.int32
  np.testing.assert_array_equal(docs.is_token, ids != 0)
  np.testing.assert_array_equal(docs.index, [by_loop(row, 0)[0] for row in ids])


@given(segment_ids, offsets)
@few_examples
def test_positions_count_within_documents_and_the_first_continues(ids, offset):
  actual = positions(documents(jnp.asarray(ids)), jnp.asarray(offset))
  assert actual.dtype == jnp.int32
  for row, start, found in zip(ids, offset, np.asarray(actual), strict=True):
    expected = by_loop(row, start)[1]
    assert [int(p) for p, e in zip(found, expected, strict=True) if e is not None] == [e for e in expected if e is not None]


@given(segment_ids)
@few_examples
def test_documents_do_not_depend_on_the_values_of_ids(ids):
  renamed = np.where(ids == 0, 0, 7 - 3 * ids)
  for a, b in zip(documents(jnp.asarray(ids)), documents(jnp.asarray(renamed)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_id_that_is_reused_is_another_document():
  docs = documents(jnp.array([[0, 5, 5, 0, 5, 2, 5, 0]], jnp.int32))
  np.testing.assert_array_equal(docs.index, [[0, 0, 0, 0, 0, 1, 2, 2]])
  np.testing.assert_array_equal(positions(docs, jnp.array([4], jnp.int32))[docs.is_token], [4, 5, 6, 0, 0])


def test_mistakes_are_named():
  check_segment_ids(None, (2, 3))
  check_segment_ids(jnp.ones((2, 3), jnp.int32), (2, 3))
  for wrong, got in ((jnp.ones((2, 4), jnp.int32), r"int32\[2, 4\]"), (jnp.ones((2, 3), jnp.float32), r"float32\[2, 3\]")):
    with pytest.raises(ValueError, match=rf"segment_ids is {got}; expected integers of shape \[2, 3\]"):
      check_segment_ids(wrong, (2, 3))
