"""The registry of metrics: what a metric is, and how recipes and scripts name metrics.

A metric is a function of a cell's columns and its data row. It returns a number, or None if there is none:

    @ps.metric(readout="generate", title="Words")
    def words(columns, row):
        return len(columns["text"].split())

A keyword-only argument without a default is a parameter. A recipe sets it to the name of a data column.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeAlias, overload

from patchscope_nn._util import functions
from patchscope_nn._util.arguments import checked
from patchscope_nn._util.registry import Registry, decorate
from patchscope_nn.metrics.arrays import of_one_cell

Columns: TypeAlias = Mapping[str, Any]
Compute: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """What figures and comparisons need to know about a metric; stored in a run's manifest.

    Attributes:
        name: The name of the metric and of its column.
        title: The title in figures.
        readout: The name of the readout that it reads; None means any.
        higher_is_better: Whether a higher number is better.
        digest: Hex digest of its code; empty for an included metric.
    """

    name: str
    title: str = ""
    readout: str | None = None
    higher_is_better: bool = True
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class Metric(MetricInfo):
    """A metric. It can be called like its function.

    Attributes:
        compute: The function; it takes a cell's columns, its data row and the parameters, and returns a
            number or None.
        parameters: The required parameters; a recipe sets each to the name of a data column.
        needs: A field of the readout that must be set, for example `reference`.
        by_column: True if the function takes the columns of many cells at once.
    """

    compute: Compute = field(repr=False)
    parameters: tuple[str, ...] = ()
    needs: str | None = None
    by_column: bool = False

    def __call__(self, columns: Columns, row: Mapping[str, Any], **parameters: str) -> float | None:
        """Compute the number for one cell, or None if it has none."""
        if not self.by_column:
            return self.compute(columns, row, **parameters)
        numbers: Any = self.compute(of_one_cell(columns), [row], **parameters)
        return None if numbers is None or math.isnan(numbers[0]) else float(numbers[0])


class MetricUse(NamedTuple):
    """A metric as a recipe or a script names it.

    `parameters` are pairs of a parameter and the name of a data column. If the metric is named as `function:
    module:name`, `metric` is None until a run is prepared and imports it.
    """

    name: str
    parameters: tuple[tuple[str, str], ...] = ()
    function: str = ""
    metric: Metric | None = None

    def dump(self) -> Any:
        """Return the form for YAML: the name, `{name: parameters}`, or `{function: module:name}`."""
        if self.function:
            return {_FUNCTION: self.function, **dict(self.parameters)}
        return {self.name: dict(self.parameters)} if self.parameters else self.name


_FUNCTION = "function"


#: All metrics; `values.py` registers the included ones.
METRICS: Registry[Metric] = Registry(
    "patchscope_nn.metrics",
    noun="metric",
    entries={},
    adopt=lambda name, loaded: as_metric(loaded, name=name),
)


@overload
def metric(function: Compute, /) -> Metric: ...
@overload
def metric(
    *,
    name: str | None = None,
    title: str = "",
    readout: str | None = None,
    needs: str | None = None,
    higher_is_better: bool = True,
    by_column: bool = False,
) -> Callable[[Compute], Metric]: ...
@checked
def metric(
    function: Compute | None = None,
    *,
    name: str | None = None,
    title: str = "",
    readout: str | None = None,
    needs: str | None = None,
    higher_is_better: bool = True,
    by_column: bool = False,
) -> Metric | Callable[[Compute], Metric]:
    """Register a function as a metric, so that recipes and scripts can name it; used as a decorator.

    Args:
        function: A function `(columns, row)` that returns a number or None. `columns` has the cell's columns
            by name, `row` is its data row. Each keyword-only argument receives the name of a data column.
        name: The name of the metric and of its column; None uses the function's.
        title: The title in figures; empty uses the name.
        readout: The name of the readout that it reads, for example `generate`; None means any.
        needs: A field of the readout that must be set, for example `relevancy`.
        higher_is_better: Whether a higher number is better; `best_over` uses this.
        by_column: True if the function takes many cells at once, which is faster: `columns` has numpy arrays,
            (n_cells,) or for lists of equal length (n_cells, k), and lacks a column that has no value;
            `row` is a list of the data rows. It returns (n_cells,) numbers, NaN where there is none, or None.

    Returns:
        The metric, which can still be called like the function.

    Raises:
        InputError: The name is taken or not valid, or the function does not take (columns, row).
    """

    def register(function: Compute) -> Metric:
        registered = as_metric(
            function,
            name=name,
            title=title,
            readout=readout,
            needs=needs,
            higher_is_better=higher_is_better,
            by_column=by_column,
        )
        METRICS.register(registered.name, registered, home=functions.reference_of(function))
        return registered

    return decorate(function, register)


def as_metric(function: Any, *, name: str | None = None, title: str = "", **facts: Any) -> Metric:
    """Make a metric from a function `(columns, row)`, or from a metric, which keeps its own attributes.

    Raises:
        ValueError: The name is not a valid column name, or the function does not take (columns, row).
    """
    if isinstance(function, Metric):
        return function if name in (None, function.name) else replace(function, name=str(name))
    name = name or functions.name_of(function)
    if not name.isidentifier() or name == _FUNCTION:
        raise ValueError(
            f"{name!r} cannot be the name of a metric; give one of letters, digits and underscores: "
            "@ps.metric(name=...)"
        )
    reference = functions.reference_of(function)
    ours = reference.startswith("patchscope_nn.")
    digest = "" if ours else hashlib.sha256(functions.function_bytes(function)).hexdigest()[:16]
    parameters = cell_arguments(function, noun="metric", name=name)
    return Metric(
        name=name, title=title or name, compute=function, parameters=parameters, digest=digest, **facts
    )


def cell_arguments(function: Any, *, noun: str, name: str) -> tuple[str, ...]:
    """Return a function's keyword-only arguments without a default.

    Raises:
        ValueError: The function does not take (columns, row).
    """
    try:
        signature = inspect.signature(function)
        names = tuple(
            name
            for name, argument in signature.parameters.items()
            if argument.kind is argument.KEYWORD_ONLY and argument.default is argument.empty
        )
        signature.bind({}, {}, **dict.fromkeys(names, ""))
    except TypeError as error:
        raise ValueError(
            f"the {noun} {name} is not a function of (columns, row): {error}; write "
            f"def {name}(columns, row): ..."
        ) from None
    return names


def parse_metric(value: Any) -> MetricUse:
    """Parse a metric, and check its parameters.

    It is a name, `{name: {parameter: column}}`, `{function: module:name, parameter: column}`, a function or a
    `Metric`. The function of `{function: ...}` is not imported yet.

    Raises:
        ValueError: There is no metric of this name, or its parameters are missing or wrong.
    """
    if isinstance(value, MetricUse):
        return value
    if callable(value):
        return _parse_callable(value)
    if isinstance(value, Mapping) and _FUNCTION in value:
        return _parse_function(value)
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(
            f"{value!r} is not a metric; give a name, {{name: {{parameter: column}}}}, or "
            "{function: module:name}"
        )
    name, parameters = next(iter(value.items()))
    known = METRICS.find(str(name))
    return MetricUse(known.name, _parse_parameters(known, parameters or {}), metric=known)


def _parse_callable(function: Any) -> MetricUse:
    """Parse a metric given as a Python function, which must have no parameters and a unique name."""
    parsed = as_metric(function)
    known, reference = METRICS.entries.get(parsed.name), functions.reference_of(parsed.compute)
    if known == parsed:
        return MetricUse(parsed.name, _parse_parameters(parsed, {}), metric=parsed)
    if known is not None and not known.digest:
        raise ValueError(
            f"the metric {parsed.name!r} of {reference} has the same name as that of patchscope_nn; give it "
            "another name"
        )
    if parsed.parameters:
        raise ValueError(
            f"the metric {parsed.name} needs {', '.join(parsed.parameters)}; register it with @ps.metric, "
            f"and give {_form(parsed)}"
        )
    return MetricUse(parsed.name, function=reference, metric=parsed)


def _parse_function(value: Mapping[Any, Any]) -> MetricUse:
    parameters = {str(key): column for key, column in value.items() if key != _FUNCTION}
    if not isinstance(value[_FUNCTION], str) or not _are_columns(parameters):
        raise ValueError(f"{dict(value)!r} should read {{function: module:name, parameter: column}}")
    reference = functions.check_reference(value[_FUNCTION])
    pairs = tuple((key, str(column)) for key, column in parameters.items())
    return MetricUse(functions.name_in(reference), pairs, function=reference)


def resolve_metric(use: MetricUse) -> MetricUse:
    """Import a metric's function, if it is not imported yet, and check its parameters.

    Raises:
        ValueError: The function cannot be imported or is not a metric, or its parameters are wrong.
    """
    if use.metric is not None:
        return use
    imported = as_metric(functions.import_function(use.function), name=use.name)
    return use._replace(parameters=_parse_parameters(imported, dict(use.parameters)), metric=imported)


def _parse_parameters(metric: Metric, parameters: Any) -> tuple[tuple[str, str], ...]:
    if not _are_columns(parameters) or set(parameters) != set(metric.parameters):
        raise ValueError(f"{metric.name} is written {_form(metric)}; given {parameters!r}")
    return tuple((key, str(parameters[key])) for key in metric.parameters)


def _are_columns(parameters: Any) -> bool:
    return isinstance(parameters, Mapping) and all(
        isinstance(column, str | int) for column in parameters.values()
    )


def _form(metric: Metric) -> str:
    """Return the form of a metric in YAML, for messages."""
    columns = ", ".join(f"{name}: COLUMN" for name in metric.parameters)
    return f"{{{metric.name}: {{{columns}}}}}" if columns else metric.name


def described(manifest: Mapping[str, Any]) -> dict[str, MetricInfo]:
    """Return the descriptions of metrics by name: of all registered ones, and of those in a run's manifest.

    The code of a manifest's metrics need not be installed.
    """
    known: dict[str, MetricInfo] = dict(METRICS.entries)
    return known | {entry["name"]: MetricInfo(**entry) for entry in manifest.get("metrics") or ()}


def dump_infos(uses: Sequence[MetricUse], *, readout: str) -> list[dict[str, Any]]:
    """Return the descriptions of a run's resolved metrics for its manifest; `described` reads them back."""
    names = [field.name for field in fields(MetricInfo)]
    infos = [{name: getattr(use.metric, name) for name in names} for use in uses if use.metric is not None]
    return [info | {"readout": info["readout"] or readout} for info in infos]
