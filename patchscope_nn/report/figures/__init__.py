"""Figures of a run's table: a metric by layer, and the answer of each cell. Figures are returned, not shown.

Every function takes a run's table (one row per cell) and does not change it:

    text.py        model output as safe, visible, short text
    drawing.py     a figure as plain dictionaries
    optional.py    modules that only some figures need
    table.py       the metrics in a table, and their means by layer
    style.py       colours, axes and layout of all figures
    scale.py       the colour scale of a heatmap
    comparison.py  a metric of several runs
    maps.py        a metric by token and layer, and panels of heatmaps
    curves.py      a metric by layer, or by pairs of layers
    cell_text.py   the label and hover text of one cell
    lines.py       which cells form a line of a text heatmap
    grid.py        the text heatmap
    choose.py      the figures that suit a table
    paper.py       figures for a paper: PDF, SVG, PNG
    glyphs.py      the characters that installed fonts can draw
"""

from __future__ import annotations

from patchscope_nn.report.figures.choose import figures
from patchscope_nn.report.figures.comparison import comparison_curve
from patchscope_nn.report.figures.curves import layer_curve, layer_pair_heatmap
from patchscope_nn.report.figures.grid import text_heatmap
from patchscope_nn.report.figures.maps import token_heatmap
from patchscope_nn.report.figures.paper import save_figures

__all__ = [
    "comparison_curve",
    "figures",
    "layer_curve",
    "layer_pair_heatmap",
    "save_figures",
    "text_heatmap",
    "token_heatmap",
]
