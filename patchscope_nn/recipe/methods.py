"""Recipes with several methods: each method is the recipe with changes, in its own run. Runs are compared.

A method's changes are a mapping, nested or dotted: `{target: {layer: -1}}` and `{target.layer: -1}` are the
same. In `source` and `target` only the named fields are changed; any other field is replaced completely.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from patchscope_nn.errors import Problem, did_you_mean
from patchscope_nn.recipe.changes import Change, apply_changes
from patchscope_nn.spec import Spec, problems

_MERGED = ("source", "target")
_FIXED = ("name", "title", "paper", "methods")
_FEWEST = 2


def slug(name: str) -> str:
    """Return the name of a method's folder: its name in lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def variants(
    recipe: type[Spec], raw: Mapping[str, Any], methods: Any
) -> tuple[dict[str, Any], list[Problem]]:
    """Build the recipe of each method.

    Args:
        recipe: The recipe's class.
        raw: The recipe in its YAML form; it is valid without its methods.
        methods: Each method's name and changes.

    Returns:
        The valid recipes by name, and the problems of the others, each at `methods.NAME.FIELD`.
    """
    if not isinstance(methods, Mapping) or len(methods) < _FEWEST:
        message = (
            "should be a mapping of two or more names, each to its changes: {logit lens: {target.layer: -1}}"
        )
        return {}, [Problem(field="methods", message=message)]
    recipes: dict[str, Any] = {}
    wrong = list(_bad_names(methods))
    for name, changes in methods.items():
        field = f"methods.{name}"
        if not isinstance(changes, Mapping | None):
            message = f"should be a mapping of changes, or empty; given {changes!r}"
            wrong.append(Problem(field=field, message=message))
            continue
        method_changes = list(_changes(changes or {}, origin=field))
        refused = [change for change in method_changes if change.path[0] in _FIXED]
        for change in refused:
            message = (
                "cannot be changed by a method; leave it out. "
                f"{did_you_mean(change.path[0], list(_free(recipe)))}"
            )
            wrong.append(Problem(field=f"{field}.{'.'.join(change.path)}", message=message))
        base = {name: value for name, value in raw.items() if name != "methods"}
        changed, unmade = apply_changes(base, [change for change in method_changes if change not in refused])
        wrong += [Problem(field=f"{field}.{problem.field}", message=problem.message) for problem in unmade]
        named = {
            "name": f"{raw['name']}-{slug(name)}".rstrip("-"),
            "title": f"{raw.get('title', raw['name'])} ({name})",
        }
        try:
            recipes[name] = recipe.model_validate(changed | named)
        except ValidationError as error:
            wrong += [
                Problem(field=f"{field}.{problem.field}", message=problem.message)
                for problem in problems(error, recipe)
            ]
    return recipes, wrong


def _free(recipe: type[Spec]) -> Iterator[str]:
    return (name for name in recipe.model_fields if name not in _FIXED)


def _bad_names(methods: Mapping[str, Any]) -> Iterator[Problem]:
    """Find names without a letter or digit, and names with the same folder as another name."""
    seen: dict[str, str] = {}
    for name in methods:
        folder = slug(name)
        if not folder:
            message = "has neither letter nor digit; name the method in words"
            yield Problem(field=f"methods.{name}", message=message)
        elif folder in seen:
            message = f"has the same folder, {folder!r}, as {seen[folder]!r}; give it another name"
            yield Problem(field=f"methods.{name}", message=message)
        seen.setdefault(folder, name)


def _changes(changes: Mapping[str, Any], *, origin: str) -> Iterator[Change]:
    for key, value in changes.items():
        path = tuple(str(key).split("."))
        if path in [(name,) for name in _MERGED] and isinstance(value, Mapping):
            for field, inner in value.items():
                yield Change(path=(*path, *str(field).split(".")), value=inner, origin=origin)
        else:
            yield Change(path=path, value=value, origin=origin)
