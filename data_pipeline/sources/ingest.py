"""First stage of a build: sources to shards, with a ledger of what came in, was kept, dropped and quarantined.

The ledger counts documents: an entry that is cut into n parts is n documents. ``in`` is therefore the number of entries
plus ``cut_parts``, and in = kept + dropped + quarantined.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.engine.tasks import Stage, task_folder
from data_pipeline.sources.base import MAX_LINE_MB, Quarantined, Reading, Source
from data_pipeline.sources.units import read_unit
from refractor_megatron.errors import DataError

if TYPE_CHECKING:
    from data_pipeline.shards import Located

QUARANTINE = "quarantine.jsonl"
LEDGER = "ledger.json"
#: Raise when the same sources would give other shards.
VERSION = 3
_SHOWN = 3

Ledger = dict[str, Any]


def ingest_stage(sources: Sequence[Source], part_bytes: int, max_line_mb: float = MAX_LINE_MB) -> Stage:
    """One task for each unit of ``sources``. Where files lie is no part of the stage's digest; what they hold is."""
    units: list[dict[str, Any]] = []
    places: list[dict[str, Any]] = []
    for number, source in enumerate(sources):
        for unit in source.units:
            content = {key: value for key, value in unit.items() if key != "place"}
            units.append({"source": number, "name": source.name, "unit": content})
            places.append(unit["place"])
    return Stage(
        "ingest",
        "data_pipeline.sources.ingest:ingest_task",
        len(units),
        {"units": units, "part_bytes": part_bytes, "max_line_mb": float(max_line_mb)},
        version=VERSION,
        volatile={"places": places},
        megabytes=tuple(float(entry["unit"]["megabytes"]) for entry in units),
    )


def ingest_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Writes the shards of unit ``index``, ``quarantine.jsonl`` and ``ledger.json`` into ``out``.

    ``params``: ``units`` [{"source": number, "name", "unit"}], ``part_bytes``, ``max_line_mb``; ``places``: one for
    each unit. Raises ``DataError`` naming a file that has gone or changed.
    """
    from data_pipeline.shards import write_shards

    entry = params["units"][index]
    unit = {**entry["unit"], "place": params["places"][index]}
    reading = Reading(int(params["part_bytes"]), int(float(params["max_line_mb"]) * 1e6))
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with (out / QUARANTINE).open("w", encoding="ascii") as quarantine:

        def kept() -> Iterator[Located]:
            for item in read_unit(unit, reading):
                counts["in"] += 1
                if isinstance(item, Quarantined):
                    reasons[item.reason] += 1
                    quarantine.write(json.dumps(_row(item, entry["source"])) + "\n")
                elif item.document.blank:
                    counts["blank"] += 1
                else:
                    counts["kept"] += 1
                    counts["bytes"] += item.document.size
                    yield item

        shards = write_shards(out, entry["source"], entry["name"], kept())
    ledger = {
        "in": counts["in"],
        "kept": counts["kept"],
        "dropped": {"blank": counts["blank"]} if counts["blank"] else {},
        "quarantined": dict(sorted(reasons.items())),
        "source": entry["source"],
        "entries": counts["in"] - reading.counts["cut_parts"],
        "cut_parts": reading.counts["cut_parts"],
        "bytes": counts["bytes"],
        "lost_bytes": reading.counts["lost_bytes"],
        "long_bytes": reading.counts["long_bytes"],
        "shards": shards,
    }
    (out / LEDGER).write_text(json.dumps(ledger, indent=1, sort_keys=True) + "\n")


def _row(item: Quarantined, source: int) -> dict[str, Any]:
    """A line of the quarantine. Its texts can be written as UTF-8: a lone surrogate stands there as an escape."""
    return {
        "reason": item.reason,
        "source": source,
        "file": item.file,
        "position": item.position,
        "detail": item.detail.encode("utf-8", "backslashreplace").decode(),
        "sample": item.sample.decode("utf-8", "backslashreplace"),
    }


def ledgers_of(folder: Path, count: int) -> list[Ledger]:
    """Ledgers of all tasks of an ingest stage folder."""
    return [json.loads((task_folder(folder, index) / LEDGER).read_bytes()) for index in range(count)]


def check_bad_fraction(sources: Sequence[Source], folder: Path, count: int, limit: float) -> None:
    """Raises ``DataError`` for the first source of the user's of which more than ``limit`` is quarantined.

    The share is of its documents, or of the bytes of its files where damage has hidden how many documents they held.
    ``folder`` and ``count``: of the ingest stage. Packages are as their makers left them and stop no build.
    """
    ledgers = ledgers_of(folder, count)
    for number, source in enumerate(sources):
        mine = [(index, ledger) for index, ledger in enumerate(ledgers) if ledger["source"] == number]
        bad, share, of_bytes = bad_share(source, [ledger for _, ledger in mine])
        if not source.mendable or not bad or share <= limit:
            continue
        shown = _reasons(source, [task_folder(folder, index) for index, _ in mine])
        what = "of its bytes" if of_bytes else "of all"
        raise DataError(
            f"Source {source.name}: {bad} of {sum(ledger['in'] for _, ledger in mine)} documents are unusable, "
            f"{share:.2%} {what}, more than data.max_bad_fraction {limit:g}: {'; '.join(shown)}; "
            "correct them or raise data.max_bad_fraction."
        )


def bad_share(source: Source, ledgers: Sequence[Ledger]) -> tuple[int, float, bool]:
    """``(quarantined documents, bad share, whether it is of bytes)`` of a source, from the ledgers of its units."""
    bad = sum(sum(ledger["quarantined"].values()) for ledger in ledgers)
    read = sum(ledger["in"] for ledger in ledgers)
    lost = sum(ledger["lost_bytes"] for ledger in ledgers)
    size = sum(entry["bytes"] for entry in source.files)
    long = sum(ledger["long_bytes"] for ledger in ledgers)  # of entries that are too long, uncompressed like the text
    text = sum(ledger["bytes"] for ledger in ledgers)
    by_number, by_size = bad / max(read, 1), max(lost / max(size, 1), long / max(long + text, 1))
    return bad, max(by_number, by_size), by_size > by_number


def _reasons(source: Source, folders: Sequence[Path]) -> list[str]:
    """``file:position (reason: detail)`` of the first quarantined entries."""
    shown: list[str] = []
    for folder in folders:
        with (folder / QUARANTINE).open(encoding="ascii") as lines:
            for line in lines:
                row = json.loads(line)
                place = f"{source.files[row['file']]['path']}:{row['position']}"
                shown.append(f"{place} ({row['reason']}: {row['detail'][:120]})")
                if len(shown) == _SHOWN:
                    return shown
    return shown
