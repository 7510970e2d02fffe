"""Data rows, each a mapping of column names to values, and where they come from. Does not import torch.

    {builtin: contexts}                      ships with this package
    {file: x.jsonl}                          .jsonl .json .csv .tsv .parquet; relative to the recipe's folder
    {hub: org/name, split: test}             the Hugging Face Hub; needs patchscope-nn[hub]
    {rows: [{entity: Paris}]}                written into the recipe
    {reader: capitals}                       a reader that is registered, or that a package provides
    {function: module:name}                  a reader of your own, with `arguments: {name: value}`

Each form can be limited to some of its rows: `where: {kind: [city, person]}` takes the rows with one of these
values, and `drop_missing: true` those in which no used column is missing.
The rows always form a table: every row has the same columns.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
from collections.abc import Mapping, Sequence
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
from patchscope_nn.data.checks import MissingValues, as_table, rows_where
from patchscope_nn.data.files import Rows, number_rows, read_file, read_jsonl
from patchscope_nn.data.readers import READERS, call_reader, find_reader
from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.spec import Spec

#: The builtin data, in builtin/NAME.jsonl. The README.md there lists the sources.
BUILTIN = ("attributes", "contexts", "directions", "entities", "facts", "texts", "topics", "two-hop", "words")
_KINDS = ("builtin", "file", "hub", "rows", "reader", "function")
#: The kinds that are read by a user's function.
READ_BY_FUNCTION = ("reader", "function")
_HUB_ONLY = ("split", "config", "revision")


def _known(name: str) -> str:
    if name not in BUILTIN:
        raise ValueError(f"{name!r} is not builtin data. {did_you_mean(name, BUILTIN)}")
    return name


def _known_reader(name: str) -> str:
    if name not in READERS:
        raise ValueError(f"{name!r} is not a known reader. {did_you_mean(name, READERS.names())}")
    return name


def _listed(value: Any) -> Any:
    if value in ([], ()):
        raise ValueError("is an empty list; give at least one row, for example [{entity: Paris}]")
    return tuple(value) if isinstance(value, list) else value


def _as_json(rows: Any) -> Any:
    """Convert rows to JSON values; dates, and the missing values of pandas, become texts."""
    return json.loads(json.dumps(rows, default=str))


_Text = Annotated[
    str, Field(min_length=1), BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
]


class DataSpec(Spec):
    """Where data rows come from: exactly one of `builtin`, `file`, `hub`, `rows`, `reader`, `function`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [kind]} for kind in _KINDS],
            "dependentRequired": {"hub": ["split"], **{name: ["hub"] for name in _HUB_ONLY}},
        }
    )

    builtin: Annotated[str, AfterValidator(_known), WithJsonSchema({"enum": list(BUILTIN)})] | None = None
    """The name of data that ships with this package, for example `contexts`."""
    file: _Text | None = None
    """A .jsonl, .json, .csv, .tsv or .parquet file; a relative path starts from the recipe's folder."""
    hub: _Text | None = None
    """A dataset of the Hugging Face Hub, `org/name`."""
    split: _Text | None = None
    """The split of the Hub dataset, for example `test`."""
    config: _Text | None = None
    """The configuration of the Hub dataset, if it has several."""
    revision: _Text | None = None
    """The commit, tag or branch of the Hub dataset."""
    rows: (
        Annotated[
            tuple[dict[str, Any], ...],
            Field(min_length=1),
            BeforeValidator(_listed),
            PlainSerializer(_as_json, return_type=Any, when_used="json"),
        ]
        | None
    ) = None
    """The rows themselves, each a mapping of column names to values."""
    reader: Annotated[str, AfterValidator(_known_reader), WithJsonSchema({"type": "string"})] | None = None
    """The name of a reader that is registered in Python, or that an installed package provides."""
    function: Annotated[str, AfterValidator(check_reference)] | None = None
    """A reader as `module:name`: a function that returns rows."""
    arguments: dict[str, Any] | None = None
    """The keyword arguments of the reader or function."""
    where: dict[str, Any] | None = None
    """Which rows to take: for each column its value, or a list of allowed values, compared as texts."""
    drop_missing: bool = False
    """Leave out rows in which a used column is missing (null or NaN); for the data of a fit, rows in which
    any column is missing. Otherwise a missing value of a used column is an error."""

    @property
    def kind(self) -> str:
        """The form that is set: `builtin`, `file`, `hub`, `rows`, `reader` or `function`."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            named = " and ".join(kinds) or "no data"
            raise ValueError(
                f"names {named}; give exactly one of {', '.join(_KINDS)}, for example {{builtin: contexts}}"
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
    """Rows that were read, and the number of rows that `drop_missing` left out."""

    rows: list[dict[str, Any]]
    dropped: int = 0


def load_rows(data: DataSpec, *, base: Path | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a table without checking for missing values; see `read_table`."""
    return read_table(data, base=base, limit=limit).rows


def read_table(
    data: DataSpec,
    *,
    base: Path | None = None,
    limit: int | None = None,
    used: Mapping[str, str] | None = None,
) -> Table:
    """Read the rows of a table. Values of .csv and .tsv files are texts; an empty value is missing.

    Args:
        data: Where the rows come from.
        base: The folder a relative file path starts from; None is the working directory.
        limit: The maximum number of rows; None takes all. With a limit, Hub data is streamed.
        used: The columns that are used, each with the field that uses it; None if that is not known.

    Returns:
        (n_rows,) mappings of column names to values, n_rows >= 1, all with the same columns.

    Raises:
        DataError: The data cannot be found or read, is not a table, or is empty; a used column is missing in
            a row; `where` names an unknown column or leaves no row; or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} leaves no row.", hint="Give 1 or more, or leave it out to read all.")
    name = f"data.{data.kind}"
    if data.kind != "rows":
        name += f"={getattr(data, data.kind)!r}"
    with closing(_numbered(data, name=name, base=base, limit=limit)) as numbered:
        selected = rows_where(numbered, data.where, name=name) if data.where else numbered
        missing = MissingValues(used, drop=data.drop_missing, name=name)
        rows = as_table(itertools.islice(missing.check(selected), limit), name=name, missing=missing)
        return Table(rows, missing.dropped)


def fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return 16 hex digits of a SHA-256 over the rows, which depends on the rows' order, not the columns'."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()[:16]


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
        dataset = datasets.load_dataset(
            data.hub, data.config, split=data.split, revision=data.revision, streaming=stream
        )
        yield from number_rows(dataset)
    except Exception as error:  # the Hub's client, its transport and its readers each have their own errors
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
        raise DataError(
            f"{name}, split={data.split!r} cannot be read ({reason}).",
            hint="Check the name, the split and the network, or save the rows and use {file: rows.jsonl}.",
        ) from error
