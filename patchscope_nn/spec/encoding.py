"""Encoding prompts: the token ids a model reads and, for every token, the characters it covers."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from patchscope_nn.errors import InputError
from patchscope_nn.spec.prompts import Message, PromptSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """A prompt as one model reads it.

    Attributes:
        text: The prompt as text: a chat with its template applied, token ids decoded.
        ids: (n_tokens,) token ids, special tokens included.
        spans: (n_tokens, 2) the range of characters of `text` that each token covers, without its end.
        tokens: (n_tokens,) the text of each token; for a special token that covers no characters, its name.
        dropped: The names of the tokens that the tokenizer adds after a text, which `ids` does not include.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    tokens: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def numbered(self, *, most: int = 40) -> str:
        """Format the tokens with their positions, `0 'The', 1 ' E', ...`, for messages."""
        parts = [f"{number} {token!r}" for number, token in enumerate(self.tokens[:most])]
        return ", ".join(parts) + (", ..." if len(self.ids) > most else "")


def encode(prompt: PromptSpec, tokenizer: Any, *, field: str) -> Encoded:
    """Tokenize a prompt as the model reads it.

    A text gets the special tokens that its tokenizer adds before a text. Those that it adds after a text are
    dropped, so that the prompt ends with its text. A chat is formatted by the tokenizer's chat template with
    the generation prompt. Token ids are used unchanged. `field` is the prompt's name in messages.

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
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    spans = tuple((int(start), int(end)) for start, end in encoding["offset_mapping"])
    ids = tuple(int(token) for token in encoding["input_ids"])
    # An added token covers no characters of the text.
    ends_in_added = special and ids and spans[-1][0] == spans[-1][1]
    end = len(ids) - (_n_added_after(tokenizer) if ends_in_added else 0)
    tokens = (
        text[first:last] or tokenizer.decode([token])
        for token, (first, last) in zip(ids[:end], spans[:end], strict=True)
    )
    return Encoded(text, ids[:end], spans[:end], tuple(tokens), dropped=_names(ids[end:], tokenizer))


def _n_added_after(tokenizer: Any) -> int:
    """Count the tokens that a tokenizer adds after every text."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    n_added = len(whole) - len(alone)
    return next((n for n in range(n_added + 1) if whole[n_added - n : len(whole) - n] == alone), 0)


def _names(ids: Sequence[int], tokenizer: Any) -> tuple[str, ...]:
    return tuple(decode([token], tokenizer) for token in ids)


def dropped_notice(names: tuple[str, ...]) -> str:
    """Return the notice for users of a tokenizer that adds tokens after a text."""
    end = "".join(names)
    return (
        f"the tokenizer adds {end!r} after every text, and prompts are read without it: position -1 is the "
        f"last token of the text itself. If the model should read {end!r}, end the prompt's text with it."
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
    spans = itertools.pairwise(itertools.accumulate(map(len, pieces), initial=0))
    return Encoded("".join(pieces), tuple(map(int, ids)), tuple(spans), pieces)


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """Decode token ids to text. An id that is not in the tokenizer's vocabulary becomes `<id 151700>`.

    A model may have more ids than its tokenizer, because embeddings are often padded to a round number.
    """

    def is_known(token: int) -> bool:
        if not getattr(tokenizer, "is_fast", False):
            return token < len(tokenizer)
        return tokenizer.convert_ids_to_tokens(token) is not None

    return "".join(
        tokenizer.decode(list(run)) if known else "".join(f"<id {token}>" for token in run)
        for known, run in itertools.groupby(ids, key=is_known)
    )


def continuation_ids(prompt: Encoded, continuation: str, tokenizer: Any, *, field: str) -> tuple[int, ...]:
    """Return the token ids of a text that follows a prompt.

    In some vocabularies a text that is tokenized alone begins with a word-start mark. So prompt and text are
    tokenized together, and the ids after the prompt's own are returned. If tokenizing them together changes
    the prompt's own ids, the text is tokenized alone.

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
