"""Checks of values and forms of the JSON Schema that several fields share."""

from __future__ import annotations

from typing import Any


def is_int(value: Any) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True for an int or a float, but not for a bool."""
    return isinstance(value, float) or is_int(value)


def listed(value: Any) -> Any:
    """Convert a list to a tuple; other values are left to the type check."""
    return tuple(value) if isinstance(value, list) else value


def floats(value: Any) -> Any:
    """Convert the ints of a list to floats; other values are left to the type check."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(float(item) if is_int(item) else item for item in value)


def closed(**properties: Any) -> dict[str, Any]:
    """Return the form of an object that has all of these properties, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def array(items: dict[str, Any]) -> dict[str, Any]:
    """Return the form of a list with at least one item."""
    return {"type": "array", "items": items, "minItems": 1}
