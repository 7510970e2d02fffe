"""Values from outside: numbers of numpy, torch and pandas made plain; missing values; texts that are none."""

from __future__ import annotations

import locale
import sys
from typing import Any

_HALVES = range(0xD800, 0xE000)
#: Python decodes a byte that its locale does not know to one of these.
_UNDECODED = range(0xDC80, 0xDD00)
_SHOWN = 80


def shown(value: Any) -> str:
    """A value as messages show it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def plain(value: Any) -> Any:
    """A value with Python's own numbers and lists in the place of numpy's, torch's and pandas'.

    Args:
        value: Anything. Lists, tuples and dictionaries are looked into; other objects stay what they are.

    Returns:
        The value: an array or a tensor becomes a list, an array scalar a number.

    Raises:
        ValueError: A text is none that can be read or written (see `wrong_text`).
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
    """Whether a value stands for nothing: None, NaN, pandas' NA or NaT."""
    if value is None:
        return True
    try:
        return bool(value != value)  # noqa: PLR0124 (what NaN and NaT are told by)
    except (ArithmeticError, TypeError, ValueError):  # an array, which is a value; or NA, which is not
        return type(value).__name__ == "NAType"


def wrong_text(text: str) -> str:
    """What is wrong with a text that holds half a character (a lone surrogate); empty for any other."""
    if text.isascii():
        return ""
    half = next((char for char in text if ord(char) in _HALVES), None)
    if half is None:
        return ""
    quoted = ascii(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    if ord(half) not in _UNDECODED:
        return f"{quoted} holds half a character, {half!a}, which no tokenizer can read; write it whole"
    return (
        f"{quoted} holds bytes that are no text in the locale {locale.setlocale(locale.LC_CTYPE)!r} "
        f"({sys.getfilesystemencoding()}). Give it as UTF-8, in Python's UTF-8 mode (set PYTHONUTF8=1) or in "
        "a locale such as LC_ALL=C.UTF-8"
    )
