"""Data as Python gives it: rows, data frames, datasets, or what a recipe's `data` says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from patchscope_nn._util.arguments import checked
from patchscope_nn._util.plain import shown
from patchscope_nn.data.rows import BUILTIN, DataSpec
from patchscope_nn.errors import DataError

_FORMS = (
    'Give rows ([{"entity": "Paris"}]), a pandas DataFrame, a datasets.Dataset, or where they are: {"file": '
    '"rows.jsonl"}.'
)


@checked
def as_data(given: Any, *, limit: int | None = None) -> DataSpec:
    """What is given as data in Python, as a recipe says it.

    Args:
        given: A `DataSpec`, a mapping as a recipe's `data`, a table (of pandas, polars or pyarrow), or
            rows: any iterable of mappings, such as a `datasets.Dataset`.
        limit: The most rows that are taken from an iterable; None takes all.

    Returns:
        The data.

    Raises:
        DataError: It is none of these.
        SpecError: It is a mapping that is no recipe's `data`.
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
    records = _records(given)
    if isinstance(records, bytes) or not isinstance(records, Iterable):
        raise DataError(f"data is {shown(given)}, which is no data.", hint=_FORMS)
    rows = islice(records, limit if limit and limit > 0 else None)
    return DataSpec(rows=tuple(_row(row, number) for number, row in enumerate(rows, start=1)))


def _named(given: Mapping[Any, Any]) -> DataSpec:
    if given and not set(given) & set(DataSpec.model_fields):
        keys = ", ".join(map(repr, list(given)[:8]))
        raise DataError(
            f"data is a mapping with the keys {keys}; of a recipe's data it has none.",
            hint="Columns make rows as pandas.DataFrame(data); a single row is given as [data]; of a dataset "
            f"with splits give one, such as data['train']. {_FORMS}",
        )
    return DataSpec(**{str(key): value for key, value in given.items()})


def _records(given: Any) -> Any:
    """The rows of a data frame, as pandas, polars and pyarrow give them; anything else is rows already."""
    columns = getattr(given, "columns", ())
    names = list(getattr(given, "column_names", None) or columns)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"data has two columns {twice[0]!r}.", hint="Give every column its own name.")
    for method in ("to_dicts", "to_pylist"):
        if hasattr(given, method):
            return list(getattr(given, method)())
    return list(given.to_dict("records")) if len(columns) and hasattr(given, "to_dict") else given


def _row(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(
            f"data, row {number}: {shown(row)} is no row; a row is a mapping of columns to values.",
            hint=_FORMS,
        )
    wrong = [name for name in row if not isinstance(name, str)]
    if wrong:
        raise DataError(
            f"data, row {number}: the column {wrong[0]!r} has a name that is no text.",
            hint="Name the columns in words, which {column} placeholders can hold.",
        )
    return dict(row)
