"""Pieces of the page. Whatever came from a corpus passes through ``esc``."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

#: Control characters, which HTML does not allow, as the pictures Unicode has of them; line ends and tabs stay.
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {
    13: None, 127: 0x2421, **{code: 0xFFFD for code in (*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)},
}  # fmt: skip
#: Characters that would turn the direction of the text around them.
_CONTROLS |= {code: 0xFFFD for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def visible(text: str) -> str:
    """Text without characters that would steer a terminal or a page."""
    return text.translate(_CONTROLS)


def esc(text: object) -> str:
    """Any text as HTML."""
    return html.escape(visible(str(text)))


def count(number: float) -> str:
    """A whole number with thousands parted by narrow spaces."""
    return f"{number:,.0f}".replace(",", "\u202f")


def short(number: float) -> str:
    """A number of tokens or documents in three figures."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.{max(0, 2 - int(math.log10(number / size)))}f}\u202f{name}"
    return f"{number:.0f}"


def percent(share: float) -> str:
    """A share 0..1; never 0 for what is there, nor 100 for what is not all."""
    if 0 < share < 0.0005:
        return "<\u202f0.1\u202f%"
    if 0.9995 <= share < 1:
        return ">\u202f99.9\u202f%"
    return f"{100 * share:.1f}\u202f%" if share < 1 else "100\u202f%"


def figure(value: float | None) -> str:
    """A score or threshold."""
    if value is None:
        return "–"
    return count(value) if abs(value) >= 1000 else f"{value:.3g}"


def bar(share: float, tick: float | None = None, kind: str = "") -> str:
    """A bar of ``share`` 0..1 of its cell, with a mark at ``tick``. Its number stands beside it, so it is hidden from
    readers of the screen."""
    mark = "" if tick is None else f'<i style="left:{100 * min(1.0, tick):.2f}%"></i>'
    return (
        f'<span class="bar {kind}" aria-hidden="true"><b style="width:{100 * min(1.0, share):.2f}%"></b>{mark}</span>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), kind: str = "") -> str:
    """A table of cells that are HTML already; the first column names the row. ``numbers``: columns set to the right."""

    def cell(place: int, value: str, tag: str = "td") -> str:
        if tag == "td" and place == 0:
            return f'<th scope="row"{" class=n" if place in numbers else ""}>{value}</th>'
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{' class=n' if place in numbers else ''}>{value}</{tag}>"

    body = "".join("<tr>" + "".join(cell(i, one) for i, one in enumerate(row)) + "</tr>" for row in rows)
    top = "".join(cell(i, esc(one), "th") for i, one in enumerate(head))
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def long_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int], limit: int, what: str, kind: str = ""
) -> str:
    """As ``table``, with the rows beyond ``limit`` behind a line that opens them."""
    if len(rows) <= limit + 2:
        return table(head, rows, numbers, kind)
    rest = details(f"{len(rows) - limit} more {esc(what)}", table(head, rows[limit:], numbers, kind))
    return table(head, rows[:limit], numbers, kind) + rest


def details(summary: str, body: str, is_open: bool = False) -> str:
    """``body`` behind a line that opens it; both are HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{body}</details>"


def note(text: str) -> str:
    """A remark in small print; ``text`` is HTML."""
    return f'<p class="note">{text}</p>'


def listed(reasons: dict[str, int], limit: int = 4) -> str:
    """``12 this, 3 that`` as HTML, most first."""
    rows = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    said = [f"<b>{count(number)}</b>&nbsp;{esc(reason)}" for reason, number in rows[:limit]]
    if rest := rows[limit:]:
        said.append(f"<b>{count(sum(number for _, number in rest))}</b>&nbsp;by {len(rest)} more reasons")
    return ", ".join(said)
