"""Recipes: a Patchscope with its data, metrics and controls, as a YAML file. No torch.

Reading one goes in steps, and reports the problems of all of them together:

1. find the file: a name that ships, or a path (`load.py`);
2. read the YAML, with the line of every field (`document.py`);
3. make the changes from outside the file (`changes.py`);
4. check every field (`model.py`), then each method's recipe (`methods.py`), and give each problem its line;
5. look up the columns it asks for (`columns.py`), which `lint` does before there is a model.
"""

from __future__ import annotations

from patchscope_nn.recipe.columns import asked_columns
from patchscope_nn.recipe.load import find, lint, load_recipe, shipped
from patchscope_nn.recipe.methods import slug
from patchscope_nn.recipe.model import PROBE_METRICS, Probe, Recipe, dump, resolved
from patchscope_nn.recipe.schema import json_schema

__all__ = [
    "PROBE_METRICS",
    "Probe",
    "Recipe",
    "asked_columns",
    "dump",
    "find",
    "json_schema",
    "lint",
    "load_recipe",
    "resolved",
    "shipped",
    "slug",
]
