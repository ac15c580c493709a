"""The record of ``tools/decode_bench.py``: Markdown, JSON and a picture.

python tools/decode_report.py outbox/benchmarks/decoding.json      (text and picture again, from the recorded times)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from refractor_megatron.evaluation.bench_report import Law
from refractor_megatron.evaluation.evidence import record, table
from refractor_megatron.evaluation.report_plots import styled_figure

OURS, THEIRS, IN_PLACE = "refractor", "llama", "in place"
NAMES = {OURS: "REFRACTOR", THEIRS: "Llama", IN_PLACE: "Llama, static cache"}
COLORS = {OURS: "#2458b3", THEIRS: "#8a97a5", IN_PLACE: "#c2410c"}
#: What must be shown: cache bytes at this length, and time a token there against the shorter one.
LONG, SHORT = 65536, 4096
LEAST_SAVING, MOST_GROWTH, JUDGED = 5.0, 1.3, "small"


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """Write ``out`` (.md) and, beside it, the same name with .json and .png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out, out.with_suffix(".json"), out.with_suffix(".png")]
    paths[1].write_text(json.dumps(result, indent=1) + "\n")
    draw(result, paths[2])
    out.write_text(markdown(result, paths[1].name, paths[2].name))
    return paths


def size(length: int) -> str:
    """``64k``."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def row_of(found: dict[str, Any], length: int) -> dict[str, Any] | None:
    """What was measured at ``length``."""
    return next((row for row in found["rows"] if row["length"] == length), None)


def laws(result: dict[str, Any]) -> list[Law]:
    """Verdicts on what the decoder must show."""
    verdicts = []
    for found in result["presets"]:
        name = found["preset"]
        low, high = row_of(found, SHORT), row_of(found, LONG)
        saving = high["cache_bytes"][THEIRS] / high["cache_bytes"][OURS] if high else None
        text = f"`{name}`: at least {LEAST_SAVING:g}× less cache memory at {size(LONG)}"
        verdicts.append(Law(text, f"{saving:.1f}×" if saving else "", saving >= LEAST_SAVING if saving else None))
        if name != JUDGED:
            continue
        growth = {model: high["ms"][model] / low["ms"][model] for model in NAMES} if high and low else None
        text = f"`{name}`: a token at {size(LONG)} takes at most {MOST_GROWTH:g}× its time at {size(SHORT)}"
        said = ", ".join(f"{NAMES[model]} {growth[model]:.2f}×" for model in NAMES) if growth else ""
        verdicts.append(Law(text, said, growth[OURS] <= MOST_GROWTH if growth else None))
    return verdicts


def figures(found: dict[str, Any]) -> str:
    """The table of one preset."""
    rows = []
    for row in found["rows"]:
        for model in NAMES:
            ms, nbytes, took = row["ms"][model], row["cache_bytes"][model], row["prefill_s"][model]
            spread = f"{min(row['ms_each'][model]):.1f} – {max(row['ms_each'][model]):.1f}"
            seconds = f"{took:.2f} s" if took is not None else "-"
            times = [f"{1e3 / ms:.1f}", f"{ms:.2f}", spread]
            rows.append([size(row["length"]), NAMES[model], *times, f"{nbytes / 2**20:.2f} MiB", seconds])
    for length, held in found["bytes_at"].items():
        for model in (OURS, THEIRS):
            rows.append([size(int(length)), NAMES[model], "-", "-", "-", f"{held[model] / 2**20:.2f} MiB", "-"])
    return table(
        ["context", "model", "tokens/s", "ms a token", "fastest – slowest", "cache a sequence", "prefill"], rows
    )


def ratios(found: dict[str, Any]) -> str:
    """The same as quotients."""
    rows = []
    for row in found["rows"]:
        times = [f"{row['ms'][model] / row['ms'][OURS]:.2f}×" for model in (THEIRS, IN_PLACE)]
        rows.append([size(row["length"]), *times, f"{row['cache_bytes'][THEIRS] / row['cache_bytes'][OURS]:.1f}×"])
    for length, held in found["bytes_at"].items():
        rows.append([size(int(length)), "-", "-", f"{held[THEIRS] / held[OURS]:.1f}×"])
    return table(["context", "Llama's time a token / ours", "with a static cache", "full cache / ours"], rows)


def going_back(found: dict[str, Any]) -> str:
    """The table of the codecs."""
    rows = []
    for row in found["rows"]:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["largest_error"].items()) or "-"
        held = [f"{row[name] / 2**20:.2f} MiB" for name in ("hot_bytes", "cold_bytes", "full_bytes")]
        hits = "-" if row["hit_rate"] is None else f"{row['hit_rate']:.0%}"
        times = [f"{row['fill_s']:.1f} s", f"{row['back_ms']:.0f} ms", f"{row['again']:,}"]
        rows.append([row["codec"], *times, hits, *held, errors, f"{row['deviation']:.1e}"])
    header = ["codec", "prefill", "going back", "tokens passed again", "chunks found", "hot", "cold", "a full cache"]
    return table([*header, "largest error of a chunk", "deviation"], rows)


def markdown(result: dict[str, Any], data: str, picture: str) -> str:
    """The record as text."""
    settings = result["settings"]
    clock, prefilled = result["presets"][0]["clock"], settings["llama_prefill"]
    body = (
        f"Batch 1, {settings['dtype']}, {settings['threads']} thread(s), torch {result['torch']}, weights and tokens "
        "random: neither changes the time. The Llama is transformers' own (scaled-dot-product attention) with its "
        "DynamicCache, which copies the cache to append a token, and with its StaticCache, which does not but has its "
        "full length from the start (filled with random keys, prefill `-`); it has the model's width, depth, heads and "
        "vocabulary, and a feed-forward as wide as the experts that a token meets. "
        f"Models and lengths take turns in one process, {settings['steps']} tokens each; medians of "
        f"{settings['rounds']} turns after a warm-up, in {clock}. Our caches were all filled by a true prefill, in "
        f"pieces of 1024; the Llama's up to {size(prefilled)}, beyond with random keys and values, for its prefill is "
        "quadratic and its time a token does not depend on them (prefill `-`). Cache bytes are of the tensors held, as "
        "allocated; ours include the records of every token, by which masks are made. A prefill is that of the "
        "tokens since the row of the length before.\n\n"
    )
    for found in result["presets"]:
        active, whole, spec = found["active"], found["parameters"], found["summaries"]
        body += (
            f"## {found['preset']}\n\nWindow {found['window']}, {spec['per_block']} summaries per block of "
            f"{spec['block_size']}. Weights a token meets: {active[OURS] / 1e6:.1f} M of {whole[OURS] / 1e6:.1f} M; "
            f"Llama {active[THEIRS] / 1e6:.1f} M of {whole[THEIRS] / 1e6:.1f} M.\n\n{figures(found)}\n{ratios(found)}\n"
        )
    back = result["going_back"]
    body += (
        f"## Going back\n\nA `{back['preset']}` conversation of {size(back['length'])} tokens goes {back['edit']:,} "
        f"tokens too far, back, and on elsewhere. Chunks of {back['chunk']}; without chunks (none) all tokens before "
        "pass again. The error is in the codec's own metric; the deviation is that of the next logits from those of a "
        "conversation "
        "that never went further, relative L2, with random weights.\n\n"
        f"{going_back(back)}\n"
    )
    body += "\n".join(f"- {law}" for law in laws(result)) + f"\n\n![time a token and cache by context]({picture})\n"
    note = [f"note: {settings['note']}"] if settings["note"] else []
    title = f"Decoding beside Llama, {'CPU' if settings['device'] == 'cpu' else 'GPU'}"
    return record(title, result["commit"], result["machine"], [result["command"]], [data, picture], body, note)


def draw(result: dict[str, Any], path: Path) -> None:
    """Time a token and cache bytes by context, both logarithmic."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with styled_figure(9.6, 3.4 * len(result["presets"])) as figure:
        grid = figure.subplots(len(result["presets"]), 2, squeeze=False)
        for (left, right), found in zip(grid, result["presets"], strict=True):
            lengths = [row["length"] for row in found["rows"]]
            more = [int(length) for length in found["bytes_at"]]
            for model, label in NAMES.items():
                style = {"color": COLORS[model], "marker": "o", "markersize": 4, "label": label}
                left.plot(lengths, [row["ms"][model] for row in found["rows"]], **style)
                if model == IN_PLACE:
                    continue  # as many bytes as the other's
                held = [row["cache_bytes"][model] for row in found["rows"]]
                held += [x[model] for x in found["bytes_at"].values()]
                right.plot(lengths + more, [x / 2**20 for x in held], **style)
            for axes, title in ((left, "ms a token"), (right, "cache a sequence, MiB")):
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.set_title(f"{found['preset']}: {title}", loc="left")
                axes.set_xticks(sorted({*lengths, *(more if axes is right else [])}))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size(int(x))))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.set_xlabel("context, tokens")
            left.legend(loc="upper left")
        figure.savefig(path, dpi=130)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write(json.loads(source.read_text()), source.with_suffix(".md"))
