"""Runs and comparisons of methods as HTML for notebooks: sentences and tables, without scripts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from patchscope_nn.analysis.statistics import REAL, best_over, mean_text
from patchscope_nn.metrics import MetricInfo, described
from patchscope_nn.report.cells import answers
from patchscope_nn.report.figures.table import (
    by_scale,
    layer_means,
    layer_name,
    metric_columns,
    with_probe_controls,
)
from patchscope_nn.report.figures.text import shorten, visible
from patchscope_nn.report.summary import metric_names, section, summary

if TYPE_CHECKING:
    from patchscope_nn.analysis.comparison import Comparison

_ROWS = 40
_EXAMPLES = 6
_WIDTH = 60


def run_html(
    table: pd.DataFrame, first_cells: pd.DataFrame, *, manifest: Mapping[str, Any], where: str
) -> str:
    """Show a run, kept at `where`: its summary, its first metric by layer with controls, and some answers.

    `first_cells` is the table of the first cells, with all columns.
    """
    recipe = section(manifest, "recipe")
    metrics = metric_columns(table, declared=metric_names(manifest))
    title = recipe.get("title") or recipe.get("name") or "A run"
    said = " ".join(summary(table, manifest=manifest, metrics=metrics))
    parts = [f"<h4>{_text(title)}</h4><p>{_text(said)}</p>"]
    if metrics:
        best, known = recipe.get("best_over") or (), described(manifest)
        parts.append(_means(with_probe_controls(table), metric=metrics[0], best=best, known=known))
    real = first_cells[first_cells["control"].isna()]
    examples = real.iloc[:: max(1, len(real) // _EXAMPLES)].head(_EXAMPLES)
    lines = [
        [cell["row"], cell["source_prompt"], *_layers(cell), answer]
        for cell, answer in zip(examples.to_dict("records"), answers(examples), strict=True)
    ]
    heads = ["row", "source prompt", "source layer", "target layer", "answer"]
    if any(line[-1] for line in lines):
        parts.append(_table(heads, lines))
    parts.append(f"<p><small>{len(table):,} cells, {_text(where)}</small></p>")
    return f"<div>{''.join(parts)}</div>"


def _layers(cell: Mapping[Any, Any]) -> list[str]:
    layers = (cell["source_layer"], cell["target_layer"])
    return ["" if pd.isna(layer) else layer_name(float(layer)) for layer in layers]


def _means(table: pd.DataFrame, *, metric: str, best: Sequence[str], known: Mapping[str, MetricInfo]) -> str:
    """Show a metric by layer and scale, with a column for each control; at most 40 lines."""
    cells = best_over(table, metric=metric, over=best, known=known) if best else table
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    flat: dict[str, str] = {}
    for scale, part in by_scale(cells).items():
        for mean in layer_means(part, metric=metric).to_dict("records"):
            value = mean_text(mean, ".2f")
            if pd.isna(mean["source_layer"]) and pd.isna(mean["target_layer"]):
                flat[mean["control"]] = value
            else:
                lines.setdefault((scale, *_layers(mean)), {})[mean["control"]] = value
    kinds = dict.fromkeys([*flat, *(kind for line in lines.values() for kind in line)])
    kinds = dict.fromkeys([REAL] if REAL in kinds else []) | kinds
    kept = list(lines.items())[:_ROWS] if lines else [(("", "all", "all"), {})]
    body = [[*place, *((flat | values).get(kind, "") for kind in kinds)] for place, values in kept]
    heads = ["scale", "source layer", "target layer", *kinds]
    start = 0 if any(line[0] for line in body) else 1  # without the scale if there is only one
    means = _table(heads[start:], [line[start:] for line in body])
    cut = f"<p><small>the first {_ROWS} of {len(lines)} lines</small></p>" if len(lines) > _ROWS else ""
    return f"<p><b>{_text(metric)}</b>, mean with 95 % interval over data rows</p>{means}{cut}"


def comparison_html(comparison: Comparison, *, title: str) -> str:
    """Show a comparison of methods: the means of each, of its controls, and its difference from the first."""
    from patchscope_nn.report.comparison import metric_table

    parts = [f"<h4>{_text(title)}</h4>"]
    for metric in comparison.metrics:
        table = metric_table(comparison, metric=metric)
        parts.append(f"<p><b>{_text(metric)}</b></p>{_table(table['heads'], table['lines'])}")
    return f"<div>{''.join(parts)}</div>"


def _table(heads: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    cells = [[_text(shorten(cell, width=_WIDTH)) for cell in line] for line in lines]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    return html.escape(visible(value))
