"""The data columns a recipe asks for, against those its data has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from patchscope_nn.data.rows import READ_BY_FUNCTION, read_table
from patchscope_nn.errors import DataError, Problem, did_you_mean
from patchscope_nn.metrics import MetricUse
from patchscope_nn.recipe.model import Probe, Recipe
from patchscope_nn.spec import Cut, Patchscope
from patchscope_nn.spec.positions import texts_of
from patchscope_nn.spec.prompts import PER_LAYER, PromptSpec, placeholders


def missing_columns(recipe: Recipe, *, base: Path | None = None) -> list[Problem]:
    """What a recipe asks for and its data lacks; data on the Hub, or a user's function gives, is not read.

    Args:
        recipe: The recipe.
        base: The folder a relative data file starts from.

    Returns:
        One problem for each column, with the field that asks for it; or why the data cannot be read, for
        example that a column that is used is missing in a row.
    """
    if recipe.data is not None and recipe.data.kind in ("hub", *READ_BY_FUNCTION):
        return []
    columns: list[str] = []
    asked = list(asked_columns(recipe, metrics=recipe.metrics, probe=recipe.probe))
    if recipe.data is not None:
        try:
            used = {column: field for field, column in reversed(asked)}
            columns = list(read_table(recipe.data, base=base, used=used).rows[0])
        except DataError as error:
            return [Problem(field=f"data.{recipe.data.kind}", message=str(error))]
    near = "The recipe has no data; add some, for example data: {builtin: contexts}."
    return [
        Problem(
            field=field,
            message=f"asks for the column {column!r}, which the data does not have. "
            f"{did_you_mean(column, columns) if columns else near}",
        )
        for field, column in asked
        if column not in columns
    ]


def asked_columns(
    scope: Patchscope | Recipe, *, metrics: Sequence[MetricUse], probe: Probe | None
) -> Iterator[tuple[str, str]]:
    """Yield each column that a Patchscope, its metrics and its probe ask for, after the field that does."""
    for field, template in _templates(scope):
        of_target = field.startswith("target.prompt")
        for column in placeholders(template):
            if not (of_target and column == PER_LAYER):
                yield field, column
    if isinstance(scope.source.mean, tuple):
        yield "source.mean.rows", scope.source.mean[1]
    for number, use in enumerate(metrics):
        for name, column in use.parameters:
            yield f"metrics.{number}.{use.name}.{name}", column
    if probe is not None:
        yield "probe.label", probe.label


def _templates(scope: Patchscope | Recipe) -> Iterator[tuple[str, PromptSpec]]:
    """The texts whose placeholders a data row fills."""
    source, target, readout = scope.source, scope.target, scope.readout
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
    for number, text in enumerate(readout.texts):
        yield f"readout.{readout.name}.{readout.texts_field}.{number}", text
