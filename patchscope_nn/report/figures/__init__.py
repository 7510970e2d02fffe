"""Figures of a run's table: a metric by layer, and what each hidden state says. Returned, never shown.

Every function takes the tidy table of DESIGN section 4 (one row per cell) and leaves it as it is:

    text.py     what a model wrote, made fit to be seen
    table.py    reading the table: its metrics, their means by layer
    style.py    what all figures share
    comparison.py  a metric of several runs
    maps.py     a metric by token and layer, and what heatmaps share
    curves.py   a metric by layer, or by pairs of layers
    said.py     what one cell says
    lines.py    which cells stand together in a line of a text heatmap
    grid.py     the text heatmap
    choose.py   which of these figures fit a table
    paper.py    a figure for a paper: PDF, SVG, PNG
    glyphs.py   which characters fonts can draw
"""

from __future__ import annotations

from patchscope_nn.analysis.statistics import REAL, is_null, numbers
from patchscope_nn.report.figures.choose import figures
from patchscope_nn.report.figures.comparison import comparison_curve
from patchscope_nn.report.figures.curves import layer_curve, layer_pair_heatmap
from patchscope_nn.report.figures.grid import text_heatmap
from patchscope_nn.report.figures.maps import rows_with_positions, token_heatmap
from patchscope_nn.report.figures.paper import FORMATS, save_figures
from patchscope_nn.report.figures.said import odds
from patchscope_nn.report.figures.table import (
    as_list,
    by_scale,
    layer_means,
    layer_name,
    metric_columns,
    reads_sink,
    with_probe_controls,
)
from patchscope_nn.report.figures.text import shorten, text_width, token, visible

__all__ = [
    "FORMATS",
    "REAL",
    "as_list",
    "by_scale",
    "comparison_curve",
    "figures",
    "is_null",
    "layer_curve",
    "layer_means",
    "layer_name",
    "layer_pair_heatmap",
    "metric_columns",
    "numbers",
    "odds",
    "reads_sink",
    "rows_with_positions",
    "save_figures",
    "shorten",
    "text_heatmap",
    "text_width",
    "token",
    "token_heatmap",
    "visible",
    "with_probe_controls",
]
