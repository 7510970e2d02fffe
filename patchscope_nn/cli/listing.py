"""The commands about recipes as files: what ships, and what is wrong with one."""

from __future__ import annotations

from typing import Annotated

import typer

from patchscope_nn.cli import options, printing


def recipes(*, json: options.Json = False) -> None:
    """List the recipes that ship, and what each costs whole, on its default model."""
    from patchscope_nn.runs.costs import costs

    with printing.waiting("counting cells", quiet=json):
        found = costs()
    printing.print_recipes(found, as_json=json)


def lint(
    files: Annotated[
        list[str], typer.Argument(help="Recipe files, or names of shipped recipes; - is the input.")
    ],
    *,
    json: options.Json = False,
) -> None:
    """Check recipes without loading a model: every problem at once, each with its line."""
    from patchscope_nn.recipe import lint as problems_of

    found = {file: problems_of(file) for file in files}
    printing.print_problems(found, as_json=json)
    if any(found.values()):
        raise typer.Exit(2)
