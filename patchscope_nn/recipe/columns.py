"""The data columns a recipe asks for, against those its data has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from patchscope_nn.data import load_rows
from patchscope_nn.errors import DataError, Problem, did_you_mean
from patchscope_nn.positions import texts_of
from patchscope_nn.prompts import PER_LAYER, PromptSpec, placeholders
from patchscope_nn.recipe.model import Recipe
from patchscope_nn.spec import Choices, Cut, NextToken


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
        of_target = field.startswith("target.prompt")
        for column in placeholders(template):
            if not (of_target and column == PER_LAYER):
                yield field, column
    if isinstance(recipe.source.mean, tuple):
        yield "source.mean.rows", recipe.source.mean[1]
    for number, use in enumerate(recipe.metrics):
        for name, column in use.parameters:
            yield f"metrics.{number}.{use.name}.{name}", column
    if recipe.probe is not None:
        yield "probe.label", recipe.probe.label


def _templates(recipe: Recipe) -> Iterator[tuple[str, PromptSpec]]:
    """The texts whose placeholders a data row fills."""
    source, target, readout = recipe.source, recipe.target, recipe.readout
    prompts = {"source.prompt": source.prompt, "source.minus": source.minus, "target.prompt": target.prompt}
    prompts |= {f"target.prompts.{number}": prompt for number, prompt in enumerate(target.prompts)}
    yield from ((field, prompt) for field, prompt in prompts.items() if prompt is not None)
    positions = {"source.position": source.position, "target.position": target.position}
    if target.corrupt is not None:
        positions["target.corrupt.position"] = target.corrupt.position
    if isinstance(target.write, tuple) and isinstance(target.write[1], Cut):
        positions["target.write.cut.position"] = target.write[1].position
    for field, position in positions.items():
        yield from ((field, text) for text in texts_of(position))
    if source.vector is not None and isinstance(source.vector.index, str):
        yield "source.vector.index", source.vector.index
    if isinstance(readout, Choices):
        for number, text in enumerate(readout.continuations):
            yield f"readout.choices.continuations.{number}", text
    if isinstance(readout, NextToken) and isinstance(readout.reference, tuple):
        for number, text in enumerate(readout.reference):
            yield f"readout.next_token.reference.{number}", text
