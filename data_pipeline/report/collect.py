"""What the report shows that no other file of a dataset holds: taken down at build time, while the text is at hand.

``report.json``: distributions of the signals over all documents that were read, what each rule would drop, a few of
those that were, the largest groups of duplicates with excerpts, and the pairs that were dropped at the lowest
similarity. Its size is bounded, whatever that of the corpus is. Excerpts are scrubbed where the dataset is.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from data_pipeline.dedup.removals import Cluster, largest_clusters
from data_pipeline.filters.audit import AuditRow, audit_table
from data_pipeline.pipeline import Pipeline, Refined
from data_pipeline.report.excerpts import Excerpts, Place, Rows, place_name

VERSION = 1
FILE = "report.json"
#: Groups of duplicates, pairs nearest to the threshold, quarantined entries, and dropped documents of a rule shown.
CLUSTERS, CLOSEST, QUARANTINED, DROPPED = 20, 6, 12, 3
#: Languages whose perplexity is listed, and pairs of sources that share most duplicates.
LANGUAGES, PAIRS = 30, 12
_BINS = 48
_FILTERS = ("language", "quality", "perplexity")

Mask = npt.NDArray[np.bool_]


def collect(pipeline: Pipeline, refined: Refined) -> dict[str, Any]:
    """The content of ``report.json``: JSON values that depend on the corpus and the options alone."""
    catalogue, scrub = pipeline.catalogue, pipeline.options.filters.pii == "scrub"
    excerpts = Excerpts(catalogue, pipeline.sources, scrub)
    rows = Rows(catalogue.ids)
    kept = np.zeros(len(catalogue), dtype=np.bool_)
    kept[refined.origin] = True
    refused = rows.mask([row.id for row in pipeline.audit if row.filter in _FILTERS])
    examples = _Examples(excerpts, rows)
    return {
        "version": VERSION,
        "documents": len(catalogue),
        "histograms": _histograms(pipeline, kept, refused),
        "perplexity_by_language": _by_language(pipeline),
        "rules": _rules(pipeline),
        "dropped": examples.dropped(_dropped(pipeline)),
        "quarantined": _quarantined(pipeline, scrub),
        "duplicates": _duplicates(pipeline, excerpts),
    }


def write(folder: Path, content: dict[str, Any]) -> None:
    """Writes ``report.json``; the same content gives the same bytes."""
    (folder / FILE).write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="ascii")


# Distributions.


def _histograms(pipeline: Pipeline, kept: Mask, refused: Mask) -> dict[str, Any]:
    """Counts of kept, filtered and otherwise dropped documents for each bin of a signal."""
    if not pipeline.signals:
        return {}
    columns = {
        "quality": (_joined(pipeline, "quality"), False),
        "language_score": (_joined(pipeline, "language_score"), False),
        "words": (_joined(pipeline, "words"), True),
    }
    if pipeline.perplexities:
        columns["perplexity"] = (np.concatenate(pipeline.perplexities).astype(np.float64), True)
    groups = {"kept": kept, "filtered": refused, "dropped later": ~kept & ~refused}
    return {name: histogram(values, groups, logarithmic) for name, (values, logarithmic) in columns.items()}


def histogram(values: npt.NDArray[np.float64], groups: dict[str, Mask], logarithmic: bool) -> dict[str, Any]:
    """``edges`` [b + 1] and the counts [b] of each group of ``values`` [n]; ``unknown``: those not finite, or not above
    0 on a logarithmic scale. The outermost 0.1 % on either side are counted into the first and last bin."""
    known = np.isfinite(values) & ((values > 0) | (not logarithmic))
    if not known.any():
        return {"edges": [], "counts": {}, "unknown": len(values)}
    low, high = (float(one) for one in np.percentile(values[known], (0.1, 99.9)))
    high = high if high > low else low + max(1e-6, abs(low))
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    counts = {
        name: np.histogram(np.clip(values[known & mask], edges[0], edges[-1]), edges)[0].tolist()
        for name, mask in groups.items()
    }
    shown = [float(f"{edge:.6g}") for edge in edges]
    return {"edges": shown, "counts": counts, "unknown": int((~known).sum()), "logarithmic": logarithmic}


def _by_language(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Perplexity in the languages of most documents: the band that was kept, and the middle."""
    if not pipeline.perplexities:
        return []
    values = np.concatenate(pipeline.perplexities).astype(np.float64)
    languages = np.concatenate([one["language"] for one in pipeline.signals])
    known = np.isfinite(values)
    names, counts = np.unique(languages[known], return_counts=True)
    most = sorted(zip((-counts).tolist(), names.tolist(), strict=True))[:LANGUAGES]
    rows = []
    for count, name in most:
        low, high = pipeline.bands.get(str(name), (None, None))
        median = float(np.median(values[known & (languages == name)]))
        rows.append({"language": str(name), "documents": -count, "median": median, "low": low, "high": high})
    return rows


def _rules(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Every quality rule with its thresholds and how many documents fail it, whether it is on or filters are off."""
    options = pipeline.options.filters
    if not pipeline.signals:
        return []
    from data_pipeline.filters.quality import RULES, chosen_rules, thresholds_of

    chosen = {
        rule.name: rule for rule in chosen_rules(options.rules_on, options.rules_off, thresholds_of(options.thresholds))
    }
    rules = []
    for stated in RULES:
        rule = chosen.get(stated.name, stated)
        fails = sum(int(np.count_nonzero(rule.fails(signals))) for signals in pipeline.signals)
        rules.append(
            {
                "name": rule.name,
                "signal": rule.signal,
                "source": rule.source,
                "low": rule.low,
                "high": rule.high,
                "on": options.enabled and options.quality and rule.name in chosen,
                "note": rule.note,
                "fails": fails,
            }
        )
    return rules


def _joined(pipeline: Pipeline, name: str) -> npt.NDArray[np.float64]:
    return np.concatenate([np.asarray(one[name], dtype=np.float64) for one in pipeline.signals])


# Documents that are not in the dataset.


def _dropped(pipeline: Pipeline) -> Iterable[AuditRow]:
    """Audit rows of documents that a filter or decontamination dropped."""
    yield from (row for row in pipeline.audit if row.filter in _FILTERS)
    for path in pipeline.audit_files:
        for row in audit_table(path).to_pylist():
            if row["action"] == "drop" and row["filter"] == "decontaminate":
                yield AuditRow(**{**row, "id": row["id"].hex()})


class _Examples:
    """A few documents of each rule: those of the lowest ids, which is as good as drawn by lot."""

    def __init__(self, excerpts: Excerpts, rows: Rows) -> None:
        self._excerpts, self._rows = excerpts, rows

    def dropped(self, rows: Iterable[AuditRow]) -> dict[str, list[dict[str, Any]]]:
        """By rule, in order of id."""
        held: dict[str, list[AuditRow]] = defaultdict(list)
        for row in rows:
            held[row.rule] = sorted([*held[row.rule], row], key=lambda one: one.id)[:DROPPED]
        return {rule: [self._shown(row) for row in held[rule]] for rule in sorted(held)}

    def _shown(self, row: AuditRow) -> dict[str, Any]:
        place = self._excerpts.catalogue.places(self._rows([row.id]))[0]
        said = {"score": row.score, "threshold": row.threshold, "detail": row.detail}
        return {**self._excerpts.lone((int(place[0]), int(place[1]))), **said}


def _quarantined(pipeline: Pipeline, scrub: bool) -> list[dict[str, Any]]:
    """The first entries that could not be understood, of as many reasons as there are, with their place."""
    held: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in pipeline.quarantine_files:
        with path.open(encoding="ascii") as lines:
            for line in lines:
                row = json.loads(line)
                if len(held[row["reason"]]) < QUARANTINED:
                    source = pipeline.sources[row["source"]]
                    place = place_name(source, row["file"], row["position"])
                    held[row["reason"]].append(
                        {
                            "reason": row["reason"],
                            "source": source.name,
                            "place": place,
                            "detail": _shown(row["detail"], scrub),
                        }
                    )
    share = max(1, QUARANTINED // max(1, len(held)))
    return [row for reason in sorted(held) for row in held[reason][:share]][:QUARANTINED]


def _shown(detail: str, scrub: bool) -> str:
    """What is wrong with an entry, in short; it may quote the entry."""
    if scrub:
        from data_pipeline.filters import pii

        detail = pii.scrub(detail.encode())[0].decode()
    return detail[:200]


# Duplicates.


def _duplicates(pipeline: Pipeline, excerpts: Excerpts) -> dict[str, Any]:
    """What was found, between which sources, the largest groups, and the pairs nearest to the threshold."""
    removals = pipeline.removals
    return {
        **removals.work_done,
        "threshold": removals.threshold,
        "counts": removals.counts,
        "by_source": {name: counts for name, counts in removals.by_source.items() if any(counts.values())},
        "pairs": _pairs(pipeline),
        "clusters": [_cluster(one, excerpts) for one in largest_clusters(removals.clusters, CLUSTERS)],
        "closest": _closest(removals.clusters, excerpts),
    }


def _cluster(one: Cluster, excerpts: Excerpts) -> dict[str, Any]:
    """The survivor beside the member that is least like it, of those listed."""
    member = min(one.members, key=lambda row: (row["jaccard"], row["id"]))
    survivor, other = excerpts.pair(one.place, member["place"])
    said = {"jaccard": member["jaccard"], "kind": member["kind"]}
    return {"size": one.size, "survivor": survivor, "member": {**other, **said}}


def _closest(path: Path, excerpts: Excerpts) -> list[dict[str, Any]]:
    """Near-duplicates of the lowest similarity that were dropped, no two for the same survivor."""
    best: dict[bytes, tuple[float, bytes, Place, Place]] = {}
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            if row["kind"] != "near":
                continue
            places = (row["survivor_shard"], row["survivor_row"]), (row["member_shard"], row["member_row"])
            entry = (row["jaccard"], row["member"], *places)
            if row["survivor"] not in best or entry < best[row["survivor"]]:
                best[row["survivor"]] = entry
        if len(best) > 4 * CLOSEST:
            best = dict(sorted(best.items(), key=lambda item: item[1])[:CLOSEST])
    pairs = []
    for jaccard, _, survivor, member in sorted(best.values())[:CLOSEST]:
        one, other = excerpts.pair(survivor, member)
        pairs.append({"survivor": one, "member": {**other, "jaccard": jaccard, "kind": "near"}})
    return pairs


def _pairs(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Sources between which most duplicates were found: where members were, where their survivors are."""
    catalogue, found = pipeline.catalogue, Counter[tuple[int, int]]()
    for batch in pq.ParquetFile(pipeline.removals.clusters).iter_batches():
        member, survivor = (_sources_of(catalogue, batch, side) for side in ("member", "survivor"))
        found.update(zip(member.tolist(), survivor.tolist(), strict=True))
    names: Sequence[str] = [source.name for source in pipeline.sources]
    rows = sorted(((-count, names[a], names[b]) for (a, b), count in found.items()))[:PAIRS]
    return [{"member": a, "survivor": b, "documents": -count} for count, a, b in rows]


def _sources_of(catalogue: Any, batch: Any, side: str) -> npt.NDArray[np.int64]:
    shard, row = (batch.column(f"{side}_{part}").to_numpy().astype(np.int64) for part in ("shard", "row"))
    found: npt.NDArray[np.int64] = catalogue.sources[catalogue.first[shard] + row]
    return found
