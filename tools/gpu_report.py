"""Markdown and plot of the attention check, ready for ``outbox/benchmarks``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Directions as the result names them, with their titles.
WAYS = {"forward": "forward", "both": "forward and backward"}


def markdown(result: dict[str, Any]) -> str:
    """The whole record."""
    about, shape = result["about"], result["about"]["shape"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Attention on a GPU",
        "",
        f"- date: {about['date']}",
        f"- commit: `{about['commit']}`",
        f"- hardware: {about['hardware']}; {versions}; CUDA {about['cuda']}",
        f"- command: `{about['command']}`",
        "- evidence: [gpu_attention.json](gpu_attention.json), [gpu_attention.png](gpu_attention.png)",
        "",
        f"{shape['heads']} query heads over {shape['kv_heads']} key heads of {shape['head_dim']}, {about['dtype']}, "
        f"one sample: the last {shape['window']} tokens and {shape['per_block']} summaries for each block of "
        f"{shape['block']} before them; rows marked + also read {shape['fan_in']} retrieved records a chunk. Dense "
        "is torch's fastest fused causal kernel on this device. Medians of device time.",
        "",
    ]
    if about["rehearsal"]:
        lines += ["**A rehearsal without a GPU**: flex ran uncompiled, and no time here means anything.", ""]
    if result.get("failed"):
        lines += ["**Failed**: " + "; ".join(f"{name} ({result[name]['error']})" for name in result["failed"]), ""]
    lines += [*_benchmark(result["benchmark"]), *_layer(result.get("layer", {})), *_parity(result.get("parity", {}))]
    lines += _diagnosis(result.get("diagnosis", {}))
    return "\n".join(lines).rstrip() + "\n"


def _benchmark(rows: list[dict[str, Any]]) -> list[str]:
    times, costs = [], []
    for row in rows:
        name = f"{row['length']:,}{' +' if row['retrieved'] else ''}"
        for way, title in WAYS.items():
            against = row.get(f"{way}_against_dense")
            if against is None:
                continue
            times.append(
                [
                    *(name, title, against["kernel"], _ms(against["dense_ms"]), _ms(row["flex"][f"{way}_ms"])),
                    *(f"{against['speed_up']:.2f}", f"{row['visited_share']:.2%}", f"{against['share_of_ideal']:.0%}"),
                ]
            )
        peaks = [_number(found.get("peak_mib"), "{:,.0f}") for found in (row["flex"], *row["dense"].values())]
        costs.append(
            [
                *(
                    name,
                    _ms(row["plan_ms"]),
                    _ms(row["lowering_ms"]),
                    f"{row['compile_s']:.1f}",
                    str(row["recompiled"]),
                ),
                *(_ms(row["changed_mask_ms"]), row["tables"], _ms(row["pooling"]["forward_ms"])),
                *(_ms(row["pooling"]["both_ms"]), peaks[0], " / ".join(peaks[1:])),
            ]
        )
    header = ["tokens", "pass", "dense kernel", "dense, ms", "ours, ms", "speed-up", "tiles visited", "of the ideal"]
    second = [
        "tokens",
        "plan, ms",
        "block lists, ms",
        "first call, s",
        "compiled again",
        "first call of a new mask, ms",
    ]
    second += ["mask tables", "summaries forward, ms", "and backward, ms", "peak, MiB", "peak of dense, MiB"]
    ideal = (
        "The ideal takes the dense kernel's time times the visited share of the causal pairs. *Compiled again* counts "
        "graphs compiled while three other masks (packed documents) ran; the time of such a call includes its plan and "
        "block lists. Making the summaries is not part of *ours*; it has columns of its own."
    )
    return ["## Attention", "", *_table(header, times), "", ideal, "", *_table(second, costs), ""]


def _layer(part: dict[str, Any]) -> list[str]:
    if "forward_speed_up" not in part:
        return []
    rows = [
        [title, *(_ms(part[which][way]) for which in ("dense", "ours")), f"{part[way.replace('_ms', '_speed_up')]:.2f}"]
        for way, title in (("forward_ms", "forward"), ("both_ms", "forward and backward, all weights"))
    ]
    text = (
        f"{part['length']:,} tokens, width {part['d_model']}, feed-forward of {part['ffn_hidden']}; {part['kernel']}."
    )
    header = ["pass", "dense flash, ms", "ours, ms", "speed-up"]
    return ["## A whole layer", "", text, "", *_table(header, rows), ""]


def _parity(part: dict[str, Any]) -> list[str]:
    rows = [
        [
            *(row["mask"], row["dtype"], row["tables"], f"{row['tiles']['partial']} / {row['tiles']['full']}"),
            str(row["rows_without_keys"]),
            *(f"{max(row['errors'].values()):.1e}", max(row["errors"], key=lambda name: row["errors"][name])),
            *(f"{row['tolerance']:.0e}", "yes" if row["holds"] else "**no**"),
        ]
        for row in part.get("rows", [])
    ]
    header = [
        "mask",
        "type",
        "tables",
        "tiles partial / full",
        "rows without keys",
        "worst error",
        "of",
        "allowed",
        "holds",
    ]
    text = "Against the dense oracle in float64: output and all gradients, errors over each tensor's largest value."
    return ["## Parity", "", text, "", *_table(header, rows), ""]


def _diagnosis(part: dict[str, Any]) -> list[str]:
    if "rows" not in part:
        return []
    rows = [
        [row["variant"], f"{row['visited_pairs']:,}", *(_ms(row.get(way)) for way in ("forward_ms", "both_ms"))]
        + [row.get("refused", "")]
        for row in part["rows"]
    ]
    column = part["longest_column"]
    text = (
        f"At {part['length']:,} tokens. The longest program of the backward pass has {column['tiles']:,.0f} tiles, "
        f"{column['share_of_fair_part']:.2f} of a fair part of the work among {column['programs_in_flight']:.0f} "
        f"programs at once. Not run for lack of time: {', '.join(part['skipped']) or 'nothing'}."
    )
    header = ["variant", "pairs visited", "forward, ms", "forward and backward, ms", "refused"]
    return ["## Diagnosis", "", text, "", *_table(header, rows), ""]


def plot(result: dict[str, Any], path: Path) -> None:
    """Time over length, both axes logarithmic: dense, ours, and the ideal of the visited share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    rows = [row for row in result["benchmark"] if not row["retrieved"]]
    ways = [way for way in WAYS if any(f"{way}_against_dense" in row for row in rows)]
    figure, axes = plt.subplots(1, max(1, len(ways)), figsize=(5.5 * max(1, len(ways)), 4.2), layout="constrained")
    for axis, way in zip(np.atleast_1d(axes), ways, strict=False):
        compared = [row for row in rows if f"{way}_against_dense" in row]
        lengths = [row["length"] for row in compared]
        dense = [row[f"{way}_against_dense"]["dense_ms"] for row in compared]
        axis.loglog(lengths, dense, "o-", label="dense flash")
        axis.loglog(lengths, [row["flex"][f"{way}_ms"] for row in compared], "o-", label="ours")
        ideal = [ms * row["visited_share"] for ms, row in zip(dense, compared, strict=True)]
        axis.loglog(lengths, ideal, ":", color="grey", label="dense x visited share")
        ticks = [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths]
        axis.set(title=WAYS[way], xlabel="tokens", ylabel="ms", xticks=lengths, xticklabels=ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(result["about"]["hardware"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def _ms(value: float | None) -> str:
    return _number(value, "{:.3g}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
