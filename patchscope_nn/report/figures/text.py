"""Make model output safe to display: no control characters, no markup, limited length.

Plotly interprets its labels as HTML, and model output is untrusted. So all text passes through `visible`,
which replaces control characters by visible signs, and is then escaped.
"""

from __future__ import annotations

import html
import re
import textwrap
import unicodedata
from collections.abc import Iterable

_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\u2028": "⏎", "\u2029": "⏎", "\x7f": "␡"}
_BIDI = "\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069"  # these reorder the text around them
_UNSEEN = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{_BIDI}]")


def _sign(match: re.Match[str]) -> str:
    """Return a visible sign for a character, which can be encoded as UTF-8."""
    character = match[0]
    if "\ud800" <= character <= "\udfff":
        return "\ufffd"
    unnamed = chr(0x2400 + ord(character)) if character < " " else f"⟨U+{ord(character):04X}⟩"
    return _SIGNS.get(character, unnamed)


def visible(text: object, *, keep: str = "") -> str:
    """Replace line breaks, control and direction characters by visible signs (⏎, ⇥, ␀, ⟨U+202E⟩).

    Returns:
        Text that can be encoded as UTF-8 (empty for None), with the characters in `keep` unchanged. It must
        still be escaped for HTML.
    """
    if text is None:
        return ""
    return _UNSEEN.sub(lambda match: match[0] if match[0] in keep else _sign(match), str(text))


def listed(words: Iterable[object]) -> str:
    """Join visible texts as `a, b and c`; empty for none."""
    *first, last = [visible(word) for word in words] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _width(character: str) -> int:
    """Return the columns that a character takes: 0 for combining marks, 2 for wide ones such as emoji."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def text_width(text: str) -> int:
    """Return the number of columns that a text takes on a screen."""
    return len(text) if text.isascii() else sum(map(_width, text))


def shorten(text: object, *, width: int, tail: bool = False) -> str:
    """Cut visible text to `width` columns: its end, or with `tail` its beginning, becomes an ellipsis."""
    full = "" if text is None else str(text)
    if len(full) <= width and full.isascii() and full.isprintable():
        return full
    # Cut first, for speed: a text may have thousands of characters, or of combining marks on one of them.
    part = visible(full[-4 * width :] if tail else full[: 4 * width])
    if len(full) <= 4 * width and text_width(part) <= width:
        return part
    kept, room = "", width - 1
    for character in reversed(part) if tail else part:
        room -= _width(character)
        if room < 0:
            break
        kept = character + kept if tail else kept + character
    return f"…{kept}" if tail else f"{kept}…"


def token(text: object) -> str:
    """Quote a token, which makes its spaces visible; right-to-left text is isolated from its surroundings."""
    quoted = f"'{shorten(text, width=40)}'"
    right_to_left = not quoted.isascii() and any(
        unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in quoted
    )
    return f"\u2068{quoted}\u2069" if right_to_left else quoted


def escape(text: str) -> str:
    """Escape text for plotly, which does not decode entities for quotes."""
    return html.escape(text, quote=False)


def wrap(text: str, *, width: int = 72) -> str:
    """Break visible text into lines of at most `width` characters, escaped."""
    if len(text) <= width and text.isprintable():  # nothing to break or to replace; most lines are short
        return escape(text)
    return "<br>".join(map(escape, textwrap.wrap(text, width=width, drop_whitespace=False)))
