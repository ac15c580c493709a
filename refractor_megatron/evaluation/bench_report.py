"""Table, verdicts, record and plot of ``refractor bench attention``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evidence import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The cost laws: spread of the time per pair, speed-up over dense, growth of memory, seconds to build the plan.
PAIR_SPREAD, SPEED_UP, SPEED_UP_AIM, GROWTH, BUILD = 0.35, 15.0, 20.0, 1.1, 0.100
SHORT_LAW, LONG_LAW, LONGEST_LAW = 4096, 65536, 131072


@dataclass(frozen=True)
class Row:
    """Medians at one length; seconds, bytes above a process of trivial length, None where not measured.

    ``forward`` and ``both`` (forward and backward) of the fabric and of dense attention, ``pooling`` in the larger mode
    measured; pairs per head.
    """

    length: int
    forward: float | None
    both: float | None
    dense_forward: float | None
    dense_both: float | None
    pooling: float | None
    visited: int
    causal: int
    heads: int
    build: float
    peak_forward: int
    peak_both: int | None
    dense_peak_forward: int | None
    dense_peak_both: int | None

    def per_pair(self, seconds: float | None) -> float | None:
        """Nanoseconds per visited pair of one head."""
        return None if seconds is None else seconds / (self.visited * self.heads) * 1e9

    @property
    def faster_forward(self) -> float | None:
        """How many times faster than dense, forward."""
        return None if self.forward is None or self.dense_forward is None else self.dense_forward / self.forward

    @property
    def faster(self) -> float | None:
        """How many times faster than dense, forward and backward."""
        return None if self.both is None or self.dense_both is None else self.dense_both / self.both

    @property
    def faster_with_pooling(self) -> float | None:
        """The same, with the making of the summaries in our time."""
        if self.both is None or self.dense_both is None or self.pooling is None:
            return None
        return self.dense_both / (self.both + self.pooling)


def rows_of(found: Sequence[dict[str, Any]], wall: bool) -> list[Row]:
    """One row per length from the answers of ``bench_measure``; ``wall``: wall instead of CPU seconds."""
    answers = {
        (r["subject"], r["length"], r["backward"]): a for a in found if (r := a["request"]) and not a["baseline"]
    }
    base = {(r["subject"], r["backward"]): a["peak"] for a in found if (r := a["request"]) and a["baseline"]}

    def seconds(key: tuple[str, int, bool], laps: str = "laps") -> float | None:
        if key not in answers or laps not in answers[key]:
            return None
        return float(statistics.median(lap[wall] for lap in answers[key][laps]))

    def peak(subject: str, length: int, backward: bool) -> int | None:
        answer = answers.get((subject, length, backward))
        return None if answer is None else max(0, answer["peak"] - base[subject, backward])

    rows = []
    for length in sorted({length for _, length, _ in answers}):
        ours = answers["fabric", length, False]
        backward = ("fabric", length, True) in answers
        row = Row(
            length=length,
            forward=seconds(("fabric", length, False)),
            both=seconds(("fabric", length, True)),
            dense_forward=seconds(("sdpa", length, False)),
            dense_both=seconds(("sdpa", length, True)),
            pooling=seconds(("fabric", length, backward), "pooling"),
            visited=ours["plan"]["visited"],
            causal=ours["plan"]["causal"],
            heads=ours["request"]["heads"],
            build=statistics.median(ours["plan"]["seconds"]),
            peak_forward=peak("fabric", length, False) or 0,
            peak_both=peak("fabric", length, True),
            dense_peak_forward=peak("sdpa", length, False),
            dense_peak_both=peak("sdpa", length, True),
        )
        rows.append(row)
    return rows


HEADER = (
    "length", "forward", "forward + backward", "dense forward", "dense forward + backward", "faster, forward",
    "faster, forward + backward", "pooling", "faster, pooling counted", "visited / causal", "ns per pair, forward",
    "ns per pair, forward + backward", "peak memory, forward", "peak memory, forward + backward",
    "dense peak memory, forward", "dense peak memory, forward + backward", "plan",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One row of the table as text."""
    times = (row.forward, row.both, row.dense_forward, row.dense_both)
    faster = (row.faster_forward, row.faster)
    per_pair = (row.per_pair(row.forward), row.per_pair(row.both))
    peaks = (row.peak_forward, row.peak_both, row.dense_peak_forward, row.dense_peak_both)
    return [
        short(row.length),
        *(_text(t, "{:.3g} s") for t in times),
        *(_text(f, "{:.1f}×") for f in faster),
        _text(row.pooling, "{:.3g} s"),
        _text(row.faster_with_pooling, "{:.1f}×"),
        f"{row.visited / row.causal:.3f}",
        *(_text(n, "{:.2f}") for n in per_pair),
        *(_text(_mebibytes(p), "{:.0f} MiB") for p in peaks),
        f"{row.build * 1e3:.1f} ms",
    ]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def short(length: int) -> str:
    """Tokens as a person writes them: 64k, 512."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def aligned(rows: Sequence[Row]) -> str:
    """The table for a terminal: one line a figure, one column a length."""
    columns = [list(HEADER), *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for parts in zip(*columns, strict=True):
        first = parts[0].ljust(widths[0])
        lines.append("  ".join([first, *(p.rjust(w) for p, w in zip(parts[1:], widths[1:], strict=True))]))
    return "\n".join(lines)


@dataclass(frozen=True)
class Law:
    """One cost law: what was found, and whether it holds (None: the lengths it needs were not measured)."""

    text: str
    found: str
    holds: bool | None

    def __str__(self) -> str:
        state = {True: "holds", False: "FAILS", None: "not measured"}[self.holds]
        return f"{state}: {self.text}" + (f" ({self.found})" if self.found else "")


def laws(rows: Sequence[Row]) -> list[Law]:
    """Verdicts on the requirements (specification section 4)."""
    by_length = {row.length: row for row in rows}
    low, high, longest = (by_length.get(length) for length in (SHORT_LAW, LONG_LAW, LONGEST_LAW))
    found = []
    pairs = [row.per_pair(row.both) for row in (low, high) if row is not None]
    spread = pairs[1] / pairs[0] if len(pairs) == 2 and pairs[0] and pairs[1] else None
    text = f"time per visited pair at {short(LONG_LAW)} within ±{PAIR_SPREAD:.0%} of {short(SHORT_LAW)}"
    found.append(_law(text, spread, "{:.2f} times", lambda x: abs(x - 1) <= PAIR_SPREAD))
    text = (
        f"forward + backward at {short(LONG_LAW)} at least {SPEED_UP:.0f}× faster than dense, aim {SPEED_UP_AIM:.0f}×"
    )
    found.append(_law(text, high.faster if high else None, "{:.1f}×", lambda x: x >= SPEED_UP))
    text = f"peak memory grows at most linearly with the length: exponent at most {GROWTH}"
    found.append(_law(text, growth(rows), "{:.2f}", lambda x: x <= GROWTH))
    text = f"plan of {short(LONG_LAW)} built in at most {BUILD * 1e3:.0f} ms, nothing cached"
    build = None if high is None else high.build * 1e3
    found.append(_law(text, build, "{:.1f} ms", lambda x: x <= BUILD * 1e3))
    runs = longest.forward if longest else None
    found.append(_law(f"forward of {short(LONGEST_LAW)} runs", runs, "{:.3g} s", lambda _: True))
    return found


def _law(text: str, value: float | None, form: str, test: Callable[[float], bool]) -> Law:
    return Law(text, "", None) if value is None else Law(text, form.format(value), test(value))


def growth(rows: Sequence[Row]) -> float | None:
    """Exponent of memory over length, by least squares on the logarithms of rows with a backward pass; None below
    two rows of a MiB or more."""
    points = [(math.log(r.length), math.log(r.peak_both)) for r in rows if r.peak_both and r.peak_both >= 2**20]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def body(rows: Sequence[Row], settings: str, clock: str, picture: str) -> str:
    """The record's text under its head."""
    facts = dict(zip(HEADER, zip(*(cells(row) for row in rows), strict=True), strict=True))
    lengths = facts.pop("length")
    figures = table(["", *lengths], [[name, *values] for name, values in facts.items()])
    verdicts = "\n".join(f"- {law}" for law in laws(rows))
    return (
        f"{settings}\n\nEvery figure comes from a process of its own. {clock} Dense is torch's flash attention, "
        "causal, on the same queries. Attention starts from ready keys; pooling makes the summaries from the tokens, "
        "with its backward pass where attention has one. Visited pairs are those that the block-sparse kernel "
        "computes, masked ones included, per head. Memory is the peak above that of the same program on 16 tokens. "
        f"The plan, in CPU seconds, is built once for all layers.\n\n{figures}\n{verdicts}\n\n"
        f"![time, time per pair, visited share and memory by length]({picture})\n"
    )


Line = tuple[str, str, str, list[float | None]]  # label, colour, dashes, a value for each row


def plot(rows: Sequence[Row], title: str, out: Path) -> None:
    """Four panels over the length: time, time per pair, visited share, memory. 1440 x 912 pixels."""
    from .report_plots import AMBER, INK, MUTED, RAW, styled_figure

    both, forward = "forward + backward", "forward"
    time: list[Line] = [
        (f"dense, {both}", MUTED, "-", [r.dense_both for r in rows]),
        (f"dense, {forward}", MUTED, "--", [r.dense_forward for r in rows]),
        (f"tri-tier, {both}", RAW, "-", [r.both for r in rows]),
        (f"tri-tier, {forward}", RAW, "--", [r.forward for r in rows]),
    ]
    per_pair: list[Line] = [
        (both, RAW, "-", [r.per_pair(r.both) for r in rows]),
        (forward, RAW, "--", [r.per_pair(r.forward) for r in rows]),
    ]
    share: list[Line] = [("tri-tier", RAW, "-", [r.visited / r.causal for r in rows])]
    memory: list[Line] = [
        (f"dense, {both}", MUTED, "-", [_mebibytes(r.dense_peak_both) for r in rows]),
        (f"dense, {forward}", MUTED, "--", [_mebibytes(r.dense_peak_forward) for r in rows]),
        (f"tri-tier, {both}", RAW, "-", [_mebibytes(r.peak_both) for r in rows]),
        (f"tri-tier, {forward}", RAW, "--", [_mebibytes(r.peak_forward) for r in rows]),
    ]
    with styled_figure(12, 7.6, pad=0.12) as figure:
        figure.suptitle(title, x=0.008, ha="left", fontsize=11.5, color=INK)
        lengths = [row.length for row in rows]
        axes = _panel(
            figure.add_subplot(2, 2, 1), "Time, and how many times faster", "seconds", lengths, time, log=True
        )
        for row in rows:
            if row.faster is not None:
                axes.annotate(
                    f"{row.faster:.1f}×", (row.length, row.dense_both), (0, 7), textcoords="offset points",
                    ha="center", color=AMBER, fontsize=9,
                )  # fmt: skip
        _panel(figure.add_subplot(2, 2, 2), "Time per visited pair and head", "nanoseconds", lengths, per_pair)
        _panel(figure.add_subplot(2, 2, 3), "Pairs visited over those of dense causal", "share", lengths, share)
        _panel(figure.add_subplot(2, 2, 4), "Peak memory", "MiB", lengths, memory, log=True)
        figure.savefig(out, format="png", dpi=120, metadata={"Software": None})


def _panel(axes: Axes, title: str, unit: str, lengths: Sequence[int], lines: Sequence[Line], log: bool = False) -> Axes:
    from matplotlib.ticker import FuncFormatter, LogLocator

    for label, color, dashes, values in lines:
        points = [(x, y) for x, y in zip(lengths, values, strict=True) if y]
        if points:
            axes.plot(*zip(*points, strict=True), dashes, color=color, marker="o", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    if log and axes.lines:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set(title=title, ylabel=unit, xlabel="tokens")
    if len(lines) > 1 and axes.lines:
        axes.legend(loc="best")
    return axes
