"""The registry of metrics: what a metric is, and how a recipe or a script names one.

A metric is a function of a cell's columns and its data row. It returns a number, or None where there is none:

    @ps.metric(readout="generate", title="Words")
    def words(columns, row):
        return len(columns["text"].split())

A keyword-only argument without a default is a parameter; a recipe gives it the name of a data column.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias, overload

from patchscope_nn._util.arguments import checked
from patchscope_nn._util.functions import (
    check_reference,
    function_bytes,
    import_function,
    name_of,
    reference_of,
)
from patchscope_nn._util.registry import Registry, decorate

Columns: TypeAlias = Mapping[str, Any]
Compute: TypeAlias = Callable[..., float | None]


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """What figures and comparisons need to know of a metric; a run's manifest holds it.

    Attributes:
        name: Its name, which is also its column's.
        title: What a figure calls it.
        readout: The name of the readout that it reads; None reads any.
        higher_is_better: Whether a higher number is better.
        digest: Hex digest of its code; empty for a metric that ships.
    """

    name: str
    title: str = ""
    readout: str | None = None
    higher_is_better: bool = True
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class Metric(MetricInfo):
    """A metric. It is called like the function it was made of.

    Attributes:
        compute: Takes a cell's columns, its data row and the parameters; returns the number.
        parameters: The parameters it needs, each of which a recipe gives the name of a data column.
        needs: A field of the readout that has to be set, for example `reference`.
    """

    compute: Compute = field(repr=False)
    parameters: tuple[str, ...] = ()
    needs: str | None = None

    def __call__(self, columns: Columns, row: Mapping[str, Any], **parameters: str) -> float | None:
        """The number of one cell, or None where it has none."""
        return self.compute(columns, row, **parameters)


class MetricUse(NamedTuple):
    """A metric as a recipe or a script names it.

    Attributes:
        name: Its name.
        parameters: Its parameters as pairs, each with the name of a data column.
        function: `module:name` where it is named so; it is imported when a run is prepared.
        metric: The metric; None while `function` is not imported.
    """

    name: str
    parameters: tuple[tuple[str, str], ...] = ()
    function: str = ""
    metric: Metric | None = None

    def dump(self) -> Any:
        """The form YAML holds: the name, `{name: parameters}`, or `{function: module:name}`."""
        if self.function:
            return {_FUNCTION: self.function, **dict(self.parameters)}
        return {self.name: dict(self.parameters)} if self.parameters else self.name


_FUNCTION = "function"


def _adopt(name: str, loaded: Any) -> Metric:
    return as_metric(loaded, name=name)


#: All metrics; `values.py` registers those that ship.
METRICS: Registry[Metric] = Registry("patchscope_nn.metrics", noun="metric", entries={}, adopt=_adopt)


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
) -> Metric | Callable[[Compute], Metric]:
    """Register a function as a metric, so that recipes and scripts can name it; used as a decorator.

    Args:
        function: A function `(columns, row)` that returns a number or None; `columns` has the cell's columns
            by name, `row` those of its data row. Each keyword-only argument is the name of a data column.
        name: Its name and its column's; None takes the function's.
        title: What figures call it; empty takes the name.
        readout: The name of the readout that it reads, for example `generate`; None reads any.
        needs: A field of the readout that has to be set, for example `relevancy`.
        higher_is_better: Whether a higher number is better. It decides what `best_over` takes.

    Returns:
        The metric, which can still be called like the function.

    Raises:
        InputError: The name is taken or cannot be a column's, or the function does not take (columns, row).
    """

    def register(function: Compute) -> Metric:
        made = as_metric(
            function, name=name, title=title, readout=readout, needs=needs, higher_is_better=higher_is_better
        )
        METRICS.register(made.name, made, home=reference_of(function))
        return made

    return decorate(function, register)


def as_metric(function: Any, *, name: str | None = None, title: str = "", **facts: Any) -> Metric:
    """A metric made of a function, without registering it.

    Args:
        function: A function `(columns, row)`, or a metric, which keeps its own facts.
        name: Its name; None takes the function's.
        title: What figures call it; empty takes the name.
        **facts: The other attributes of `Metric`.

    Raises:
        ValueError: The name cannot be a column's, or the function does not take (columns, row).
    """
    if isinstance(function, Metric):
        return function if name in (None, function.name) else replace(function, name=str(name))
    name = name or name_of(function)
    if not name.isidentifier() or name == _FUNCTION:
        raise ValueError(
            f"{name!r} cannot be the name of a metric; give one of letters, digits and underscores: "
            "@ps.metric(name=...)"
        )
    reference = reference_of(function)
    ours = reference.startswith("patchscope_nn.")
    digest = "" if ours else hashlib.sha256(function_bytes(function)).hexdigest()[:16]
    parameters = cell_arguments(function, noun="metric", name=name)
    return Metric(
        name=name, title=title or name, compute=function, parameters=parameters, digest=digest, **facts
    )


def cell_arguments(function: Any, *, noun: str, name: str) -> tuple[str, ...]:
    """The keyword-only arguments without a default of a function of (columns, row).

    Raises:
        ValueError: It is not a function of (columns, row).
    """
    try:
        signature = inspect.signature(function)
        arguments = signature.parameters.values()
        keywords = [one for one in arguments if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
        names = tuple(argument.name for argument in keywords)
        signature.bind({}, {}, **dict.fromkeys(names, ""))
    except TypeError as error:
        raise ValueError(
            f"the {noun} {name} is not a function of (columns, row): {error}; write "
            f"def {name}(columns, row): ..."
        ) from None
    return names


def parse_metric(value: Any) -> MetricUse:
    """Check the form of a metric, and that its parameters are those it needs.

    Args:
        value: A name, `{name: {parameter: column}}`, `{function: module:name, parameter: column}`, a
            function, a `Metric` or a `MetricUse`.

    Returns:
        The metric as it is used. A metric given as `{function: ...}` is not imported yet.

    Raises:
        ValueError: There is no such metric, or its parameters are not those it needs.
    """
    if isinstance(value, MetricUse):
        return value
    if callable(value):
        return _parse_given(value)
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
    found = METRICS.find(str(name))
    return MetricUse(found.name, _parse_parameters(found, parameters or {}), metric=found)


def _parse_given(function: Any) -> MetricUse:
    """A metric given as a Python function, which must need no parameter and have a name of its own."""
    made = as_metric(function)
    known = METRICS.entries.get(made.name)
    if known == made:
        return MetricUse(made.name, _parse_parameters(made, {}), metric=made)
    if known is not None and not known.digest:
        raise ValueError(
            f"the metric {made.name!r} of {reference_of(made.compute)} has the name of that of "
            "patchscope_nn; give it another name"
        )
    if made.parameters:
        raise ValueError(
            f"the metric {made.name} needs {', '.join(made.parameters)}; register it with @ps.metric, and "
            f"give {_form(made)}"
        )
    return MetricUse(made.name, function=reference_of(made.compute), metric=made)


def _parse_function(value: Mapping[Any, Any]) -> MetricUse:
    parameters = {str(key): column for key, column in value.items() if key != _FUNCTION}
    if not isinstance(value[_FUNCTION], str) or not _are_columns(parameters):
        raise ValueError(f"{dict(value)!r} should read {{function: module:name, parameter: column}}")
    reference = check_reference(value[_FUNCTION])
    pairs = tuple((key, str(column)) for key, column in parameters.items())
    return MetricUse(reference.rpartition(":")[2].rpartition(".")[2], pairs, function=reference)


def resolve_metric(use: MetricUse) -> MetricUse:
    """A metric whose function is imported.

    Raises:
        ValueError: It cannot be imported, is not a metric, or its parameters are not those it needs.
    """
    if use.metric is not None:
        return use
    made = as_metric(import_function(use.function), name=use.name)
    return use._replace(parameters=_parse_parameters(made, dict(use.parameters)), metric=made)


def _parse_parameters(found: Metric, parameters: Any) -> tuple[tuple[str, str], ...]:
    if not _are_columns(parameters) or set(parameters) != set(found.parameters):
        raise ValueError(f"{found.name} is written {_form(found)}; given {parameters!r}")
    return tuple((key, str(parameters[key])) for key in found.parameters)


def _are_columns(parameters: Any) -> bool:
    return isinstance(parameters, Mapping) and all(
        isinstance(column, str | int) for column in parameters.values()
    )


def _form(found: Metric) -> str:
    """How YAML writes a metric."""
    columns = ", ".join(f"{name}: COLUMN" for name in found.parameters)
    return f"{{{found.name}: {{{columns}}}}}" if columns else found.name


def described(manifest: Mapping[str, Any]) -> dict[str, MetricInfo]:
    """What is known of metrics by name: those that ship, and those of a run, as its manifest has them.

    Args:
        manifest: A run's manifest; the code of its metrics need not be installed.
    """
    known: dict[str, MetricInfo] = dict(METRICS.entries)
    return known | {entry["name"]: MetricInfo(**entry) for entry in manifest.get("metrics") or ()}


def dump_infos(uses: Sequence[MetricUse], *, readout: str) -> list[dict[str, Any]]:
    """What a manifest holds of a run's metrics, for `described`.

    Args:
        uses: The metrics, resolved.
        readout: The name of the run's readout.
    """
    found = [use.metric for use in uses if use.metric is not None]
    return [
        {
            "name": one.name,
            "title": one.title,
            "readout": one.readout or readout,
            "higher_is_better": one.higher_is_better,
            "digest": one.digest,
        }
        for one in found
    ]
