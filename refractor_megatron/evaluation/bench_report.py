"""Table, verdicts, record and plot of ``refractor bench attention``."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .bench_measure import LONG, SETTLE, Request
from .evidence import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The cost laws (specification section 4): spread of the time per pair, speed-up over dense, growth of memory, seconds
#: to build the plan.
PAIR_SPREAD, SPEED_UP, SPEED_UP_AIM, GROWTH, BUILD = 0.35, 15.0, 20.0, 1.1, 0.100
SHORT_LAW, LONG_LAW, LONGEST_LAW = 4096, 65536, 131072
#: Lengths are longer than this.
SHORTEST = 16
#: Memory is judged from this many bytes on: what a process holds besides moves by some MiB.
JUDGED = 64 * 2**20


@dataclass(frozen=True)
class Row:
    """Medians at one length; seconds, bytes above a settled process, None where not measured.

    ``forward`` and ``both`` (forward and backward) of tri-tier and of dense, and of the pooling of the summaries;
    ``cold``: which of these fields are one run without a warm-up; pairs per head.
    """

    length: int
    forward: float | None
    both: float | None
    dense_forward: float | None
    dense_both: float | None
    pooling_forward: float | None
    pooling_both: float | None
    cold: frozenset[str]
    visited: int
    causal: int
    heads: int
    build: float
    memory_forward: int | None
    memory_both: int | None
    dense_memory_forward: int | None
    dense_memory_both: int | None

    def per_pair(self, seconds: float | None) -> float | None:
        """Nanoseconds per visited pair of one head."""
        return None if seconds is None else seconds / (self.visited * self.heads) * 1e9

    @property
    def faster_forward(self) -> float | None:
        """How many times faster than dense, forward."""
        return _ratio(self.dense_forward, self.forward)

    @property
    def faster(self) -> float | None:
        """How many times faster than dense, forward and backward."""
        return _ratio(self.dense_both, self.both)

    @property
    def faster_forward_pooled(self) -> float | None:
        """Forward, with the making of the summaries in our time."""
        return _ratio(self.dense_forward, self.forward, self.pooling_forward)

    @property
    def faster_pooled(self) -> float | None:
        """Forward and backward, with the making of the summaries in our time."""
        return _ratio(self.dense_both, self.both, self.pooling_both)


def _ratio(dense: float | None, *ours: float | None) -> float | None:
    known = [seconds for seconds in ours if seconds is not None]
    return None if dense is None or len(known) < len(ours) else dense / sum(known)


def rows_of(found: Sequence[dict[str, Any]], wall: bool) -> list[Row]:
    """One row per length from the answers of ``bench_measure``; ``wall``: wall instead of CPU seconds."""
    answers = {(r["subject"], r["length"], r["backward"]): a for a in found if (r := a["request"])}
    rows = []
    for length in sorted({length for _, length, _ in answers}):
        seconds: dict[str, float] = {}
        memory: dict[str, int] = {}
        cold = set()
        for (subject, at, backward), answer in answers.items():
            if at != length:
                continue
            name = ("dense_" if subject == "dense" else "") + ("both" if backward else "forward")
            seconds[name] = statistics.median(lap[wall] for lap in answer["laps"])
            memory[name] = answer["memory"]
            cold |= {name} if answer["cold"] else set()
            if "pooling" in answer:
                seconds[f"pooling_{name}"] = statistics.median(lap[wall] for lap in answer["pooling"])
        ours = answers["tri-tier", length, False]
        row = Row(
            length=length,
            forward=seconds.get("forward"),
            both=seconds.get("both"),
            dense_forward=seconds.get("dense_forward"),
            dense_both=seconds.get("dense_both"),
            pooling_forward=seconds.get("pooling_forward"),
            pooling_both=seconds.get("pooling_both"),
            cold=frozenset(cold),
            visited=ours["plan"]["visited"],
            causal=ours["plan"]["causal"],
            heads=ours["request"]["heads"],
            build=statistics.median(lap[wall] for lap in ours["plan"]["laps"]),
            memory_forward=memory.get("forward"),
            memory_both=memory.get("both"),
            dense_memory_forward=memory.get("dense_forward"),
            dense_memory_both=memory.get("dense_both"),
        )
        rows.append(row)
    return rows


HEADER = (
    "length", "tri-tier forward", "tri-tier forward + backward", "dense forward", "dense forward + backward",
    "faster, forward", "faster, forward + backward", "pooling forward", "pooling forward + backward",
    "faster with pooling, forward", "faster with pooling, forward + backward", "visited / causal",
    "ns per pair, forward", "ns per pair, forward + backward", "tri-tier memory, forward",
    "tri-tier memory, forward + backward", "dense memory, forward", "dense memory, forward + backward", "plan",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One row of the table as text."""
    times = ("forward", "both", "dense_forward", "dense_both")
    faster = (row.faster_forward, row.faster)
    pooled = (row.faster_forward_pooled, row.faster_pooled)
    per_pair = (row.per_pair(row.forward), row.per_pair(row.both))
    memory = (row.memory_forward, row.memory_both, row.dense_memory_forward, row.dense_memory_both)
    return [
        short(row.length),
        *(_text(getattr(row, name), "{:.3g} s" + "*" * (name in row.cold)) for name in times),
        *(_text(f, "{:.1f}×") for f in faster),
        *(_text(t, "{:.3g} s") for t in (row.pooling_forward, row.pooling_both)),
        *(_text(f, "{:.1f}×") for f in pooled),
        f"{row.visited / row.causal:.3f}",
        *(_text(n, "{:.2f}") for n in per_pair),
        *(_text(None if m is None else mebibytes(m), "{:.0f} MiB") for m in memory),
        f"{row.build * 1e3:.1f} ms",
    ]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def mebibytes(size: int) -> float:
    """Bytes in MiB."""
    return size / 2**20


def short(length: int) -> str:
    """Tokens as a person writes them: 64k, 512."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def parse_lengths(text: str) -> list[int]:
    """``4k,512`` -> [512, 4096], ascending. Raises: ConfigError."""
    lengths = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})([kK]?)\s*", part)
        if match is None:
            mega = re.fullmatch(r"\s*(\d{1,6})[mM]\s*", part)
            way_out = f"k is the only unit: {int(mega[1]) * 1024}k" if mega else "write for example 4k,16k or 512"
            raise ConfigError(f"--lengths: '{part}' is not a number of tokens; {way_out}.")
        length = int(match[1]) * (1024 if match[2] else 1)
        if length <= SHORTEST:
            raise ConfigError(f"--lengths: {length} tokens are too few to measure; write more than {SHORTEST}.")
        lengths.add(length)
    return sorted(lengths)


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
    """One cost law: what was found, and whether it holds (None: not measured; ``found`` may say what it needs)."""

    text: str
    found: str
    holds: bool | None

    def __str__(self) -> str:
        state = {True: "holds", False: "FAILS", None: "not measured"}[self.holds]
        return f"{state}: {self.text}" + (f" ({self.found})" if self.found else "")


def laws(rows: Sequence[Row]) -> list[Law]:
    """Verdicts on the cost laws of specification section 4."""
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
    needs = f"needs two lengths, one twice the other, of at least {mebibytes(JUDGED):.0f} MiB"
    for mode, points in (
        ("forward", [(row.length, row.memory_forward) for row in rows]),
        ("forward + backward", [(row.length, row.memory_both) for row in rows]),
    ):
        text = f"{mode}: memory grows at most linearly with the length, exponent at most {GROWTH}"
        found.append(_law(text, growth(points), "{:.2f}", lambda x: x <= GROWTH, needs))
    text = f"plan of {short(LONG_LAW)} built in at most {BUILD * 1e3:.0f} ms, nothing cached"
    build = None if high is None else high.build * 1e3
    found.append(_law(text, build, "{:.1f} ms", lambda x: x <= BUILD * 1e3))
    runs = longest.forward if longest else None
    found.append(_law(f"forward of {short(LONGEST_LAW)} runs", runs, "{:.3g} s", lambda _: True))
    return found


def _law(text: str, value: float | None, form: str, test: Callable[[float], bool], needs: str = "") -> Law:
    return Law(text, needs, None) if value is None else Law(text, form.format(value), test(value))


def growth(points: Sequence[tuple[int, int | None]]) -> float | None:
    """Exponent of memory over length, by least squares on the logarithms of (tokens, bytes); None where fewer than two
    lengths, the longest twice the shortest, take ``JUDGED`` bytes."""
    judged = [(length, size) for length, size in points if size is not None and size >= JUDGED]
    if len(judged) < 2 or judged[-1][0] < 2 * judged[0][0]:
        return None
    logs = [(math.log(length), math.log(size)) for length, size in judged]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def keys_per_query(request: Request) -> float:
    """Legal keys of a query, on average over a plain document of ``request.length`` tokens, long beside the window."""
    near, linear = _keys(request)
    return near + linear * request.length


def _keys(request: Request) -> tuple[float, float]:
    """-> (keys whatever the length, keys for each token of the length)."""
    near = float(request.window + request.retrieved)
    if request.levels == 1:
        return near, request.summaries / (2 * request.block)
    # blocks of the query's own group, half of it on average, and of the whole group before it
    return near + 1.5 * request.fanout * request.summaries, request.summaries / (2 * request.block * request.fanout)


def scaling(request: Request) -> str:
    """The law of the keys per query in words, and from which length on the cost is quadratic."""
    near, linear = _keys(request)
    parts = [f"{request.window} of the window"]
    parts += [f"{request.retrieved} retrieved"] if request.retrieved else []
    if request.summaries and request.levels == 2:
        parts.append(f"{1.5 * request.fanout * request.summaries:.0f} summaries of near blocks (1.5·F·S)")
    if not linear:
        return f"A query reads about {' + '.join(parts)} keys at any length: the cost is linear in the length."
    formula = "S·L/2BF, F blocks in a group" if request.levels == 2 else "S·L/2B"
    parts.append(f"L/{1 / linear:.0f} summaries ({formula})")
    return (
        f"A query reads on average {' + '.join(parts)} keys at length L. The last term makes the cost quadratic, "
        f"{1 / (2 * linear):.0f} times below dense: it outweighs the others beyond {near / linear / 1024:.0f}k tokens. "
        f"The visited share tends to 1/{1 / (2 * linear):.0f}"
        + ("; `--levels 2` divides both by its fan-out." if request.levels == 1 else ".")
    )


def beside_dense(rows: Sequence[Row]) -> str:
    """A sentence on where tri-tier takes more memory than dense."""
    more = [
        f"{short(row.length)} {mode} ({mebibytes(ours):.0f} against {mebibytes(dense):.0f} MiB)"
        for row in rows
        for mode, ours, dense in (
            ("forward", row.memory_forward, row.dense_memory_forward),
            ("forward + backward", row.memory_both, row.dense_memory_both),
        )
        if ours is not None and dense is not None and ours > dense
    ]
    if not more:
        return "Tri-tier nowhere takes more memory than dense."
    return (
        f"Tri-tier takes more memory than dense at {', '.join(more)}: flash attention keeps no scores either, and "
        "tri-tier adds far keys, the plan and what pooling makes on its way."
    )


def _marks(rows: Sequence[Row]) -> str:
    """What the marks of the table mean, as far as they occur."""
    text = (
        f" `*` is one run without a warm-up, for it takes more than {LONG:.0f} s." if any(r.cold for r in rows) else ""
    )
    lacking = [short(row.length) for row in rows if row.both is None]
    if lacking:
        text += f" `-`: forward + backward is not measured at {', '.join(lacking)} on a CPU, for dense takes minutes."
    if any(row.pooling_forward is None for row in rows):
        text += " Pooling is `-` where there is no summary."
    return text


def _settling(request: Request) -> str:
    if request.device == "cuda":
        return "its self-test"
    return (
        f"a run of {SETTLE} tokens (above the peak of a small process, which its self-test sets, short lengths seem up "
        "to 40 MiB smaller than they are, so that forward seems to grow faster than linear)"
    )


def body(rows: Sequence[Row], request: Request, settings: str, clock: str, picture: str) -> str:
    """The record's text under its head; ``request``: any of those measured."""
    facts = dict(zip(HEADER, zip(*(cells(row) for row in rows), strict=True), strict=True))
    lengths = facts.pop("length")
    figures = table(["", *lengths], [[name, *values] for name, values in facts.items()])
    verdicts = "\n".join(f"- {law}" for law in laws(rows))
    return (
        f"{settings}\n\nEvery figure comes from a process of its own. {clock}{_marks(rows)} Dense is torch's flash "
        "attention, causal, on the same queries. Tri-tier starts from ready keys; pooling makes the summaries from the "
        "tokens, with its backward pass where it is named. Visited pairs are those that the kernel computes, masked "
        "ones included, per head. Memory is the peak of attention and of pooling, inputs included, above what the same "
        f"process holds after {_settling(request)}. The plan, made once for all layers, is all that the kernel needs "
        f"of the records, its lists of visits or tiles included.\n\n{figures}\n{verdicts}\n\n{beside_dense(rows)}\n\n"
        f"{scaling(request)}\n\n"
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
        (f"tri-tier, {both}", RAW, "-", [r.per_pair(r.both) for r in rows]),
        (f"tri-tier, {forward}", RAW, "--", [r.per_pair(r.forward) for r in rows]),
    ]
    share: list[Line] = [("tri-tier", RAW, "-", [r.visited / r.causal for r in rows])]
    sizes = [
        (f"dense, {both}", MUTED, "-", [r.dense_memory_both for r in rows]),
        (f"dense, {forward}", MUTED, "--", [r.dense_memory_forward for r in rows]),
        (f"tri-tier, {both}", RAW, "-", [r.memory_both for r in rows]),
        (f"tri-tier, {forward}", RAW, "--", [r.memory_forward for r in rows]),
    ]
    memory: list[Line] = [(a, b, c, [size and mebibytes(size) for size in values]) for a, b, c, values in sizes]
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
