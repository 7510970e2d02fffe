"""Which characters the fonts of this machine can draw: for the rest stands their code."""

from __future__ import annotations

from functools import cache

#: Matplotlib's own font, then those that have the letters of other scripts, where they are installed.
_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
)


@cache
def families() -> list[str]:
    """The font families to use, in order; at least matplotlib's own."""
    from matplotlib import font_manager

    known = {entry.name for entry in font_manager.fontManager.ttflist}
    return [name for name in _FAMILIES if name in known]


@cache
def _drawn() -> frozenset[int]:
    """The code points that one of the families has."""
    from matplotlib import font_manager

    files = [font_manager.findfont(name) for name in families()]
    return frozenset(code for file in files for code in font_manager.get_font(file).get_charmap())


def printable(text: str) -> str:
    """A text in which what no font has is written as its code, such as ⟨U+6771⟩.

    Joiners and direction marks, which draw nothing, are left out.
    """
    kept = (one for one in text if one not in "\u200d\ufe0e\ufe0f\u2066\u2067\u2068\u2069")
    return "".join(one if ord(one) in _drawn() else f"⟨U+{ord(one):04X}⟩" for one in kept)
