"""Markdown and plot of the attention check, ready for ``outbox/benchmarks``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from refractor_megatron.evaluation.bench_report import short
from refractor_megatron.evaluation.evidence import record, table
from refractor_megatron.evaluation.report_plots import AMBER, INK, MUTED, RAW, styled_figure

#: Directions as the result names them, with their titles.
WAYS = {"forward": "forward", "both": "forward and backward"}
Entry = dict[str, Any]
#: Header of a column, and what stands there for an entry.
Column = tuple[str, Callable[[Entry], str]]


def markdown(result: Entry) -> str:
    """The whole record."""
    about, shape = result["about"], result["about"]["shape"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"{shape['heads']} query heads over {shape['kv_heads']} key heads of {shape['head_dim']}, {about['dtype']}, "
        f"one sample: the last {shape['window']} tokens and {shape['per_block']} summaries for each block of "
        f"{shape['block']} before them; rows marked + also read {shape['fan_in']} retrieved records a chunk. Dense "
        "is torch's fastest fused causal kernel on this device. Medians of device time.\n"
    ]
    if about["rehearsal"]:
        parts.append("**A rehearsal without a GPU**: flex ran uncompiled, and no time here means anything.\n")
    if result.get("failed"):
        parts.append(
            "**Failed**: " + "; ".join(f"{name} ({result[name]['error']})" for name in result["failed"]) + "\n"
        )
    parts += _benchmark(result["benchmark"])
    parts += _layer(result.get("layer", {}))
    parts += _parity(result.get("parity", {}))
    parts += _diagnosis(result.get("diagnosis", {}))
    evidence, extra = ["gpu_attention.json", "gpu_attention.png"], [f"versions: {versions}; CUDA {about['cuda']}"]
    title, body = "Attention on a GPU", "\n".join(parts)
    return record(title, about["commit"], about["hardware"], [about["command"]], evidence, body, extra)


def _benchmark(rows: Sequence[Entry]) -> list[str]:
    times: list[Column] = [
        ("tokens", _tokens),
        ("pass", lambda row: WAYS[row["way"]]),
        ("dense kernel", lambda row: row["kernel"]),
        ("dense, ms", lambda row: _ms(row["dense_ms"])),
        ("ours, ms", lambda row: _ms(row["flex"][f"{row['way']}_ms"])),
        ("speed-up", lambda row: f"{row['speed_up']:.2f}"),
        ("tiles visited", lambda row: f"{row['visited_share']:.2%}"),
        ("of the ideal", lambda row: f"{row['share_of_ideal']:.0%}"),
    ]
    costs: list[Column] = [
        ("tokens", _tokens),
        ("plan, ms", lambda row: _ms(row["plan_ms"])),
        ("block lists, ms", lambda row: _ms(row["lowering_ms"])),
        ("first call, s", lambda row: f"{row['compile_s']:.1f}"),
        ("compiled again", lambda row: str(row["recompiled"])),
        ("first call of a new mask, ms", lambda row: _ms(row["changed_mask_ms"])),
        ("mask tables", lambda row: row["tables"]),
        ("summaries forward, ms", lambda row: _ms(row["pooling"]["forward_ms"])),
        ("and backward, ms", lambda row: _ms(row["pooling"]["both_ms"])),
        ("peak, MiB", lambda row: _mebibytes(row["flex"])),
        ("peak of dense, MiB", lambda row: " / ".join(map(_mebibytes, row["dense"].values()))),
    ]
    compared = [
        {**row, **row[f"{way}_against_dense"], "way": way} for row in rows for way in WAYS if _is_compared(row, way)
    ]
    ideal = (
        "The ideal takes the dense kernel's time times the visited share of the causal pairs. *Compiled again* counts "
        "graphs compiled while three other masks (packed documents) ran; the time of such a call includes its plan and "
        "block lists. Making the summaries is not part of *ours*; it has columns of its own.\n"
    )
    return ["## Attention\n", _table(times, compared), ideal, _table(costs, rows)]


def _layer(part: Entry) -> list[str]:
    if "forward_speed_up" not in part:
        return []
    columns: list[Column] = [
        ("pass", lambda row: row["title"]),
        ("dense flash, ms", lambda row: _ms(part["dense"][f"{row['way']}_ms"])),
        ("ours, ms", lambda row: _ms(part["ours"][f"{row['way']}_ms"])),
        ("speed-up", lambda row: f"{part[row['way'] + '_speed_up']:.2f}"),
    ]
    titles = {"forward": "forward", "both": "forward and backward, all weights"}
    text = (
        f"{part['length']:,} tokens, width {part['d_model']}, feed-forward of {part['ffn_hidden']}; {part['kernel']}.\n"
    )
    rows = [{"way": way, "title": title} for way, title in titles.items()]
    return ["## A whole layer\n", text, _table(columns, rows)]


def _parity(part: Entry) -> list[str]:
    columns: list[Column] = [
        ("mask", lambda row: row["mask"]),
        ("type", lambda row: row["dtype"]),
        ("tables", lambda row: row["tables"]),
        ("tiles partial / full", lambda row: f"{row['tiles']['partial']} / {row['tiles']['full']}"),
        ("rows without keys", lambda row: str(row["rows_without_keys"])),
        ("worst error", lambda row: f"{max(row['errors'].values()):.1e}"),
        ("of", lambda row: max(row["errors"], key=lambda name: row["errors"][name])),
        ("allowed", lambda row: f"{row['tolerance']:.0e}"),
        ("holds", lambda row: "yes" if row["holds"] else "**no**"),
    ]
    text = "Against the dense oracle in float64: output and all gradients, errors over each tensor's largest value.\n"
    return ["## Parity\n", text, _table(columns, part.get("rows", []))]


def _diagnosis(part: Entry) -> list[str]:
    if "rows" not in part:
        return []
    columns: list[Column] = [
        ("variant", lambda row: row["variant"]),
        ("pairs visited", lambda row: f"{row['visited_pairs']:,}"),
        ("forward, ms", lambda row: _ms(row.get("forward_ms"))),
        ("forward and backward, ms", lambda row: _ms(row.get("both_ms"))),
        ("refused", lambda row: row.get("refused", "")),
    ]
    longest = part["longest_column"]
    text = (
        f"At {part['length']:,} tokens. The longest program of the backward pass has {longest['tiles']:,.0f} tiles, "
        f"{longest['share_of_fair_part']:.2f} of a fair part of the work among {longest['programs_in_flight']:.0f} "
        f"programs at once. Not run for lack of time: {', '.join(part['skipped']) or 'nothing'}.\n"
    )
    return ["## Diagnosis\n", text, _table(columns, part["rows"])]


def plot(result: Entry, path: Path) -> None:
    """Time over length, both axes logarithmic: dense, ours, and the ideal of the visited share."""
    rows = [row for row in result["benchmark"] if not row["retrieved"]]
    ways = [way for way in WAYS if any(_is_compared(row, way) for row in rows)]
    with styled_figure(5.5 * max(1, len(ways)), 4.4, pad=0.1) as figure:
        figure.suptitle(result["about"]["hardware"], x=0.008, ha="left", fontsize=11.5, color=INK)
        for place, way in enumerate(ways, 1):
            axes = figure.add_subplot(1, len(ways), place)
            compared = [row for row in rows if _is_compared(row, way)]
            lengths = [row["length"] for row in compared]
            dense = [row[f"{way}_against_dense"]["dense_ms"] for row in compared]
            ideal = [ms * row["visited_share"] for ms, row in zip(dense, compared, strict=True)]
            axes.plot(lengths, dense, color=MUTED, marker="o", label="dense flash")
            ours = [row["flex"][f"{way}_ms"] for row in compared]
            axes.plot(lengths, ours, color=RAW, marker="o", label="ours")
            axes.plot(lengths, ideal, ":", color=AMBER, label="dense x visited share")
            axes.set(title=WAYS[way], xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
            axes.set_xticks(lengths, [short(length) for length in lengths])
            axes.minorticks_off()
            axes.legend()
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def _is_compared(row: Entry, way: str) -> bool:
    return f"{way}_against_dense" in row


def _table(columns: Sequence[Column], entries: Iterable[Entry]) -> str:
    return table([header for header, _ in columns], [[text(entry) for _, text in columns] for entry in entries])


def _tokens(row: Entry) -> str:
    return f"{row['length']:,}{' +' if row['retrieved'] else ''}"


def _mebibytes(found: Entry) -> str:
    return _number(found.get("peak_mib"), "{:,.0f}")


def _ms(value: float | None) -> str:
    return _number(value, "{:.3g}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
