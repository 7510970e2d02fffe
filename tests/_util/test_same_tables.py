"""What counts as the same table: ranks deep in the list are those of nearly equal logits, and no more."""

import pandas as pd
import pytest
from tables import assert_same_table


def table(*, rank: float, ranks: list[int], nll: float = 2.0) -> pd.DataFrame:
    """A cell with a rank of its own, and one without."""
    return pd.DataFrame(
        {
            "top_ids": [[1, 2, 3], [4, 5, 6]],
            "reference_ranks": [ranks, None],
            "rank": [rank, None],
            "nll_nats": [nll, None],
        }
    )


@pytest.mark.parametrize(
    ("found", "expected"), [(1, 1), (100, 100), (150, 151), (6923, 6924), (6924, 6923), (40_000, 40_021)]
)
def test_logits_that_are_equal_to_rounding_may_change_places(found: int, expected: int) -> None:
    one, other = (table(rank=float(rank), ranks=[3, rank]) for rank in (found, expected))
    before = one.copy(deep=True)
    assert_same_table(one, other)
    pd.testing.assert_frame_equal(one, before)


@pytest.mark.parametrize(
    ("found", "expected"),
    [(1, 2), (2, 1), (99, 100), (101, 100), (150, 153), (6923, 6928), (6923, 7923), (1, 6923), (6923, 1)],
)
@pytest.mark.parametrize("where", ["rank", "reference_ranks"])
def test_a_rank_that_is_wrong_fails(found: int, expected: int, where: str) -> None:
    one, other = (
        table(
            rank=float(rank if where == "rank" else 5), ranks=[3, rank if where == "reference_ranks" else 5]
        )
        for rank in (found, expected)
    )
    with pytest.raises(AssertionError):
        assert_same_table(one, other)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(table(rank=6923.0, ranks=[6923], nll=2.01), id="another number beside an equal rank"),
        pytest.param(table(rank=6923.0, ranks=[6923, 6923]), id="more ranks"),
        pytest.param(table(rank=float("nan"), ranks=[6923]), id="no rank"),
        pytest.param(table(rank=6923.0, ranks=[6923]).drop(columns="rank"), id="no column"),
        pytest.param(table(rank=6923.0, ranks=[6923]).iloc[:1], id="fewer cells"),
    ],
)
def test_what_else_differs_fails(other: pd.DataFrame) -> None:
    one = table(rank=6923.0, ranks=[6923])
    for pair in ((one, other), (other, one)):
        with pytest.raises(AssertionError):
            assert_same_table(*pair)
