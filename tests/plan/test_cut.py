"""Batches that fit: against a loop that adds one item after the other."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from patchscope_nn.plan.cut import cut


def greedy(sizes, limit, most):
    """Batches of the sizes of items, in order: each holds up to `most`, and up to `limit` in sum."""
    batches = []
    for item, size in enumerate(sizes):
        last = batches[-1] if batches else []
        fits = last and len(last) < most and sum(sizes[other] for other in last) + size <= limit
        if fits:
            last.append(item)
        else:
            batches.append([item])
    return batches


@given(sizes=st.lists(st.integers(0, 12), max_size=40), limit=st.integers(0, 30), most=st.integers(1, 50))
def test_batches_are_the_longest_that_fit(sizes, limit, most):
    whole = np.array(sizes, np.int64)

    def fits(batch):
        assert 0 < batch.stop - batch.start <= most
        return np.cumsum(whole[batch]) <= limit

    found = [list(range(batch.start, batch.stop)) for batch in cut(len(sizes), fits, most=most)]
    assert found == greedy(sizes, limit, most)


@given(
    kinds=st.lists(st.integers(0, 2), max_size=40),
    bad=st.sets(st.integers(0, 39)),
    most=st.integers(1, 50),
)
def test_a_single_item_always_fits_and_a_batch_ends_at_the_first_misfit(kinds, bad, most):
    """Also if a longer batch would fit again."""
    whole = np.array(kinds, np.int64)

    def fits(batch):
        items = np.arange(batch.start, batch.stop)
        return (whole[batch] == whole[batch.start]) & ~np.isin(items, list(bad))

    expected = []
    for item, kind in enumerate(kinds):
        last = expected[-1] if expected else []
        if last and len(last) < most and kind == kinds[last[0]] and item not in bad:
            last.append(item)
        else:
            expected.append([item])
    found = [list(range(batch.start, batch.stop)) for batch in cut(len(kinds), fits, most=most)]
    assert found == expected
