"""The plots of a report. Each panel draws itself on given axes, so the HTML page and the picture show the same."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .report_data import Floats, RunData, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT, GRID = "#1f2933", "#66727f", "#c5ced8", "#e8ecf0"
RAW, EMA, AMBER = "#2458b3", "#c2410c", "#a16207"
#: Healthy range of the normalised router entropy (specification, section 6).
ENTROPY_BAND = (0.4, 0.8)
#: Points that a line keeps and columns that the heat map keeps; longer runs are averaged down to them.
MAX_POINTS, MAX_COLUMNS = 1500, 240

_STYLE: Any = {
    "font.size": 9.5, "axes.edgecolor": FAINT, "axes.labelcolor": MUTED, "axes.linewidth": 0.8, "text.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 3, "ytick.major.size": 0,
    "lines.linewidth": 1.6, "lines.solid_capstyle": "round", "legend.frameon": False, "legend.fontsize": 9,
    "figure.facecolor": "white", "svg.fonttype": "none", "svg.hashsalt": "refractor", "axes.titlelocation": "left",
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlecolor": INK, "axes.titlepad": 9,
}  # fmt: skip
#: Text in an SVG stays text; the reader's own interface font replaces matplotlib's default.
_FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Panel:
    """One plot: ``draw`` returns False, having drawn nothing, where the run did not record what it shows."""

    name: str
    title: str
    caption: str
    draw: Callable[[Axes, RunData], bool]


def draw_loss(axes: Axes, run: RunData) -> bool:
    """Training and held-out loss against the baselines, in bits per byte (nats per token if bytes are unknown)."""
    factor = run.bits_per_nat()
    scale = factor or 1.0
    steps, loss = run.series("lm_loss")
    if not len(steps):
        steps, loss = run.series("loss")
    held = {weights: run.held_out(weights) for weights in ("raw", "ema")}
    if not len(steps) and not any(len(x) for x, _ in held.values()):
        return False
    _trend(axes, steps, loss * scale, MUTED, "training")
    for weights, color in (("raw", RAW), ("ema", EMA)):
        x, y = held[weights]
        if len(x):
            name = "held-out, EMA weights" if weights == "ema" else "held-out, raw weights"
            axes.plot(x, y * scale, color=color, marker="o", markersize=3.4, label=name, zorder=4)
    lines = [
        (name, value * scale)
        for name in ("unigram", "bigram")
        if (value := number(run.baselines, name, "loss")) is not None
    ]
    for name, level in lines:
        axes.axhline(level, color=AMBER, linewidth=1.1, dashes=(5, 3), zorder=2)
        right = name == "unigram"  # the curve starts high and ends low: each label stands where it is not
        axes.annotate(
            f"{name} {level:.2f}", (right, level), (-2 if right else 4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right" if right else "left", va="bottom", color=AMBER, fontsize=9,
        )  # fmt: skip
    _limit_loss(axes, [y * scale for y in (loss, *(y for _, y in held.values()))], [level for _, level in lines])
    axes.set_ylabel("bits per byte" if factor else "nats per token")
    axes.legend(loc="upper right")
    return True


def _limit_loss(axes: Axes, curves: list[Floats], levels: list[float]) -> None:
    """Cut off the first steps' fall from log(vocabulary), which would squeeze everything of interest."""
    values = np.concatenate([*curves, np.array(levels)])
    low = float(values.min())
    high = min(float(values.max()), 1.25 * max([*levels, float(np.median(values))]))
    room = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - room, high + 2.5 * room)


def draw_lr(axes: Axes, run: RunData) -> bool:
    """Learning rate."""
    from matplotlib.ticker import FuncFormatter

    steps, values = run.series("lr")
    if not len(steps):
        return False
    _line(axes, steps, values, RAW)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_ylim(bottom=0)
    return True


def draw_grad_norm(axes: Axes, run: RunData) -> bool:
    """Gradient norm before clipping, with the clipping threshold."""
    steps, values = run.series("grad_norm")
    if not len(steps):
        return False
    _trend(axes, steps, values, RAW)
    clip = number(run.config, "train", "grad_clip") or 0.0
    positive = values[values > 0]
    near = len(positive) > 0 and 0 < clip <= 4 * positive.max()  # a threshold far above would flatten the curve
    if near:
        axes.axhline(clip, color=AMBER, linewidth=1.1, dashes=(5, 3))
    if clip > 0:
        place = {"xy": (1, clip), "xytext": (-2, 3), "xycoords": ("axes fraction", "data")}
        above = {"xy": (1, 1), "xytext": (-2, -11), "xycoords": "axes fraction"}
        axes.annotate(
            f"clip {clip:g}" if near else f"clip {clip:g}, above", **(place if near else above),
            textcoords="offset points", ha="right", color=AMBER, fontsize=9,
        )  # fmt: skip
    if len(positive) and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    return True


def draw_entropy(axes: Axes, run: RunData) -> bool:
    """Router entropy: mean over layers, the span of layers, and the healthy band."""
    steps, mean = run.series("router_entropy")
    if not len(steps):
        return False
    axes.axhspan(*ENTROPY_BAND, color="#e5f2ea", zorder=0)
    axes.annotate(
        "healthy band 0.4 to 0.8", (0, ENTROPY_BAND[0]), (5, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", color="#2f7a4d", fontsize=9,
    )  # fmt: skip
    layer_steps, layers = run.lists("router_entropy_layer")
    if len(layer_steps):
        x, rows = _reduce(layer_steps, layers, MAX_POINTS)
        axes.fill_between(x, rows.min(1), rows.max(1), color=RAW, alpha=0.14, linewidth=0, label="span of layers")
    _trend(axes, steps, mean, RAW, "mean of layers")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower right", ncols=2)
    return True


def draw_load(axes: Axes, run: RunData) -> bool:
    """Expert load over an even share, steps by experts."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    steps, rows = run.lists("expert_load")
    if not len(steps):
        return False
    rows = rows / np.maximum(rows.mean(1, keepdims=True), 1e-30)  # 1 is an even share, whatever the recorded scale
    x, rows = _reduce(steps, rows, MAX_COLUMNS)
    half = 0.5 * (x[-1] - x[0]) / max(1, len(x) - 1) or 0.5
    image = axes.imshow(
        rows.T, aspect="auto", origin="lower", interpolation="nearest", vmin=0, vmax=2,
        extent=(x[0] - half, x[-1] + half, -0.5, rows.shape[1] - 0.5),
        cmap=LinearSegmentedColormap.from_list("load", [RAW, "#a9c3ea", "#f7f7f5", "#f3b48c", EMA]),
    )  # fmt: skip
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel("expert")
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, ticks=[0, 1, 2])
    bar.ax.set_yticklabels(["0", "even", "2×"])
    bar.outline.set_visible(False)
    return True


def draw_throughput(axes: Axes, run: RunData) -> bool:
    """Tokens per second."""
    from matplotlib.ticker import FuncFormatter

    steps, values = run.series("tokens_per_s")
    if not len(steps):
        return False
    _trend(axes, steps, values, RAW)
    axes.set_ylim(0, 1.25 * float(np.quantile(values, 0.98)) or 1)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}")
    )
    return True


def draw_positions(axes: Axes, run: RunData) -> bool:
    """Held-out loss by position in the sequence: a model that uses its context falls to the right."""
    length = number(run.config, "train", "seq_len")
    drawn = False
    for weights, color in (("raw", RAW), ("ema", EMA)):
        parts = run.result(weights).get("by_position")
        if isinstance(parts, list) and parts and all(isinstance(part, int | float) for part in parts):
            centre = (np.arange(len(parts)) + 0.5) / len(parts) * (length or 100.0)
            name = "EMA weights" if weights == "ema" else "raw weights"
            axes.plot(centre, parts, color=color, marker="o", markersize=3.4, label=name)
            drawn = True
    if drawn:
        axes.set_xlim(0, length or 100)
        axes.set_xlabel("position in the sequence" if length else "position, % of the sequence")
        axes.set_ylabel("nats per token")
        axes.legend(loc="best")
    return drawn


LOSS = Panel(
    "loss", "Loss", "Training loss of each step (grey, smoothed over the raw values) and held-out loss, against a "
    "unigram and a bigram model of the same held-out tokens.", draw_loss,
)  # fmt: skip
PANELS = (
    Panel("lr", "Learning rate", "", draw_lr),
    Panel("grad_norm", "Gradient norm", "Global L2 norm before clipping.", draw_grad_norm),
    Panel(
        "entropy", "Router entropy", "Entropy of a token's expert probabilities over log(experts): 0 is "
        "certainty, 1 is indifference.", draw_entropy,
    ),
    Panel("load", "Expert load", "Tokens each expert got over an even share, mean of layers.", draw_load),
    Panel("throughput", "Tokens per second", "Training steps; evaluation and saving not counted.", draw_throughput),
    Panel(
        "positions", "Held-out loss by position", "Eight equal parts of the sequence, whole held-out split.",
        draw_positions,
    ),
)  # fmt: skip
#: The six plots of the picture.
PICTURE = (LOSS, *PANELS[:5])


def panel_svg(panel: Panel, run: RunData, width: float, height: float) -> str | None:
    """The panel as a standalone SVG document of ``width`` × ``height`` inches; None where nothing is recorded."""
    with styled_figure(width, height) as figure:
        axes = figure.add_subplot()
        if not panel.draw(axes, run):
            return None
        _finish(axes, run)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace("'DejaVu Sans'", _FONTS)


def data_uri(svg: str) -> str:
    """``svg`` as an image address that needs no other file."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def write_picture(run: RunData, title: str, out: Path) -> None:
    """Write `PICTURE` as one PNG of 2 × 3 panels, 1800 × 1000 pixels."""
    with styled_figure(15, 8.3, pad=0.12) as figure:
        figure.suptitle(title, x=0.008, ha="left", fontsize=11.5, color=INK)
        for number_, panel in enumerate(PICTURE, 1):
            axes = figure.add_subplot(2, 3, number_)
            if panel.draw(axes, run):
                _finish(axes, run)
            else:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "not recorded", ha="center", color=MUTED, transform=axes.transAxes)
            axes.set_title(panel.title)
        figure.savefig(out, format="png", dpi=120, metadata={"Software": None})


def position_axis(axes: Axes, buckets: Sequence[tuple[int, int]]) -> None:
    """Label the x axis 0, 1, ... with the buckets [first, last) of positions in the document."""
    axes.set_xticks(range(len(buckets)), [f"{first:,}–{last - 1:,}" for first, last in buckets])
    axes.set_xlim(-0.35, len(buckets) - 0.65)
    axes.set_xlabel("position in the document, tokens")


@contextmanager
def styled_figure(width: float, height: float, pad: float = 0.04) -> Iterator[Figure]:
    """A figure of ``width`` x ``height`` inches in the style of the reports, whatever the user's own settings."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the report
        matplotlib.rcParams.update(_STYLE)
        yield Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=pad, h_pad=pad))


def _finish(axes: Axes, run: RunData) -> None:
    from matplotlib.ticker import MaxNLocator

    if not axes.get_xlabel():
        axes.set_xlabel("step")
        records = [*run.steps, *run.evals]
        low, high = (extreme(float(record["step"]) for record in records) for extreme in (min, max))
        axes.set_xlim(low - 0.5, high + 0.5) if high - low < 2 else axes.set_xlim(low, high + 0.006 * (high - low))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))


def _line(axes: Axes, steps: Floats, values: Floats, color: str, label: str | None = None) -> None:
    x, y = _reduce(steps, values, MAX_POINTS)
    axes.plot(x, y, color=color, label=label, marker="o" if len(x) == 1 else "", zorder=3)


def _trend(axes: Axes, steps: Floats, values: Floats, color: str, label: str | None = None) -> None:
    """The values themselves, faint, under their running median."""
    if len(steps) >= 20:
        x, y = _reduce(steps, values, MAX_POINTS)
        axes.plot(x, y, color=color, alpha=0.28, linewidth=0.8, zorder=1)
        values = _running_median(values, max(5, len(values) // 50))
    if len(steps):
        _line(axes, steps, values, color, label)


def _running_median(values: Floats, width: int) -> Floats:
    half = width // 2
    padded = np.pad(values, half, mode="edge")
    result: Floats = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    return result


def _reduce(steps: Floats, values: Floats, limit: int) -> tuple[Floats, Floats]:
    """Mean over consecutive runs of records, so that at most ``limit`` of them remain."""
    if len(steps) <= limit:
        return steps, values
    starts = np.unique(np.linspace(0, len(steps), limit, endpoint=False).astype(int))
    sizes = np.diff(starts, append=len(steps))
    mean = np.add.reduceat(values, starts, axis=0) / (sizes if values.ndim == 1 else sizes[:, None])
    return np.add.reduceat(steps, starts) / sizes, mean
