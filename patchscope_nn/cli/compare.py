"""The command that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchscope_nn.cli import options


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs; all others are compared with the first."),
    ],
    *,
    out: options.PageFile = None,
    best_over: options.BestOver = None,
    json: options.Json = False,
) -> None:
    """Compare runs cell by cell. Prints paired differences with intervals for each metric."""
    from patchscope_nn.cli.comparing import print_compared
    from patchscope_nn.runs.experiments import compare_runs, load_runs, write_page

    runs = load_runs(folders)
    comparison = compare_runs(runs, best=[axis.value for axis in best_over] if best_over else None)
    title = f"{', '.join(comparison.names[1:])} compared with {comparison.names[0]}"
    page = None if out is None else write_page(comparison, runs, path=out, title=title)
    print_compared(comparison, page=page, title=title, as_json=json)
