"""The base class of all specification objects, and the messages of its validation errors.

Numbers of numpy, torch and pandas are converted to Python's own, as `arguments.py` does for arguments.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic import ValidationError as _ValidationError

from patchscope_nn._util.plain import plain, shown
from patchscope_nn.errors import Problem, SpecError, did_you_mean

#: The models of objects that a document names by a word (`generate: {...}`). Messages list their fields.
NAMED: dict[str, type[BaseModel]] = {}


class Spec(BaseModel):
    """The base class of all specification objects: frozen, keyword-only, without unknown fields.

    The text under a field describes it in the JSON Schema.

    Raises:
        SpecError: A field is wrong; the error lists all problems.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except _ValidationError as error:
            raise SpecError(problems(error, type(self)), origin=type(self).__name__) from None

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain(value)

    # Lets pydantic build nested objects without this method, so that one error collects all problems.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic's own marker


def problems(error: _ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Convert a pydantic error into problems with this package's messages.

    Args:
        error: Pydantic's error.
        model: The class that was being built; messages list its fields.

    Returns:
        One problem for each wrong field.
    """
    by_field: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        *above, last = detail["loc"] or ("",)
        # The name of an unknown field is the user's, and may contain any character.
        end = (last,) if detail["type"] == "extra_forbidden" or _is_name(last) else ()
        loc = (*filter(_is_name, above), *end)
        field = ".".join(str(part) for part in loc)
        by_field.setdefault(field, Problem(field=field, message=_message(detail, loc, model)))
    return list(by_field.values())


def _is_name(part: int | str) -> bool:
    """True for the name or index of a field; False for the validator names that pydantic adds to a path."""
    return isinstance(part, int) or not any(mark in part for mark in "[(-")


def _message(detail: Any, loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"is not a field here. {did_you_mean(str(loc[-1]), _fields(model, loc[:-1]))}"
    if kind == "missing":
        return "is required and was not given"
    text = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return text
    if kind == "literal_error":
        allowed = _QUOTED.findall(detail["ctx"]["expected"])
        return f"{shown(value)} is not allowed here. {did_you_mean(str(value), allowed)}"
    text = _YAML_WORDS.get(kind, text)
    return f"{text[0].lower()}{text[1:]}; given {shown(value)}"


_QUOTED = re.compile(r"'([^']*)'")
#: Messages in YAML's words, in place of pydantic's, which name Python types.
_YAML_WORDS = {
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping of fields",
    "tuple_type": "should be a list",
}


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """List the fields allowed at a path below a model."""
    for part in path:
        if part in NAMED:
            model = NAMED[str(part)]
            continue
        if part not in model.model_fields:
            continue
        annotation = model.model_fields[str(part)].annotation
        nested = [kind for kind in (annotation, *get_args(annotation)) if _is_model(kind)]
        model = nested[0] if len(nested) == 1 else model
    return list(model.model_fields)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
