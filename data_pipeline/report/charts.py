"""Charts as SVG inside the page: coloured by its style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.report.html import count, esc

#: Size in the units of the page where the chart stands beside another one.
WIDTH, HEIGHT = 520, 222
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 34, 40


@dataclass(frozen=True)
class Series:
    """``counts`` [bins] with the name in the legend and the class that colours it."""

    name: str
    kind: str
    counts: Sequence[float]


@dataclass(frozen=True)
class Histogram:
    """Stacked bars over ``edges`` [bins + 1]; ``marks``: (x, label) of vertical lines; ``label``: of the x axis."""

    title: str
    edges: Sequence[float]
    series: Sequence[Series]
    label: str
    logarithmic: bool = False
    marks: Sequence[tuple[float, str]] = ()
    unit: str = "documents"

    def svg(self) -> str:
        """The chart, with a legend if there are several series. It says in words what it shows."""
        if len(self.edges) < 2 or not any(sum(one.counts) for one in self.series):
            return ""
        self_top = max(sum(parts) for parts in zip(*(one.counts for one in self.series), strict=True))
        ticks = _nice(self_top)
        top = max(self_top, ticks[-1])
        parts = [self._grid(ticks, top), self._bars(top), self._axis(), *self._marks()]
        said = ", ".join(f"{one.name}: {count(sum(one.counts))} {self.unit}" for one in self.series)
        summary = f"{self.title}. {said}. {self.label} from {self.edges[0]:.4g} to {self.edges[-1]:.4g}."
        return (
            f'<figure>{self._legend()}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(summary)}">'
            f"{''.join(parts)}</svg></figure>"
        )

    def _legend(self) -> str:
        if len(self.series) < 2:
            return ""
        keys = "".join(
            f'<span><i class="{one.kind}"></i>{esc(one.name)} {count(sum(one.counts))}</span>' for one in self.series
        )
        return f'<div class="legend" aria-hidden="true">{keys}</div>'

    def _x(self, value: float) -> float:
        low, high = self.edges[0], self.edges[-1]
        share = (
            (math.log(max(value, 1e-300)) - math.log(low)) / (math.log(high) - math.log(low))
            if self.logarithmic
            else (value - low) / (high - low)
        )
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float, top: float) -> float:
        return HEIGHT - _BOTTOM - value / top * (HEIGHT - _TOP - _BOTTOM)

    def _grid(self, ticks: Sequence[float], top: float) -> str:
        return "".join(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{self._y(one, top):.1f}" '
            f'y2="{self._y(one, top):.1f}"/><text x="{_LEFT - 6}" y="{self._y(one, top) + 4:.1f}" '
            f'text-anchor="end">{_tick(one)}</text>'
            for one in ticks
        )

    def _bars(self, top: float) -> str:
        out = []
        for place in range(len(self.edges) - 1):
            left, right = self._x(self.edges[place]), self._x(self.edges[place + 1])
            held = 0.0
            for one in self.series:
                number = one.counts[place]
                if not number:
                    continue
                y, below = self._y(held + number, top), self._y(held, top)
                wide = max(0.6, right - left - 1)
                out.append(
                    f'<rect class="{one.kind}" x="{left + 0.5:.1f}" y="{y:.1f}" width="{wide:.1f}" '
                    f'height="{max(0.7, below - y):.1f}"><title>{self._span(place)}: {count(number)} {self.unit}'
                    f"{', ' + esc(one.name) if len(self.series) > 1 else ''}</title></rect>"
                )
                held += number
        return "".join(out)

    def _span(self, place: int) -> str:
        return f"{self.edges[place]:.3g} to {self.edges[place + 1]:.3g}"

    def _axis(self) -> str:
        base = HEIGHT - _BOTTOM
        ticks = self._log_ticks() if self.logarithmic else _between(self.edges[0], self.edges[-1])
        labels = "".join(
            f'<text x="{self._x(one):.1f}" y="{base + 16}" text-anchor="middle">{_tick(one)}</text>' for one in ticks
        )
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        return (
            f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>{labels}'
            f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{esc(self.label)}</text>'
        )

    def _marks(self) -> list[str]:
        """Lines with labels in two rows in turn, so that stages of nearly the same length can both be read."""
        out = []
        for place, (value, label) in enumerate(self.marks):
            if not self.edges[0] <= value <= self.edges[-1]:
                continue
            x, y = self._x(value), _TOP - 19 + 13 * (place % 2)
            end = x + 6.6 * len(label) + 6 > WIDTH
            out.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 10}" y2="{HEIGHT - _BOTTOM}"/>'
                f'<text class="mark" x="{x - 4 if end else x + 4:.1f}" y="{y}" '
                f'text-anchor="{"end" if end else "start"}">{esc(label)}</text>'
            )
        return out

    def _log_ticks(self) -> list[float]:
        low, high = math.log10(self.edges[0]), math.log10(self.edges[-1])
        powers = [10.0**power for power in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
        if len(powers) >= 3:
            return powers
        steps = [m * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
        return [one for one in steps if self.edges[0] <= one <= self.edges[-1]]


def _tick(value: float) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}\u202f{name}"
    return f"{value:g}"


def _nice(top: float) -> list[float]:
    """Two to four round numbers up to about ``top``, from 0."""
    step = _step(top / 3)
    return [step * k for k in range(int(top / step) + 1)]


def _between(low: float, high: float) -> list[float]:
    step = _step((high - low) / 7)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _step(size: float) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= size * (1 - 1e-9))
