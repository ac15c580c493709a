"""Sections of the page: what went in and came out, and what could not be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.report.contents import Contents
from data_pipeline.report.html import count, details, esc, listed, note, percent, table

#: Steps of the ledger in words.
STEPS = {
    "ingest": "Read",
    "filters": "Filters",
    "dedup": "Duplicates",
    "over_cap": "Size limit",
    "contaminated": "Overlap with evaluation",
    "empty after edits": "Emptied by edits",
    "equal after edits": "Equal after edits",
}


def funnel(data: Contents) -> str:
    """Every step: how many documents came in, stayed and went, and why."""
    if not data.ledger:
        return ""
    first = max(1, data.ledger[0]["in"])
    rows = [_step(step, first) for step in data.ledger]
    splits = data.manifest["splits"]
    train, heldout = splits["train"]["documents"], splits["heldout"]["documents"]
    flow = (
        f'<div class="flow" aria-hidden="true"><b style="width:{100 * train / first:.3f}%"></b>'
        f'<b class="second" style="width:{100 * heldout / first:.3f}%"></b></div>'
    )
    rows.append(
        [
            "Split",
            flow,
            count(train + heldout),
            "",
            f"<b>{count(train)}</b>&nbsp;training, <b>{count(heldout)}</b>&nbsp;held out",
        ]
    )
    cut = data.manifest.get("counts", {}).get("cut", 0)
    more = f" Long texts were cut {count(cut)} times; each part counts as a document." if cut else ""
    lead = note(f"Documents after each step. What a step kept is what the next one got, checked at build time.{more}")
    return lead + table(["step", "", "kept", "went", "why"], rows, (2, 3), "funnel")


def _step(step: Mapping[str, Any], first: int) -> list[str]:
    gone = {**step["dropped"], **{f"{why} (quarantined)": n for why, n in step["quarantined"].items()}}
    lost = sum(gone.values())
    flow = (
        f'<div class="flow" aria-hidden="true"><b style="width:{100 * step["kept"] / first:.3f}%"></b>'
        f'<u style="width:{100 * lost / first:.3f}%"></u></div>'
    )
    share = f"{count(lost)} <small>({percent(lost / max(1, step['in']))})</small>" if lost else "–"
    name = STEPS.get(step["name"], step["name"])
    return [esc(name), flow, count(step["kept"]), share, listed(gone)]


def quarantine(data: Contents) -> str:
    """Entries that could not be understood, with their places."""
    reasons: dict[str, int] = {}
    for step in data.ledger:
        for why, number in step["quarantined"].items():
            reasons[why] = reasons.get(why, 0) + number
    if not reasons:
        return ""
    shown = data.collected.get("quarantined", [])
    rows = [
        [f"<code>{esc(row['place'])}</code>", esc(row["source"]), esc(row["reason"]), esc(row["detail"])]
        for row in shown
    ]
    lead = note(f"{listed(reasons, 12)}. All of them, with their first bytes, are in <code>quarantine.jsonl</code>.")
    return lead + (table(["where", "source", "reason", "what is wrong"], rows) if rows else "")


def parameters(data: Contents) -> str:
    """Every option as it was given to the build, and every file with its hash."""
    rows = [
        [f"<code>{esc(key)}</code>", f"<code>{esc(value)}</code>"]
        for key, value in _flat(data.manifest.get("parameters", {}))
    ]
    files = [
        [f"<code>{esc(name)}</code>", count(entry["bytes"]), f"<code>{esc(entry['sha256'])}</code>"]
        for name, entry in sorted(data.manifest["files"].items())
    ]
    seal = [
        (label, data.manifest.get(key))
        for label, key in (
            ("digest of input and options", "digest"),
            ("sha256 of content", "content_sha256"),
            ("Merkle root", "merkle_root"),
        )
    ]
    sealed = table(["seal", ""], [[esc(label), f"<code>{esc(value)}</code>"] for label, value in seal if value])
    return (
        note("The same corpus and options give the same digest and, byte for byte, the same files.")
        + sealed
        + (details(f"{len(rows)} options", table(["option", "value"], rows)) if rows else "")
        + details(f"{len(files)} files", table(["file", "bytes", "sha256"], files, (1,)))
    )


def _flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    rows = []
    for key in sorted(value):
        if isinstance(value[key], dict):
            rows += _flat(value[key], f"{before}{key}.")
        else:
            rows.append((f"{before}{key}", _said(value[key])))
    return rows


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
