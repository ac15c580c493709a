"""From sources to the documents that will be trained on: read, judge, deduplicate, choose, refine.

Each step is a ``Stage`` in the work folder, so what was done stays done when a build is killed, and a changed threshold
reruns only the steps that depend on it: signals and signatures are kept. Between steps stand row masks, a byte a
document; no step holds the text of more than one shard a worker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pyarrow import parquet

from data_pipeline.catalogue import Catalogue
from data_pipeline.dedup.exact import exact_survivors
from data_pipeline.documents import PART_BYTES
from data_pipeline.engine.arrays import Saved, save_arrays
from data_pipeline.engine.tasks import Executor, Stage, task_folder
from data_pipeline.filters.audit import AuditRow, counts
from data_pipeline.options import Options
from data_pipeline.progress import Log
from data_pipeline.receipts.ledger import Ledger
from data_pipeline.selection import in_order, split_heldout, under_cap
from data_pipeline.shards import Shard
from data_pipeline.sources.base import Source
from data_pipeline.sources.ingest import QUARANTINE, check_bad_fraction, ingest_stage, ledgers_of
from refractor_megatron.errors import DataError

Mask = npt.NDArray[np.bool_]
#: A long text is cut so that at least this many parts fit under data.max_mb, but no finer than ``SMALLEST_PART`` bytes.
PARTS_IN_CAP = 16
SMALLEST_PART = 64 << 10
#: A lone document is cut into this many parts, so that some can be held out.
PARTS_OF_ONE = 20


@dataclass(frozen=True)
class Refined:
    """``catalogue`` of the refined shards; rows of it int64 [m] in the seeded hash order for each split."""

    catalogue: Catalogue
    train: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.int64]
    origin: npt.NDArray[np.int64]  # [n], row number among the documents that were read


@dataclass
class Pipeline:
    """One build's way from sources to refined shards; ``ledgers`` and the audit say what became of the rest."""

    sources: Sequence[Source]
    options: Options
    work: Path
    executor: Executor
    log: Log
    evaluation: Sequence[tuple[str, str]] = ()  # (path, sha256) of the user's evaluation files
    ledgers: list[Ledger] = field(default_factory=list)
    audit: list[AuditRow] = field(default_factory=list)
    audit_files: list[Path] = field(default_factory=list)
    quarantine_files: list[Path] = field(default_factory=list)
    signals: list[dict[str, npt.NDArray[Any]]] = field(default_factory=list)  # of each shard, if a step needs them
    perplexities: list[npt.NDArray[Any]] = field(default_factory=list)  # of each shard, if they were asked for
    bands: dict[str, tuple[float, float]] = field(default_factory=dict)  # perplexities to keep, by language
    kept: set[str] = field(default_factory=set)  # folders of arrays that stages still read
    _digests: dict[str, str] = field(default_factory=dict)  # of the stages that ran for each shard

    def run(self) -> Refined:
        """All steps. Raises ``DataError`` if a source is too bad or nothing is left."""
        catalogue = self._read()
        keep = np.ones(len(catalogue), dtype=np.bool_)
        if self._needs_signals():
            self._compute_signals(catalogue)
        if self.options.filters.enabled:
            keep = self._filter(catalogue, keep)
        keep = self._deduplicate(catalogue, keep)
        train, heldout = self._select(catalogue, keep)
        if self.options.decontaminate.enabled:
            train = self._decontaminate(catalogue, train, heldout)
        self.catalogue, self.read_mb = catalogue, float(catalogue.sizes.sum()) / 1e6
        return self._refine(catalogue, train, heldout)

    def _needs_signals(self) -> bool:
        """Quality decides between near-duplicates, so what survives does not depend on other steps being on."""
        options = self.options
        return (
            options.filters.enabled or options.filters.pii != "off" or options.dedup.enabled
            or options.mix.by == "language"
        )  # fmt: skip

    # Steps, in order.

    def _read(self) -> Catalogue:
        cap = int(self.options.max_mb * 1e6)
        catalogue = self._ingest(min(PART_BYTES, max(SMALLEST_PART, cap // PARTS_IN_CAP)))
        if len(catalogue) == 1 and not Shard(catalogue.shards[0]).framed[0]:
            self.log("data: the corpus is one document; it is cut into parts, so held-out text is of the same document")
            catalogue = self._ingest(max(8, -(-int(catalogue.sizes[0]) // PARTS_OF_ONE)))
        if not len(catalogue):
            self._refuse(0, 0)
        return catalogue

    def _ingest(self, part_bytes: int) -> Catalogue:
        stage = ingest_stage(self.sources, part_bytes)
        folder = self.executor.run(stage, self.work, self.log)
        check_bad_fraction(self.sources, folder, stage.count, self.options.max_bad_fraction)
        tasks = [task_folder(folder, index) for index in range(stage.count)]
        self.quarantine_files = [task / QUARANTINE for task in tasks]
        self.entered = ledgers_of(folder, stage.count)
        self.ledgers = [Ledger.sum("ingest", self.entered)]
        self.digest = stage.digest
        return Catalogue.of([path for task in tasks for path in sorted(task.glob("*.arrow"))])

    def _compute_signals(self, catalogue: Catalogue) -> None:
        from data_pipeline.filters.stages import FILE, VERSION, read_signals

        tasks = self._per_shard(
            "signals",
            "data_pipeline.filters.stages:signals_task",
            catalogue,
            {"version": VERSION, "pii": self.options.filters.pii != "off"},
        )
        self._signal_files = [task / FILE for task in tasks]
        self.signals = [read_signals(path) for path in self._signal_files]

    def _filter(self, catalogue: Catalogue, keep: Mask) -> Mask:
        from data_pipeline.filters.decide import decide, perplexity_bands
        from data_pipeline.filters.quality import chosen_rules, thresholds_of

        options = self.options.filters
        perplexities: list[npt.NDArray[Any]] | None = None
        bands: dict[str, tuple[float, float]] | None = None
        if options.perplexity_low > 0 or options.perplexity_high < 100:
            perplexities = self._perplexities(catalogue)
            languages = np.concatenate([one["language"] for one in self.signals])
            values = np.concatenate(perplexities)
            bands = perplexity_bands(values[keep], languages[keep], options.perplexity_low, options.perplexity_high)
        self.perplexities, self.bands = perplexities or [], bands or {}
        rules = chosen_rules(options.rules_on, options.rules_off, thresholds_of(options.thresholds))
        passed, rows = np.ones(len(catalogue), dtype=np.bool_), list[AuditRow]()
        for number, signals in enumerate(self.signals):
            decision = decide(signals, None if perplexities is None else perplexities[number], bands, options, rules)
            passed[catalogue.first[number] : catalogue.first[number + 1]] = decision.keep
            rows.extend(decision.rows)
        self.audit.extend(rows)
        return self._drop(keep, "filters", ~passed, counts(rows))

    def _perplexities(self, catalogue: Catalogue) -> list[npt.NDArray[Any]]:
        from data_pipeline.filters.perplexity import SAMPLE_BYTES

        told = {"signals": [str(path) for path in self._signal_files]}
        train = Stage(
            "ngram",
            "data_pipeline.filters.perplexity:train_task",
            1,
            {"of": self._digests["signals"], "seed": self.options.seed, "sample_bytes": SAMPLE_BYTES},
            volatile={"shards": [str(path) for path in catalogue.shards], **told},
        )
        models = task_folder(self.executor.run(train, self.work, self.log), 0)
        tasks = self._per_shard(
            "perplexity", "data_pipeline.filters.perplexity:score_task", catalogue, {"of": train.digest},
            {**told, "models": str(models)},
        )  # fmt: skip
        return [parquet.read_table(task / "perplexity.parquet")["perplexity"].to_numpy() for task in tasks]

    def _deduplicate(self, catalogue: Catalogue, keep: Mask) -> Mask:
        """Documents of equal content always; near ones if the options say so."""
        from data_pipeline.dedup.removals import deduplicate

        removals = deduplicate(
            list(catalogue.shards),
            catalogue.split(keep),
            catalogue.split(self._quality(catalogue)),
            [source.name for source in self.sources],
            self.options.dedup,
            self.executor,
            self.work,
            self.log,
        )
        self.audit.extend(AuditRow(**row) for row in removals.audit())
        self.removals = removals
        reasons = {"duplicate": removals.counts["exact"], "near-duplicate": removals.counts["near"]}
        return self._drop(keep, "dedup", np.concatenate([np.zeros(0, np.bool_), *removals.removed]), reasons)

    def _select(self, catalogue: Catalogue, keep: Mask) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        order = in_order(catalogue.keys, self.options.seed)
        order = order[keep[order]]
        chosen = under_cap(order, catalogue.sizes, catalogue.sources, int(self.options.max_mb * 1e6))
        over = keep.copy()
        over[chosen] = False
        self._note(catalogue, np.flatnonzero(over), "cap", "max-mb/1", f"data.max_mb {self.options.max_mb:g}")
        self._drop(keep, "over_cap", over)
        if len(chosen) < 2:
            self._refuse(len(order), len(chosen))
        # parts of one document stay on one side, unless there is no other
        groups = catalogue.groups if len(np.unique(catalogue.groups[chosen], axis=0)) > 1 else catalogue.keys
        return split_heldout(chosen, groups, self.options.heldout_fraction, self.options.seed)

    def _refuse(self, usable: int, chosen: int) -> None:
        first = self.ledgers[0]
        if usable > chosen:
            raise DataError(
                f"data.max_mb ({self.options.max_mb:g} MB) leaves {chosen} usable documents of {usable}; raise it."
            )
        gone = {
            reason: n for ledger in self.ledgers for reason, n in (ledger.dropped | ledger.quarantined).items() if n
        }
        why = ", ".join(f"{count} {reason}" for reason, count in gone.items()) or "none was dropped"
        raise DataError(
            f"The corpus has {usable} usable documents of {first.entered} ({why}), but training and held-out text need "
            f"one each; add text{' or loosen data.filters' if self.options.filters.enabled else ''}."
        )

    def _decontaminate(
        self, catalogue: Catalogue, train: npt.NDArray[np.int64], heldout: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        options = self.options.decontaminate
        masks = {"train": _mask(len(catalogue), train), "heldout": _mask(len(catalogue), heldout)}
        saved = self._save("splits", catalogue, masks)
        content = {"masks": saved.digest, "text": self.digest}
        shards = [str(path) for path in catalogue.shards]
        gather = Stage(
            "evaluation-set",
            "data_pipeline.filters.decontaminate:evaluation_task",
            1,
            {**content, "ngram": options.ngram, "files_sha256": [sha256 for _, sha256 in self.evaluation]},
            volatile={
                "shards": shards,
                "heldout": self._paths(saved, "heldout", catalogue),
                "files": [path for path, _ in self.evaluation],
            },
        )
        evaluation = task_folder(self.executor.run(gather, self.work, self.log), 0)
        tasks = self._per_shard(
            "decontaminate",
            "data_pipeline.filters.decontaminate:decontaminate_task",
            catalogue,
            {**content, "of": gather.digest, "threshold": options.overlap},
            {"train": self._paths(saved, "train", catalogue), "evaluation": str(evaluation)},
        )
        self.audit_files += [task / "audit.parquet" for task in tasks]
        kept = np.concatenate([np.load(task / "keep.npy") for task in tasks])
        self._drop(masks["train"] | masks["heldout"], "contaminated", masks["train"] & ~kept)
        left: npt.NDArray[np.int64] = train[kept[train]]
        if not len(left):
            raise DataError(
                "Every training document shares its text with evaluation documents; raise data.decontaminate.overlap."
            )
        return left

    def _refine(self, catalogue: Catalogue, train: npt.NDArray[np.int64], heldout: npt.NDArray[np.int64]) -> Refined:
        masks = {"train": _mask(len(catalogue), train), "keep": _mask(len(catalogue), np.concatenate([train, heldout]))}
        saved = self._save("chosen", catalogue, masks)
        cuts = None
        if self.options.dedup.paragraphs:
            cuts = self._paragraph_cuts(catalogue, self._paths(saved, "train", catalogue))
        scrub = self.options.filters.pii == "scrub"
        signals = [str(path) for path in self._signal_files] if scrub else None
        self.digest = _digest(
            [self.digest, saved.digest, cuts is not None, self._digests["signals"] if scrub else None]
        )
        tasks = self._per_shard(
            "refine",
            "data_pipeline.refine:refine_task",
            catalogue,
            {},
            {"keep": self._paths(saved, "keep", catalogue), "cuts": cuts, "pii": signals},
        )
        self.audit_files += [task / "audit.parquet" for task in tasks]
        rows = [np.load(task / "rows.npy") + low for task, low in zip(tasks, catalogue.first[:-1], strict=True)]
        origin = np.concatenate([np.empty(0, np.int64), *rows])
        gone = masks["keep"].copy()
        gone[origin] = False
        self._note(catalogue, np.flatnonzero(gone), "edits", "empty/1", "nothing is left of it")
        left = self._drop(masks["keep"], "empty after edits", gone)
        shards = [task / "00000.arrow" for task, kept in zip(tasks, rows, strict=True) if len(kept)]
        refined = Catalogue.of(shards)
        return self._unequal(catalogue, refined, origin, train, heldout, left)

    def _unequal(
        self,
        catalogue: Catalogue,
        refined: Catalogue,
        origin: npt.NDArray[np.int64],
        train: npt.NDArray[np.int64],
        heldout: npt.NDArray[np.int64],
        keep: Mask,
    ) -> Refined:
        """Documents that edits made equal go but for one, a held-out one if there is one, then the first in order."""
        place = np.full(len(catalogue), -1, dtype=np.int64)
        place[origin] = np.arange(len(origin))
        order = np.concatenate([heldout, train])
        order = place[order][place[order] >= 0]
        ranks = np.empty(len(refined), dtype=np.int64)
        ranks[order] = np.arange(len(order))
        twin = exact_survivors(refined.keys, ranks, np.ones(len(refined), dtype=np.bool_))
        again = np.flatnonzero(twin >= 0)
        gone_before, kept_before = self.removals.equal
        self.equal = (
            np.concatenate([gone_before, origin[again]]),
            np.concatenate([kept_before, origin[twin[again]]]),
        )
        gone = np.zeros(len(catalogue), dtype=np.bool_)
        gone[origin[twin >= 0]] = True
        for row in np.flatnonzero(twin >= 0).tolist():
            survivor = refined.ids[twin[row]].tobytes().hex()
            self._note(catalogue, origin[[row]], "edits", "equal/1", f"survivor={survivor}")
        self._drop(keep, "equal after edits", gone)
        sides = [place[side][~gone[side] & (place[side] >= 0)] for side in (train, heldout)]
        if not (len(sides[0]) and len(sides[1])):
            self._refuse(len(sides[0]) + len(sides[1]), len(sides[0]) + len(sides[1]))
        return Refined(refined, sides[0], sides[1], origin)

    def _paragraph_cuts(self, catalogue: Catalogue, train: list[str]) -> list[str]:
        from data_pipeline.dedup.paragraphs import paragraph_duplicates

        masks = [Path(path) for path in train]
        folders = paragraph_duplicates(list(catalogue.shards), masks, self.executor, self.work, self.log)
        return [str(folder) for folder in folders]

    # What steps share.

    def _per_shard(
        self,
        name: str,
        function: str,
        catalogue: Catalogue,
        params: dict[str, Any],
        volatile: dict[str, Any] | None = None,
    ) -> list[Path]:
        """Runs a task for each shard; returns their folders."""
        stage = Stage(
            name,
            function,
            len(catalogue.shards),
            {"text": self.digest, **params},
            volatile={"shards": [str(path) for path in catalogue.shards], **(volatile or {})},
            megabytes=tuple(float(sizes.sum()) / 1e6 for sizes in catalogue.split(catalogue.sizes)),
        )
        self._digests[name] = stage.digest
        folder = self.executor.run(stage, self.work, self.log)
        return [task_folder(folder, index) for index in range(stage.count)]

    def _save(self, name: str, catalogue: Catalogue, masks: dict[str, Mask]) -> Saved:
        """Row masks as one array for each shard, for tasks to read."""
        arrays = {
            f"{key}-{number:05d}": part
            for key, mask in masks.items()
            for number, part in enumerate(catalogue.split(mask))
        }
        saved = save_arrays(self.work, name, **arrays)
        self.kept.add(saved.folder.name)
        return saved

    def _paths(self, saved: Saved, key: str, catalogue: Catalogue) -> list[str]:
        return [saved.path(f"{key}-{number:05d}") for number in range(len(catalogue.shards))]

    def _note(self, catalogue: Catalogue, rows: npt.NDArray[np.int64], step: str, rule: str, detail: str) -> None:
        """An audit row for each of the documents ``rows``, which ``rule`` drops."""
        for row in rows.tolist():
            document, source = catalogue.ids[row].tobytes().hex(), int(catalogue.sources[row])
            self.audit.append(AuditRow(document, source, "drop", step, None, None, rule, detail))

    def _quality(self, catalogue: Catalogue) -> npt.NDArray[np.float32]:
        if not self.signals:
            return np.zeros(len(catalogue), dtype=np.float32)
        return np.concatenate([one["quality"] for one in self.signals]).astype(np.float32)

    def _drop(self, keep: Mask, name: str, gone: Mask, reasons: dict[str, int] | None = None) -> Mask:
        """Enters a step into the ledger; returns what is left. ``reasons`` split its count."""
        left = keep & ~gone
        entered, kept = int(keep.sum()), int(left.sum())
        dropped = {name: entered - kept} if reasons is None else reasons
        self.ledgers.append(Ledger(name, entered, kept, dropped).follow(self.ledgers[-1]))
        return left


def _mask(size: int, rows: npt.NDArray[np.int64]) -> Mask:
    mask = np.zeros(size, dtype=np.bool_)
    mask[rows] = True
    return mask


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
