"""Sections of the page about the text: sources, languages, lengths, signals, rules and PII."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.report.charts import Histogram, Series
from data_pipeline.report.contents import UNKNOWN, Contents, Dropped, totals
from data_pipeline.report.html import bar, count, details, esc, figure, long_table, note, percent, short, table

_SHOWN = 14
#: What a rule's score is, where no signal has that name; filters that drop a document for another one.
_SIGNALS = {"decontaminate": "share of n-grams", "language": "certainty of the language"}
_DUPLICATE = {"exact-duplicate": "equal", "near-duplicate": "near"}


def sources(data: Contents) -> str:
    """Every source of which something was kept, largest first; then those of which nothing was."""
    rows = sorted(enumerate(data.sources), key=lambda row: (-row[1]["bytes"], row[1]["name"]))
    total = sum(row["bytes"] for _, row in rows)
    if not total:
        return ""
    largest = max(row["bytes"] for _, row in rows)
    weighted = any(row.get("weight", 1.0) != 1.0 for _, row in rows)
    head = ["source", "licence", "documents", "MB", "", "share", "equal", "near", "filtered"]
    lines = []
    for number, row in rows:
        gone: Mapping[str, int] = data.dropped_by_source.get(number, {})
        other = sum(n for name, n in gone.items() if name not in _DUPLICATE)
        lines.append(
            [
                f'{esc(row["name"])} <small class="note">{esc(row["version"])}</small>',
                esc(row["licence"]), count(row["documents"]), f"{row['bytes'] / 1e6:,.2f}",
                bar(row["bytes"] / largest), percent(row["bytes"] / total),
                *(count(gone[name]) if gone.get(name) else "–" for name in _DUPLICATE), count(other) if other else "–",
                *([figure(row.get("weight", 1.0))] if weighted else []),
            ]
        )  # fmt: skip
    used = sum(1 for _, row in rows if row["documents"])
    lead = note(
        f"{used} of {len(rows)} sources are in the dataset, with {total / 1e6:,.1f} MB after all edits. "
        "The last columns count documents that went: equal to another, near to another, and by filters."
    )
    numbers = (2, 3, 5, 6, 7, 8, 9)
    return lead + long_table([*head, *(["weight"] if weighted else [])], lines, numbers, _SHOWN, "sources", "sources")


def languages(data: Contents) -> str:
    """Documents and text by language, of the training split."""
    documents = data.documents("train")
    if documents is None or set(np.unique(documents.language).tolist()) <= {UNKNOWN}:
        return ""
    rows = totals(documents.language, documents.bytes, documents.tokens)
    whole = max(1, int(documents.bytes.sum()))
    largest = rows[0][2][0]
    lines = [
        [
            f"<code>{esc(name)}</code>", count(number), f"{size / 1e6:,.2f}", bar(size / largest),
            percent(size / whole), short(tokens), f"{size / max(1, tokens):.2f}",
        ]
        for name, number, (size, tokens) in rows
    ]  # fmt: skip
    small = sum(1 for _, number, _ in rows if number < 20)
    few = (
        f" {small} of them have fewer than 20 documents: some of these will be mistakes of the identifier."
        if small
        else ""
    )
    lead = note(f"Training text in {len(rows)} languages, as identified document by document.{few}")
    head = ["language", "documents", "MB", "", "share", "tokens", "bytes/token"]
    return lead + long_table(head, lines, (1, 2, 4, 5, 6), _SHOWN, "languages")


def lengths(data: Contents) -> str:
    """How long documents are, and in how long documents the tokens stand, with the lengths of the stages."""
    documents = data.documents("train")
    if documents is None or not len(documents.tokens):
        return ""
    tokens = documents.tokens.astype(np.float64)
    edges = np.geomspace(max(1.0, tokens.min()), max(2.0, tokens.max() * 1.0001), 49)
    marks = [(float(stage["length"]), count(stage["length"])) for stage in data.stages]
    label = "tokens of a document"
    charts = []
    for title, unit, weights in (("Documents", "documents", None), ("Tokens", "tokens", tokens)):
        counts, _ = np.histogram(tokens, edges, weights=weights)
        chart = Histogram(
            f"{title} by length", edges.tolist(), [Series(unit, "kept", counts.tolist())], label, True, marks, unit
        )
        charts.append(f"<div><h3>{title} by length</h3>{chart.svg()}</div>")
    low, middle, high = (int(one) for one in np.percentile(documents.tokens, (10, 50, 90)))
    lead = note(
        f"Half of the {count(len(tokens))} training documents have at most {count(middle)} tokens; eight in ten lie "
        f"between {count(low)} and {count(high)}; the longest has {count(int(tokens.max()))}."
        + (" Dashed lines: the lengths of the stages." if marks else "")
    )
    return lead + f'<div class="two">{"".join(charts)}</div>'


def signals(data: Contents) -> str:
    """Distributions of quality and perplexity over all documents that were read."""
    found = data.collected.get("histograms", {})
    names = {
        "quality": ("Quality", "quality: mean credit over all rules"),
        "perplexity": ("Perplexity", "perplexity by a model of the document's language"),
        "words": ("Words", "words of a document"),
    }
    charts = [
        f"<div><h3>{title}</h3>{_chart(title, label, found[name])}</div>"
        for name, (title, label) in names.items()
        if found.get(name, {}).get("edges")
    ]
    if not charts:
        return ""
    lead = note(
        f"All {count(data.collected['documents'])} documents that were read, whatever became of them: kept, dropped by "
        "a filter, or dropped later as a duplicate and so on. The outermost values are counted into the last bars."
    )
    return lead + f'<div class="{"three" if len(charts) > 2 else "two"}">{"".join(charts)}</div>' + _bands(data)


def _chart(title: str, label: str, found: dict[str, Any]) -> str:
    kinds = {"kept": "kept", "dropped later": "later", "filtered": "gone"}
    series = [Series(name, kind, found["counts"][name]) for name, kind in kinds.items() if sum(found["counts"][name])]
    if found["unknown"]:
        label += f"; {count(found['unknown'])} have none"
    return Histogram(title, found["edges"], series, label, bool(found.get("logarithmic"))).svg()


def _bands(data: Contents) -> str:
    rows = [
        [
            f"<code>{esc(row['language'])}</code>",
            count(row["documents"]),
            *(figure(row[key]) for key in ("low", "median", "high")),
        ]
        for row in data.collected.get("perplexity_by_language", [])
    ]
    if not rows:
        return ""
    head = ["language", "documents", "kept from", "median", "kept to"]
    return details(f"Perplexity in {len(rows)} languages", table(head, rows, (1, 2, 3, 4)))


def filters(data: Contents) -> str:
    """Rules that dropped something, with a few of the documents; then what every other rule would have dropped."""
    skipped = {*_DUPLICATE, "pii", "paragraphs"}
    acted = [one for one in data.rules if one.action == "drop" and one.filter not in skipped]
    known = {row["name"]: row for row in data.collected.get("rules", [])}
    examples = data.collected.get("dropped", {})
    if not acted and not known:
        return ""
    most = max((one.count for one in acted), default=1)
    rows = [_rule(one, known.get(one.rule, {}), most) for one in acted]
    head = ["rule", "dropped", "", "scores of these", "threshold", "signal"]
    lead = note(
        "The first rule that a document fails is the one that dropped it. "
        "Each document is a row of <code>audit.parquet</code>."
    )
    shown = [_quotes(one, examples[one.rule]) for one in acted if examples.get(one.rule)]
    if not rows:
        lead = note("No rule dropped a document.")
    return (
        lead
        + (table(head, rows, (1, 3, 4)) if rows else "")
        + (details("Examples of what each rule dropped", "".join(shown)) if shown else "")
        + _others(data, known)
    )


def _rule(one: Dropped, known: dict[str, Any], most: int) -> list[str]:
    low, high = one.thresholds
    limit = figure(low) if low == high else f"{figure(low)} … {figure(high)}"
    source = f'<br><small class="note">{esc(known["source"])}</small>' if known else ""
    return [
        f"<code>{esc(one.rule)}</code>{source}", count(one.count), bar(one.count / most),
        f"{figure(one.lowest)} … {figure(one.highest)}", limit,
        esc(known.get("signal", _SIGNALS.get(one.filter, one.filter)).replace("_", " ")),
    ]  # fmt: skip


def _quotes(one: Dropped, found: list[dict[str, Any]]) -> str:
    blocks = "".join(map(_quote, found))
    return f"<h3><code>{esc(one.rule)}</code>: {len(found)} of {count(one.count)}</h3>{blocks}"


def _quote(row: dict[str, Any]) -> str:
    text = row["text"]
    shown = "Its policy forbids copies." if text is None else text.strip() + (" …" if row.get("more") else "")
    about = "<br>".join(
        [
            esc(row["source"]),
            f'<small class="note">{esc(row["place"])}</small>',
            f"score <b>{figure(row['score'])}</b>, threshold {figure(row['threshold'])}",
            f'<small class="note">{esc(row["detail"])}</small>',
        ]
    )
    return f'<div class="quote"><div>{about}</div><pre dir="auto">{esc(shown)}</pre></div>'


def _others(data: Contents, known: dict[str, dict[str, Any]]) -> str:
    whole = max(1, data.collected.get("documents", 0))
    rows = [
        [
            f"<code>{esc(row['name'])}</code>", "on" if row["on"] else "off", count(row["fails"]),
            percent(row["fails"] / whole), figure(row["low"]), figure(row["high"]), esc(row["note"]),
        ]
        for row in known.values()
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["rule", "", "documents that fail it", "of all", "least", "most", "why it is off by default"]
    return details(f"All {len(rows)} quality rules, and what each alone would drop", table(head, rows, (2, 3, 4, 5)))


def edits(data: Contents) -> str:
    """What was changed within documents that stayed: PII and paragraphs."""
    changed = {one.filter: one.count for one in data.rules if one.action == "change"}
    if not changed:
        return ""
    said = []
    if paragraphs := changed.get("paragraphs"):
        said.append(f"Paragraphs that stand in another document were cut from {count(paragraphs)} documents.")
    if scrubbed := changed.get("pii"):
        said.append(f"PII was replaced by a placeholder of its kind in {count(scrubbed)} documents.")
    most = max(data.pii.values(), default=1)
    rows = [[esc(kind), count(number), bar(number / most)] for kind, number in data.pii.items()]
    return note(" ".join(said)) + (table(["PII", "replaced", ""], rows, (1,), "narrow") if rows else "")
