"""Mappings as a document names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from patchscope_nn.errors import did_you_mean

#: The mappings with a name; the others are `{affine: file}`, `{fitted: file}`, ... or Python objects.
NAMED_MAPPINGS = ("identity", "target_norm")
_MAPPING_KEYS = ("affine", "function", "fitted", "tuned_lens", "jacobian_lens")


def _parse_mapping(value: Any) -> Any:
    if callable(value) or value in NAMED_MAPPINGS:
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        key, item = next(iter(value.items()))
        if key in _MAPPING_KEYS and isinstance(item, str) and item:
            if key == "function" and item.count(":") != 1:
                raise ValueError(f"function: {item!r} should read module:name, for example my_maps:rotate")
            return (key, item)
    if isinstance(value, tuple) and len(value) == 2 and value[0] in _MAPPING_KEYS:  # noqa: PLR2004 (key, item)
        return value
    names = [*NAMED_MAPPINGS, *_MAPPING_KEYS]
    name = next(iter(value), "") if isinstance(value, Mapping) else str(value)
    raise ValueError(
        f"{value!r} is no mapping. {did_you_mean(str(name), names)} Write {{affine: weights.safetensors}}, "
        "{fitted: fit.safetensors}, {function: module:name}, or give a torch module or function in Python."
    )


def dump_mapping(value: Any) -> Any:
    """A mapping as YAML holds it; a Python object by its qualified name."""
    if isinstance(value, tuple):
        return {value[0]: value[1]}
    if isinstance(value, str):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    return {"python": f"{named.__module__}:{named.__qualname__}"}


AnyMapping = Annotated[
    Any,
    BeforeValidator(_parse_mapping),
    PlainSerializer(dump_mapping),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(NAMED_MAPPINGS)},
                *(
                    {
                        "type": "object",
                        "properties": {key: {"type": "string"}},
                        "required": [key],
                        "additionalProperties": False,
                    }
                    for key in _MAPPING_KEYS
                ),
            ]
        }
    ),
]
