"""Derived columns: functions that run after the readout and before the metrics, which can read their values.

    @ps.column
    def first_word(columns, row) -> str:
        return columns["text"].split()[0]

The return annotation is the column's type: `str` (also the default), `float`, `int`, `bool`, or a `list` of
texts or numbers. None is a missing value.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, NamedTuple, overload

from patchscope_nn._util import functions
from patchscope_nn._util.arguments import checked
from patchscope_nn._util.plain import plain, shown
from patchscope_nn._util.registry import Registry, decorate
from patchscope_nn.metrics.registry import cell_arguments
from patchscope_nn.spec import ColumnType

_KINDS: dict[Any, ColumnType] = {
    str: "text",
    float: "number",
    int: "number",
    bool: "number",
    list[str]: "texts",
    list[float]: "numbers",
    list[int]: "numbers",
}
_TYPES: dict[ColumnType, Any] = {"text": str, "number": (int, float), "texts": str, "numbers": (int, float)}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A derived column. It can be called like its function.

    Attributes:
        name: Its name in the table.
        kind: `text`, `number`, `texts` or `numbers`; the last two are for lists.
        compute: The function; it takes a cell's columns and its data row, and returns the value or None.
        digest: Hex digest of the function's code.
    """

    name: str
    kind: ColumnType
    compute: Callable[..., Any] = field(repr=False)
    digest: str

    def __call__(self, columns: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
        """Compute the value for one cell."""
        return self.compute(columns, row)

    def check(self, value: Any) -> Any:
        """Return a value as tables hold it, with numbers as floats; TypeError if it is of another kind."""
        value = plain(value)
        if value is None:
            return None
        listed = self.kind in ("texts", "numbers")
        items = value if listed else [value]
        kind = _TYPES[self.kind]
        if not isinstance(items, list | tuple) or not all(isinstance(item, kind) for item in items):
            raise TypeError(
                f"it returned {shown(value)}, which is not a {self.kind}; annotate the return type, "
                f"for example -> {type(value).__name__}"
            )
        held = list(items) if kind is str else [float(item) for item in items]
        return held if listed else held[0]


class ColumnUse(NamedTuple):
    """A derived column as a recipe or a script names it.

    If it is named as `function: module:name`, `column` is None until a run is prepared and imports it.
    """

    name: str
    function: str = ""
    column: Column | None = None

    def dump(self) -> Any:
        """Return the form for YAML: the name, or `{function: module:name}`."""
        return {"function": self.function} if self.function else self.name


#: The columns that are registered or offered by packages. None is included.
COLUMNS: Registry[Column] = Registry(
    "patchscope_nn.columns",
    noun="column",
    entries={},
    adopt=lambda name, loaded: as_column(loaded, name=name),
)


@overload
def column(function: Callable[..., Any], /) -> Column: ...
@overload
def column(*, name: str | None = None) -> Callable[[Callable[..., Any]], Column]: ...
@checked
def column(
    function: Callable[..., Any] | None = None, *, name: str | None = None
) -> Column | Callable[[Callable[..., Any]], Column]:
    """Register a function as a column that recipes and scripts can name; used as a decorator.

    Args:
        function: A function `(columns, row)`. `columns` has the cell's place in the sweep, its readout's
            columns and the derived columns before this one; `row` is the data row.
        name: The column's name; None uses the function's.

    Returns:
        The column, which can still be called like the function.

    Raises:
        InputError: The name is taken or not valid, or the function does not take (columns, row).
    """

    def register(function: Callable[..., Any]) -> Column:
        derived = as_column(function, name=name)
        COLUMNS.register(derived.name, derived, home=functions.reference_of(function))
        return derived

    return decorate(function, register)


def as_column(function: Any, *, name: str | None = None) -> Column:
    """Make a column from a function, without registering it.

    Raises:
        ValueError: The name is not a valid column name, or the function does not take (columns, row).
    """
    if isinstance(function, Column):
        return function if name in (None, function.name) else replace(function, name=str(name))
    name = name or functions.name_of(function)
    if not name.isidentifier():
        raise ValueError(
            f"{name!r} cannot be the name of a column; give one of letters, digits and underscores: "
            "@ps.column(name=...)"
        )
    if needed := cell_arguments(function, noun="column", name=name):
        raise ValueError(f"the column {name} needs {', '.join(needed)}; give each a default")
    digest = hashlib.sha256(functions.function_bytes(function)).hexdigest()[:16]
    return Column(name=name, kind=_kind(function, name), compute=function, digest=digest)


def _kind(function: Any, name: str) -> ColumnType:
    """Return the column type for a function's return annotation; without an annotation it is text."""
    try:
        returned = typing.get_type_hints(function).get("return", str)
    except (NameError, TypeError):
        # An annotation that only a type checker can evaluate, or an object without annotations.
        returned = str
    parts = [part for part in typing.get_args(returned) if part is not NoneType]
    if NoneType in typing.get_args(returned) and len(parts) == 1:
        returned = parts[0]
    if returned not in _KINDS:
        allowed = "str, float, int, bool, list[str] or list[float]"
        raise ValueError(f"the column {name} returns {returned!r}; a column can hold {allowed}")
    return _KINDS[returned]


def parse_column(value: Any) -> ColumnUse:
    """Check the form of a derived column: a name, `{function: module:name}`, a function or a `Column`.

    The function of `{function: ...}` is not imported yet.

    Raises:
        ValueError: The value has none of these forms, or there is no column of this name.
    """
    if isinstance(value, ColumnUse):
        return value
    if callable(value):
        derived = as_column(value)
        known = COLUMNS.entries.get(derived.name) == derived
        return ColumnUse(derived.name, "" if known else functions.reference_of(derived.compute), derived)
    if isinstance(value, str):
        return ColumnUse(value, column=COLUMNS.find(value))
    if isinstance(value, Mapping) and set(value) == {"function"} and isinstance(value["function"], str):
        reference = functions.check_reference(value["function"])
        return ColumnUse(functions.name_in(reference), reference)
    raise ValueError(f"{value!r} is not a column; give a name, or {{function: module:name}}")


def resolve_column(use: ColumnUse) -> ColumnUse:
    """Import a column's function, if it is not imported yet; ValueError if that fails, as in `as_column`."""
    if use.column is not None:
        return use
    return use._replace(column=as_column(functions.import_function(use.function), name=use.name))
