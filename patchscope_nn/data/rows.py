"""Data rows, each a mapping of column names to values, and where they come from. No torch.

    {builtin: contexts}                      ships with this package
    {file: x.jsonl}                          .jsonl .json .csv .tsv .parquet; from the recipe's folder
    {hub: org/name, split: test}             the Hugging Face Hub; needs patchscope-nn[hub]
    {rows: [{entity: Paris}]}                written into the recipe
    {reader: capitals}                       a reader that is registered, or that a package brings
    {function: module:name}                  a reader of your own, with `arguments: {name: value}`

and of any of them only some rows: those that have one of some values, `where: {kind: [city, person]}`, or
those in which no column that is used is missing, `drop_missing: true`.
Whatever the form, the rows are a table: every row has the same columns.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from patchscope_nn._util.functions import check_reference
from patchscope_nn._util.plain import is_missing, shown, wrong_text
from patchscope_nn.data.files import Numbered, Rows, number_rows, read_file, read_jsonl
from patchscope_nn.data.readers import READERS, call_reader, find_reader
from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.spec import Spec

#: The data that ships: builtin/NAME.jsonl. Its README.md tells where each comes from.
BUILTIN = ("attributes", "contexts", "directions", "entities", "facts", "texts", "topics", "two-hop", "words")
_KINDS = ("builtin", "file", "hub", "rows", "reader", "function")
#: The kinds that are read by a function of the user's.
READ_BY_FUNCTION = ("reader", "function")
_HUB_ONLY = ("split", "config", "revision")
#: How many values of a column a message names.
_MOST = 20


def _known(name: str) -> str:
    if name not in BUILTIN:
        raise ValueError(f"{name!r} is no builtin data. {did_you_mean(name, BUILTIN)}")
    return name


def _known_reader(name: str) -> str:
    if name not in READERS:
        raise ValueError(f"{name!r} is not a known reader. {did_you_mean(name, READERS.names())}")
    return name


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _listed(value: Any) -> Any:
    if value in ([], ()):
        raise ValueError("is an empty list; give at least one row, for example [{entity: Paris}]")
    return tuple(value) if isinstance(value, list) else value


def _as_json(rows: Any) -> Any:
    """Rows as JSON holds them; dates, and what pandas has for a missing value, become texts."""
    return json.loads(json.dumps(rows, default=str))


_Text = Annotated[str, Field(min_length=1), BeforeValidator(_text)]


class DataSpec(Spec):
    """Where the data rows come from: one of `builtin`, `file`, `hub`, `rows`, `reader` and `function`.

    Attributes:
        builtin: The name of data that ships with this package, for example `contexts`.
        file: A .jsonl, .json, .csv, .tsv or .parquet file; a relative path starts from the recipe's folder.
        hub: A dataset of the Hugging Face Hub, `org/name`.
        split: The split of the Hub dataset, for example `test`.
        config: The configuration of the Hub dataset, where it has several.
        revision: The commit, tag or branch of the Hub dataset.
        rows: The rows themselves, each a mapping of column names to values.
        reader: The name of a reader that is registered in Python, or that an installed package brings.
        function: A reader as `module:name`: a function that returns rows.
        arguments: The keyword arguments of the reader or function.
        where: Which rows to take: for each column named a value, or a list of values one of which it has,
            compared as texts.
        drop_missing: Leave out the rows in which a column that is used is missing (null or NaN); of the texts
            and rows of a fit, any column. Otherwise a missing value that is used is an error.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [kind]} for kind in _KINDS],
            "dependentRequired": {"hub": ["split"], **{name: ["hub"] for name in _HUB_ONLY}},
        }
    )

    builtin: Annotated[str, AfterValidator(_known), WithJsonSchema({"enum": list(BUILTIN)})] | None = None
    file: _Text | None = None
    hub: _Text | None = None
    split: _Text | None = None
    config: _Text | None = None
    revision: _Text | None = None
    rows: (
        Annotated[
            tuple[dict[str, Any], ...],
            Field(min_length=1),
            BeforeValidator(_listed),
            PlainSerializer(_as_json, return_type=Any, when_used="json"),
        ]
        | None
    ) = None
    reader: Annotated[str, AfterValidator(_known_reader), WithJsonSchema({"type": "string"})] | None = None
    function: Annotated[str, AfterValidator(check_reference)] | None = None
    arguments: dict[str, Any] | None = None
    where: dict[str, Any] | None = None
    drop_missing: bool = False

    @property
    def kind(self) -> str:
        """Which of `builtin`, `file`, `hub`, `rows`, `reader` and `function` it is."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            given = " and ".join(kinds) or "no data"
            raise ValueError(
                f"names {given}; give exactly one of {', '.join(_KINDS)}, for example {{builtin: contexts}}"
            )
        more = [name for name in _HUB_ONLY if getattr(self, name) is not None]
        if more and self.hub is None:
            raise ValueError(f"{more[0]} belongs to hub, and this is {kinds[0]}; leave it out")
        if self.hub is not None and self.split is None:
            raise ValueError(f"hub needs a split, for example {{hub: {self.hub}, split: test}}")
        if self.arguments is not None and self.kind not in READ_BY_FUNCTION:
            raise ValueError(
                f"arguments belong to reader or function, and this is {self.kind}; leave them out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain = {name: value for name, value in handler(self).items() if value is not None}
        return plain if self.drop_missing else {k: v for k, v in plain.items() if k != "drop_missing"}


class Table(NamedTuple):
    """Rows that were read, and how many `drop_missing` left out."""

    rows: list[dict[str, Any]]
    dropped: int = 0


def load_rows(data: DataSpec, *, base: Path | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of `read_table`, whose columns may be missing."""
    return read_table(data, base=base, limit=limit).rows


def read_table(
    data: DataSpec,
    *,
    base: Path | None = None,
    limit: int | None = None,
    used: Mapping[str, str] | None = None,
) -> Table:
    """Read the rows of a table. Values of .csv and .tsv files are texts; an empty one is missing.

    Args:
        data: Where they come from.
        base: The folder a relative file path starts from; None is the working directory.
        limit: The most rows to take; None takes all. Hub data is streamed when it is given.
        used: The columns that are used, each with the field that uses it; None where that is not known.

    Returns:
        (n_rows,) mappings of column names to values, n_rows >= 1, all with the same columns.

    Raises:
        DataError: The data cannot be found or read, is no table, or is empty; a column that is used is
            missing in a row; `where` names no column of it or leaves no row; or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no row.", hint="Give 1 or more, or leave it out to read all.")
    name = f"data.{data.kind}"
    if data.kind != "rows":
        name += f"={getattr(data, data.kind)!r}"
    with closing(_numbered(data, name=name, base=base, limit=limit)) as numbered:
        kept = _kept(numbered, data.where, name=name) if data.where else numbered
        whole = _Whole(used, drop=data.drop_missing, name=name)
        rows = _table(itertools.islice(whole.check(kept), limit), name=name, dropped=whole)
        return Table(rows, whole.dropped)


class _Whole:
    """Leaves out rows in which a column that is used is missing, and counts them; or refuses them.

    Args:
        used: The columns that are used, each with the field that uses it; None where that is not known.
        drop: Whether such rows are left out.
        name: What messages call the data.
    """

    def __init__(self, used: Mapping[str, str] | None, *, drop: bool, name: str) -> None:
        self.used, self.drop, self.name = used, drop, name
        self.dropped = 0

    def check(self, numbered: Iterable[Numbered]) -> Rows:
        """The rows that are whole; what is no row is kept, and refused later."""
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
                    "true, which leaves out those in which a column that is used is missing.",
                )


def fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first 16 hex digits of a SHA-256 over the rows; the rows' order counts, the columns' does not."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()[:16]


def _table(numbered: Iterable[Numbered], *, name: str, dropped: _Whole) -> list[dict[str, Any]]:
    """The rows, once it is sure that they are a table."""
    table: list[dict[str, Any]] = []
    for where, row in numbered:
        if not isinstance(row, Mapping):
            raise DataError(
                f"{name}, {where}: {shown(row)} is no row.",
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
                raise DataError(f"{name}, {where}: the column {column!r}: {problem}.", hint="Mend the data.")
        table.append(dict(row))
    if not table and dropped.dropped:
        columns = "" if dropped.used is None else f" ({', '.join(dropped.used)})"
        raise DataError(
            f"{name}: data.drop_missing leaves no row; in each of {dropped.dropped} a column that is used"
            f"{columns} is missing.",
            hint="Give data with these columns.",
        )
    if not table:
        raise DataError(f"{name} holds no row.", hint="Give data with at least one row.")
    return table


def _kept(numbered: Rows, where: Mapping[str, Any], *, name: str) -> Rows:
    """The rows whose columns have the values asked for; what is no row is kept, and refused later."""
    wanted = {
        column: [str(value) for value in (asked if isinstance(asked, list | tuple) else [asked])]
        for column, asked in where.items()
    }
    seen: dict[str, set[str]] = {column: set() for column in wanted}
    kept = False
    for one in numbered:
        if isinstance(one.row, Mapping):
            missing = [column for column in wanted if column not in one.row]
            if missing:
                raise DataError(
                    f"{name}, {one.where}: data.where.{missing[0]} is no column.",
                    hint=did_you_mean(missing[0], [str(column) for column in one.row]),
                )
            for column in wanted:
                seen[column].add(str(one.row[column]))
            if any(str(one.row[column]) not in values for column, values in wanted.items()):
                continue
        kept = True
        yield one
    if not kept:
        values = "; ".join(f"{column}: {', '.join(sorted(found)[:_MOST])}" for column, found in seen.items())
        raise DataError(f"{name}: data.where={dict(where)!r} leaves no row.", hint=f"There are {values}.")


def _numbered(data: DataSpec, *, name: str, base: Path | None, limit: int | None) -> Rows:
    if data.builtin is not None:
        folder = importlib.resources.files("patchscope_nn.data") / "builtin"
        yield from read_jsonl((folder / f"{data.builtin}.jsonl").read_text("utf-8").split("\n"), name=name)
    elif data.file is not None:
        yield from read_file(Path(data.file), name=name, base=base)
    elif data.hub is not None:
        yield from _hub(data, name=name, stream=limit is not None)
    elif data.rows is not None:
        yield from number_rows(data.rows)
    else:
        read = find_reader(name=data.reader, function=data.function)
        yield from call_reader(read, data.arguments or {}, name=name)


def _hub(data: DataSpec, *, name: str, stream: bool) -> Rows:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name} needs the package datasets, which is not installed.",
            hint="Run: pip install 'patchscope-nn[hub]'",
        ) from None
    try:
        found = datasets.load_dataset(
            data.hub, data.config, split=data.split, revision=data.revision, streaming=stream
        )
        yield from number_rows(found)
    except Exception as error:  # the Hub's client, its transport and its readers raise errors of their own
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
        raise DataError(
            f"{name}, split={data.split!r} cannot be read ({reason}).",
            hint="Check the name, the split and the network, or save the rows and use {file: rows.jsonl}.",
        ) from error
