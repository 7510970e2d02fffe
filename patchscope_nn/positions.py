"""Position selectors: how a recipe names tokens of a prompt, and what they resolve to.

A position is an index into that prompt's own tokens, special tokens included; -1 is the last. A text names
the last token of its last occurrence, `first:text` the last token of its first. A span or a list patches
several tokens together; `each` makes one cell of every position it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from patchscope_nn.errors import PositionError
from patchscope_nn.prompts import Encoded

_FIRST = "first:"
_ALLOWED = (
    "an index (-1 is the last), a text of the prompt, 'first:text', {start: a, end: b}, "
    "a list of indices and texts, or {each: ...}"
)


class Span(BaseModel):
    """The tokens start..end-1, patched together; negative numbers count from the end.

    Attributes:
        start: The first token.
        end: One past the last token; None goes to the end of the prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    start: int
    end: int | None = None


class Each(BaseModel):
    """Several positions, each a cell of its own.

    Attributes:
        each: `all` for every token, or a list of positions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    each: Literal["all"] | tuple[int | str | Span, ...]

    def __init__(self, each: Any) -> None:
        super().__init__(each=each if each == "all" else tuple(_parse_one(item) for item in _listed(each)))


PositionSelector: TypeAlias = int | str | Span | Each | tuple[int | str, ...]


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple | range) and len(value):
        return value
    raise ValueError(f"each: {value!r} is neither 'all' nor a list of positions")


def parse_positions(value: Any) -> PositionSelector:
    """Check the form of a position selector, before any prompt is known.

    Args:
        value: An index, a text, `first:text`, a `Span` or `{start, end}`, a list of indices and texts, or
            an `Each` or `{each: ...}`.

    Returns:
        The selector, hashable.

    Raises:
        ValueError: The value is none of these.
    """
    if isinstance(value, Each):
        return value
    if isinstance(value, Mapping) and set(value) == {"each"}:
        return Each(value["each"])
    if isinstance(value, list | tuple | range):
        if not len(value):
            raise ValueError(f"is an empty list; give {_ALLOWED}")
        items = tuple(_parse_one(item) for item in value)
        if any(isinstance(item, Span) for item in items):
            raise ValueError(f"a list holds indices and texts, not spans; give {_ALLOWED}")
        return items  # type: ignore[return-value]  # spans were refused above
    return _parse_one(value)


def _parse_one(value: Any) -> int | str | Span:
    if isinstance(value, Span):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.removeprefix(_FIRST):
        return value
    whole = isinstance(value, Mapping) and {"start"} <= set(value) <= {"start", "end"}
    if whole and all(isinstance(part, int | None) for part in value.values()):
        return Span(**value)
    raise ValueError(f"{value!r} is no position; give {_ALLOWED}")


def resolve_positions(
    selector: PositionSelector, prompt: Encoded, *, field: str
) -> tuple[tuple[int, ...], ...]:
    """The tokens a selector names in a prompt, counted from the left.

    Args:
        selector: What `parse_positions` returned.
        prompt: The prompt.
        field: The field's name, for messages.

    Returns:
        One tuple for each cell, without repeats; each holds the positions that are patched together, in
        0..n_tokens - 1.

    Raises:
        PositionError: A position is outside the prompt, a text is absent or covers no whole token, or a
            span is empty. The message lists the prompt's numbered tokens.
    """
    if not isinstance(selector, Each):
        return (_together(selector, prompt, field=field),)
    if selector.each == "all":
        return tuple((position,) for position in range(len(prompt.ids)))
    return tuple(dict.fromkeys(_together(item, prompt, field=field) for item in selector.each))


def _together(
    selector: int | str | Span | tuple[int | str, ...], prompt: Encoded, *, field: str
) -> tuple[int, ...]:
    if isinstance(selector, Span):
        end = len(prompt.ids) if selector.end is None else selector.end
        found = tuple(range(len(prompt.ids))[selector.start : end])
        start = selector.start + len(prompt.ids) * (selector.start < 0)
        expected = (end + len(prompt.ids) * (end < 0)) - start
        if not found or len(found) != expected:
            raise _error(f"{field}=[{selector.start}, {selector.end}) is no span inside", prompt)
        return found
    items = selector if isinstance(selector, tuple) else (selector,)
    found = tuple(_one(item, prompt, field=field) for item in items)
    if len(set(found)) != len(found):
        raise _error(f"{field}={list(items)!r} names the same token twice in", prompt)
    return found


def _one(item: int | str, prompt: Encoded, *, field: str) -> int:
    count = len(prompt.ids)
    if isinstance(item, int):
        if -count <= item < count:
            return item % count
        raise _error(f"{field}={item} is outside", prompt)
    text = item.removeprefix(_FIRST)
    start = prompt.text.find(text) if item.startswith(_FIRST) else prompt.text.rfind(text)
    if start < 0:
        raise _error(f"{field}={item!r} does not occur in", prompt)
    end = start + len(text)
    for position in reversed(range(count)):
        first, last = prompt.spans[position]
        # A token that begins with a space still spells the word after it; a token of spaces is itself.
        word = prompt.text[first:last].lstrip()
        first = last - len(word) if word else first
        if start <= first < last == end:
            return position
    raise _error(f"{field}={item!r} ends with no whole token of", prompt)


def _error(problem: str, prompt: Encoded) -> PositionError:
    return PositionError(
        f"{problem} this {len(prompt.ids)}-token prompt ({prompt.numbered()}).",
        hint="Use an index (-1 is the last token), or a text that ends where a token ends.",
    )


_INDEX_OR_TEXT: dict[str, Any] = {"anyOf": [{"type": "integer"}, {"type": "string", "minLength": 1}]}
_SPAN: dict[str, Any] = {
    "type": "object",
    "properties": {"start": {"type": "integer"}, "end": {"type": ["integer", "null"]}},
    "required": ["start"],
    "additionalProperties": False,
}
_EACH: dict[str, Any] = {
    "type": "object",
    "properties": {
        "each": {
            "anyOf": [
                {"const": "all"},
                {"type": "array", "minItems": 1, "items": {"anyOf": [*_INDEX_OR_TEXT["anyOf"], _SPAN]}},
            ]
        }
    },
    "required": ["each"],
    "additionalProperties": False,
}
Positions = Annotated[
    PositionSelector,
    BeforeValidator(parse_positions),
    WithJsonSchema(
        {
            "anyOf": [
                *_INDEX_OR_TEXT["anyOf"],
                _SPAN,
                _EACH,
                {"type": "array", "items": _INDEX_OR_TEXT, "minItems": 1},
            ]
        }
    ),
]
