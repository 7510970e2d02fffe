"""Metrics: one number for a cell, from what its readout gave and its data row. Pure; no torch.

A metric is named in a recipe by its name, or as `{name: {parameter: value}}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.spec import Choices, Generate, NextToken, Readout

Columns = Mapping[str, Any]


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
        higher_is_better: Which way is better.
    """

    name: str
    title: str
    readout: type[Readout]
    compute: Callable[..., float | None]
    parameters: tuple[str, ...] = ()
    reference: bool = False
    higher_is_better: bool = True


class MetricUse(NamedTuple):
    """A metric as a recipe names it: its name, and its parameters as pairs."""

    name: str
    parameters: tuple[tuple[str, str], ...] = ()

    def dump(self) -> Any:
        """The form YAML holds: the name, or `{name: parameters}`."""
        return {self.name: dict(self.parameters)} if self.parameters else self.name


def precision_at_1(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """1 where the patched run's top token is the reference token, else 0 (section 4.1)."""
    reference = columns.get("reference_ids")
    return None if not reference else float(columns["top_ids"][0] == reference[0])


def rouge_l(columns: Columns, row: Mapping[str, Any], *, reference: str) -> float:
    """ROUGE-L F1 of the generated text against a data column (section 4.3; Lin 2004), without stemming."""
    return rouge_l_f1(columns["text"], str(row[reference]))


def contains(columns: Columns, row: Mapping[str, Any], *, reference: str) -> float:
    """1 where the text holds a data column's, both lower-cased and without spaces and marks, else 0."""
    return float(_letters(str(row[reference])) in _letters(columns["text"]))


def choice_accuracy(columns: Columns, row: Mapping[str, Any], *, answer: str) -> float:
    """1 where the most likely choice is a data column's, spaces around it left out, else 0."""
    return float(columns["choice"].strip() == str(row[answer]).strip())


def rouge_l_f1(text: str, reference: str) -> float:
    """ROUGE-L F1 of two texts: the longest common subsequence of their words (Lin 2004, section 3).

    Args:
        text: The text.
        reference: The reference.

    Returns:
        A number in 0..1; 0 where either has no word.
    """
    ours, theirs = _words(text), _words(reference)
    common = _longest_common_subsequence(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def _longest_common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        before = lengths[:]
        for place, other in enumerate(theirs, start=1):
            lengths[place] = (
                before[place - 1] + 1 if word == other else max(before[place], lengths[place - 1])
            )
    return lengths[-1]


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
        Metric(name="rouge_l", title="ROUGE-L", readout=Generate, compute=rouge_l, parameters=("reference",)),
        Metric(
            name="contains",
            title="Contains the reference",
            readout=Generate,
            compute=contains,
            parameters=("reference",),
        ),
        Metric(
            name="choice_accuracy",
            title="Accuracy",
            readout=Choices,
            compute=choice_accuracy,
            parameters=("answer",),
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
    if not isinstance(parameters, Mapping) or set(parameters) != set(needed):
        form = f"{{{name}: {{{', '.join(f'{one}: COLUMN' for one in needed)}}}}}" if needed else name
        raise ValueError(f"{name} is written {form}; given {parameters!r}")
    return MetricUse(name, tuple((key, str(parameters[key])) for key in needed))


def check_metrics(uses: Sequence[MetricUse], readout: Readout) -> list[str]:
    """What keeps metrics from being computed on a readout; empty where nothing does."""
    found = []
    for use in uses:
        metric = METRICS[use.name]
        if not isinstance(readout, metric.readout):
            found.append(f"{use.name} reads {metric.readout.name}, and the readout is {readout.name}")
        elif metric.reference and isinstance(readout, NextToken) and readout.reference is None:
            found.append(f"{use.name} needs readout.next_token.reference, for example reference: source")
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
                    raise DataError(
                        f"metrics.{use.name}.{name}={column!r} is no column of data row {number}.",
                        hint=did_you_mean(column, list(row)),
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
