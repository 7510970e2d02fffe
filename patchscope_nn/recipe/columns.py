"""Comparing the data columns that a recipe uses with those of its data."""

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
    """Find the columns that a recipe uses and its data lacks. Data from the Hub or a function is not read.

    Args:
        recipe: The recipe.
        base: The folder a relative data file starts from.

    Returns:
        A problem for each column, with the field that uses it; or one that says why the data cannot be read,
        for example because a used column is missing in a row.
    """
    if recipe.data is not None and recipe.data.kind in ("hub", *READ_BY_FUNCTION):
        return []
    columns: list[str] = []
    uses = list(asked_columns(recipe, metrics=recipe.metrics, probe=recipe.probe))
    if recipe.data is not None:
        try:
            used = {column: field for field, column in reversed(uses)}
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
        for field, column in uses
        if column not in columns
    ]


def asked_columns(
    scope: Patchscope | Recipe, *, metrics: Sequence[MetricUse], probe: Probe | None
) -> Iterator[tuple[str, str]]:
    """Yield each field that uses a column, with the column, of a Patchscope, its metrics and its probe."""
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
    """Yield the texts whose placeholders a data row fills, each after its field."""
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
