"""Values from users: converting numbers of numpy, torch and pandas, missing values, and invalid texts."""

from __future__ import annotations

import locale
import sys
from typing import Any

_HALVES = range(0xD800, 0xE000)
#: Python decodes a byte that is invalid in its locale to one of these.
_UNDECODED = range(0xDC80, 0xDD00)
_SHOWN = 80


def shown(value: Any) -> str:
    """Return a value's `repr` for messages, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def plain(value: Any) -> Any:
    """Convert numbers and arrays of numpy, torch and pandas to Python's own numbers and lists.

    Args:
        value: Anything. Items of lists, tuples and dictionaries are converted; other objects are unchanged.

    Returns:
        The value: an array or a tensor becomes a list, an array scalar a number.

    Raises:
        ValueError: A text cannot be encoded (see `wrong_text`).
    """
    if isinstance(value, str):
        if problem := wrong_text(value):
            raise ValueError(problem)
        return value
    if hasattr(value, "tolist") and not isinstance(value, type):
        return value.tolist()
    kind = type(value)
    if kind is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    return kind(plain(item) for item in value) if kind in (list, tuple) else value


def is_missing(value: Any) -> bool:
    """True for a missing value: None, NaN, pandas' NA or NaT."""
    if value is None:
        return True
    try:
        return bool(value != value)  # noqa: PLR0124 (only NaN and NaT differ from themselves)
    except (ArithmeticError, TypeError, ValueError):  # an array, which is not missing; or NA, which is
        return type(value).__name__ == "NAType"


def wrong_text(text: str) -> str:
    """Describe the problem of a text with half a character (a lone surrogate); empty for a valid text."""
    if text.isascii():
        return ""
    half = next((char for char in text if ord(char) in _HALVES), None)
    if half is None:
        return ""
    quoted = ascii(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    if ord(half) not in _UNDECODED:
        return f"{quoted} holds half a character, {half!a}, which no tokenizer can read; write it whole"
    return (
        f"{quoted} holds bytes that are not text in the locale {locale.setlocale(locale.LC_CTYPE)!r} "
        f"({sys.getfilesystemencoding()}). Give it as UTF-8, in Python's UTF-8 mode (set PYTHONUTF8=1) or in "
        "a locale such as LC_ALL=C.UTF-8"
    )
