"""What ``data inspect`` prints: a screen about the whole, or a document, a sample, the audit. Plain lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipeline.manifest import SPLITS
from data_pipeline.report.contents import UNKNOWN, Contents, Dropped, totals
from data_pipeline.report.html import visible
from data_pipeline.tables import sources_table
from refractor_megatron.errors import DataError

#: Sources, domains and audit rows listed at first.
_SOURCES, _DOMAINS, _ROWS = 8, 6, 20


def overview(data: Contents) -> Iterator[str]:
    """Sources, steps, splits, languages, stages, tasks and what was dropped or changed."""
    yield from sources_table(data.sources, _SOURCES)
    yield from _steps(data)
    for split in SPLITS:
        counts = data.manifest["splits"][split]
        ratio = counts["bytes"] / counts["tokens"]
        yield f"{split}: {counts['documents']} documents, {counts['tokens']} tokens, {ratio:.2f} bytes/token"
        yield f"  tokens by role: {_said(data.roles(split))}"
        if bits := data.bits(split):
            yield f"  tokens by mask bit: {_said(bits)}"
    yield from _languages(data)
    yield from map(_stage, data.stages)
    yield from (
        f"stage {one['length']}: left out, {one['tokens']} tokens of documents that long, it needs {one['needs']}"
        for one in data.curriculum.get("left_out", [])
    )
    for split, made in data.manifest.get("tasks", {}).items():
        kinds = Counter[str]()
        for stage in made["stages"]:
            kinds.update(stage["kinds"])
        yield f"{split}: {made['documents']} documents, {made['tokens']} tokens: {_said(dict(kinds)) or 'none'}"
    yield from _changes(data)
    if not data.ledger:  # of an older version, which has no other account of them
        yield f"counts: {_said(data.manifest['counts'])}"


def _steps(data: Contents) -> Iterator[str]:
    for step in data.ledger:
        gone = Counter(step["dropped"]) + Counter(step["quarantined"])
        if gone:
            yield f"{step['name']}: {step['in']} in, {step['kept']} kept; {_most(dict(gone), 4)}"


def _languages(data: Contents) -> Iterator[str]:
    documents = data.documents("train")
    if documents is None or UNKNOWN in documents.language:
        return
    rows = totals(documents.language, documents.bytes)
    whole = max(1, int(documents.bytes.sum()))
    shown = ", ".join(f"{name} {sums[0] / whole:.1%}" for name, _, sums in rows[:_DOMAINS])
    yield f"languages: {len(rows)}; {shown}{', ...' if len(rows) > _DOMAINS else ''} of the training text"


def _stage(stage: dict[str, Any]) -> str:
    domains = sorted(stage["domains"], key=lambda row: (-row["share"], row["name"]))
    shown = ", ".join(f"{row['name']} {row['share']:.1%}" for row in domains[:_DOMAINS])
    long = f", {stage['long_share']:.1%} long" if stage["below"] else ""
    return (
        f"stage {stage['length']}: {stage['sequences']} sequences, {stage['tokens']} tokens{long}, "
        f"{stage['documents_cut_share']:.2%} of documents cut; {len(domains)} domains: {shown}"
        f"{', ...' if len(domains) > _DOMAINS else ''}"
    )


def _changes(data: Contents) -> Iterator[str]:
    for action, said in (("drop", "dropped"), ("change", "changed")):
        counts = Counter[str]()
        for one in data.rules:
            if one.action == action:
                counts[one.filter] += one.count
        if counts:
            yield f"{said} by: {_said(dict(counts.most_common()))}"
    if data.pii:
        yield f"PII replaced: {_said(data.pii)}"


def audit(data: Contents, rule: str, full: bool) -> Iterator[str]:
    """The rules of the audit, or the rows of ``rule`` (its name with or without version, or a filter's).

    Raises ``DataError`` for a folder without an audit, and a rule that is not in it.
    """
    if data.audit is None:
        raise DataError(f"{data.folder} has no audit.parquet; it was built by an older version: build it again.")
    if not rule:
        yield f"{'documents':>9}  {'action':<7} {'filter':<16} {'rule':<36} {'scores':<22} threshold"
        yield from map(_rule, data.rules)
        return
    names = {one.rule for one in data.rules if rule in (one.rule, one.rule.partition("/")[0], one.filter)}
    if not names:
        known = ", ".join(sorted({one.rule for one in data.rules})) or "none"
        raise DataError(f"{data.folder} has no audit row of a rule or filter {rule!r}; it has those of: {known}.")
    import pyarrow as pa
    import pyarrow.compute as pc

    mask = pc.or_(pc.is_in(data.audit["rule"], pa.array(sorted(names))), pc.equal(data.audit["filter"], rule))
    rows = data.audit.filter(mask)
    shown = rows if full else rows.slice(0, _ROWS)
    yield from (audit_line(data, row) for row in shown.to_pylist())
    if left := rows.num_rows - shown.num_rows:
        yield f"{left} more rows: --full shows them, audit.parquet holds them"


def audit_line(data: Contents, row: dict[str, Any]) -> str:
    """A row of the audit as a line."""
    limit = "" if row["threshold"] is None else f" against {row['threshold']:.4g}"
    score = "" if row["score"] is None else f": {row['score']:.4g}{limit}"
    name = data.sources[row["source"]]["name"]
    return visible(f"{row['id'].hex()} {name}: {row['action']} by {row['rule']}{score}; {row['detail']}")


def _rule(one: Dropped) -> str:
    scores = "-" if one.lowest is None or one.highest is None else f"{one.lowest:.4g}..{one.highest:.4g}"
    low, high = one.thresholds
    limit = "-" if low is None or high is None else f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"
    return f"{one.count:>9}  {one.action:<7} {one.filter:<16} {one.rule:<36} {scores:<22} {limit}"


def _said(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def _most(counts: dict[str, int], limit: int) -> str:
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = int(np.sum([number for _, number in rows[limit:]]))
    return _said(dict(rows[:limit])) + (f", {rest} by {len(rows) - limit} more reasons" if rest else "")
