"""The cells on a page: made from columns, with each distinct text made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from calls import calls
from tables import make_table

from patchscope_nn.report import cells
from patchscope_nn.report.figures.table import coded, reads_sink, sinks
from patchscope_nn.report.page import write_report


@pytest.mark.quick
def test_numbers_have_four_digits_as_text_would() -> None:
    given = [0.0, 1.0, -2.5, 0.1, 1 / 3, 123456.0, 9999.5, 0.00012345678, 1e-30, -7e20, np.nan, np.inf]
    found = cells._rounded(np.array(given))
    for number, rounded in zip(given, found, strict=True):
        assert (
            rounded is None if not np.isfinite(number) else rounded == pytest.approx(float(f"{number:.4g}"))
        )
    assert all(isinstance(number, int) for number in cells._rounded(np.array([3.0, -1.0])))


def test_distinct_values_are_found_by_value_whether_or_not_they_are_one_object() -> None:
    one = [1, 2]
    codes, distinct = coded([one, [1, 2], None, np.array([1, 2]), "a", float("nan"), [], one])
    assert codes.tolist() == [0, 0, 1, 0, 2, 1, 3, 0]
    assert distinct == [[1, 2], None, "a", []]
    texts = pd.Series(["b", None, "b"])
    assert coded(texts)[0].tolist() == coded(texts.astype(object))[0].tolist() == [0, 1, 0]


def test_sinks_of_a_table_are_those_of_its_cells() -> None:
    table = make_table(n_rows=3, positions=(0, 3), controls=("unpatched", "random"))
    assert sinks(table).tolist() == [reads_sink(cell) for cell in table.to_dict("records")]
    assert sinks(table).any()
    assert not sinks(table).all()


def test_a_listed_cell_takes_few_calls(tmp_path: Path) -> None:
    """The figures show as many cells of the larger table, so the difference is that of the listed cells."""
    one = make_table(n_rows=100, layers=range(6), controls=())
    # As in a run's table, equal lists are one object.
    for name in ("source_position", "target_position", "source_token", "target_token"):
        known: dict[Any, Any] = {}
        one[name] = [known.setdefault(str(value), value) for value in one[name]]
    two = pd.concat([one, one.assign(row=one["row"] + 100)], ignore_index=True)
    write_report(one, manifest={}, path=tmp_path / "warm.html")
    few, many = (
        calls(lambda table=table: write_report(table, manifest={}, path=tmp_path / "page.html"))
        for table in (one, two)
    )
    assert (many - few) / len(one) < 25
