"""The base of all specification objects, and what is wrong with one, in the house's words.

Numbers of numpy, torch and pandas become Python's own here, as they do for arguments in `arguments.py`.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic import ValidationError as _ValidationError

from patchscope_nn._util.plain import plain, shown
from patchscope_nn.errors import Problem, SpecError, did_you_mean

#: Objects that a document names by a word (`generate: {...}`): what fields stand below that word.
NAMED: dict[str, type[BaseModel]] = {}


class Spec(BaseModel):
    """The base of all specification objects: frozen, keyword-only, closed to unknown fields.

    Raises:
        SpecError: On construction, with every problem at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except _ValidationError as error:
            raise SpecError(problems(error, type(self)), origin=type(self).__name__) from None

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain(value)

    # Tells pydantic that nested objects may be built without this method, so that one error collects all.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic's own marker


def problems(error: _ValidationError, model: type[BaseModel]) -> list[Problem]:
    """What pydantic found wrong, in the house's words.

    Args:
        error: Pydantic's error.
        model: The model that was being built, for the names it allows.

    Returns:
        One problem for each wrong field.
    """
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        *above, last = detail["loc"] or ("",)
        # An unknown field is spelt as the user spelt it, with any marks it has.
        given = (last,) if detail["type"] == "extra_forbidden" or _is_name(last) else ()
        loc = (*filter(_is_name, above), *given)
        field = ".".join(str(part) for part in loc)
        found.setdefault(field, Problem(field=field, message=_message(detail, loc, model)))
    return list(found.values())


def _is_name(part: int | str) -> bool:
    """Pydantic adds the names of its own validators to a path; a field has none of these marks."""
    return isinstance(part, int) or not any(mark in part for mark in "[(-")


def _message(detail: Any, loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"is no field here. {did_you_mean(str(loc[-1]), _fields(model, loc[:-1]))}"
    if kind == "missing":
        return "is required and was not given"
    text = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return text
    if kind == "literal_error":
        allowed = _QUOTED.findall(detail["ctx"]["expected"])
        return f"{shown(given)} is not allowed here. {did_you_mean(str(given), allowed)}"
    text = _YAML_WORDS.get(kind, text)
    return f"{text[0].lower()}{text[1:]}; given {shown(given)}"


_QUOTED = re.compile(r"'([^']*)'")
#: Pydantic speaks of Python's types; the user may be writing YAML.
_YAML_WORDS = {
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping of fields",
    "tuple_type": "should be a list",
}


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The fields allowed at a path below a model."""
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
