"""Which tokens of one tokenizer stand for the same text as which of another's: by their character offsets."""

from __future__ import annotations

from patchscope_nn.errors import InputError
from patchscope_nn.spec.prompts import Encoded


def aligned(
    source: Encoded, target: Encoded, *, skip: int = 1, most: int | None = None
) -> list[tuple[int, int]]:
    """Pairs of positions whose tokens end at the same character of one text.

    Both models have then read exactly the same text up to there. Where several tokens of a side end at one
    character (the bytes of one letter), the last of them has read it. Special tokens cover no text.

    Args:
        source: The text as the source model reads it.
        target: The same text as the target model reads it.
        skip: How many tokens at the beginning are left out, on either side; position 0 is an attention sink
            in most models.
        most: How many tokens at the beginning are looked at, on either side; None for all.

    Returns:
        (n, 2) positions from the left, in order.

    Raises:
        InputError: The two do not read the same text, so that offsets cannot be compared.
    """
    if source.text != target.text:
        raise InputError(
            "the two tokenizers give different texts back for one text: their tokens cannot be aligned.",
            hint="Use models with fast tokenizers (tokenizers.json), which know character offsets.",
        )
    ends = [_ends(one, skip=skip, most=most) for one in (source, target)]
    return sorted((place, ends[1][end]) for end, place in ends[0].items() if end in ends[1])


def _ends(one: Encoded, *, skip: int, most: int | None) -> dict[int, int]:
    """Position by the character at which its token ends."""
    spans = list(enumerate(one.spans))[skip:most]
    return {end: place for place, (start, end) in spans if end > start}
