"""Prompts: texts, chats and token ids, and the target prompts of the paper.

A prompt may hold `{column}` placeholders, which a data row fills; `{{` and `}}` stand for braces.
`encoding.py` turns a filled prompt into tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from patchscope_nn._util.plain import is_missing, wrong_text
from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.spec.forms import array, closed, is_int

#: The few-shot description prompt of section 4.3; patch its last token, `x`.
DESCRIBE = (
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean "
    "multinational major appliance and consumer electronics corporation, x"
)
#: The token-identity prompt of section 4.1, as in the authors' code; patch its last token, `?`.
IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"

#: The placeholder that stands for l in a target prompt; it is not filled by a column.
PER_LAYER = "source_layer"

Message: TypeAlias = tuple[str, str]
PromptSpec: TypeAlias = str | tuple[int, ...] | tuple[Message, ...]

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
_ALLOWED = "a text, a list of chat messages ({role: user, content: ...}), or a list of token ids"


def parse_prompt(value: Any) -> PromptSpec:
    """Check the form of a prompt, without a tokenizer.

    The value is a text, a list of `{role, content}` messages, which become pairs, or a list of token ids.

    Raises:
        ValueError: The value is none of these, or empty.
    """
    if isinstance(value, str):
        if not value:
            raise ValueError("is an empty text, which has no token to read or write")
        return value
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"{value!r} is not a valid prompt; give {_ALLOWED}")
    if all(map(is_int, value)):
        return tuple(value)
    return tuple(map(_message, value))


def _message(item: Any) -> Message:
    if isinstance(item, Mapping) and set(item) == {"role", "content"}:
        item = (item["role"], item["content"])
    if isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):  # noqa: PLR2004 (a role and a content)
        return (item[0], item[1])
    raise ValueError(f"{item!r} is not a chat message; give {{role: user, content: ...}}")


def render(prompt: PromptSpec, row: Mapping[str, Any], *, field: str) -> PromptSpec:
    """Fill the `{column}` placeholders of a prompt from a data row.

    Braces in the row's values stay as they are.

    Raises:
        DataError: A placeholder names a column that the row lacks.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            return match.group(0)[0]
        if name not in row:
            raise DataError(
                f"{field} asks for the column {name!r}, which the data does not have.",
                hint=f"{did_you_mean(name, list(row)) if row else 'No data was given; give some.'} "
                "Write {{ and }} for braces that are text.",
            )
        return text_of(row, name, field=field)

    return _map_texts(prompt, lambda text: _PLACEHOLDER.sub(value, text))


def _map_texts(prompt: PromptSpec, change: Callable[[str], str]) -> PromptSpec:
    """Change a prompt's text, or the content of each of its messages; token ids stay as they are."""
    if isinstance(prompt, str):
        return change(prompt)
    return tuple(item if isinstance(item, int) else (item[0], change(item[1])) for item in prompt)  # type: ignore[return-value]  # ids or messages


def text_of(row: Mapping[str, Any], column: str, *, field: str) -> str:
    """Return a data row's value as text.

    Raises:
        DataError: The value is missing, or holds half a character (a lone surrogate).
    """
    value = row[column]
    if is_missing(value):
        raise DataError(
            f"{field} uses the column {column!r}, which is missing here ({value!r}).",
            hint="Give it a value, or leave the row out: data.drop_missing: true.",
        )
    text = str(value)
    if problem := wrong_text(text):
        raise DataError(f"{field} uses the column {column!r}: {problem}.", hint="Correct the data.")
    return text


def placeholders(prompt: PromptSpec) -> list[str]:
    """List the columns that a prompt's placeholders name."""
    texts = [prompt] if isinstance(prompt, str) else [item[1] for item in prompt if not isinstance(item, int)]
    columns = (match[1] for text in texts for match in _PLACEHOLDER.finditer(text))
    return [*dict.fromkeys(filter(None, columns))]


def literal(prompt: PromptSpec) -> PromptSpec:
    """Escape the braces of a prompt, so that `render` returns the prompt unchanged."""
    return _map_texts(prompt, lambda text: text.replace("{", "{{").replace("}", "}}"))


def dump_prompt(prompt: PromptSpec) -> Any:
    """Convert a prompt to its YAML form: a text, a list of `{role, content}`, or a list of ids."""
    if isinstance(prompt, str):
        return prompt
    return [item if isinstance(item, int) else {"role": item[0], "content": item[1]} for item in prompt]


Prompt = Annotated[
    PromptSpec,
    BeforeValidator(parse_prompt),
    PlainSerializer(dump_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                array({"type": "integer"}),
                array(closed(role={"type": "string"}, content={"type": "string"})),
            ]
        }
    ),
]
