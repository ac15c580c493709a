"""Makes ``table.md`` from the run folders of ``launch/scale_test.sh``: tokens/s, MFU and memory of each run."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refractor_megatron.compat.versions import probe_cores, probe_cuda, probe_memory
from refractor_megatron.evaluation.evidence import commit
from refractor_megatron.telemetry.sinks.jsonl import read_jsonl

#: First steps left out of the medians: allocation, thread pools, page cache.
WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """One run: its folder name and either figures or the sentence it failed with."""

    name: str
    ranks: int
    steps: int = 0
    tokens_per_s: float = 0.0
    step_ms: float = 0.0
    mfu: float = 0.0
    peak_rss_mb: float = 0.0
    problem: str = ""


def read_row(folder: Path) -> Row:
    """Read one run folder (``<settings>.r<ranks>``).

    Medians are over the steps after the first ``WARM_UP``; memory is the highest value of the run.
    """
    name, _, ranks = folder.name.rpartition(".r")
    records = read_jsonl(folder / "metrics.jsonl")
    steps = [record for record in records if "tokens_per_s" in record][WARM_UP:]
    if not steps:
        return Row(name, int(ranks), problem=_last_line(folder / "scale.log"))

    def median(key: str) -> float:
        return statistics.median(float(record.get(key, 0.0)) for record in steps)

    return Row(
        name,
        int(ranks),
        steps=len(steps),
        tokens_per_s=median("tokens_per_s"),
        step_ms=median("step_ms"),
        mfu=median("mfu"),
        peak_rss_mb=max(float(record.get("peak_rss_mb", 0.0)) for record in steps),
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def to_markdown(rows: Sequence[Row], command: str) -> str:
    """The table with what a reader needs to repeat it: command, commit, machine."""
    lines = [
        "# Scale test",
        "",
        f"- command: `{command}`",
        f"- commit: {commit()}",
        f"- machine: {_machine()}",
        f"- medians over the steps after the first {WARM_UP}",
        "",
        "| settings | ranks | steps | tokens/s | per rank | step ms | MFU | peak RSS MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row.problem:
            lines.append(f"| {row.name} | {row.ranks} | failed: {row.problem} | | | | | |")
        else:
            speed = f"{row.tokens_per_s:.0f} | {row.tokens_per_s / row.ranks:.0f} | {row.step_ms:.0f}"
            lines.append(
                f"| {row.name} | {row.ranks} | {row.steps} | {speed} | {row.mfu:.1%} | {row.peak_rss_mb:.0f} |"
            )
    return "\n".join(lines) + "\n"


def _machine() -> str:
    cuda = probe_cuda()
    gpu = cuda.found if cuda.present else "no GPU"
    return f"{platform.machine()}, {probe_cores().found} cores, {probe_memory().found}, {gpu}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``OUT/table.md`` and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder that holds the run folders")
    parser.add_argument("--command", default="bash launch/scale_test.sh", help="command to name in the table")
    options = parser.parse_args(arguments)
    folders = sorted(path for path in options.out.glob("*.r[0-9]*") if path.is_dir())
    if not folders:
        print(f"error: {options.out} holds no runs; make some with bash launch/scale_test.sh.", file=sys.stderr)
        return 3
    text = to_markdown([read_row(folder) for folder in folders], options.command)
    (options.out / "table.md").write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
