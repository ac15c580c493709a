"""The record of ``tools/data_build_bench.py``: Markdown, JSON and a plot.

python tools/data_build_report.py outbox/benchmarks/data_build.json      (text and plot again, from what was measured)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from refractor_megatron.evaluation.evidence import record, table
from refractor_megatron.evaluation.report_plots import AMBER, RAW, styled_figure

SPEED_TARGET, MEMORY_TARGET = 15.0, 2000.0
#: Steps shorter than this share of a build are summed in the plot.
SMALL = 0.01


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """Write ``out`` (.md) and, beside it, the same name with .json and .png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out, out.with_suffix(".json")]
    paths[1].write_text(json.dumps(result, indent=1) + "\n")
    if "speed" in result or "memory" in result:
        paths.append(out.with_suffix(".png"))
        plot(result, paths[2])
    out.write_text(markdown(result, [path.name for path in paths[1:]]))
    return paths


def markdown(result: dict[str, Any], evidence: list[str]) -> str:
    """The record as text, of the parts that were run."""
    parts = [
        f"`{' '.join(result['options'])}`, {result['cores']} cores, each build in a fresh process with an empty cache "
        "folder; compiled code is on the disk from a small build before, and the input in the page cache. Rates are "
        "megabytes of the text that came in, extracted, for a second of wall time.\n"
    ]
    for name, section in (("speed", speed), ("memory", memory), ("kills", kills)):
        if name in result:
            parts.append(section(result[name]))
    if len(evidence) > 1:
        parts.append(f"![Steps and memory]({evidence[-1]})\n")
    machine = f"{result['hardware']}; {result['cores']} of them used"
    extra = [f"load of the machine at the start: {result['load_average']:.1f}"]
    title = "A whole build: speed, memory, kills"
    return record(title, result["commit"], machine, [result["command"]], evidence, "\n".join(parts), extra)


def verdict(holds: bool, text: str) -> str:
    return f"- {'holds' if holds else 'falls short'}: {text}"


def speed(part: dict[str, Any]) -> str:
    text, rates = part["text"]["median"], [one["mb_per_s"] for one in part["text"]["rounds"]]
    runs = {"from text": text} | ({"from packages": part["packages"]} if "packages" in part else {})
    said = (
        f"From {text['bytes'] / 1e6:.1f} MB of extracted text in .jsonl.zst: **{text['mb_per_s']:.1f} MB/s** "
        f"({text['seconds']:.1f} s; median of {len(rates)} builds, {min(rates):.1f} – {max(rates):.1f})."
    )
    if tokenizer := text["steps"].get("tokenizer"):
        rate = text["bytes"] / 1e6 / (text["seconds"] - tokenizer)
        said += f" Of that {tokenizer:.1f} s train the tokenizer; with a given one it would be {rate:.1f} MB/s."
    if "packages" in part:
        packages = part["packages"]
        said += (
            f" From the packages themselves, unpacking and the main text of HTML included: "
            f"{packages['mb_per_s']:.1f} MB/s ({packages['bytes'] / 1e6:.1f} MB, {packages['seconds']:.1f} s)."
        )
    names = list(dict.fromkeys(step for run in runs.values() for step in run["steps"]))
    rows = []
    for name in names:
        cells = [
            f"{run['steps'].get(name, 0):.1f} s ({run['steps'].get(name, 0) / run['seconds']:.0%})"
            for run in runs.values()
        ]
        rows.append([name, *cells])
    rows.append(["total", *(f"{run['seconds']:.1f} s" for run in runs.values())])
    laps = "The build's own account: " + "; ".join(line.removeprefix("data: ") for line in text["lines"]) + ".\n"
    line = verdict(
        text["mb_per_s"] >= SPEED_TARGET, f"at least {SPEED_TARGET:.0f} MB/s on 2 cores ({text['mb_per_s']:.1f})"
    )
    note = "Between stages: choosing, merging streams, made tasks, packing, audit and receipts, in the first process.\n"
    return "\n".join(["## Speed\n", said + "\n", table(["step", *runs], rows), note, laps, line, ""])


def memory(part: list[dict[str, Any]]) -> str:
    text = (
        "Sum over all processes of a build, four times a second; pages that n processes share count an n-th in each "
        "(PSS), mapped files included while their pages are in. The text of further copies has every document's words "
        "in another order, so that nothing of it is a duplicate.\n"
    )
    rows = [
        [f"{one['copies']}×", f"{one['megabytes']:.0f} MB", f"{one['mb_per_s']:.1f} MB/s", f"{one['peak_mb']:.0f} MB",
         one["at"], f"{one['peak_unbacked_mb']:.0f} MB"] for one in part
    ]  # fmt: skip
    head = ["input", "text", "speed", "peak", "when", "peak of what no file backs"]
    first, last = part[0], part[-1]
    lines = [
        verdict(first["peak_mb"] <= MEMORY_TARGET, f"at most 2 GB for the corpus once ({first['peak_mb']:.0f} MB)")
    ]
    growth, more = last["peak_mb"] / first["peak_mb"], last["megabytes"] / first["megabytes"]
    lines.append(f"- {more:.1f} times the text takes {growth:.2f} times the memory")
    return "\n".join(["## Memory\n", text, table(head, rows), *lines, ""])


def kills(part: dict[str, Any]) -> str:
    rows = [
        [str(number), kill["where"], f"{kill['delay']:.2f} s", kill["whom"]]
        for number, kill in enumerate(part["kills"], 1)
    ]
    text = (
        f"A build of {part['megabytes']:.1f} MB, {part['seconds_alone']:.1f} s when left alone, was killed "
        f"{len(part['kills'])} times with SIGKILL, each time started again, and took {part['seconds_last']:.1f} s "
        "after the last kill. The instants are drawn uniformly over the time of the build left alone and come in "
        "their order, each as a delay since the last stage that had begun or ended by then. Merkle roots: "
        f"`{part['roots'][0]}` left alone, `{part['roots'][1]}` killed. {part['files']} files compared by sha256, "
        f"{len(part['differing'])} differ{': ' + ', '.join(part['differing']) if part['differing'] else ''}. "
        f"{part['workers_left']} worker processes outlived the build.\n"
    )
    same = part["roots"][0] == part["roots"][1] and not part["differing"] and part["same_folder_name"]
    line = verdict(same and not part["workers_left"], f"identical bytes after {len(part['kills'])} kills")
    return "\n".join(["## Kills\n", text, table(["", "where", "delay", "killed processes"], rows), line, ""])


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds by step of the builds, and memory over time."""
    panels = [name for name in ("speed", "memory") if name in result]
    with styled_figure(5.2 * len(panels), 3.9) as figure:
        axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
        if "speed" in axes:
            draw_steps(axes["speed"], result["speed"]["text"]["median"])
        if "memory" in axes:
            draw_memory(axes["memory"], result["memory"])
        figure.savefig(path, dpi=150)


def draw_steps(axes: Any, build: dict[str, Any]) -> None:
    steps = {name: spent for name, spent in build["steps"].items() if spent >= SMALL * build["seconds"]}
    steps["shorter steps"] = build["seconds"] - sum(steps.values())
    names = list(steps)[::-1]
    colors = [AMBER if name == "tokenizer" else RAW for name in names]
    axes.barh(names, [steps[name] for name in names], color=colors, height=0.65)
    axes.set(xlabel="seconds", title=f"From text: {build['mb_per_s']:.1f} MB/s")
    axes.grid(False, axis="y")


def draw_memory(axes: Any, part: list[dict[str, Any]]) -> None:
    for one, color in zip(part, (RAW, AMBER), strict=False):
        end = one["curve"][-1][0]
        share = [at / end for at, _, _ in one["curve"]]
        axes.plot(share, [pss for _, pss, _ in one["curve"]], color=color, linewidth=1.1,
                  label=f"{one['megabytes']:.0f} MB of text: all")  # fmt: skip
        axes.plot(share, [own for _, _, own in one["curve"]], color=color, linewidth=0.9, dashes=(3, 2),
                  label="what no file backs")  # fmt: skip
    axes.set(xlabel="share of the build's time", ylabel="MB, all processes", title="Memory")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).with_suffix(".md"))
