"""Readers: users' functions that return data rows, registered by name or provided by installed packages.

    @ps.reader
    def capitals(continent="Europe"):
        return [{"country": "France", "capital": "Paris"}, ...]

A reader runs on this machine when a run is prepared. Its rows are part of the run's identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

from patchscope_nn._util.arguments import checked
from patchscope_nn._util.functions import import_function, reference_of
from patchscope_nn._util.plain import shown
from patchscope_nn._util.registry import Registry, decorate
from patchscope_nn.data.files import Rows, number_rows
from patchscope_nn.errors import DataError, PatchscopeError

#: The readers that are registered or provided by packages. There are no builtin ones.
READERS: Registry[Callable[..., Any]] = Registry("patchscope_nn.data", noun="reader", entries={})


@overload
def reader(function: Callable[..., Any], /) -> Callable[..., Any]: ...
@overload
def reader(*, name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
@checked
def reader(function: Callable[..., Any] | None = None, *, name: str | None = None) -> Any:
    """Register a function as a reader for `data: {reader: name}`; used as a decorator.

    Args:
        function: Returns rows: mappings of column names to values, or a data frame. Its keyword arguments are
            `data.arguments`.
        name: Its name; None takes the function's.

    Returns:
        The function, unchanged; a decorator if `function` is None.

    Raises:
        InputError: The name is taken.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        READERS.register(name or function.__name__, function, home=reference_of(function))
        return function

    return decorate(function, register)


def find_reader(*, name: str | None, function: str | None) -> Callable[..., Any]:
    """Return the reader of a name, or of `module:name`; DataError if it cannot be found or imported."""
    try:
        return READERS.find(name) if name is not None else import_function(str(function))
    except ValueError as error:
        raise DataError(
            f"data: {error}.", hint="A module is found in the current environment, or on PYTHONPATH."
        ) from error


def call_reader(function: Callable[..., Any], arguments: Mapping[str, Any], *, name: str) -> Rows:
    """Yield the rows that a reader returns, each with its number; `name` is what messages call it.

    Raises:
        DataError: The reader fails, or does not return rows.
    """
    try:
        yield from number_rows(records_of(function(**arguments)))
    except PatchscopeError:
        raise
    except Exception as error:
        # A user's function may raise anything.
        raise DataError(
            f"{name} failed: {type(error).__name__}: {error}.", hint="Correct the reader, or data.arguments."
        ) from error


def records_of(data: Any) -> Any:
    """Return the rows of a data frame of pandas, polars or pyarrow; other objects are taken as rows.

    Raises:
        DataError: Two columns have the same name, or the object is not an iterable of rows.
    """
    columns = getattr(data, "columns", ())
    names = list(getattr(data, "column_names", None) or columns)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"data has two columns {twice[0]!r}.", hint="Give every column its own name.")
    for method in ("to_dicts", "to_pylist"):
        if hasattr(data, method):
            return list(getattr(data, method)())
    records = data.to_dict("records") if len(columns) and hasattr(data, "to_dict") else data
    if isinstance(records, str | bytes | Mapping) or not hasattr(records, "__iter__"):
        raise DataError(f"data is {shown(data)}, which is not a list of rows.", hint=FORMS)
    return records


FORMS = (
    'Give rows ([{"entity": "Paris"}]), a pandas DataFrame, a datasets.Dataset, or where they are: {"file": '
    '"rows.jsonl"}.'
)
