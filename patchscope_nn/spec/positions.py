"""Position selectors: how a recipe names tokens of a prompt, and how names become token indices.

A position is an index into the prompt's own tokens, special tokens included; -1 is the last. A text names
the last token of its last occurrence, and `first:text` the last token of its first occurrence. A span or a
list patches several tokens together, `{tokens: text}` all tokens of a text's last occurrence, and
`{every: text}` the last token of every occurrence. `each` makes a cell of each of its positions. A data row
fills `{column}` placeholders in texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, WithJsonSchema

from patchscope_nn._util.checking import Spec
from patchscope_nn.errors import PositionError
from patchscope_nn.spec.encoding import Encoded
from patchscope_nn.spec.forms import array, closed, is_int
from patchscope_nn.spec.prompts import render

_FIRST = "first:"
_ALLOWED = (
    "an index (-1 is the last), a text of the prompt, 'first:text', {start: a, end: b}, "
    "a list of indices and texts, {tokens: text}, {every: text}, or {each: ...}"
)


class Span(Spec):
    """The tokens start..end-1, patched together; negative numbers count from the end."""

    start: int
    """The first token."""
    end: int | None = None
    """One past the last token; None goes to the end of the prompt."""


class Every(Spec):
    """The last tokens of all occurrences of a text, patched together."""

    every: Annotated[str, Field(min_length=1)]
    """The text."""


class Tokens(Spec):
    """All tokens of the last occurrence of a text, patched together."""

    tokens: Annotated[str, Field(min_length=1)]
    """The text."""


def _each(value: Any) -> Any:
    if isinstance(value, str) and value == "all":
        return value
    if isinstance(value, list | tuple | range) and len(value):
        return tuple(map(_parse_item, value))
    raise ValueError(f"each: {value!r} is neither 'all' nor a list of positions")


class Each(Spec):
    """Several positions, each in a separate cell."""

    each: Annotated[Literal["all"] | tuple[int | str | Span | Every | Tokens, ...], BeforeValidator(_each)]
    """`all` for every token, or a list of positions."""

    def __init__(self, each: Any) -> None:
        super().__init__(each=each)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # as in Spec


_OF_TEXT: dict[str, type[Every | Tokens]] = {"every": Every, "tokens": Tokens}
PositionSelector: TypeAlias = int | str | Span | Every | Tokens | Each | tuple[int | str, ...]


def parse_positions(value: Any) -> PositionSelector:
    """Check the form of a position selector, without a prompt.

    Raises:
        ValueError: It is not a selector, as the message lists them.
    """
    if isinstance(value, Each):
        return value
    if isinstance(value, Mapping) and set(value) == {"each"}:
        return Each.model_construct(each=_each(value["each"]))
    if isinstance(value, list | tuple | range):
        if not len(value):
            raise ValueError(f"is an empty list; give {_ALLOWED}")
        items = tuple(map(_parse_item, value))
        if any(isinstance(item, Span | Every | Tokens) for item in items):
            raise ValueError(f"a list holds indices and texts, not spans; give {_ALLOWED}")
        return items  # type: ignore[return-value]  # spans were refused above
    return _parse_item(value)


def _parse_item(value: Any) -> int | str | Span | Every | Tokens:
    if isinstance(value, Span | Every | Tokens):
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        name, text = next(iter(value.items()))
        if name in _OF_TEXT and isinstance(text, str) and text:
            return _OF_TEXT[name](**{name: text})
    if is_int(value):
        return int(value)
    if isinstance(value, str) and value.removeprefix(_FIRST):
        return value
    whole = isinstance(value, Mapping) and {"start"} <= set(value) <= {"start", "end"}
    if whole and all(part is None or is_int(part) for part in value.values()):
        return Span(**value)
    raise ValueError(f"{value!r} is not a valid position; give {_ALLOWED}")


def resolve_positions(
    selector: PositionSelector, prompt: Encoded, *, field: str
) -> tuple[tuple[int, ...], ...]:
    """Return the tokens that a selector names in a prompt, counted from the left.

    Returns:
        A tuple for each cell, without repeats. It holds the positions that are patched together, in
        0..n_tokens - 1.

    Raises:
        PositionError: A position is outside the prompt, a text is absent or does not end with a whole token,
            or a span is empty. The message lists the prompt's numbered tokens.
    """
    if not isinstance(selector, Each):
        return (_together(selector, prompt, field=field),)
    if selector.each == "all":
        return tuple((position,) for position in range(len(prompt.ids)))
    return tuple(dict.fromkeys(_together(item, prompt, field=field) for item in selector.each))


def _together(
    selector: int | str | Span | Every | Tokens | tuple[int | str, ...], prompt: Encoded, *, field: str
) -> tuple[int, ...]:
    if isinstance(selector, Every):
        return _every(selector.every, prompt, field=field)
    if isinstance(selector, Tokens):
        return _tokens(selector.tokens, prompt, field=field)
    if isinstance(selector, Span):
        count = len(prompt.ids)
        end = count if selector.end is None else selector.end
        span = tuple(range(count)[selector.start : end])
        start, end = (index + count if index < 0 else index for index in (selector.start, end))
        if not span or len(span) != end - start:
            raise _error(f"{field}=[{selector.start}, {selector.end}) is not a span inside", prompt)
        return span
    items = selector if isinstance(selector, tuple) else (selector,)
    positions = tuple(_position(item, prompt, field=field) for item in items)
    if len(set(positions)) != len(positions):
        raise _error(f"{field}={list(items)!r} names the same token twice in", prompt)
    return positions


def _position(item: int | str, prompt: Encoded, *, field: str) -> int:
    count = len(prompt.ids)
    if isinstance(item, int):
        if -count <= item < count:
            return item % count
        raise _error(f"{field}={item} is outside", prompt)
    text = item.removeprefix(_FIRST)
    start = prompt.text.find(text) if item.startswith(_FIRST) else prompt.text.rfind(text)
    if start < 0:
        raise _error(f"{field}={item!r} does not occur in", prompt)
    position = _ending(prompt, start, start + len(text))
    if position is None:
        raise _error(f"{field}={item!r} does not end with a whole token of", prompt)
    return position


def _every(text: str, prompt: Encoded, *, field: str) -> tuple[int, ...]:
    starts = [match.start() for match in re.finditer(re.escape(text), prompt.text)]
    endings = dict.fromkeys(_ending(prompt, start, start + len(text)) for start in starts)
    positions = tuple(position for position in endings if position is not None)
    if not positions:
        raise _error(f"{field}: no {text!r} ends with a whole token of", prompt)
    return positions


def _tokens(text: str, prompt: Encoded, *, field: str) -> tuple[int, ...]:
    start = prompt.text.rfind(text)
    end = start + len(text)
    positions = tuple(n for n, (first, last) in enumerate(prompt.spans) if first < end and start < last)
    if start < 0 or not positions:
        raise _error(f"{field}: {text!r} does not occur in", prompt)
    return positions


def texts_of(selector: PositionSelector | None) -> list[str]:
    """List the texts in a selector."""
    match selector:
        case Each(each=tuple(items)) | tuple(items):
            return [text for item in items for text in texts_of(item)]
        case Every(every=text) | Tokens(tokens=text) | str(text):
            return [text]
        case _:
            return []


def fill(selector: PositionSelector, row: Mapping[str, Any], *, field: str) -> PositionSelector:
    """Fill the `{column}` placeholders of a selector's texts from a data row.

    Raises:
        DataError: A placeholder names a column that the row lacks.
    """
    if not any("{" in text or "}" in text for text in texts_of(selector)):
        return selector

    def filled(item: Any) -> Any:
        match item:
            case str():
                return str(render(item, row, field=field))
            case Every(every=text):
                return Every(every=filled(text))
            case Tokens(tokens=text):
                return Tokens(tokens=filled(text))
            case Each(each=items):
                return Each([filled(item) for item in items])
            case tuple():
                return tuple(map(filled, item))
            case _:
                return item

    return filled(selector)


def _ending(prompt: Encoded, start: int, end: int) -> int | None:
    """Find the token that lies inside the characters start..end-1 and ends where they end."""
    for position in reversed(range(len(prompt.ids))):
        first, last = prompt.spans[position]
        # Leading spaces of a token are ignored, unless it has nothing else.
        word = prompt.text[first:last].lstrip()
        first = last - len(word) if word else first
        if start <= first < last == end:
            return position
    return None


def _error(problem: str, prompt: Encoded) -> PositionError:
    return PositionError(
        f"{problem} this {len(prompt.ids)}-token prompt ({prompt.numbered()}).",
        hint="Use an index (-1 is the last token), or a text that ends where a token ends.",
    )


_TEXT = {"type": "string", "minLength": 1}
_INDEX_OR_TEXT: list[dict[str, Any]] = [{"type": "integer"}, _TEXT]
_SPAN = closed(start={"type": "integer"}, end={"type": ["integer", "null"]}) | {"required": ["start"]}
_ITEMS = [*_INDEX_OR_TEXT, _SPAN, closed(every=_TEXT), closed(tokens=_TEXT)]
_EACH = closed(each={"anyOf": [{"const": "all"}, array({"anyOf": _ITEMS})]})
POSITIONS_SCHEMA: dict[str, Any] = {"anyOf": [*_ITEMS, _EACH, array({"anyOf": _INDEX_OR_TEXT})]}
Positions = Annotated[PositionSelector, BeforeValidator(parse_positions), WithJsonSchema(POSITIONS_SCHEMA)]
