"""Text as the pictures' font can draw it, and how wide it gets."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

#: Stands for a character that the font lacks.
_MISSING = "□"


def drawable(text: str, bold: bool = False) -> str:
    """The text without control and direction characters, and with a box for what the font lacks."""
    return "".join(_character(character, bold) for character in text)


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of a line in pixels, for letters of ``size`` pixels."""
    font = _font(bold)
    font.set_size(size, 72)
    font.set_text(text, 0.0)
    return float(font.get_width_height()[0]) / 64


@cache
def _character(character: str, bold: bool) -> str:
    if unicodedata.category(character).startswith("C"):
        return ""
    return character if _font(bold).get_char_index(ord(character)) else _MISSING


@cache
def _font(bold: bool) -> FT2Font:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return get_font(findfont(FontProperties(weight="bold" if bold else "normal")))
