"""Derived columns and metrics, which are computed from each cell's readout. Pure functions; no torch.

registry.py   what a metric is, and how recipes and scripts name metrics
values.py     the included metrics, each with its source; new metrics go there
columns.py    users' columns, computed after the readout and before the metrics
arrays.py     columns as arrays and as rows
evaluate.py   checks whether columns and metrics fit a run, and computes them
"""

from __future__ import annotations

from patchscope_nn.metrics.columns import (
    COLUMNS,
    ColumnUse,
    column,
    parse_column,
    resolve_column,
)
from patchscope_nn.metrics.evaluate import (
    check_columns,
    check_metrics,
    check_names,
    compute,
    references,
)
from patchscope_nn.metrics.registry import (
    METRICS,
    MetricInfo,
    MetricUse,
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
    "ColumnUse",
    "MetricInfo",
    "MetricUse",
    "check_columns",
    "check_metrics",
    "check_names",
    "column",
    "compute",
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
