"""The record of ``tools/tiers.py``: Markdown, JSON and a picture.

python tools/tiers_report.py outbox/benchmarks/tiers.json      (text and picture again, from the recorded losses)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.evaluation.evidence import record, table
from refractor_megatron.evaluation.position import Bucket, confidence
from refractor_megatron.evaluation.report_plots import FAINT, MUTED, position_axis, styled_figure

Floats = npt.NDArray[np.float64]

#: Arm that the others are compared with.
BASE = "A"


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """Write ``out`` (.md) and, beside it, the same name with .json and .png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out, out.with_suffix(".json"), out.with_suffix(".png")]
    result["differences"] = {
        name: difference(result, name) for name in result["arms"] if BASE in result["arms"] and name != BASE
    }
    paths[1].write_text(json.dumps(result) + "\n")
    draw(result, paths[2])
    out.write_text(markdown(result, paths[1].name, paths[2].name))
    return paths


def by_document(arm: dict[str, Any]) -> Floats:
    """Losses [documents, buckets + 1]: the buckets, then the whole window."""
    position = arm["position"]
    losses = np.array(position["loss_by_document"])
    sizes = np.array([bucket["last"] - bucket["first"] for bucket in position["buckets"]])
    return np.concatenate([losses, (losses * sizes).sum(1, keepdims=True) / sizes.sum()], axis=1)


def difference(result: dict[str, Any], name: str) -> list[dict[str, float]]:
    """Loss of an arm minus that of `BASE`, document by document: mean and interval of each bucket and of all."""
    paired = by_document(result["arms"][name]) - by_document(result["arms"][BASE])
    low, high = confidence(paired)
    return [
        {"mean": float(mean), "low": float(a), "high": float(b)}
        for mean, a, b in zip(paired.mean(0), low, high, strict=True)
    ]


def common_buckets(result: dict[str, Any]) -> list[Bucket]:
    """Buckets of the first arm: those of every arm."""
    return [Bucket(**bucket) for bucket in next(iter(result["arms"].values()))["position"]["buckets"]]


def names_of(result: dict[str, Any]) -> list[str]:
    """Buckets as words, then the whole."""
    return [*(f"{bucket.first:,}–{bucket.last - 1:,}" for bucket in common_buckets(result)), "all"]


def markdown(result: dict[str, Any], data: str, picture: str) -> str:
    """The record as text."""
    arms = result["arms"]
    position = next(iter(arms.values()))["position"]
    tokens = next(iter(arms.values()))["tokens"]
    machine = f"{result['hardware']}; {result['threads']} thread(s) an arm, {result['jobs']} arm(s) at a time"
    about = (
        f"data: `{position['data_digest'][:12]}`; {position['documents']} held-out documents of more than "
        f"{position['seq_len']:,} tokens, first {position['seq_len']:,} predicted"
    )
    text = (
        f"Each arm trains the `{result['preset']}` model on {tokens:,} tokens in sequences of {position['seq_len']:,}: "
        f"the same samples in the same order from the same seed ({result['seed']}). The arms differ in what a query "
        "may read. Intervals are 95 %, from a bootstrap over documents; differences are taken document by document. "
        "They say how sure the figure is for these trained models, not how it varies from one training run to the next"
        + (": for that see A2, which differs from A by its seed only." if "A2" in arms else ", one per arm.")
    )
    parts = [f"{text}\n", f"![loss by position]({picture})\n", "## Arms\n", _arms_table(arms)]
    parts += [f"## Loss by position, nats per token ({position['weights']} weights)\n", _loss_table(result)]
    if result["differences"]:
        parts += [f"## Difference to {BASE}, nats per token\n", _difference_table(result), _reading(result)]
    title = "What each tier is worth: loss by position in long documents"
    commands, evidence = [result["command"]], [data, picture]
    return record(title, result["commit"], machine, commands, evidence, "\n".join(parts), [about])


def _arms_table(arms: dict[str, Any]) -> str:
    rows = [
        [
            name,
            arm["title"],
            f"{arm['position']['parameters']:,}",
            f"{arm['seconds']:.0f} s",
            f"{arm['tokens_per_s']:,.0f}",
            f"`{arm['position']['config_hash']}`",
        ]
        for name, arm in arms.items()
    ]
    return table(["arm", "a query reads", "parameters", "training time", "median tokens/s", "configuration"], rows)


def _loss_table(result: dict[str, Any]) -> str:
    rows = []
    for name, arm in result["arms"].items():
        losses = by_document(arm)
        low, high = confidence(losses)
        cells = zip(losses.mean(0), low, high, strict=True)
        rows.append([name, *(f"{mean:.4f} ({a:.3f} – {b:.3f})" for mean, a, b in cells)])
    return table(["arm", *names_of(result)], rows)


def _difference_table(result: dict[str, Any]) -> str:
    def cell(one: dict[str, float]) -> str:
        text = f"{one['mean']:+.4f} ({one['low']:+.4f} – {one['high']:+.4f})".replace("-", "−")
        return f"**{text}**" if one["low"] > 0 or one["high"] < 0 else text

    rows = [[name, *map(cell, cells)] for name, cells in result["differences"].items()]
    return table(["arm", *names_of(result)], rows) + "\nNegative is better than A; bold intervals exclude 0.\n"


def _reading(result: dict[str, Any]) -> str:
    """One sentence per arm about the last bucket, where the tiers matter most; another seed says what chance does."""
    last = common_buckets(result)[-1]
    lines = []
    chance = abs(result["differences"]["A2"][-2]["mean"]) if "A2" in result["differences"] else 0.0
    for name, cells in result["differences"].items():
        one = cells[-2]
        if one["low"] <= 0 <= one["high"]:
            side = "no certain difference to"
        elif name != "A2" and abs(one["mean"]) <= chance:
            side = f"within what another seed does ({chance:.4f}) to"
        else:
            side = "better than" if one["mean"] < 0 else "worse than"
        figures = f"{one['mean']:+.4f} nats per token ({np.expm1(one['mean']):+.2%} perplexity)".replace("-", "−")
        lines.append(f"- {name}, positions {last.first:,} to {last.last - 1:,}: {side} {BASE}, {figures}.")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], out: Path) -> None:
    """Loss by position of every arm and, paired by document, the difference to `BASE`."""
    buckets = common_buckets(result)
    ranges = [(bucket.first, bucket.last) for bucket in buckets]
    place = np.arange(len(buckets), dtype=np.float64)
    arms = list(result["arms"].values())
    position = arms[0]["position"]
    with styled_figure(14, 5.6, pad=0.12) as figure:
        left, right = figure.subplots(1, 2) if result["differences"] else (figure.add_subplot(), None)
        for i, arm in enumerate(arms):
            shown = [Bucket(**bucket) for bucket in arm["position"]["buckets"]]
            x = place + 0.05 * (i - (len(arms) - 1) / 2)
            mean = np.array([bucket.loss for bucket in shown])
            ends = np.array([[b.loss - b.low for b in shown], [b.high - b.loss for b in shown]])
            left.errorbar(
                x, mean, ends, color=arm["color"], marker="o", markersize=4.5, elinewidth=1, label=arm["label"]
            )
        position_axis(left, ranges)
        left.set_ylabel("loss, nats per token")
        left.set_title(f"Loss on {position['documents']} long held-out documents")
        figure.legend(loc="outside lower center", ncols=len(arms), title="bars: 95 % over documents")
        if right is not None:
            _draw_differences(right, result, place)
            position_axis(right, ranges)
        figure.savefig(out, format="png", dpi=120, metadata={"Software": None})


def _draw_differences(axes: Any, result: dict[str, Any], place: Floats) -> None:
    colors = {name: arm["color"] for name, arm in result["arms"].items()}
    axes.axhline(0, color=colors[BASE], linewidth=1.4, zorder=1)
    ends = []
    for name, cells in result["differences"].items():
        mean, low, high = (np.array([cell[key] for cell in cells[:-1]]) for key in ("mean", "low", "high"))
        axes.fill_between(place, low, high, color=colors[name], alpha=0.09, linewidth=0)
        for edge in (low, high):
            axes.plot(place, edge, color=colors[name], linewidth=0.8, alpha=0.35)
        axes.plot(place, mean, color=colors[name], marker="o", markersize=4.5, zorder=4)
        ends.append((float(mean[-1]), name))
    # Labels stand at the curves' ends, at least 5 % of the height apart.
    low, high = axes.get_ylim()
    y = -np.inf
    for value, name in sorted([*ends, (0.0, BASE)]):
        y = max(value, y + 0.05 * (high - low))
        axes.annotate(
            name, (place[-1], y), (9, 0), textcoords="offset points", va="center", color=colors[name],
            fontweight="bold", annotation_clip=False, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axes.set_ylabel(f"difference to {BASE}, nats per token")
    axes.set_title(f"Difference to {BASE}, paired by document: below the line is better")
    axes.spines["left"].set_color(FAINT)
    axes.tick_params(colors=MUTED)


if __name__ == "__main__":
    for written in write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).with_suffix(".md")):
        print(f"wrote {written}")
