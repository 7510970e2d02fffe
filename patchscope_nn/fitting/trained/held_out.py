"""What is fitted on, and what is kept apart to say how well the fit does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from patchscope_nn.errors import DataError
from patchscope_nn.spec.prompts import encode

Item = TypeVar("Item")


class Parts(NamedTuple, Generic[Item]):
    """Items, dealt out.

    Attributes:
        fitted: What is fitted on.
        stopping: What says when to stop, and chooses among settings; empty where nothing is chosen.
        held_out: What the reported numbers are computed on, and nothing else.
    """

    fitted: list[Item]
    stopping: list[Item]
    held_out: list[Item]

    def counts(self) -> dict[str, int]:
        """How many items each part has, by its name."""
        return {name: len(items) for name, items in self._asdict().items()}


def deal(
    items: Sequence[Item], *, held_out: float, seed: int, stopping: float = 0.0, what: str = "rows"
) -> Parts[Item]:
    """Deal items out at random; equal items are one, so that none is both fitted on and held out.

    Args:
        items: The items; hashable.
        held_out: The share that is held out, above 0 and below 1.
        seed: Decides which.
        stopping: The share that says when to stop.
        what: What messages call the items.

    Returns:
        The parts; those that are asked for hold one item or more.

    Raises:
        DataError: A share is no share, or there are too few items for one in each part.
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


def deal_texts(
    texts: Sequence[str],
    tokenizer: object,
    *,
    held_out: float,
    seed: int,
    stopping: float = 0.0,
    max_tokens: int,
    least: int,
) -> Parts[tuple[int, ...]]:
    """Tokenize texts and deal them out.

    Args:
        texts: The texts.
        tokenizer: A transformers tokenizer.
        held_out: As in `deal`.
        seed: As in `deal`.
        stopping: As in `deal`.
        max_tokens: How many tokens of a text are read; what comes after is left out.
        least: How many tokens a text needs; shorter ones are left out.

    Returns:
        Token ids, dealt out; texts that begin alike are one.

    Raises:
        DataError: As in `deal`; or all texts are too short.
    """
    encoded = [encode(text, tokenizer, field="a text").ids[:max_tokens] for text in texts if text]
    long = [ids for ids in encoded if len(ids) >= least]
    if not long:
        raise DataError(
            f"none of {len(texts)} texts has {least} tokens or more (the longest has "
            f"{max(map(len, encoded), default=0)}).",
            hint="Give longer texts, or skip fewer tokens at their beginning.",
        )
    return deal(
        long, held_out=held_out, seed=seed, stopping=stopping, what=f"texts of {least} tokens or more"
    )
