"""The command that rebuilds reports, and writes figures for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchscope_nn.cli import options, printing


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, finished or not, or of an experiment.")
    ],
    *,
    figures: options.Figures = None,
    json: options.Json = False,
) -> None:
    """Rebuild the HTML report of a run. For an experiment, also rebuild the reports of its methods."""
    from patchscope_nn.runs.experiments import Experiment, open_finished

    finished = open_finished(folder)
    pages = [finished.report()]
    if isinstance(finished, Experiment):
        pages += [run.report() for run in finished.values()]
    files = [] if figures is None else finished.save_figures(figures)
    printing.print_report(pages, figures=files, as_json=json)
