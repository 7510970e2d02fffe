"""Changes to a recipe from outside its file: `--set key.path=value`, and the options that name a field.

They are applied to the raw mapping before it is checked, so that a changed recipe is checked like a recipe
that was written that way. A change copies the parts that it modifies; its arguments stay unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchscope_nn.errors import Problem
from patchscope_nn.recipe.document import read_yaml


@dataclass(frozen=True, kw_only=True)
class Change:
    """A value to set at a path.

    Attributes:
        path: The parts of the dotted path.
        value: The new value.
        origin: The source of the change, for messages: `--set a.b=1`.
    """

    path: tuple[str, ...]
    value: Any
    origin: str

    def concerns(self, field: str) -> bool:
        """True if a problem of a field can be due to this change: the field is on its path, or below it."""
        parts = tuple(field.split(".")) if field else ()
        common = min(len(parts), len(self.path))
        return bool(common) and parts[:common] == self.path[:common]


def parse_changes(*, sets: Sequence[str], overrides: Mapping[str, Any]) -> tuple[list[Change], list[Problem]]:
    """Read changes. `sets` come after `overrides`, and therefore take precedence.

    Args:
        sets: Texts `key.path=value`; values are YAML.
        overrides: Dotted paths and values.

    Returns:
        The changes, and the problems of the texts.
    """
    changes = [
        Change(path=tuple(path.split(".")), value=value, origin=f"{path}={value!r}")
        for path, value in overrides.items()
    ]
    problems = []
    for text in sets:
        path, equals, value = text.partition("=")
        parts = tuple(part.strip() for part in path.split("."))
        if not equals or not all(parts):
            message = "is not an assignment; write --set key.path=value, for example --set source.layer=5"
            problems.append(Problem(field=f"--set {text}", message=message))
            continue
        document = read_yaml(value) if value.strip() else None
        if document and document.problems:
            message = "; ".join(problem.message for problem in document.problems)
            problems.append(Problem(field=f"--set {text}", message=f"the value {message}"))
            continue
        changes.append(Change(path=parts, value=document and document.value, origin=f"--set {text}"))
    return changes, problems


def apply_changes(value: Any, changes: Sequence[Change]) -> tuple[Any, list[Problem]]:
    """Apply changes to a raw recipe.

    Args:
        value: The raw recipe.
        changes: The changes, in their order.

    Returns:
        The changed recipe, and a problem for each change that could not be applied.
    """
    problems = []
    for change in changes:
        try:
            value = _set(value, change.path, change.value, above=())
        except ValueError as error:
            field = ".".join(change.path)
            problems.append(Problem(field=field, message=f"{error} (from {change.origin})"))
    return value, problems


def _set(node: Any, path: tuple[str, ...], value: Any, *, above: tuple[str, ...]) -> Any:
    if not path:
        return value
    key, *rest = path
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            numbers = f"0..{len(node) - 1}" if node else "none; the list is empty"
            raise ValueError(f"{'.'.join(above)} is a list; name an item by its number: {numbers}")
        items = list(node)
        items[int(key)] = _set(items[int(key)], tuple(rest), value, above=(*above, key))
        return items
    fields = _fields(node, key, above)
    fields[key] = _set(fields.get(key), tuple(rest), value, above=(*above, key))
    return fields


def _fields(node: Any, key: str, above: tuple[str, ...]) -> dict[str, Any]:
    """Return the mapping in which a key is set; a scalar is replaced by an empty mapping."""
    if above != ("readout",) and not (len(above) == len(("metrics", "0")) and above[0] == "metrics"):
        return dict(node) if isinstance(node, dict) else {}
    # A readout or metric has exactly one name, and may be only a name.
    fields = {node: None} if isinstance(node, str) else node if isinstance(node, dict) else {}
    name = next(iter(fields), key)
    if name != key:
        place = ".".join(above)
        raise ValueError(f"{place} is {name} here; set {place}={key} first, or {place}.{name}.FIELD")
    return dict(fields)
