"""Mappings as a document names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from patchscope_nn.errors import SpecError, did_you_mean
from patchscope_nn.spec.fitting import FIT_KINDS, Fit, fit_schema
from patchscope_nn.spec.training import LENS_KINDS, Train, train_schema

#: The mappings with a name; the others are `{affine: file}`, `{fitted: file}`, ... or Python objects.
NAMED_MAPPINGS = ("identity", "target_norm")
#: Identity within one model, and a fit between two.
ALIGNED = "aligned"
_MAPPING_KEYS = ("affine", "function", "fitted", "tuned_lens", "jacobian_lens")
#: What is made before the run, by the word a document has for it, and the shortest example.
_MADE: dict[str, tuple[type[Fit | Train], str]] = {
    "fit": (Fit, "{kind: affine}"),
    "train": (Train, "{kind: tuned_lens}"),
}


def _parse_mapping(value: Any) -> Any:
    if callable(value) or isinstance(value, Fit | Train) or value in (*NAMED_MAPPINGS, ALIGNED):
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        key, item = next(iter(value.items()))
        if key in _MADE:
            return _parse_made(key, item)
        if key in _MAPPING_KEYS and isinstance(item, str) and item:
            if key == "function" and item.count(":") != 1:
                raise ValueError(f"function: {item!r} should read module:name, for example my_maps:rotate")
            return (key, item)
    if isinstance(value, tuple) and len(value) == 2 and value[0] in _MAPPING_KEYS:  # noqa: PLR2004 (a pair)
        return value
    names = [*NAMED_MAPPINGS, ALIGNED, *_MAPPING_KEYS, *_MADE]
    name = next(iter(value), "") if isinstance(value, Mapping) else str(value)
    raise ValueError(
        f"{value!r} is no mapping. {did_you_mean(str(name), names)} Write {{affine: weights.safetensors}}, "
        "{fitted: fit.safetensors}, {fit: {kind: affine}}, {train: {kind: tuned_lens}}, "
        "{function: module:name}, or give a torch module or function in Python."
    )


def _parse_made(key: str, value: Any) -> Fit | Train:
    kind, example = _MADE[key]
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: {value!r} should be fields, for example {example}")  # noqa: TRY004
    try:
        return kind(**value)
    except SpecError as error:
        said = (f"{key}.{one}" if one.field else f"{key}: {one.message}" for one in error.problems)
        raise ValueError("; ".join(said)) from None


def dump_mapping(value: Any) -> Any:
    """A mapping as YAML holds it; a Python object by its qualified name."""
    if isinstance(value, tuple):
        return {value[0]: value[1]}
    for key, (kind, _) in _MADE.items():
        if isinstance(value, kind):
            return {key: value.model_dump(mode="json", exclude_defaults=True)}
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
                {"enum": [*NAMED_MAPPINGS, ALIGNED]},
                *(
                    {
                        "type": "object",
                        "properties": {key: form},
                        "required": [key],
                        "additionalProperties": False,
                    }
                    for key, form in {
                        "fit": {"anyOf": [{"enum": list(FIT_KINDS)}, fit_schema()]},
                        "train": {"anyOf": [{"enum": list(LENS_KINDS)}, train_schema()]},
                        **{key: {"type": "string"} for key in _MAPPING_KEYS},
                    }.items()
                ),
            ]
        }
    ),
]
