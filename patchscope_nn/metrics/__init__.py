"""Metrics: one number for a cell, from what its readout gave and its data row. Pure; no torch.

A metric is named in a recipe by its name, or as `{name: {parameter: value}}`.

    values.py     what each computes, with its source
    registry.py   what each needs and which way is better
"""

from __future__ import annotations

from patchscope_nn.metrics.registry import (
    METRICS,
    Metric,
    MetricUse,
    check_columns,
    check_metrics,
    compute_metrics,
    parse_metric,
    references,
)
from patchscope_nn.metrics.values import Columns, rouge_1_f1, rouge_l_f1

__all__ = [
    "METRICS",
    "Columns",
    "Metric",
    "MetricUse",
    "check_columns",
    "check_metrics",
    "compute_metrics",
    "parse_metric",
    "references",
    "rouge_1_f1",
    "rouge_l_f1",
]
