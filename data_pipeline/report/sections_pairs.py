"""Section of the page about duplicates: how alike they were, the largest groups, and the closest calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.report.charts import Histogram, Series
from data_pipeline.report.compare import marked
from data_pipeline.report.contents import Contents
from data_pipeline.report.html import count, details, esc, note, table

#: Groups and pairs whose texts are open when the page is; groups and pairs of sources shown at first.
_OPEN, _GROUPS, _PAIRS = 1, 8, 6
_TITLE = 64


def duplicates(data: Contents) -> str:
    """Empty where nothing was dropped as a duplicate."""
    equal, near = len(data.scores("exact-duplicate")), data.scores("near-duplicate")
    if not equal and not len(near):
        return ""
    found = data.collected.get("duplicates", {})
    said = f"{count(equal)} documents had the content of another one"
    if len(near):
        threshold = data.manifest["parameters"]["dedup"]["threshold"]
        said += f", and {count(len(near))} were near to one: exact Jaccard index of their word n-grams"
        said += f" at least {threshold:g}"
    if found.get("compared"):
        said += f" ({count(found['compared'])} candidate pairs were compared, {count(found['edges'])} held)"
    lead = note(f"{said}. The document of higher quality stays, and only its direct neighbours go.")
    beside = [part for part in (_similarity(data, near), _sources(found)) if part]
    return lead + f'<div class="two">{"".join(beside)}</div>' + _closest(found) + _clusters(found)


def _similarity(data: Contents, near: Any) -> str:
    if not len(near):
        return ""
    low = min(float(data.manifest["parameters"]["dedup"]["threshold"]), float(near.min()))
    edges = np.linspace(low, 1.0, 31) if low < 1 else np.array([0.0, 1.0])
    counts, _ = np.histogram(near, edges)
    chart = Histogram(
        "Near-duplicates by similarity",
        edges.tolist(),
        [Series("dropped", "gone", counts.tolist())],
        "Jaccard index with the document that stays",
    )
    return f"<div><h3>How alike near-duplicates were</h3>{chart.svg()}</div>"


def _sources(found: dict[str, Any]) -> str:
    rows = [[esc(row["member"]), esc(row["survivor"]), count(row["documents"])] for row in found.get("pairs", [])]
    if not rows:
        return ""
    head = ["dropped from", "in favour of", "documents"]
    return f"<div><h3>Where most of them came from</h3>{table(head, rows[:_PAIRS], (2,))}</div>"


def _closest(found: dict[str, Any]) -> str:
    rows = found.get("closest", [])
    if not rows:
        return ""
    lead = note(
        "Pairs just above the threshold: read these to judge it. "
        "<del>Only in the document that stays</del>, <ins>only in the one that went</ins>."
    )
    body = "".join(
        details(f"Jaccard <b>{row['member']['jaccard']:.3f}</b>: {_between(row)}", _sides(row), place < _OPEN)
        for place, row in enumerate(rows)
    )
    return f"<h3>Closest calls</h3>{lead}{body}"


def _clusters(found: dict[str, Any]) -> str:
    rows = found.get("clusters", [])
    if not rows:
        return ""
    lead = note("Beside the document that stays, the one least like it of those that went for it.")
    shown = [
        details(f"<b>{count(row['size'])}</b> went for one: {_between(row)}", _sides(row), place < _OPEN)
        for place, row in enumerate(rows)
    ]
    rest = details(f"{len(shown) - _GROUPS} more groups", "".join(shown[_GROUPS:])) if len(shown) > _GROUPS else ""
    return f"<h3>Largest groups</h3>{lead}{''.join(shown[:_GROUPS])}{rest}"


def _between(row: dict[str, Any]) -> str:
    names = row["survivor"]["source"], row["member"]["source"]
    said = esc(names[0]) if names[0] == names[1] else f"{esc(names[0])} and {esc(names[1])}"
    words = " ".join((row["survivor"]["text"] or "").split())
    title = f"{words[:_TITLE].rstrip()}…" if len(words) > _TITLE else words
    return f"{said} <small class='note'><bdi>{esc(title)}</bdi></small>"


def _sides(row: dict[str, Any]) -> str:
    one, other = row["survivor"], row["member"]
    if one["text"] is None or other["text"] is None:
        texts = tuple(esc(side["text"] or "Its policy forbids copies.") for side in (one, other))
    else:
        texts = marked(one["text"], other["text"])
    return f'<div class="sides">{_side("stays", one, texts[0])}{_side("went", other, texts[1])}</div>'


def _side(what: str, document: dict[str, Any], text: str) -> str:
    skipped = f", from byte {count(document['skipped'])}" if document.get("skipped") else ""
    about = f"<b>{what}</b>: {esc(document['place'])}, {count(document['bytes'])} bytes{skipped}"
    if "jaccard" in document:
        about += f", Jaccard {document['jaccard']:.3f}"
    return f'<div><p>{about}</p><pre dir="auto">{text}{" …" if document.get("more") else ""}</pre></div>'
