"""The commands that list and check recipe files."""

from __future__ import annotations

from typing import Annotated

import typer

from patchscope_nn.cli import options, printing


def recipes(*, json: options.Json = False) -> None:
    """List the included recipes and their costs."""
    from patchscope_nn.runs.costs import costs

    with printing.waiting("counting cells", quiet=json):
        counted = costs()
    printing.print_recipes(counted, as_json=json)


def lint(
    files: Annotated[
        list[str], typer.Argument(help="Recipe files, or names of included recipes; - reads standard input.")
    ],
    *,
    json: options.Json = False,
) -> None:
    """Check recipes without loading a model. All problems are listed, each with its line."""
    from patchscope_nn.recipe import lint as problems_of

    problems = {file: problems_of(file) for file in files}
    printing.print_problems(problems, as_json=json)
    if any(problems.values()):
        raise typer.Exit(2)
