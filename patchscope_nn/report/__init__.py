"""The report: one offline HTML file with a run's summary, figures, cells and the command that repeats it.

The page loads nothing from the network. Model output is untrusted: it enters the page as escaped JSON and is
displayed with `textContent`, never as markup.

    summary.py    the run in sentences, and short facts
    cards.py      generated texts beside their references and controls
    cells.py      the cells, as JSON for the table on the page
    page.py       the page of one run, from these and templates/report.html.jinja
    notebook.py   runs and comparisons as notebooks display them
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
