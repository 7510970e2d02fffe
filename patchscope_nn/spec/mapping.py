"""Mappings as recipes and scripts name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, overload

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from patchscope_nn._util.arguments import checked
from patchscope_nn._util.functions import check_reference, name_of, reference_of
from patchscope_nn._util.registry import Registry, decorate
from patchscope_nn.errors import SpecError, did_you_mean
from patchscope_nn.spec.fitting import FIT_KINDS, Fit
from patchscope_nn.spec.forms import closed
from patchscope_nn.spec.training import LENS_KINDS, Train

#: The mappings without parameters; the others are `{affine: file}`, `{fitted: file}`, ... or Python objects.
NAMED_MAPPINGS = ("identity", "target_norm")
#: The identity within one model, and a fitted mapping between two models.
ALIGNED = "aligned"
#: All mappings that can be named: builtin ones, each by its name, and users' functions.
MAPPINGS: Registry[Any] = Registry(
    "patchscope_nn.mappings", noun="mapping", entries={name: name for name in (*NAMED_MAPPINGS, ALIGNED)}
)
_MAPPING_KEYS = ("affine", "function", "fitted", "tuned_lens", "jacobian_lens")
#: The mappings that are fitted or trained before the run: their key, their class and the shortest example.
_MADE: dict[str, tuple[type[Fit | Train], str]] = {
    "fit": (Fit, "{kind: affine}"),
    "train": (Train, "{kind: tuned_lens}"),
}


@overload
def mapping(function: Callable[..., Any], /) -> Callable[..., Any]: ...
@overload
def mapping(*, name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
@checked
def mapping(function: Callable[..., Any] | None = None, *, name: str | None = None) -> Any:
    """Register a function or torch module as a mapping that recipes and scripts can name.

    Args:
        function: Maps states (..., d_model) to (..., d_model of the target). It runs where the target model
            runs.
        name: Its name; None takes the function's.

    Returns:
        The function, unchanged; a decorator if `function` is None.

    Raises:
        InputError: The name is taken.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        MAPPINGS.register(name or name_of(function), function, home=reference_of(function))
        return function

    return decorate(function, register)


def _parse_mapping(value: Any) -> Any:
    if callable(value) or isinstance(value, Fit | Train) or (isinstance(value, str) and value in MAPPINGS):
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        key, item = next(iter(value.items()))
        if key in _MADE:
            return _parse_made(key, item)
        if key in _MAPPING_KEYS and isinstance(item, str) and item:
            if key == "function":
                check_reference(item)
            return (key, item)
    if isinstance(value, tuple) and len(value) == 2 and value[0] in _MAPPING_KEYS:  # noqa: PLR2004 (a pair)
        return value
    names = [*MAPPINGS.names(), *_MAPPING_KEYS, *_MADE]
    name = next(iter(value), "") if isinstance(value, Mapping) else str(value)
    raise ValueError(
        f"{value!r} is not a known mapping. {did_you_mean(str(name), names)} Write "
        "{affine: weights.safetensors}, {fitted: fit.safetensors}, {fit: {kind: affine}}, "
        "{train: {kind: tuned_lens}}, {function: module:name}, or give a torch module or function in Python."
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
        messages = (
            f"{key}.{problem}" if problem.field else f"{key}: {problem.message}" for problem in error.problems
        )
        raise ValueError("; ".join(messages)) from None


def dump_mapping(value: Any) -> Any:
    """Convert a mapping to its YAML form; a Python object is written as its qualified name."""
    if isinstance(value, tuple):
        return {value[0]: value[1]}
    for key, (kind, _) in _MADE.items():
        if isinstance(value, kind):
            return {key: value.model_dump(mode="json", exclude_defaults=True)}
    if isinstance(value, str):
        return value
    return {"python": reference_of(value)}


_FORMS: list[dict[str, Any]] = [
    {"enum": [*NAMED_MAPPINGS, ALIGNED]},
    closed(fit={"anyOf": [{"enum": list(FIT_KINDS)}, Fit.model_json_schema()]}),
    closed(train={"anyOf": [{"enum": list(LENS_KINDS)}, Train.model_json_schema()]}),
    *(closed(**{key: {"type": "string"}}) for key in _MAPPING_KEYS),
]
AnyMapping = Annotated[
    Any, BeforeValidator(_parse_mapping), PlainSerializer(dump_mapping), WithJsonSchema({"anyOf": _FORMS})
]
