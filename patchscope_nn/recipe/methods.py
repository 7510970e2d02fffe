"""Recipes with several methods: each is the recipe with some changes, a run of its own, and is compared.

A method's changes are a mapping, nested or dotted: `{target: {layer: -1}}` and `{target.layer: -1}` are the
same. Of `source` and `target` only the fields named are changed; any other field is put whole.
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
    """A method's folder: its name in lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def variants(
    recipe: type[Spec], raw: Mapping[str, Any], methods: Any
) -> tuple[dict[str, Any], list[Problem]]:
    """The recipe of each method, and everything that is wrong with them.

    Args:
        recipe: The recipe's class.
        raw: The recipe as its YAML holds it; it is right without its methods.
        methods: Each method's name and changes.

    Returns:
        The recipes by name, those that are right, and the problems, each at `methods.NAME.FIELD`.
    """
    if not isinstance(methods, Mapping) or len(methods) < _FEWEST:
        message = (
            "should be a mapping of two or more names, each to its changes: {logit lens: {target.layer: -1}}"
        )
        return {}, [Problem(field="methods", message=message)]
    found: dict[str, Any] = {}
    wrong = list(_bad_names(methods))
    for name, changes in methods.items():
        place = f"methods.{name}"
        if not isinstance(changes, Mapping | None):
            message = f"should be a mapping of changes, or empty; given {changes!r}"
            wrong.append(Problem(field=place, message=message))
            continue
        asked = list(_changes(changes or {}, origin=place))
        bad = [change for change in asked if change.path[0] in _FIXED]
        for change in bad:
            message = (
                f"is no method's to change; leave it out. {did_you_mean(change.path[0], list(_free(recipe)))}"
            )
            wrong.append(Problem(field=f"{place}.{'.'.join(change.path)}", message=message))
        base = {name: value for name, value in raw.items() if name != "methods"}
        made, unmade = apply_changes(base, [change for change in asked if change not in bad])
        wrong += [Problem(field=f"{place}.{one.field}", message=one.message) for one in unmade]
        named = {
            "name": f"{raw['name']}-{slug(name)}".rstrip("-"),
            "title": f"{raw.get('title', raw['name'])} ({name})",
        }
        try:
            found[name] = recipe.model_validate(made | named)
        except ValidationError as error:
            wrong += [
                Problem(field=f"{place}.{one.field}", message=one.message) for one in problems(error, recipe)
            ]
    return found, wrong


def _free(recipe: type[Spec]) -> Iterator[str]:
    return (name for name in recipe.model_fields if name not in _FIXED)


def _bad_names(methods: Mapping[str, Any]) -> Iterator[Problem]:
    """Names that make no folder, or the same one as another's."""
    seen: dict[str, str] = {}
    for name in methods:
        folder = slug(name)
        if not folder:
            message = "has neither letter nor digit; name the method in words"
            yield Problem(field=f"methods.{name}", message=message)
        elif folder in seen:
            message = f"has the folder {folder!r} that {seen[folder]!r} has; give it another name"
            yield Problem(field=f"methods.{name}", message=message)
        seen.setdefault(folder, name)


def _changes(given: Mapping[str, Any], *, origin: str) -> Iterator[Change]:
    for key, value in given.items():
        path = tuple(str(key).split("."))
        if path in [(name,) for name in _MERGED] and isinstance(value, Mapping):
            for field, inner in value.items():
                yield Change(path=(*path, *str(field).split(".")), value=inner, origin=origin)
        else:
            yield Change(path=path, value=value, origin=origin)
