"""Prompts: the texts, chats and token ids a model reads, and the target prompts of the paper.

A prompt may hold `{column}` placeholders, which a data row fills; `{{` and `}}` stand for braces.
Encoding one gives the token ids the model sees and, for every token, the characters it covers.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from patchscope_nn._util.plain import is_missing, wrong_text
from patchscope_nn.errors import DataError, InputError, did_you_mean

#: The few-shot description prompt of section 4.3; patch its last token, `x`.
DESCRIBE = (
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean "
    "multinational major appliance and consumer electronics corporation, x"
)
#: The token-identity prompt of section 4.1, as the authors' code has it; patch its last token, `?`.
IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"

#: The placeholder of a target prompt that no column fills: it stands for l.
PER_LAYER = "source_layer"

Message: TypeAlias = tuple[str, str]
PromptSpec: TypeAlias = str | tuple[int, ...] | tuple[Message, ...]

_log = logging.getLogger(__name__)
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
_ALLOWED = "a text, a list of chat messages ({role: user, content: ...}), or a list of token ids"


def parse_prompt(value: Any) -> PromptSpec:
    """Check the form of a prompt, before any tokenizer is known.

    Args:
        value: A text; a list of `{role, content}` messages; or a list of token ids.

    Returns:
        The prompt, hashable: messages become (role, content) pairs.

    Raises:
        ValueError: The value is none of these, or empty.
    """
    if isinstance(value, str):
        if not value:
            raise ValueError("is an empty text, which has no token to read or write")
        return value
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"{value!r} is no prompt; give {_ALLOWED}")
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return tuple(value)
    return tuple(_message(item) for item in value)


def _message(item: Any) -> Message:
    if isinstance(item, Mapping) and set(item) == {"role", "content"}:
        item = (item["role"], item["content"])
    if isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):  # noqa: PLR2004 (a role and a content)
        return (item[0], item[1])
    raise ValueError(f"{item!r} is no chat message; give {{role: user, content: ...}}")


def render(prompt: PromptSpec, row: Mapping[str, Any], *, field: str) -> PromptSpec:
    """Fill the `{column}` placeholders of a prompt from a data row.

    Args:
        prompt: What `parse_prompt` returned.
        row: Column names and values.
        field: The field's name, for messages.

    Returns:
        The prompt without placeholders; values are put in as they are, never read again as templates.

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

    if isinstance(prompt, str):
        return _PLACEHOLDER.sub(value, prompt)
    return tuple(  # type: ignore[return-value]  # ids stay ids, messages stay messages
        item if isinstance(item, int) else (item[0], _PLACEHOLDER.sub(value, item[1])) for item in prompt
    )


def text_of(row: Mapping[str, Any], column: str, *, field: str) -> str:
    """A data row's value as text.

    Args:
        row: Column names and values.
        column: A column of it.
        field: The name of the field that uses it, for messages.

    Raises:
        DataError: The value is missing, or holds half a character.
    """
    value = row[column]
    if is_missing(value):
        raise DataError(
            f"{field} uses the column {column!r}, which is missing here ({value!r}).",
            hint="Give it a value, or leave the row out: data.drop_missing: true.",
        )
    text = str(value)
    if problem := wrong_text(text):
        raise DataError(f"{field} uses the column {column!r}: {problem}.", hint="Mend the data.")
    return text


class _Recorder(dict[str, str]):
    """A data row that has every column and remembers which were asked for."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> str:
        self[key] = ""
        return ""


def placeholders(prompt: PromptSpec) -> list[str]:
    """The names of the columns a prompt asks for."""
    asked = _Recorder()
    render(prompt, asked, field="prompt")
    return list(asked)


def literal(prompt: PromptSpec) -> PromptSpec:
    """The prompt that `render` gives back as this one, whatever braces it holds."""
    if isinstance(prompt, str):
        return prompt.replace("{", "{{").replace("}", "}}")
    return tuple(  # type: ignore[return-value]  # as in render
        item if isinstance(item, int) else (item[0], str(literal(item[1]))) for item in prompt
    )


@dataclass(frozen=True)
class Encoded:
    """A prompt as one model reads it.

    Attributes:
        text: The prompt as text; a chat after its template, ids decoded.
        ids: (n_tokens,) token ids, special tokens included.
        spans: (n_tokens, 2) the characters of `text` each token covers, end left out.
        tokens: (n_tokens,) the text of each token; a special token that covers none, by its name.
        dropped: The names of the tokens that the tokenizer puts after a text, which `ids` does not hold.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    tokens: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def numbered(self, *, most: int = 40) -> str:
        """The tokens with their positions, `0 'The', 1 ' E', ...`, for messages."""
        shown = [f"{number} {token!r}" for number, token in enumerate(self.tokens[:most])]
        return ", ".join(shown) + (", ..." if len(self.ids) > most else "")


def encode(prompt: PromptSpec, tokenizer: Any, *, field: str) -> Encoded:
    """Tokenize a prompt as the model will see it.

    A text gets the special tokens that its tokenizer puts before it; those that it puts after a text are
    dropped, so that the prompt ends where its text ends. A chat goes through the tokenizer's chat template
    with the generation prompt; ids are taken as they are.

    Args:
        prompt: A prompt without placeholders.
        tokenizer: A transformers tokenizer.
        field: The field's name, for messages.

    Returns:
        The encoded prompt.

    Raises:
        InputError: The tokenizer has no chat template, an id is outside its vocabulary, or the prompt
            has no tokens.
    """
    if isinstance(prompt, str):
        encoded = _encode_text(prompt, tokenizer, special=True)
        if encoded.dropped:
            _log_once(dropped_notice(encoded.dropped))
    elif isinstance(prompt[0], int):
        encoded = _encode_ids(prompt, tokenizer, field=field)
    else:
        encoded = _encode_text(_chat_text(prompt, tokenizer, field=field), tokenizer, special=False)
    if not encoded.ids:
        raise InputError(f"{field}={prompt!r} has no tokens.", hint="Give a prompt with some text in it.")
    return encoded


def _chat_text(messages: tuple[Message, ...], tokenizer: Any, *, field: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{field} is a chat, and this model's tokenizer has no chat template.",
            hint="Give the prompt as text, or use a model tuned for chat.",
        )
    chat = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def _encode_text(text: str, tokenizer: Any, *, special: bool) -> Encoded:
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        end = len(ids) - (_n_added_after(tokenizer) if special else 0)
        return replace(_from_pieces(ids[:end], tokenizer), dropped=_names(ids[end:], tokenizer))
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    spans = tuple((int(start), int(end)) for start, end in found["offset_mapping"])
    ids = tuple(int(token) for token in found["input_ids"])
    # A token that was added covers no character of the text.
    ends_in_added = special and ids and spans[-1][0] == spans[-1][1]
    end = len(ids) - (_n_added_after(tokenizer) if ends_in_added else 0)
    tokens = (
        text[first:last] or tokenizer.decode([token])
        for token, (first, last) in zip(ids[:end], spans[:end], strict=True)
    )
    return Encoded(text, ids[:end], spans[:end], tuple(tokens), dropped=_names(ids[end:], tokenizer))


def _n_added_after(tokenizer: Any) -> int:
    """How many tokens a tokenizer puts after a text, whatever the text is."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    n_added = len(whole) - len(alone)
    return next((n for n in range(n_added + 1) if whole[n_added - n : len(whole) - n] == alone), 0)


def _names(ids: Sequence[int], tokenizer: Any) -> tuple[str, ...]:
    return tuple(decode([token], tokenizer) for token in ids)


def dropped_notice(names: tuple[str, ...]) -> str:
    """What a user should know where a tokenizer puts tokens after a text."""
    end = "".join(names)
    return (
        f"the tokenizer puts {end!r} after every text, and prompts are read without it: position -1 is the "
        f"last token of the text itself. Where the model should read {end!r}, end the prompt's text with it."
    )


@functools.cache
def _log_once(message: str) -> None:
    _log.warning(message)


def _encode_ids(ids: tuple[int, ...], tokenizer: Any, *, field: str) -> Encoded:
    size = len(tokenizer)
    wrong = [token for token in ids if not 0 <= token < size]
    if wrong:
        raise InputError(
            f"{field} holds token id {wrong[0]}, and this vocabulary has ids 0..{size - 1}.",
            hint="Give the prompt as text to have it tokenized.",
        )
    return _from_pieces(ids, tokenizer)


def _from_pieces(ids: Sequence[int], tokenizer: Any) -> Encoded:
    pieces = _names(ids, tokenizer)
    ends = tuple(itertools.accumulate(len(piece) for piece in pieces))
    spans = tuple((end - len(piece), end) for piece, end in zip(pieces, ends, strict=True))
    return Encoded("".join(pieces), tuple(int(token) for token in ids), spans, pieces)


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of token ids; an id that the tokenizer does not know is shown as `<id 151700>`.

    A model may have more ids than its tokenizer: embeddings are often padded to a round number.
    """
    parts = itertools.groupby(ids, key=lambda token: _knows(tokenizer, token))
    return "".join(
        tokenizer.decode(list(run)) if known else "".join(f"<id {token}>" for token in run)
        for known, run in parts
    )


def _knows(tokenizer: Any, token: int) -> bool:
    if not getattr(tokenizer, "is_fast", False):
        return token < len(tokenizer)
    return tokenizer.convert_ids_to_tokens(token) is not None


def continuation_ids(prompt: Encoded, continuation: str, tokenizer: Any, *, field: str) -> tuple[int, ...]:
    """The token ids a text gets when it stands after a prompt.

    Tokenizing it alone would add a word-start mark in some vocabularies; so prompt and text are tokenized
    together, and where the prompt's own tokens stay what they were, the rest is the answer.

    Args:
        prompt: The prompt it follows.
        continuation: The text.
        tokenizer: A transformers tokenizer.
        field: The field's name, for messages.

    Returns:
        (n,) token ids, n >= 1.

    Raises:
        InputError: The text has no tokens.
    """
    together = tuple(tokenizer(prompt.text + continuation, add_special_tokens=False)["input_ids"])
    alone = tuple(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
    ids = together[len(alone) :] if together[: len(alone)] == alone else ()
    ids = ids or tuple(tokenizer(continuation, add_special_tokens=False)["input_ids"])
    if not ids:
        raise InputError(f"{field}={continuation!r} has no tokens.", hint="Give a text that is not empty.")
    return ids


def dump_prompt(prompt: PromptSpec) -> Any:
    """A prompt as YAML holds it: a text, a list of `{role, content}`, or a list of ids."""
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
                {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
                        "required": ["role", "content"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]
