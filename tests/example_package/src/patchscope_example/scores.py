"""A column and a metric, which reads it."""

import patchscope_nn as ps


def first_word(columns, row) -> str | None:
    """The first word of a generated text; None where it has no word."""
    words = columns["text"].split()
    return words[0] if words else None


@ps.metric(title="Share of words that were said before", readout="generate", higher_is_better=False)
def repeated_words(columns, row):
    """How much a text repeats itself, 0..1; None where it has no word."""
    words = columns["text"].lower().split()
    return 1 - len(set(words)) / len(words) if words else None
