"""The command that builds reports again, and writes figures for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchscope_nn.cli import options, printing


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, finished or not, or an experiment's.")
    ],
    *,
    figures: options.Figures = None,
    json: options.Json = False,
) -> None:
    """Build the HTML report of a run, or of an experiment with all its methods, again."""
    from patchscope_nn.runs.experiments import Experiment, open_finished

    finished = open_finished(folder)
    pages = [finished.report()]
    if isinstance(finished, Experiment):
        pages += [one.report() for one in finished.values()]
    files = [] if figures is None else finished.save_figures(figures)
    printing.print_report(pages, figures=files, as_json=json)
