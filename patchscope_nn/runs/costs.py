"""The cost of a recipe on its default model, counted from its cells without loading weights."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from patchscope_nn.data.rows import load_rows
from patchscope_nn.errors import InputError
from patchscope_nn.models import load
from patchscope_nn.recipe import Recipe, find, load_recipe, shipped
from patchscope_nn.runs.loading import Loader
from patchscope_nn.runs.prepare import prepare


class Cost(NamedTuple):
    """The cost of a whole recipe, with all its methods.

    Attributes:
        rows: The number of data rows.
        cells: The number of cells, including controls.
        decoded_tokens: The maximum number of decoded tokens.
        fits: Whether a mapping is fitted first, unless it is saved from an earlier run.
    """

    rows: int
    cells: int
    decoded_tokens: int
    fits: bool


def costs() -> list[tuple[Recipe, Cost | str]]:
    """Return every included recipe with its cost; the config and tokenizer of each model are loaded once."""
    load_once = cache(lambda name: load(name, weights=False))
    recipes = map(load_recipe, shipped())
    return [(recipe, cost(recipe, loader=lambda model, **_: load_once(model))) for recipe in recipes]


def cost(recipe: Recipe, *, loader: Loader) -> Cost | str:
    """Count the cost of an included recipe.

    Args:
        recipe: The recipe.
        loader: Loads its model, like `models.load`.

    Returns:
        The cost; or the reason why it cannot be counted, for example a missing tokenizer or package.
    """
    base = find(recipe.name).parent
    try:
        runs = prepare(recipe, loader=loader, base=base).runs.values()
        rows = 1 if recipe.data is None else len(load_rows(recipe.data, base=base))
    except InputError as error:
        return error.message
    decoded = sum(len(run.sweep.cells) * run.sweep.scope.readout.decoded for run in runs)
    cells = sum(len(run.sweep.cells) for run in runs)
    return Cost(rows=rows, cells=cells, decoded_tokens=decoded, fits=any(run.fit for run in runs))
