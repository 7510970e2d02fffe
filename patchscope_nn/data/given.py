"""Data that is given in Python: rows, data frames, datasets, or the fields of a recipe's `data`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from patchscope_nn._util.arguments import checked
from patchscope_nn._util.functions import reference_of
from patchscope_nn._util.plain import shown
from patchscope_nn.data.readers import FORMS, call_reader, records_of
from patchscope_nn.data.rows import BUILTIN, DataSpec
from patchscope_nn.errors import DataError


@checked
def as_data(given: Any, *, limit: int | None = None) -> DataSpec:
    """Convert data that is given in Python to a `DataSpec`; of an iterable, at most `limit` rows are taken.

    Args:
        given: A `DataSpec`, a mapping as in a recipe's `data`, a table (of pandas, polars or pyarrow), a
            function that returns rows, or rows: any iterable of mappings, for example a `datasets.Dataset`.
        limit: The maximum number of rows; None takes all.

    Raises:
        DataError: It is none of these.
        SpecError: It is a mapping with keys of a recipe's `data`, but not valid.
    """
    if isinstance(given, DataSpec):
        return given
    if isinstance(given, str | Path):
        kind = "builtin" if given in BUILTIN else "file"
        raise DataError(
            f"data is {str(given)!r}, and a text does not say what it is.",
            hint=f"Give {{{kind!r}: {str(given)!r}}}.",
        )
    if isinstance(given, Mapping):
        return _named(given)
    if callable(given):
        name = f"data={reference_of(given)}"
        records = (entry.row for entry in call_reader(given, {}, name=name))
    else:
        records = records_of(given)
    rows = islice(records, limit if limit and limit > 0 else None)
    return DataSpec(rows=tuple(_row(row, number) for number, row in enumerate(rows, start=1)))


def _named(mapping: Mapping[Any, Any]) -> DataSpec:
    if mapping and not set(mapping) & set(DataSpec.model_fields):
        keys = ", ".join(map(repr, list(mapping)[:8]))
        raise DataError(
            f"data is a mapping with the keys {keys}, which are not those of a recipe's data.",
            hint="Give columns as pandas.DataFrame(data), a single row as [data], and a split of a dataset "
            f"as data['train']. {FORMS}",
        )
    return DataSpec(**{str(key): value for key, value in mapping.items()})


def _row(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(
            f"data, row {number}: {shown(row)} is not a row; a row is a mapping of columns to values.",
            hint=FORMS,
        )
    wrong = [name for name in row if not isinstance(name, str)]
    if wrong:
        raise DataError(
            f"data, row {number}: the column {wrong[0]!r} has a name that is not a text.",
            hint="Name the columns in words, so that {column} placeholders can name them.",
        )
    return dict(row)
