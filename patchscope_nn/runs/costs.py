"""What a recipe costs on its default model, before anything runs: counted from its cells, without weights."""

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
    """What a whole recipe runs, all its methods together.

    Attributes:
        rows: Data rows.
        cells: Cells, those of controls included.
        decoded_tokens: The most tokens that are decoded.
        fits: Whether a mapping is fitted first, where it is not kept from an earlier run.
    """

    rows: int
    cells: int
    decoded_tokens: int
    fits: bool


def costs() -> list[tuple[Recipe, Cost | str]]:
    """Every recipe that ships, and what it costs; of each model config and tokenizer are loaded, once."""
    once = cache(lambda name: load(name, weights=False))
    return [(one, cost(one, loader=lambda model, **_: once(model))) for one in map(load_recipe, shipped())]


def cost(recipe: Recipe, *, loader: Loader) -> Cost | str:
    """Count a recipe that ships.

    Args:
        recipe: The recipe.
        loader: What loads its model, as `models.load` does.

    Returns:
        The cost; or why it cannot be counted here: the tokenizer is not there, or a package is missing.
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
