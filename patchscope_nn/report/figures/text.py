"""Text that a model wrote, made fit to be seen: no control characters, no markup, not too long.

Plotly reads its labels as a small HTML, and what a model says is not ours to trust, so all text passes
through `visible` (control characters become signs one can see) and is then escaped.
"""

from __future__ import annotations

import html
import re
import textwrap
import unicodedata

_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\u2028": "⏎", "\u2029": "⏎", "\x7f": "␡"}
_BIDI = "\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069"  # they would reorder the text around them
_UNSEEN = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{_BIDI}]")


def _sign(found: re.Match[str]) -> str:
    """One character as something that can be seen, and that can be written as UTF-8."""
    character = found[0]
    if "\ud800" <= character <= "\udfff":
        return "\ufffd"
    unnamed = chr(0x2400 + ord(character)) if character < " " else f"⟨U+{ord(character):04X}⟩"
    return _SIGNS.get(character, unnamed)


def visible(text: object, *, keep: str = "") -> str:
    """Text with its line breaks, control and direction characters shown as signs (⏎, ⇥, ␀, ⟨U+202E⟩).

    Args:
        text: Anything; None is the empty text.
        keep: Characters left as they are, such as a line break.

    Returns:
        Text that is safe to encode, though not yet to put into HTML.
    """
    if text is None:
        return ""
    return _UNSEEN.sub(lambda found: found[0] if found[0] in keep else _sign(found), str(text))


def _width(character: str) -> int:
    """Columns that one character takes: 0 for combining marks, 2 for wide ones such as emoji."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def text_width(text: str) -> int:
    """Columns that a text takes on a screen."""
    return len(text) if text.isascii() else sum(map(_width, text))


def shorten(text: object, *, width: int, tail: bool = False) -> str:
    """Visible text of at most `width` columns; what is cut off leaves an ellipsis.

    Args:
        text: Anything; None is the empty text.
        width: Columns, the ellipsis included.
        tail: Keep the end of the text instead of its beginning.
    """
    given = "" if text is None else str(text)
    # Cut before the slow work: a text may have thousands of characters, and thousands of marks on one.
    part = visible(given[-4 * width :] if tail else given[: 4 * width])
    if len(given) <= 4 * width and text_width(part) <= width:
        return part
    kept, room = "", width - 1
    for character in reversed(part) if tail else part:
        room -= _width(character)
        if room < 0:
            break
        kept = character + kept if tail else kept + character
    return f"…{kept}" if tail else f"{kept}…"


def token(text: object) -> str:
    """A token between quotes, so that its spaces are seen; isolated if it is written from the right."""
    shown = f"'{shorten(text, width=40)}'"
    turns = any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in shown)
    return f"\u2068{shown}\u2069" if turns else shown


def escape(text: str) -> str:
    """Text for plotly, which knows no entity for quotes."""
    return html.escape(text, quote=False)


def wrap(shown: str, *, width: int = 72) -> str:
    """Visible text, escaped, in lines of at most `width` characters."""
    return "<br>".join(map(escape, textwrap.wrap(shown, width=width, drop_whitespace=False)))
