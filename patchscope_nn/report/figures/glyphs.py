"""Replace characters that no installed font can draw by their code points."""

from __future__ import annotations

from functools import cache

#: Matplotlib's own font, then fonts for other scripts, which are used if they are installed.
_FAMILIES = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic"),
    *("Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji"),
)


@cache
def families() -> list[str]:
    """Return the installed font families to use, in order of preference."""
    from matplotlib import font_manager

    known = {entry.name for entry in font_manager.fontManager.ttflist}
    return [name for name in _FAMILIES if name in known]


@cache
def _supported() -> frozenset[int]:
    """Return the code points that at least one of the families can draw."""
    from matplotlib import font_manager

    files = [font_manager.findfont(name) for name in families()]
    return frozenset(code for file in files for code in font_manager.get_font(file).get_charmap())


def printable(text: str) -> str:
    """Replace every character that no font can draw by its code point, such as ⟨U+6771⟩.

    Joiners and direction marks are invisible, and are removed.
    """
    kept = (letter for letter in text if letter not in "\u200d\ufe0e\ufe0f\u2066\u2067\u2068\u2069")
    return "".join(letter if ord(letter) in _supported() else f"⟨U+{ord(letter):04X}⟩" for letter in kept)
