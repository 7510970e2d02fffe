"""Data files: .jsonl, .json, .csv, .tsv and .parquet, read row by row with line numbers. No torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from patchscope_nn.errors import DataError, did_you_mean


class Numbered(NamedTuple):
    """A row and its place in the data: `line 3` or `row 3`."""

    where: str
    row: Any


Rows: TypeAlias = Generator[Numbered, None, None]


def number_rows(rows: Iterable[Any]) -> Rows:
    """Number rows that are not read from lines of a file, from 1."""
    return (Numbered(f"row {number}", row) for number, row in enumerate(rows, start=1))


def read_file(file: Path, *, name: str, base: Path | None) -> Rows:
    """Read the rows of a file in the format of its ending; they are not yet checked to form a table.

    A relative path starts from `base`, or from the working directory.

    Raises:
        DataError: The file is missing, cannot be read, or has an unsupported format.
    """
    read = _READERS.get(file.suffix.lower())
    if read is None:
        ending = file.suffix or "no ending"
        raise DataError(f"{name} has {ending}, which is not read. {did_you_mean(ending, list(_READERS))}")
    try:
        path = (base or Path.cwd()) / file.expanduser()
        if not path.exists():
            raise DataError(f"{name} does not exist; looked for {path}.", hint="Check data.file.")
        yield from read(path, name)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise DataError(f"{name} cannot be read: {reason}.", hint="Check the file.") from None
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text.", hint="Save the file as UTF-8.") from None


def _read_json_lines(path: Path, name: str) -> Rows:
    # Only "\n" ends a line of JSON Lines; texts may contain other characters that Python splits lines at.
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        yield from read_jsonl(lines, name=name)


def read_jsonl(lines: Iterable[str], *, name: str) -> Rows:
    """Read the rows of JSON Lines; empty lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Numbered(f"line {number}", _json(line, name=name, above=number - 1))


def _read_json(path: Path, name: str) -> Rows:
    text = path.read_text("utf-8-sig")
    rows = _json(text, name=name) if text.strip() else []
    if not isinstance(rows, list):
        raise DataError(
            f"{name} is a JSON {type(rows).__name__}, not a list of rows.",
            hint='Write [{"column": value}, ...], or one row a line in a .jsonl file.',
        )
    yield from number_rows(rows)


def _json(text: str, *, name: str, above: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno + above}, column {error.colno}"
        raise DataError(f"{name}, {where}: is not JSON ({error.msg}).", hint="Correct that line.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}, line {1 + above}: is JSON that cannot be read ({error}).") from None


def _read_csv(path: Path, name: str, *, delimiter: str = ",") -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        records = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield from _records(records, name=name)
        except csv.Error as error:
            raise DataError(
                f"{name}, line {records.line_num}: is not {path.suffix[1:].upper()} ({error}).",
                hint='Put a text that holds quotes or line ends in quotes, and write quotes in it as "".',
            ) from None


def _records(records: Any, *, name: str) -> Rows:
    header: list[str] | None = None
    for record in records:
        if not record:
            continue
        if header is None:
            header = record
            repeated = sorted({column for column in header if not column or header.count(column) > 1})
            if repeated:
                raise DataError(
                    f"{name}, line {records.line_num}: the column {repeated[0]!r} is unnamed or comes twice.",
                    hint="The first line names every column once.",
                )
        elif len(record) != len(header):
            raise DataError(
                f"{name}, line {records.line_num}: {len(record)} values for {len(header)} columns "
                f"({', '.join(header)}).",
                hint="Give every row the same columns; put a text that holds the separator in quotes.",
            )
        else:
            # In these files, an empty cell stands for a missing value.
            row = {column: text or None for column, text in zip(header, record, strict=True)}
            yield Numbered(f"line {records.line_num}", row)


def _read_parquet(path: Path, name: str) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            yield from number_rows(row for batch in table.iter_batches() for row in batch.to_pylist())
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"{name} is not a Parquet file ({reason}).", hint="Check the file.") from None


_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
