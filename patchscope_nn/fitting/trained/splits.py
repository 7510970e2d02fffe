"""Data split into a part to fit on, a part to stop or choose by, and a held-out part to score on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from patchscope_nn.errors import DataError
from patchscope_nn.spec.encoding import encode

Item = TypeVar("Item")


class Parts(NamedTuple, Generic[Item]):
    """Items, split.

    Attributes:
        fitted: The items to fit on.
        stopping: The items that decide when to stop, or choose among settings; empty if nothing is chosen.
        held_out: The items that scores are computed on, and nothing else.
    """

    fitted: list[Item]
    stopping: list[Item]
    held_out: list[Item]

    def counts(self) -> dict[str, int]:
        """The number of items in each part, by its name."""
        return {name: len(items) for name, items in self._asdict().items()}


def split_items(
    items: Sequence[Item], *, held_out: float, seed: int, stopping: float = 0.0, what: str = "rows"
) -> Parts[Item]:
    """Split items at random. Equal items count once, so that none is both fitted on and held out.

    `held_out` and `stopping` are shares; each part with a share above 0 has at least one item. Error messages
    call the items `what`.

    Raises:
        DataError: The shares leave nothing to fit on, or there are too few items for one in each part.
    """
    if not 0 < held_out < 1 or not 0 <= stopping < 1 - held_out:
        raise DataError(
            f"held_out={held_out} and stopping={stopping} leave nothing to fit on.",
            hint="Give shares of the data, for example 0.2 and 0.1.",
        )
    distinct = list(dict.fromkeys(items))
    mixed = random.Random(seed).sample(distinct, len(distinct))  # noqa: S311 (no secret)
    n_held = max(1, round(held_out * len(mixed)))
    n_stop = max(1, round(stopping * len(mixed))) if stopping else 0
    least = 2 + bool(stopping)
    if len(mixed) < max(least, n_held + n_stop + 1):
        raise DataError(
            f"{len(mixed)} different {what} are too few to fit on some and hold out others.",
            hint=f"Give at least {least}, and better some hundreds.",
        )
    return Parts(mixed[n_held + n_stop :], mixed[n_held : n_held + n_stop], mixed[:n_held])


def split_texts(
    texts: Sequence[str], tokenizer: object, *, max_tokens: int, least: int, **shares: Any
) -> Parts[tuple[int, ...]]:
    """Tokenize texts and split them with the `shares` of `split_items`.

    Texts are cut after `max_tokens`, and then those of fewer tokens than `least` are left out.

    Raises:
        DataError: As in `split_items`, or all texts are too short.
    """
    encoded = [encode(text, tokenizer, field="a text").ids[:max_tokens] for text in texts if text]
    long = [ids for ids in encoded if len(ids) >= least]
    if not long:
        raise DataError(
            f"none of {len(texts)} texts has {least} tokens or more (the longest has "
            f"{max(map(len, encoded), default=0)}).",
            hint="Give longer texts, or skip fewer tokens at their beginning.",
        )
    return split_items(long, what=f"texts of {least} tokens or more", **shares)
