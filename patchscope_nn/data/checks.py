"""Checks of data rows: which rows are taken, and whether they form a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from patchscope_nn._util.plain import is_missing, shown, wrong_text
from patchscope_nn.data.files import Numbered, Rows
from patchscope_nn.errors import DataError, did_you_mean

#: The maximum number of a column's values that a message names.
_MOST = 20


def rows_where(numbered: Rows, where: Mapping[str, Any], *, name: str) -> Rows:
    """Yield the rows with given values, and entries that are not rows, which `as_table` refuses.

    `where` has for each column its value, or a list of allowed values, compared as texts.

    Raises:
        DataError: A column of `where` does not exist, or no row has the values.
    """
    wanted = {
        column: [str(value) for value in (values if isinstance(values, list | tuple) else [values])]
        for column, values in where.items()
    }
    seen: dict[str, set[str]] = {column: set() for column in wanted}
    kept = False
    for entry in numbered:
        if isinstance(entry.row, Mapping):
            missing = [column for column in wanted if column not in entry.row]
            if missing:
                raise DataError(
                    f"{name}, {entry.where}: data.where.{missing[0]} is not a column.",
                    hint=did_you_mean(missing[0], [str(column) for column in entry.row]),
                )
            for column in wanted:
                seen[column].add(str(entry.row[column]))
            if any(str(entry.row[column]) not in values for column, values in wanted.items()):
                continue
        kept = True
        yield entry
    if not kept:
        present = "; ".join(
            f"{column}: {', '.join(sorted(values)[:_MOST])}" for column, values in seen.items()
        )
        raise DataError(f"{name}: data.where={dict(where)!r} leaves no row.", hint=f"There are {present}.")


class MissingValues:
    """Drops and counts the rows in which a used column is missing, or raises an error at the first.

    `used` has the field that uses each column; it is None if the used columns are not known.
    """

    def __init__(self, used: Mapping[str, str] | None, *, drop: bool, name: str) -> None:
        self.used, self.drop, self.name = used, drop, name
        self.dropped = 0

    def check(self, numbered: Iterable[Numbered]) -> Rows:
        """Yield the rows without missing values, and entries that are not rows, which `as_table` refuses."""
        for entry in numbered:
            row = entry.row if isinstance(entry.row, Mapping) else {}
            known = (row if self.drop else ()) if self.used is None else self.used
            missing = next((column for column in known if column in row and is_missing(row[column])), None)
            if missing is None:
                yield entry
            elif self.drop:
                self.dropped += 1
            else:
                raise DataError(
                    f"{self.name}, {entry.where}: the column {missing!r} is missing ({row[missing]!r}), and "
                    f"{(self.used or {})[missing]} uses it.",
                    hint="Give it a value; or take other rows, with data.where, or with data.drop_missing: "
                    "true, which leaves out rows in which a used column is missing.",
                )


def as_table(numbered: Iterable[Numbered], *, name: str, missing: MissingValues) -> list[dict[str, Any]]:
    """Return the rows, after checking that they form a table; `missing` has dropped rows from them.

    Raises:
        DataError: An entry is not a row, the columns differ between rows, a text is invalid, or there are no
            rows.
    """
    table: list[dict[str, Any]] = []
    for where, row in numbered:
        if not isinstance(row, Mapping):
            raise DataError(
                f"{name}, {where}: {shown(row)} is not a row.",
                hint='A row is a mapping of columns to values, for example {"entity": "Paris"}.',
            )
        if not row:
            raise DataError(f"{name}, {where}: the row has no column.", hint="Leave the row out.")
        if table and row.keys() != table[0].keys():
            raise DataError(
                f"{name}, {where}: the columns are {', '.join(row)}; those of the first row are "
                f"{', '.join(table[0])}.",
                hint="Give every row the same columns.",
            )
        for column, value in row.items():
            if isinstance(value, str) and (problem := wrong_text(value)):
                raise DataError(
                    f"{name}, {where}: the column {column!r}: {problem}.", hint="Correct the data."
                )
        table.append(dict(row))
    if not table and missing.dropped:
        columns = "" if missing.used is None else f" ({', '.join(missing.used)})"
        raise DataError(
            f"{name}: data.drop_missing leaves no row; all {missing.dropped} lack a value of a used "
            f"column{columns}.",
            hint="Give data with these columns.",
        )
    if not table:
        raise DataError(f"{name} holds no row.", hint="Give data with at least one row.")
    return table
