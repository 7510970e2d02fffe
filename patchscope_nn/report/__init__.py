"""One offline HTML file that tells what a run asked, what came back, and how to do it again.

Nothing in it asks the network for anything. Model output is data here: it reaches the page as escaped
JSON and is put there with `textContent`, never as markup.

    summary.py    the run in sentences, and short facts
    cards.py      generated texts beside their references and controls
    cells.py      the cells, as JSON for the page's own table
    page.py       the page, from these and templates/report.html.jinja
    notebook.py   a run, and methods side by side, as a notebook shows them
    comparison.py the page of several runs, from templates/comparison.html.jinja
"""

from __future__ import annotations

from patchscope_nn.report.comparison import Side, write_comparison
from patchscope_nn.report.notebook import comparison_html, run_html
from patchscope_nn.report.page import MAX_CELLS, run_figures, write_report

__all__ = [
    "MAX_CELLS",
    "Side",
    "comparison_html",
    "run_figures",
    "run_html",
    "write_comparison",
    "write_report",
]
