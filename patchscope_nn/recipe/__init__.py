"""Recipes: a Patchscope with its data, metrics and controls, as a YAML file. Does not import torch.

A recipe is read in these steps, and the problems of all steps are reported together:

1. find the file: the name of a builtin recipe, or a path (`load.py`);
2. read the YAML, with the line of every field (`document.py`);
3. apply the changes from outside the file (`changes.py`);
4. check every field (`model.py`), then each method's recipe (`methods.py`), and add the line of each problem;
5. look up the columns that it uses (`columns.py`), which `lint` does without a model.
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
