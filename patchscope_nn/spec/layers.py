"""Layer selectors: how a recipe names decoder blocks, and how names become block numbers.

A layer is the output of a block, 0 to n_layers - 1. `embed` is the input of block 0; it is resolved to
`EMBED` (-1).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, WithJsonSchema

from patchscope_nn._util.plain import plain
from patchscope_nn.errors import LayerError
from patchscope_nn.spec.forms import array, is_int

EMBED = -1
LayerSelector: TypeAlias = int | str | tuple[int | str, ...]

_RANGE = re.compile(r"^(-?\d*):(-?\d*)(?::([1-9]\d*))?$")
_ALLOWED = "an int (negative counts from the end), a list, 'start:stop[:step]', 'all' or 'embed'"


def parse_layers(value: Any, *, same: bool = False) -> LayerSelector:
    """Check the form of a layer selector, without a model.

    Args:
        value: An int, `all`, `embed`, `same`, a range (a Python `range`, or the text `start:stop:step`, which
            excludes the stop), or a list of these.
        same: True if `same` is allowed, as it is for a target.

    Raises:
        ValueError: The value is none of these.
    """
    value = plain(value)
    if isinstance(value, list | tuple | range):
        if not len(value):
            raise ValueError(f"is an empty list; give {_ALLOWED}")
        return tuple(_parse_item(item) for item in value)
    return _parse_item(value, same=same)


def _parse_item(value: Any, *, same: bool = False) -> Any:
    words = ("all", "embed", "same") if same else ("all", "embed")
    if is_int(value) or (isinstance(value, str) and (value in words or _RANGE.match(value))):
        return value
    extra = " or 'same'" if same else ""
    raise ValueError(f"{value!r} is not a valid layer; give {_ALLOWED}{extra}")


def resolve_layers(selector: LayerSelector, *, n_layers: int, field: str) -> tuple[int, ...]:
    """Return the block numbers that a selector names, in its order and without repeats.

    Returns:
        Block numbers in 0..n_layers - 1, and `EMBED` for the input of block 0.

    Raises:
        LayerError: A layer is outside the model, or a range holds no layer.
    """
    items = selector if isinstance(selector, tuple) else (selector,)
    blocks = (block for item in items for block in _resolve_item(item, n_layers=n_layers, field=field))
    return tuple(dict.fromkeys(blocks))


def _resolve_item(item: int | str, *, n_layers: int, field: str) -> range | tuple[int, ...]:
    if item == "all":
        return range(n_layers)
    if item == "embed":
        return (EMBED,)
    if isinstance(item, int):
        if not -n_layers <= item < n_layers:
            raise LayerError(
                f"{field}={item} is outside this model, whose {n_layers} blocks are "
                f"0..{n_layers - 1} (or {-n_layers}..-1 from the end).",
                hint="Use 'embed' for the input of block 0.",
            )
        return (item % n_layers,)
    blocks = range(n_layers)[slice(*(int(part) if part else None for part in item.split(":")))]
    if not blocks:
        raise LayerError(
            f"{field}={item!r} holds no layer of this model, whose blocks are 0..{n_layers - 1}.",
            hint="A range excludes its stop, as in Python: '0:10' is layers 0 to 9.",
        )
    return blocks


_ITEMS = [{"type": "integer"}, {"enum": ["all", "embed"]}, {"type": "string", "pattern": _RANGE.pattern}]
_LIST = array({"anyOf": _ITEMS})
SourceLayers = Annotated[
    LayerSelector, BeforeValidator(parse_layers), WithJsonSchema({"anyOf": [*_ITEMS, _LIST]})
]
TargetLayers = Annotated[
    LayerSelector,
    BeforeValidator(lambda value: parse_layers(value, same=True)),
    WithJsonSchema({"anyOf": [*_ITEMS, {"enum": ["same"]}, _LIST]}),
]
