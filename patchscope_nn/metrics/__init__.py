"""What is made of a cell's readout: derived columns, then metrics, one number each. Pure; no torch.

registry.py   what a metric is, and how recipes and scripts name one
values.py     the metrics that ship, each with its source; a new metric goes there
columns.py    users' columns, which run after the readout and before the metrics
evaluate.py   whether these fit a run, and computing them
"""

from __future__ import annotations

from patchscope_nn.metrics.columns import (
    COLUMNS,
    Column,
    ColumnUse,
    as_column,
    column,
    parse_column,
    resolve_column,
)
from patchscope_nn.metrics.evaluate import (
    check_columns,
    check_metrics,
    check_names,
    compute_columns,
    compute_metrics,
    references,
)
from patchscope_nn.metrics.registry import (
    METRICS,
    Columns,
    Metric,
    MetricInfo,
    MetricUse,
    as_metric,
    described,
    dump_infos,
    metric,
    parse_metric,
    resolve_metric,
)
from patchscope_nn.metrics.values import rouge_1_f1, rouge_l_f1

__all__ = [
    "COLUMNS",
    "METRICS",
    "Column",
    "ColumnUse",
    "Columns",
    "Metric",
    "MetricInfo",
    "MetricUse",
    "as_column",
    "as_metric",
    "check_columns",
    "check_metrics",
    "check_names",
    "column",
    "compute_columns",
    "compute_metrics",
    "described",
    "dump_infos",
    "metric",
    "parse_column",
    "parse_metric",
    "references",
    "resolve_column",
    "resolve_metric",
    "rouge_1_f1",
    "rouge_l_f1",
]
