"""Rows of different lengths in one array, against plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from patchscope_nn._util.ragged import Ragged, first_seen, ranges

numbers = st.integers(-(2**62), 2**62)
row_lists = st.lists(st.lists(numbers, max_size=4), max_size=6)


@given(rows=row_lists, data=st.data())
def test_rows_are_kept_and_taken(rows, data):
    ragged = Ragged(rows)
    assert len(ragged) == len(rows)
    assert ragged.counts.tolist() == [len(row) for row in rows]
    assert ragged.values.tolist() == [number for row in rows for number in row]
    assert [ragged.row(number) for number in range(len(rows))] == [tuple(row) for row in rows]
    places = st.lists(st.integers(0, len(rows) - 1), max_size=9) if rows else st.just([])
    taken = data.draw(places)
    values, index = ragged.take(np.array(taken, np.int64))
    assert values.tolist() == [number for place in taken for number in rows[place]]
    assert index.tolist() == [at for at, place in enumerate(taken) for _ in rows[place]]
    for part in (ragged.values, ragged.counts, ragged.starts, values, index):
        assert part.dtype == np.int64


def test_rows_may_come_from_an_iterator():
    assert Ragged(iter([(1, 2), (), (3,)])).values.tolist() == [1, 2, 3]


@given(parts=st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 5)), max_size=8))
def test_ranges(parts):
    starts, counts = (np.array([part[side] for part in parts], np.int64) for side in (0, 1))
    found = ranges(starts, counts)
    assert found.tolist() == [at for start, count in parts for at in range(start, start + count)]
    assert found.dtype == np.int64


@given(values=st.lists(st.integers(-3, 3) | numbers, max_size=12))
def test_first_seen(values):
    distinct, index = first_seen(np.array(values, np.int64))
    expected = list(dict.fromkeys(values))
    assert distinct.tolist() == expected
    assert index.tolist() == [expected.index(value) for value in values]
