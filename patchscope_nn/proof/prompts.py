"""Random prompts of a model's own vocabulary, and the lengths that its config names."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from patchscope_nn.models import Model

#: Names of config fields that hold a number of tokens beyond which a model computes differently.
_LENGTH = re.compile(r"window|chunk|local|floor|extent|span|original_max_position|block_size|max_seq")
#: Names that match, but do not hold a length in tokens.
_NO_LENGTH = re.compile(r"layers|pattern|ratio|theta|base_freq|vision|patch|image|audio|head|expert")
#: Names of config fields that hold the ids of special tokens.
_SPECIAL = re.compile(r"token_(id|index)$|_token$")
#: Kinds of rotary embedding whose factors do not depend on the length of the prompt.
_STATIC_ROPE = ("default", "linear", "yarn", "llama3", "proportional", "mrope")


class Numbers:
    """A tokenizer whose texts are token ids: the text ` 12 57` has the ids 12 and 57.

    It lets prompts of random ids go through the same compiler as a user's texts.
    """

    is_fast = False
    chat_template = None
    clean_up_tokenization_spaces = False

    def __init__(self, size: int, *, eos: int | None = None) -> None:
        self.size, self.eos_token_id = size, eos

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        """Encode a text; words that are not numbers have no token."""
        return {"input_ids": [int(word) for word in text.split() if word.isdecimal()]}

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: Sequence[int], **_options: Any) -> str:
        """Decode ids."""
        return as_text(ids)

    def get_vocab(self) -> dict[str, int]:
        """Its vocabulary, which no trial needs."""
        return {}


def as_text(ids: Sequence[int]) -> str:
    """Return ids as the text that `Numbers` encodes to them."""
    return "".join(f" {token}" for token in ids)


def random_ids(model: Model, count: int, *, seed: int, variant: int = 0) -> list[int]:
    """Random ids of a model's tokenizer, (count,), without special tokens.

    `variant` says which of several choices with the same seed.
    """
    # The config's are the ends of texts, padding and images.
    special = {
        *getattr(model.tokenizer, "all_special_ids", ()),
        *(
            value
            for name, value in _fields(model.module.config.to_dict())
            if isinstance(value, int) and _SPECIAL.search(name)
        ),
    }
    size = min(len(model.tokenizer), model.info.vocab_size)
    chooser = random.Random(f"{seed} {count} {variant}")  # noqa: S311 (a seeded choice, no secret)
    ordinary = [token for token in chooser.sample(range(size), min(size, 64)) if token not in special]
    return chooser.choices(ordinary or range(size), k=count)


def thresholds(model: Model) -> list[int]:
    """The lengths, in tokens and ascending, beyond which a model may compute differently, as its config says.

    Families differ in whether the length that a field names still belongs to the shorter ones. So each result
    is one token below the field.
    """
    config = model.module.config.get_text_config().to_dict()
    most = model.info.n_positions
    lengths = {
        value - 1
        for name, value in _fields(config)
        if isinstance(value, int)
        and not isinstance(value, bool)
        and _LENGTH.search(name)
        and not _NO_LENGTH.search(name)
        and value > 1
        and (most is None or value < most)
    }
    return sorted(lengths)


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of a config and of nested ones. Lengths of static rotary embeddings are left out."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            static = value.get("rope_type", value.get("type")) in _STATIC_ROPE
            inner = value.items() if not static else ((k, v) for k, v in value.items() if "position" not in k)
            yield from _fields(dict(inner))
        elif isinstance(value, list | tuple):
            yield from ((name, entry) for entry in value)
        elif isinstance(name, str):
            yield name, value
