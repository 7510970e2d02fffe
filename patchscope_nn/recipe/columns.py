"""The data columns a recipe asks for, against those its data has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from patchscope_nn.data import load_rows
from patchscope_nn.errors import DataError, Problem, did_you_mean
from patchscope_nn.prompts import PromptSpec, render
from patchscope_nn.recipe.model import Recipe
from patchscope_nn.spec import Choices, NextToken


def missing_columns(recipe: Recipe, *, base: Path | None = None) -> list[Problem]:
    """What a recipe asks for and its data lacks; data on the Hub is not looked at.

    Args:
        recipe: The recipe.
        base: The folder a relative data file starts from.

    Returns:
        One problem for each column, with the field that asks for it; or why the data cannot be read.
    """
    if recipe.data is not None and recipe.data.hub is not None:
        return []
    columns: list[str] = []
    if recipe.data is not None:
        try:
            columns = list(load_rows(recipe.data, base=base)[0])
        except DataError as error:
            return [Problem(field=f"data.{recipe.data.kind}", message=str(error))]
    near = "The recipe has no data; add some, for example data: {builtin: contexts}."
    return [
        Problem(
            field=field,
            message=f"asks for the column {column!r}, which the data does not have. "
            f"{did_you_mean(column, columns) if columns else near}",
        )
        for field, column in _asked(recipe)
        if column not in columns
    ]


def _asked(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The columns a recipe asks for, each with the field that does."""
    for field, template in _templates(recipe):
        for column in _placeholders(template):
            yield field, column
    for number, use in enumerate(recipe.metrics):
        for name, column in use.parameters:
            yield f"metrics.{number}.{use.name}.{name}", column
    if recipe.probe is not None:
        yield "probe.label", recipe.probe.label


def _templates(recipe: Recipe) -> Iterator[tuple[str, PromptSpec]]:
    """The texts whose placeholders a data row fills."""
    yield "source.prompt", recipe.source.prompt
    if recipe.target.prompt is not None:
        yield "target.prompt", recipe.target.prompt
    readout = recipe.readout
    if isinstance(readout, Choices):
        for number, text in enumerate(readout.continuations):
            yield f"readout.choices.continuations.{number}", text
    if isinstance(readout, NextToken) and isinstance(readout.reference, tuple):
        for number, text in enumerate(readout.reference):
            yield f"readout.next_token.reference.{number}", text


class _Recorder(dict[str, str]):
    """A data row that has every column and remembers which were asked for."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> str:
        self[key] = ""
        return ""


def _placeholders(prompt: PromptSpec) -> list[str]:
    asked = _Recorder()
    render(prompt, asked, field="prompt")
    return list(asked)
