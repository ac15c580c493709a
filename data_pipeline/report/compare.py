"""Two texts side by side, with what differs marked word by word."""

from __future__ import annotations

import difflib
import re

from data_pipeline.report.html import esc

#: A word, one sign of a script without spaces, white space, or any other sign.
_PIECE = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u0e00-\u0e7f\u3040-\u9fff\uac00-\ud7af]+|\s+|.",
    re.DOTALL,
)


def marked(one: str, other: str) -> tuple[str, str]:
    """Both texts as HTML: what only the first has in ``<del>``, what only the second has in ``<ins>``."""
    a, b = _PIECE.findall(one), _PIECE.findall(other)
    left, right = [], []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        gone, come = esc("".join(a[a0:a1])), esc("".join(b[b0:b1]))
        if kind == "equal":
            left.append(gone)
            right.append(come)
            continue
        left.append(f"<del>{gone}</del>" if gone else "")
        right.append(f"<ins>{come}</ins>" if come else "")
    return "".join(left), "".join(right)
