"""What every record under ``outbox/benchmarks/`` says first: date, commit, hardware, command, evidence."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """``git describe`` of the tree this code runs from; says so where that is not a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown (git is not installed)"
    return answer.stdout.strip() or "unknown (not a git checkout)"


def processor(gpu: str | None = None) -> str:
    """Model name of the processor with its count, memory, and the GPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = models[0] if models else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {gpu or 'no GPU'}"


def record(
    title: str,
    measured: str,
    machine: str,
    commands: Sequence[str],
    evidence: Sequence[str],
    body: str,
    extra: Sequence[str] = (),
) -> str:
    """A record as Markdown.

    measured: the commit; evidence: links relative to the record; extra: further lines of the head, each ``name: text``.
    """
    head = [
        f"# {title}",
        "",
        f"- date: {datetime.date.today().isoformat()}",
        f"- commit: `{measured}`",
        f"- hardware: {machine}",
        *(f"- command: `{command}`" for command in commands),
        "- evidence: " + ", ".join(f"[{Path(link).name}]({link})" for link in evidence),
        *(f"- {line}" for line in extra),
        "",
    ]
    return "\n".join(head) + "\n" + body.rstrip() + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
