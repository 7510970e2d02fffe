"""The command that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchscope_nn.cli import options


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders; the others are compared with the first."),
    ],
    *,
    out: options.PageFile = None,
    best_over: options.BestOver = None,
    json: options.Json = False,
) -> None:
    """Compare runs cell by cell: paired differences with intervals, in each metric."""
    from patchscope_nn.cli.comparing import print_compared
    from patchscope_nn.runs.experiments import compare_runs, load_runs, write_page

    runs = load_runs(folders)
    found = compare_runs(runs, best=[one.value for one in best_over] if best_over else None)
    title = f"{', '.join(found.names[1:])} beside {found.names[0]}"
    page = None if out is None else write_page(found, runs, path=out, title=title)
    print_compared(found, page=page, as_json=json)
