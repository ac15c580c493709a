"""The record of ``tools/dedup_bench.py``: Markdown, JSON and a plot.

python tools/dedup_report.py outbox/benchmarks/dedup.json      (text and plot again, from what was measured)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from refractor_megatron.evaluation.evidence import record, table
from refractor_megatron.evaluation.report_plots import AMBER, INK, RAW, styled_figure

END_TARGET, RECALL_TARGET = 40.0, 0.99
REASONS = {
    "survivor": "the same cluster, another member of it stays (ours by quality, length and id; datatrove's the root of "
    "its union-find, so whichever came into the largest cluster first)",
    "unverified": "no index >= threshold to any document: a band in common, which datatrove does not verify",
    "chain": "near only such documents as went, some in its own favour, and none that stays: datatrove removes along "
    "chains, ours only what resembles its survivor directly",
    "missed": "near a document that stays, no band in common by our hashes",
    "short": "fewer words than an n-gram after datatrove's normalising: it makes no shingles of those and keeps them "
    "even if equal",
    "words": "below the threshold in datatrove's words (its tokenizer splits at other places and takes punctuation and "
    "accents away)",
    "theirs-missed": "near in datatrove's words as well, no band in common by its hashes",
}
SHOWN = 3


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """Write ``out`` (.md) and, beside it, the same name with .json and .png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out, out.with_suffix(".json")]
    paths[1].write_text(json.dumps(result, indent=1) + "\n")
    if "quality" in result:
        paths.append(out.with_suffix(".png"))
        plot(result, paths[2])
    out.write_text(markdown(result, [path.name for path in paths[1:]]))
    return paths


def markdown(result: dict[str, Any], evidence: list[str]) -> str:
    """The record as text, of the parts that were run."""
    corpus = result["corpus"]
    about = (
        f"{corpus['documents']:,} documents, {corpus['megabytes']:.1f} MB in {corpus['shards']} shards, of "
        f"{', '.join(corpus['sources'])}; {corpus['planted']:,} of them planted: copies of which 0 to 8 % of the words "
        "are replaced, deleted or followed by another. One core, one thread, one process at a time; compiled code is "
        "loaded and the page cache warm before a clock starts.\n"
    )
    parts = [about]
    for name, section in (("signatures", signatures), ("end", end), ("quality", quality), ("datatrove", datatrove)):
        if name in result:
            parts.append(section(result[name]))
    if "quality" in result:
        parts.append(f"![S-curve and steps]({evidence[-1]})\n")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    extra = [f"versions: {versions}", f"load of the machine at the start: {result['load_average']:.1f}"]
    title = "Near-duplicates: speed, quality, and other libraries"
    return record(
        title,
        result["commit"],
        result["hardware"] + "; one core",
        [result["command"]],
        evidence,
        "\n".join(parts),
        extra,
    )


def verdict(holds: bool, text: str) -> str:
    return f"- {'holds' if holds else 'falls short'}: {text}"


def signatures(part: dict[str, Any]) -> str:
    rows, verdicts = [], []
    for one in part["rows"]:
        rows.append(
            [one["name"], one["timed"], f"{one['mb_per_s']:.2f}", f"{min(one['all']):.2f} – {max(one['all']):.2f}",
             "-" if one["ours_faster"] == 1 else f"{one['ours_faster']:.1f}×"]
        )  # fmt: skip
        if one["target"]:
            text = f"at least {one['target']:.0f}× {one['name']} ({one['ours_faster']:.1f}×)"
            verdicts.append(verdict(one["ours_faster"] >= one["target"], text))
    text = (
        f"128 hashes of word 5-grams. In each of {len(part['megabytes'])} rounds all have the same documents, "
        f"{np.mean(part['megabytes']):.1f} MB, other ones in the next; processor time, medians. MB of text also where "
        "ready sets are timed. Python token sets: `re.findall(r'\\w+', text.lower())`, 5-grams joined by a space. "
        f"Of {part['compared']} documents {part['equal']} have datasketch's signature bit for bit, for two seeds.\n"
    )
    head = ["", "timed", "MB/s", "slowest – fastest", "ours is faster"]
    return "## Signatures\n\n" + text + "\n" + table(head, rows) + "\n" + "\n".join(verdicts) + "\n"


def end(part: dict[str, Any]) -> str:
    one, rates = part["median"], [each["mb_per_s"] for each in part["rounds"]]
    total = one["seconds"]
    rows = [[name, f"{spent:.2f} s", f"{spent / total:.0%}"] for name, spent in one["steps"].items()]
    work = one["work_done"]
    text = (
        "The build's own step (`data_pipeline.dedup.removals.deduplicate`, one worker): shards read, signed, banded, "
        "candidates verified by exact Jaccard index, survivors chosen, every stage's files on the disk (fsync). "
        f"Median of {len(rates)} rounds by wall time, each in a fresh process with an empty work folder: "
        f"**{one['mb_per_s']:.1f} MB/s** ({min(rates):.1f} – {max(rates):.1f}), {one['mb_per_cpu_s']:.1f} MB for a "
        f"second of the processor. {work['compared']:,} pairs compared in {work['rounds']} rounds, "
        f"{work['edges']:,} at the threshold; {one['removed']['exact']:,} exact and {one['removed']['near']:,} near "
        f"duplicates removed. Peak memory {one['peak_mb']:.0f} MB, {one['base_mb']:.0f} MB of it before the start; "
        "pages of mapped files that are in count.\n"
    )
    line = verdict(one["mb_per_s"] >= END_TARGET, f"at least {END_TARGET:.0f} MB/s ({one['mb_per_s']:.1f})")
    return "## End to end\n\n" + text + "\n" + table(["step", "time", "share"], rows) + "\n" + line + "\n"


def quality(part: dict[str, Any]) -> str:
    truth, seeds = part["truth"], part["seeds"]
    checked = truth["in_python"]
    pairs = ", ".join(f"{count:,} ≥ {level}" for level, count in truth["pairs"].items())
    text = (
        f"Exact truth by prefix filtering and merging ({truth['seconds']:.1f} s): pairs by Jaccard index: {pairs}. On "
        f"{checked['pairs']} of them sets of Python tuples of words give the same index (largest difference "
        f"{checked['largest_difference']:.1e}). Recall: the share of true pairs that share a band; the second "
        "number leaves out pairs of index 1. Precision: the share of verified pairs that are true at 0.7. Left in: "
        "documents that stay although one that ranks higher, resembles them as much and stays too, of all documents in "
        f"such a pair. With every true pair at 0.7 known, {truth['removed_with_all_pairs']:,} documents would go.\n"
    )
    rows = []
    for one in seeds:
        recalls = [f"{one['recall'][k]:.4f} ({one['recall_unequal'][k]:.4f})" for k in one["recall"]]
        left = [f"{k['documents']} of {k['of']:,}" for k in one["left_in"].values()]
        rows.append([str(one["seed"]), f"{one['candidates']:,}", f"{one['verified']:,}", *recalls,
                     f"{one['precision']:.6f}", f"{one['kept']:,}", *left])  # fmt: skip
    levels = list(seeds[0]["recall"])
    head = ["seed", "candidates", "verified", *(f"recall ≥ {k}" for k in levels), "precision", "kept",
            *(f"left in ≥ {k}" for k in levels)]  # fmt: skip
    worst = min(one["recall"]["0.8"] for one in seeds)
    exact = min(one["precision"] for one in seeds)
    verdicts = [
        verdict(
            worst >= RECALL_TARGET, f"recall at least {RECALL_TARGET} for pairs ≥ 0.8 with every seed ({worst:.4f})"
        ),
        verdict(exact == 1.0, f"precision 1.0 at the threshold with every seed ({exact:.6f})"),
    ]
    return (
        f"## Quality, {len(seeds)} hash seeds\n\n" + text + "\n" + table(head, rows) + "\n" + "\n".join(verdicts) + "\n"
    )


def datatrove(part: dict[str, Any]) -> str:
    if "skipped" in part:
        return f"## Beside datatrove\n\nLeft out: {part['skipped']}.\n"
    kept, theirs = part["kept"], part["seconds"]["datatrove"]
    spent = sum(seconds for step, seconds in theirs.items() if step != "load")
    below = part["candidates_below"]
    text = (
        f"datatrove {part['version']}, MinHash of word 5-grams, 16 × 8, its defaults otherwise (64-bit xxhash, English "
        f"tokenizer), on {part['documents']} documents, {part['megabytes']:.2f} MB: two thirds whole clusters of the "
        f"corpus above, the rest without neighbours. Kept: ours {kept['ours']}, datatrove's {kept['datatrove']}, "
        f"{kept['both']} by both. Seconds: ours {part['seconds']['ours']:.2f}, datatrove's {spent:.1f}, not loading. "
        f"Of datatrove's {part['candidates']:,} candidate pairs, which it all takes for duplicates, "
        f"{below['ours']:,} are below 0.7 by our words and {below['theirs']:,} by its own.\n"
    )
    rows = []
    for key, count in sorted(part["reasons"].items()):
        side, _, reason = key.partition(": ")
        rows.append([side, str(count), REASONS[reason], examples(part["differing"], side, reason)])
    note = "\nIndices: the highest to any other document, by our words / by datatrove's. "
    note += "Every differing document is in the JSON file.\n"
    return "## Beside datatrove\n\n" + text + "\n" + table(["kept by", "documents", "why", "such as"], rows) + note


def examples(differing: list[dict[str, Any]], side: str, reason: str) -> str:
    chosen = [one for one in differing if one["kept_by"] == side and one["reason"] == reason][:SHOWN]
    return "; ".join(f"row {one['row']} ({one['ours']:.2f} / {one['theirs']:.2f})" for one in chosen)


def plot(result: dict[str, Any], path: Path) -> None:
    """The S-curve, predicted and measured; beside it the steps of the end-to-end run."""
    options, bins = result["options"], result["quality"]["bins"]
    with styled_figure(10, 3.8) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        index = np.linspace(0.5, 1, 200)
        left.plot(index, 1 - (1 - index ** options["rows"]) ** options["bands"], color=RAW,
                  label=f"1 − (1 − J^{options['rows']})^{options['bands']}")  # fmt: skip
        middle = [(one["from"] + one["to"]) / 2 for one in bins]
        mean = np.array([np.mean(one["measured"]) for one in bins])
        spread = np.array(
            [[m - min(one["measured"]), max(one["measured"]) - m] for m, one in zip(mean, bins, strict=True)]
        )
        left.errorbar(middle, mean, yerr=np.maximum(spread.T, 0), fmt="o", markersize=4, color=AMBER, elinewidth=1,
                      label=f"measured, {len(result['quality']['seeds'])} seeds: mean, least, most")  # fmt: skip
        left.plot(
            middle, [one["predicted"] for one in bins], "_", color=INK, markersize=9, label="predicted for its pairs"
        )
        left.set(
            xlabel="exact Jaccard index", ylabel="becomes a candidate", title="Candidates by index", ylim=(0, 1.03)
        )
        left.legend(loc="lower right")
        if "end" in result:
            steps = result["end"]["median"]["steps"]
            names = list(steps)[::-1]
            right.barh(names, [steps[name] for name in names], color=RAW, height=0.6)
            right.set(xlabel="seconds", title=f"End to end: {result['end']['median']['mb_per_s']:.0f} MB/s")
            right.grid(False, axis="y")
        else:
            right.set_axis_off()
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).with_suffix(".md"))
