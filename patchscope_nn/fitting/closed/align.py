"""Alignment of two tokenizers: which of their tokens end at the same character of a text."""

from __future__ import annotations

from patchscope_nn.errors import InputError
from patchscope_nn.spec.encoding import Encoded


def aligned(
    source: Encoded, target: Encoded, *, skip: int = 1, most: int | None = None
) -> list[tuple[int, int]]:
    """Pairs of positions whose tokens end at the same character of one text.

    Up to such a position both models have read exactly the same text. If several tokens of one side end at
    the same character (the bytes of one letter), the last of them is used. Special tokens cover no text.

    The first `skip` tokens are left out on either side, because position 0 is an attention sink in most
    models. No token after the first `most` is considered.

    Returns:
        (source position, target position) pairs from the left, in order.

    Raises:
        InputError: The two tokenizers give different texts back, so that offsets cannot be compared.
    """
    if source.text != target.text:
        raise InputError(
            "the two tokenizers give different texts back for one text, so their tokens cannot be aligned.",
            hint="Use models with fast tokenizers (tokenizers.json), which know character offsets.",
        )
    source_ends, target_ends = (_ends(encoded, skip=skip, most=most) for encoded in (source, target))
    return sorted((position, target_ends[end]) for end, position in source_ends.items() if end in target_ends)


def _ends(encoded: Encoded, *, skip: int, most: int | None) -> dict[int, int]:
    """The position of a token, by the character at which it ends."""
    spans = list(enumerate(encoded.spans))[skip:most]
    return {end: position for position, (start, end) in spans if end > start}
