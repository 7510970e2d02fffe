"""The registry: what each metric needs, which way is better, and whether it fits a readout and its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.metrics.values import (
    Columns,
    choice_accuracy,
    choice_log_odds,
    contains,
    cosine,
    fraction_of_variance,
    precision_at_1,
    rank,
    reciprocal_rank,
    relevancy,
    rouge_1,
    rouge_l,
    top_k_overlap,
)
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import Readout


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric, and what it needs.

    Attributes:
        name: Its name, and its column's.
        title: What a figure calls it.
        readout: The readout it reads.
        compute: From the readout's columns, the data row and the parameters, to the number.
        parameters: The parameters it needs, each the name of a data column.
        reference: Whether it needs the readout's reference.
        option: A field of the readout that has to be true.
        higher_is_better: Which way is better.
    """

    name: str
    title: str
    readout: type[Readout]
    compute: Callable[..., float | None]
    parameters: tuple[str, ...] = ()
    reference: bool = False
    option: str | None = None
    higher_is_better: bool = True


class MetricUse(NamedTuple):
    """A metric as a recipe names it: its name, and its parameters as pairs."""

    name: str
    parameters: tuple[tuple[str, str], ...] = ()

    def dump(self) -> Any:
        """The form YAML holds: the name, or `{name: parameters}`."""
        return {self.name: dict(self.parameters)} if self.parameters else self.name


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="precision_at_1",
            title="Precision@1",
            readout=NextToken,
            compute=precision_at_1,
            reference=True,
        ),
        Metric(
            name="surprisal_nats",
            title="Surprisal (nats): -log p_source(top token of the patched run)",
            readout=NextToken,
            compute=lambda columns, _row: columns.get("surprisal_nats"),
            reference=True,
            higher_is_better=False,
        ),
        Metric(
            name="nll_nats",
            title="NLL (nats): -log p_patched(reference token)",
            readout=NextToken,
            compute=lambda columns, _row: columns.get("nll_nats"),
            reference=True,
            higher_is_better=False,
        ),
        Metric(
            name="kl_nats",
            title="KL (nats): KL(source || patched)",
            readout=NextToken,
            compute=lambda columns, _row: columns.get("kl_nats"),
            reference=True,
            higher_is_better=False,
        ),
        Metric(
            name="top_k_overlap",
            title="Top-k overlap with the source's own",
            readout=NextToken,
            compute=top_k_overlap,
            reference=True,
        ),
        Metric(
            name="rank",
            title="Rank of the reference token",
            readout=NextToken,
            compute=rank,
            reference=True,
            higher_is_better=False,
        ),
        Metric(
            name="reciprocal_rank",
            title="Reciprocal rank of the reference token",
            readout=NextToken,
            compute=reciprocal_rank,
            reference=True,
        ),
        Metric(name="rouge_l", title="ROUGE-L", readout=Generate, compute=rouge_l, parameters=("reference",)),
        Metric(name="rouge_1", title="ROUGE-1", readout=Generate, compute=rouge_1, parameters=("reference",)),
        Metric(
            name="contains",
            title="Contains the reference",
            readout=Generate,
            compute=contains,
            parameters=("reference",),
        ),
        Metric(
            name="relevancy",
            title="Relevancy: mean |p_patched - p_unpatched| of the text's tokens",
            readout=Generate,
            compute=relevancy,
            option="relevancy",
        ),
        Metric(
            name="choice_accuracy",
            title="Accuracy",
            readout=Choices,
            compute=choice_accuracy,
            parameters=("answer",),
        ),
        Metric(
            name="choice_log_odds",
            title="Log-odds of the answer (nats)",
            readout=Choices,
            compute=choice_log_odds,
            parameters=("answer",),
        ),
        Metric(
            name="cosine",
            title="Cosine with the state it replaced",
            readout=Hidden,
            compute=cosine,
            option="clean",
        ),
        Metric(
            name="fraction_of_variance",
            title="Fraction of the replaced state's variance",
            readout=Hidden,
            compute=fraction_of_variance,
            option="clean",
        ),
    )
}


def parse_metric(value: Any) -> MetricUse:
    """Check the form of a metric: its name, and that its parameters are those it needs.

    Args:
        value: A name, `{name: {parameter: column}}`, or a `MetricUse`.

    Returns:
        The metric's name and parameters.

    Raises:
        ValueError: There is no such metric, or its parameters are not those it needs.
    """
    if isinstance(value, MetricUse):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"{value!r} is no metric; give a name, or {{name: {{parameter: column}}}}")
    name, parameters = next(iter(value.items()))
    if name not in METRICS:
        raise ValueError(f"{name!r} is no metric. {did_you_mean(str(name), list(METRICS))}")
    needed = METRICS[name].parameters
    parameters = parameters or {}
    named = isinstance(parameters, Mapping) and all(
        isinstance(column, str | int) for column in parameters.values()
    )
    if not named or set(parameters) != set(needed):
        form = f"{{{name}: {{{', '.join(f'{one}: COLUMN' for one in needed)}}}}}" if needed else name
        raise ValueError(f"{name} is written {form}; given {parameters!r}")
    return MetricUse(name, tuple((key, str(parameters[key])) for key in needed))


def check_metrics(uses: Sequence[MetricUse], readout: Readout) -> list[str]:
    """What keeps metrics from being computed on a readout; empty where nothing does."""
    found = []
    for use in uses:
        metric = METRICS[use.name]
        if readout.name != metric.readout.name:
            found.append(f"{use.name} reads {metric.readout.name}, and the readout is {readout.name}")
        elif metric.reference and not (readout.from_source or readout.texts):
            field = f"readout.{readout.name}.{readout.texts_field}"
            found.append(f"{use.name} needs {field}, for example {readout.texts_field}: source")
        elif metric.option is not None and not getattr(readout, metric.option):
            found.append(f"{use.name} needs readout.{readout.name}.{metric.option}: true")
    return found


def check_columns(uses: Sequence[MetricUse], rows: Sequence[Mapping[str, Any]]) -> None:
    """Check that every data row has the columns the metrics read.

    Raises:
        DataError: A parameter names a column that a row does not have.
    """
    for use in uses:
        for name, column in use.parameters:
            for number, row in enumerate(rows):
                if column not in row:
                    near = did_you_mean(column, list(row))
                    raise DataError(
                        f"metrics.{use.name}.{name}={column!r} is no column of data row {number}.",
                        hint=f"A metric's parameter names a column of the data. {near} A text that is the "
                        f"same for every row is a column, too: data: {{rows: [{{{name}: {column}}}]}}, and "
                        f"{use.name}: {{{name}: {name}}}.",
                    )


def compute_metrics(
    uses: Sequence[MetricUse], columns: Columns, row: Mapping[str, Any]
) -> dict[str, float | None]:
    """The metrics of one cell.

    Args:
        uses: Which.
        columns: What the cell's readout gave.
        row: Its data row.

    Returns:
        One number, or None, for each.
    """
    return {use.name: METRICS[use.name].compute(columns, row, **dict(use.parameters)) for use in uses}


#: Of how many data rows a manifest says what their metrics compare with, and the longest text.
_ROWS, _LIMIT = 24, 1000


def references(uses: Sequence[MetricUse], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What metrics compare with, of the first data rows: what a report shows beside what was said.

    Args:
        uses: The metrics.
        rows: The data rows.

    Returns:
        For each of the first rows the columns that are parameters of a metric; empty where there are none.
    """
    columns = dict.fromkeys(column for use in uses for _, column in use.parameters)
    return [{name: str(row[name])[:_LIMIT] for name in columns} for row in rows[:_ROWS]] if columns else []
