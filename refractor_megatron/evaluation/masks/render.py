"""Draws a ``Picture``: queries downwards, keys to the right, roles as bands along both axes, tiers in colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...distinction.roles import SCOPE_BITS
from .lettering import drawable, text_width
from .picture import Cell, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, ALARM = "#1f2933", "#66727f", "#c5ced8", "#b3261e"
#: Bands of roles in id order; further roles start over.
ROLE_COLOURS = ("#64748b", "#d99a2b", "#4f9d69", "#b8567c", "#3d94b8", "#a39b8f", "#7c6bb0", "#8a6d3b")
LOCAL, SUMMARY, RETRIEVED = "#1f4e79", "#3fa796", "#8a5cb8"
CELL_COLOURS = {
    Cell.FUTURE: "#ffffff",
    Cell.DOCUMENT: "#eef0f2",
    Cell.SEGMENT: "#d9dde2",
    Cell.RULE: "#f0a59c",
    Cell.UNREAD: "#f7efd2",
    Cell.SUMMARY: "#a9d9cf",
    Cell.LOCAL: LOCAL,
}
CELL_TEXT = {
    Cell.LOCAL: "read directly (local tier)",
    Cell.SUMMARY: "read inside a summary",
    Cell.UNREAD: "permitted, but in no tier",
    Cell.RULE: "forbidden by a rule",
    Cell.SEGMENT: "another segment",
    Cell.DOCUMENT: "another document",
    Cell.FUTURE: "later than the query",
}
_DPI = 100
#: Lengths in pixels at scale 1, where the matrix is about ``_SIDE`` wide.
_SIDE = 880
_MARGIN, _TITLE, _LABELS, _BAND, _GAP, _LEGEND = 28, 148, 214, 14, 8, 230
#: From one entry of the legend to the next, and from the last one to the next heading.
_ENTRY, _BLOCK = 21, 36
#: Sizes of title and subtitle.
_TITLE_SIZE, _SUBTITLE_SIZE = 19, 12


def save(picture: Picture, path: Path, title: str) -> None:
    """Writes the PNG."""
    figure = draw(picture, title)
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def draw(picture: Picture, title: str) -> Figure:
    """The figure, in whole pixels for each cell."""
    from matplotlib.figure import Figure

    title = drawable(_shortened(f"Who reads whom: {title}", 120), bold=True)
    page = _Page.of(picture, title, _subtitle(picture))
    figure = Figure(figsize=(page.width / _DPI, page.height / _DPI), dpi=_DPI, facecolor="white")
    _Drawing(figure, picture, page).everything(title)
    return figure


def _subtitle(picture: Picture) -> str:
    spec = picture.spec
    local = f"{spec.local.kind} window of {spec.local.window}"
    if spec.local.kind in ("dilated", "hybrid"):
        local += f", dilation {spec.local.dilation} in units of {spec.local.unit}"
    parts = [f"{_many(picture.length, picture.conversation.unit[:-1])}, one cell each", local]
    if spec.summary is not None:
        summaries = f"{_many(spec.summary.per_block, 'summary')} for every {_many(spec.summary.block_size, 'cell')}"
        if spec.summary.levels == 2:
            summaries += f" and for groups of {spec.summary.fanout} such blocks"
        parts.append(summaries)
    if spec.retrieved is not None:
        parts.append(f"{_many(spec.retrieved.fan_in, 'record')} for every {_many(spec.retrieved.chunk, 'cell')}")
    parts.append(f"rules {picture.rules.digest[:12]}")
    return "   ·   ".join(parts)


@dataclass(frozen=True)
class _Page:
    """Places in pixels from the top left corner. ``scale`` lets text and margins grow with the matrix."""

    scale: float
    cell: int
    far_cell: int
    left: int
    top: int
    side: int
    summary: int
    retrieved: int
    token_left: int
    width: int
    height: int

    @classmethod
    def of(cls, picture: Picture, title: str, subtitle: str) -> _Page:
        length = picture.length
        cell = max(1, min(16, round(_SIDE / length)))
        far_cell = max(cell, 4)
        side = cell * length
        scale = max(1.0, side / _SIDE)
        left = round(scale * (_MARGIN + _LABELS + _BAND + _GAP))
        top = round(scale * (_MARGIN + _TITLE))
        summary = far_cell * picture.summary.shape[1]
        retrieved = far_cell * picture.retrieved.shape[1]
        token_left = left + sum(width + round(2 * _GAP * scale) for width in (summary, retrieved) if width)
        width = token_left + side + round(scale * (3 * _GAP + _LEGEND + _MARGIN))
        lines = max(text_width(title, _TITLE_SIZE, bold=True), text_width(subtitle, _SUBTITLE_SIZE))
        width = max(width, round(scale * (2 * _MARGIN + lines)))
        legend = sum(_BLOCK + _ENTRY * len(entries) for _, entries in _legend_blocks(picture))
        height = top + max(side, round(scale * legend)) + round(scale * (_MARGIN + _BAND))
        return cls(scale, cell, far_cell, left, top, side, summary, retrieved, token_left, width, height)

    def px(self, length: float) -> int:
        """A length of the unscaled design in pixels."""
        return round(length * self.scale)


class _Drawing:
    """One figure in the making."""

    def __init__(self, figure: Figure, picture: Picture, page: _Page) -> None:
        self.figure, self.picture, self.page = figure, picture, page
        self.roles = picture.rules.roles
        self.messages = picture.conversation.messages

    def everything(self, title: str) -> None:
        """Title, bands, labels, the panels of the three tiers, and the legend."""
        page, band, gap = self.page, self.page.px(_BAND), self.page.px(_GAP)
        self._title(title)
        self._band(page.left - gap - band, page.top, band, page.side, upright=True)
        self._band(page.token_left, page.top - gap - band, page.side, band, upright=False)
        muted: dict[str, Any] = {"color": MUTED, "size": 10.5}
        self._text(page.left - gap - band / 2, page.top + page.side + page.px(13), "queries", ha="center", **muted)
        self._text(page.token_left + page.side + page.px(6), page.top - gap - band / 2, "keys", **muted)
        self._row_labels()
        self._column_labels()
        left = page.left
        for name, colour, mask, width in (
            ("summaries", SUMMARY, self.picture.summary, page.summary),
            ("retrieved", RETRIEVED, self.picture.retrieved, page.retrieved),
        ):
            if width:
                self._far_panel(left, width, mask, colour, name)
                left += width + page.px(2 * _GAP)
        self._token_panel()
        self._legend()

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes over a rectangle of the page, in its pixels, y downwards; nothing drawn yet."""
        page = self.page
        place = (left / page.width, 1 - (top + height) / page.height, width / page.width, height / page.height)
        axes = self.figure.add_axes(place)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.axis("off")
        return axes

    def _text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        """Text at a pixel of the page; size in pixels at scale 1, of an em."""
        page = self.page
        settings: dict[str, Any] = {"color": INK, "va": "center", "fontsize": size * page.scale * 72 / _DPI} | style
        # Words of a message are no TeX, whatever they hold.
        self.figure.text(x / page.width, 1 - y / page.height, text, parse_math=False, **settings)

    def _title(self, title: str) -> None:
        page = self.page
        self._text(page.px(_MARGIN), page.px(_MARGIN + 10), title, _TITLE_SIZE, fontweight="bold")
        self._text(page.px(_MARGIN), page.px(_MARGIN + 38), _subtitle(self.picture), _SUBTITLE_SIZE, color=MUTED)

    def _band(self, left: int, top: int, width: int, height: int, *, upright: bool) -> None:
        axes = self._axes(left, top, width, height)
        for message in self.messages:
            start, size = message.start * self.page.cell, (message.stop - message.start) * self.page.cell
            place = ((0, start), width, size) if upright else ((start, 0), size, height)
            _rectangle(axes, *place, facecolor=_role_colour(message.role), edgecolor="white", linewidth=0.8)

    def _row_labels(self) -> None:
        """Role, scopes and first words of each message, pushed apart where messages are short."""
        page, px = self.page, self.page.px
        right = page.left - px(_GAP + _BAND)
        centres = [page.top + (m.start + m.stop) / 2 * page.cell for m in self.messages]
        low, high = page.top + px(7), page.top + page.side - px(7)
        two_lines = _spread(centres, px(34), low + px(7), high - px(7))
        step, places = (1, two_lines) if two_lines else _spread_some(centres, px(13), low, high)
        leaders = self._axes(right - px(14), 0, px(14), page.height)
        for message, centre, y in zip(self.messages[::step], centres[::step], places, strict=True):
            leaders.plot([px(1), px(6), px(13)], [y, centre, centre], color=LINE, linewidth=0.8)
            first = y - px(8) if two_lines else y
            style = {"ha": "right", "fontweight": "bold"}
            self._text(right - px(20), first, self.roles[message.role], 12, color=_role_colour(message.role), **style)
            scopes = " ".join(f"+{_short(bit.name)}" for bit in SCOPE_BITS if message.bits & bit)
            beside = max(94, 30 + text_width(self.roles[message.role], 12, bold=True))
            self._text(right - px(beside), first, scopes, 9.5, color=ALARM, **style)
            if two_lines:
                text = _fitted(message.text, 10.5, _LABELS - 20)
                self._text(right - px(20), y + px(8), text, 10.5, color=MUTED, ha="right")

    def _column_labels(self) -> None:
        """Roles over the keys: level where every message is wide enough, else upright."""
        page, px = self.page, self.page.px
        top = page.top - px(_GAP + _BAND)
        centres = [page.token_left + (m.start + m.stop) / 2 * page.cell for m in self.messages]
        level = all((m.stop - m.start) * page.cell > px(9) * len(self.roles[m.role]) for m in self.messages)
        edge = page.token_left + page.side
        step, places = 1, centres
        if not level:
            step, places = _spread_some(centres, px(13), page.token_left + px(6), edge - px(6))
        leaders = self._axes(0, top - px(14), page.width, px(14))
        for message, centre, x in zip(self.messages[::step], centres[::step], places, strict=True):
            style: dict[str, Any] = {"color": _role_colour(message.role), "ha": "center", "fontweight": "bold"}
            if level:
                self._text(x, top - px(11), self.roles[message.role], 11, **style)
                continue
            leaders.plot([x, centre, centre], [px(2), px(9), px(13)], color=LINE, linewidth=0.8)
            self._text(x, top - px(16), self.roles[message.role], 11, rotation=90, va="bottom", **style)

    def _far_panel(self, left: int, width: int, mask: npt.NDArray[np.bool_], colour: str, name: str) -> None:
        page, px = self.page, self.page.px
        axes = self._axes(left, page.top, width, page.side)
        image = _rgb([("#ffffff", ~mask), (colour, mask)])
        axes.imshow(image, extent=(0, width, page.side, 0), interpolation="nearest", aspect="auto")
        self._boundaries(axes, keys=False)
        _frame(axes, width, page.side)
        summary, groups = self.picture.spec.summary, 0
        if name == "summaries" and summary is not None:
            groups = summary.counts(self.picture.length)[0] * page.far_cell
            if page.far_cell * summary.per_block >= 6:
                for x in range(0, width + 1, page.far_cell * summary.per_block):
                    axes.axvline(x, color=LINE, linewidth=0.5)
        labels = [(name, left, width)]
        if groups:  # summaries of groups stand before those of blocks
            axes.axvline(groups, color=INK, linewidth=1.2)
            labels = [("groups", left, groups), ("blocks", left + groups, width - groups)]
        narrow = any(size < px(64) for _, _, size in labels)
        y = page.top - px(_GAP) - (0 if narrow else px(_BAND) / 2)
        centres = [start + size / 2 for _, start, size in labels]
        places = _spread(centres, px(13), left - px(_GAP), left + width + px(_GAP)) or centres
        for (label, _, _), middle in zip(labels, places, strict=True):
            self._text(
                middle, y, label, 11, color=colour, ha="center", va="bottom" if narrow else "center",
                rotation=90 if narrow else 0, fontweight="bold",
            )  # fmt: skip

    def _token_panel(self) -> None:
        page, cells = self.page, self.picture.cells
        axes = self._axes(page.token_left, page.top, page.side, page.side)
        image = _rgb([(CELL_COLOURS[cell], cells == cell) for cell in Cell])
        axes.imshow(image, extent=(0, page.side, page.side, 0), interpolation="nearest", aspect="auto")
        self._boundaries(axes, keys=True)
        _frame(axes, page.side, page.side)

    def _boundaries(self, axes: Axes, *, keys: bool) -> None:
        """Thin lines between messages, dark ones between documents."""
        if self.page.side < 12 * len(self.messages):  # they would cover the cells
            return
        for before, message in zip(self.messages, self.messages[1:], strict=False):
            at = message.start * self.page.cell
            new = before.document != message.document
            style: dict[str, Any] = {"color": INK if new else "white", "linewidth": 1.2 if new else 0.9}
            axes.axhline(at, **style)
            if keys:
                axes.axvline(at, **style)

    def _legend(self) -> None:
        page, px = self.page, self.page.px
        left, y = page.token_left + page.side + px(3 * _GAP), page.top + px(6)
        axes = self._axes(left, 0, px(_LEGEND), page.height)
        for heading, entries in _legend_blocks(self.picture):
            self._text(left, y, heading, 12, fontweight="bold")
            for colour, text in entries:
                y += px(_ENTRY)
                _rectangle(axes, (0, y - px(7)), px(14), px(14), facecolor=colour, edgecolor=LINE, linewidth=0.6)
                self._text(left + px(22), y, text, 11.5)
            y += px(_BLOCK)


def _legend_blocks(picture: Picture) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings, each with its (colour, text) entries."""
    edges = picture.edges()
    tiers = [(LOCAL, f"local: {_many(edges['local'], 'edge')}")]
    if picture.summary.size:
        tiers.append((SUMMARY, f"summaries: {_many(edges['summary'], 'edge')}"))
    if picture.retrieved.size:
        tiers.append((RETRIEVED, f"retrieved: {_many(edges['retrieved'], 'edge')}"))
    present = [cell for cell in CELL_TEXT if (picture.cells == cell).any()]
    used = sorted({message.role for message in picture.conversation.messages})
    return [
        ("Keys that a query attends to", tiers),
        ("A query (row) and a cell (column)", [(CELL_COLOURS[cell], CELL_TEXT[cell]) for cell in present]),
        ("Roles", [(_role_colour(role), picture.rules.roles[role]) for role in used]),
    ]


def _role_colour(role: int) -> str:
    return ROLE_COLOURS[role % len(ROLE_COLOURS)]


def _short(bit: str | None) -> str:
    return str(bit).removesuffix("_SCOPE")


def _many(number: int, noun: str) -> str:
    plural = noun.removesuffix("y") + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun if number == 1 else plural}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _fitted(text: str, size: float, width: float) -> str:
    """The beginning of a text that is at most ``width`` wide, in pixels at scale 1."""
    most = 32
    text = drawable(text[: 4 * most])
    while text_width(_shortened(text, most), size) > width:
        most -= 1
    return _shortened(text, most)


def _spread_some(wanted: Sequence[float], gap: float, low: float, high: float) -> tuple[int, list[float]]:
    """(n, places of every n-th): n = 1 if all have room. n is odd, so that two roles in turn are both named."""
    for step in range(1, len(wanted) + 2, 2):
        places = _spread(wanted[::step], gap, low, high)
        if places is not None:
            return step, places
    raise AssertionError((gap, low, high))


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float] | None:
    """Places near the wanted ones (ascending), at least ``gap`` apart within [low, high]; None where too many."""
    if (len(wanted) - 1) * gap > high - low:
        return None
    places: list[float] = []
    for at in wanted:
        places.append(max(at, low, places[-1] + gap if places else low))
    limit = high
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def _rgb(layers: Sequence[tuple[str, npt.NDArray[np.bool_]]]) -> npt.NDArray[np.uint8]:
    """uint8 [rows, columns, 3] from colours and the cells they fill."""
    image = np.zeros((*layers[0][1].shape, 3), dtype=np.uint8)
    for colour, mask in layers:
        image[mask] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return image


def _rectangle(axes: Axes, corner: tuple[float, float], width: float, height: float, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(corner, width, height, **style))


def _frame(axes: Axes, width: float, height: float) -> None:
    _rectangle(axes, (0, 0), width, height, fill=False, edgecolor=LINE, linewidth=1.0, clip_on=False)
