"""Builds a dataset folder from a corpus.

The folder is ``<name>-<digest12>``. The digest covers the code's format version, every option but who does the work,
and the identity of the input: for a user's files their relative names and content hashes (read from an index when size,
time stamp and inode are unchanged, so a second run reads no text), for packages their names, versions and .deb hashes.
The same corpus in another place gives the same folder, and nothing is built twice.

Steps leave their results under ``<cache>/stages/<name>``, and a build that was killed goes on from there. What is
published is put together in a folder beside the result and renamed when everything is on disk. Files carry no time
stamps: rebuilding gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline import manifest as manifests
from data_pipeline.curriculum.plan import MadeTasks, plan_stages
from data_pipeline.curriculum.routing import MOST_DRAWN
from data_pipeline.engine.choose import executor_of
from data_pipeline.engine.tasks import Executor, Stage, task_folder
from data_pipeline.filters.audit import read_audit, write_audit
from data_pipeline.options import Curriculum, Options, Tasks
from data_pipeline.output import draft_folder, exclusive, mendable_errors
from data_pipeline.pack.indexed import read_indexed
from data_pipeline.pipeline import Pipeline, Refined
from data_pipeline.progress import Log
from data_pipeline.receipts.croissant import croissant
from data_pipeline.sources import open_sources
from data_pipeline.sources.base import Source
from data_pipeline.sources.fingerprint import sha256_of
from data_pipeline.tables import gather, sources_table, write_documents, write_provenance_of, write_sources
from data_pipeline.tasks.compose import Kind
from data_pipeline.tasks.write import generate
from data_pipeline.tokenise.merge import merge
from refractor_megatron.errors import DataError, OutputError
from refractor_megatron.tokenizer import Tokenizer

#: Raise when the same input and options would give other bytes.
CODE_VERSION = 3


@dataclass(frozen=True)
class BuiltData:
    """``folder`` of the dataset, its ``manifest``, and whether this call built it."""

    folder: Path
    manifest: dict[str, Any]
    built: bool


def build(
    corpus: Path | None,
    out_root: Path,
    options: Options,
    *,
    cache: Path,
    tokenizer: Tokenizer | None = None,
    sources_file: Path | None = None,
    log: Log = print,
) -> BuiltData:
    """Returns the dataset of ``corpus`` (``None``: of ``sources_file`` or of the default corpus options.name names).

    ``options.vocab_size`` counts special tokens and is an upper bound; ``max_mb`` caps the text in units of 10^6 bytes.
    ``tokenizer`` encodes it; without one a tokenizer is trained on a sample of the text. Raises ``DataError`` for an
    unusable corpus or a tokenizer of more ids, ``OutputError`` if a result cannot be written.
    """
    _check(options, tokenizer)
    with mendable_errors(out_root, cache):
        sources = open_sources(corpus, cache, log, name=options.name, sources_file=sources_file)
        digest = _digest(options, sources, tokenizer)
        folder = out_root / f"{options.name}-{digest[:12]}"
        if (folder / "manifest.json").exists():
            return _up_to_date(folder, log)
        work = (cache / "stages" / options.name).absolute()  # workers may have another working directory
        with exclusive(out_root, log), exclusive(work, log):
            if (folder / "manifest.json").exists():  # by the build this one has waited for
                return _up_to_date(folder, log)
            if folder.exists():
                raise OutputError(f"{folder} exists but is not a whole dataset; delete it and run again.")
            with executor_of(options.engine) as executor, draft_folder(folder) as draft:
                recorder = _Recorder(executor)
                manifest = _Build(draft, sources, options, tokenizer, digest, work, recorder, log).run()
            _sweep(work, recorder.used)
    return BuiltData(folder, manifest, built=True)


def _up_to_date(folder: Path, log: Log) -> BuiltData:
    log(f"data: {folder} is up to date")
    return BuiltData(folder, manifests.load(folder), built=False)


def _check(options: Options, tokenizer: Tokenizer | None) -> None:
    if not options.name or options.name.startswith(".") or "/" in options.name:
        raise DataError(f"data.name {options.name!r} cannot name a folder; use letters, digits and dashes.")
    if options.max_mb <= 0:
        raise DataError(f"data.max_mb must be above 0, not {options.max_mb:g}.")
    if not 0 < options.heldout_fraction < 1:
        raise DataError(f"data.heldout_fraction must lie between 0 and 1, not {options.heldout_fraction:g}.")
    lengths = options.curriculum.lengths
    if any(low >= high for low, high in zip(lengths, lengths[1:], strict=False)) or any(one < 2 for one in lengths):
        raise DataError(f"data.curriculum.lengths must rise and be at least 2, not {list(lengths)}.")
    if tokenizer is not None and tokenizer.vocab_size > options.vocab_size:
        raise DataError(
            f"The tokenizer has {tokenizer.vocab_size} ids and model.vocab_size is {options.vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size}."
        )


def _parameters(options: Options, tokenizer: Tokenizer | None) -> dict[str, Any]:
    body = asdict(options)
    del body["engine"]  # changes no byte
    return body if tokenizer is None else {**body, "tokenizer": tokenizer.digest}


def _digest(options: Options, sources: list[Source], tokenizer: Tokenizer | None) -> str:
    inputs = [{"name": s.name, "version": s.version, "identity": s.identity, "weight": s.weight} for s in sources]
    body = {"code": CODE_VERSION, "parameters": _parameters(options, tokenizer), "sources": inputs}
    return hashlib.sha256(manifests.canonical(body)).hexdigest()


@dataclass
class _Build:
    """One build into ``draft``."""

    draft: Path
    sources: list[Source]
    options: Options
    tokenizer: Tokenizer | None
    digest: str
    work: Path
    executor: Executor
    log: Log

    def run(self) -> dict[str, Any]:
        """Everything from reading to the sealed manifest, which it returns."""
        clock = _Clock(self.log)
        self.pipeline = Pipeline(self.sources, self.options, self.work, self.executor, self.log)
        refined = self.pipeline.run()
        clock.lap("read, judge, deduplicate and select")
        self._write_sources(refined)
        names = write_provenance_of(self.draft, refined.catalogue, refined.train, self.sources)
        tokenizer = self.tokenizer or self._learn(refined)
        tokenizer.save(self.draft / "tokenizer.json")
        clock.lap(f"tokenizer of {tokenizer.vocab_size} ids")
        splits = self._encode(refined, tokenizer)
        clock.lap("encode and merge")
        extra = self._stages(refined, splits, tokenizer)
        self._write_receipts()
        counts = self._counts()
        _report(counts, splits, self.log)
        body = {
            "digest": self.digest,
            "code_version": CODE_VERSION,
            "parameters": _parameters(self.options, self.tokenizer),
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.digest},
            "splits": splits,
            "provenance_sources": names,
            "counts": counts,
            **extra,
        }
        manifest = self._seal(body)
        clock.lap("receipts")
        return manifest

    def _seal(self, body: dict[str, Any]) -> dict[str, Any]:
        """Writes ``croissant.json``, then the manifest over everything."""
        files = manifests.entries(self.draft)
        path = self.draft / "croissant.json"
        path.write_bytes(croissant(self.draft, self.options.name, self.digest, files, self.pipeline.ledgers))
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        content = tuple(name for name in sorted(files) if name.startswith(("stage-", "tasks")))
        return manifests.seal(self.draft, body, content=content, files=files)

    def _write_sources(self, refined: Refined) -> None:
        catalogue = refined.catalogue
        documents = np.bincount(catalogue.sources, minlength=len(self.sources))
        sizes = np.bincount(catalogue.sources, weights=catalogue.sizes.astype(np.float64), minlength=len(self.sources))
        write_sources(self.draft, self.sources, documents.tolist(), sizes.astype(np.int64).tolist())
        for line in sources_table(json.loads((self.draft / "sources.json").read_bytes())):
            self.log(line)

    def _learn(self, refined: Refined) -> Tokenizer:
        """The tokenizer trained on the first training documents in hash order, as a step that is not done twice."""
        limit = int(self.options.tokenizer_mb * 1e6)
        total = np.cumsum(refined.catalogue.sizes[refined.train])
        sample = refined.train[: int(np.searchsorted(total, limit)) + 1]
        places = self.work / f"sample-{self.pipeline.digest[:12]}" / "places.npy"
        places.parent.mkdir(parents=True, exist_ok=True)
        np.save(places, refined.catalogue.places(sample))
        stage = Stage(
            "tokenizer",
            "data_pipeline.tokenise.learn:learn_task",
            1,
            {"text": self.pipeline.digest, "vocab_size": self.options.vocab_size, "max_bytes": limit},
            volatile={"shards": [str(path) for path in refined.catalogue.shards], "sample": str(places)},
        )
        folder = self.executor.run(stage, self.work, self.log)
        return Tokenizer.load(task_folder(folder, 0) / "tokenizer.json")

    def _encode(self, refined: Refined, tokenizer: Tokenizer) -> dict[str, dict[str, int]]:
        catalogue = refined.catalogue
        stage = Stage(
            "encode",
            "data_pipeline.tokenise.stages:encode_task",
            len(catalogue.shards),
            {"text": self.pipeline.digest, "tokenizer_digest": tokenizer.digest},
            volatile={
                "shards": [str(path) for path in catalogue.shards],
                "tokenizer": str((self.draft / "tokenizer.json").absolute()),
            },
            megabytes=tuple(float(sizes.sum()) / 1e6 for sizes in catalogue.split(catalogue.sizes)),
        )
        folder = self.executor.run(stage, self.work, self.log)
        tasks = [task_folder(folder, index) for index in range(stage.count)]
        self._lengths = np.concatenate([np.load(task / "documents.npy") for task in tasks])
        splits = {}
        for split, rows in (("train", refined.train), ("heldout", refined.heldout)):
            merge(tasks, catalogue.places(rows), self.draft / split, tokenizer.vocab_size)
            splits[split] = {
                "documents": len(rows),
                "tokens": int(self._lengths[rows].sum()),
                "bytes": int(catalogue.sizes[rows].sum()),
            }
        return splits

    def _stages(self, refined: Refined, splits: dict[str, dict[str, int]], tokenizer: Tokenizer) -> dict[str, Any]:
        """Document tables, made tasks and the curriculum's packed stages."""
        domain, names, weights = self._domains(refined)
        for split, rows in (("train", refined.train), ("heldout", refined.heldout)):
            write_documents(self.draft / f"documents-{split}.parquet", self._document_columns(refined, rows, domain))
        if not self.options.curriculum.lengths:
            return {"domains": names}
        return {"domains": names, **self._curriculum(domain[refined.train], names, weights, tokenizer)}

    def _domains(self, refined: Refined) -> tuple[npt.NDArray[np.int16], list[str], list[float]]:
        """Domain of every document, int16 [n], and names and weights of the domains."""
        if self.options.mix.by == "source":
            names = [source.name for source in self.sources]
            return refined.catalogue.sources.astype(np.int16), names, [source.weight for source in self.sources]
        codes, domain = np.unique(self._languages(refined), return_inverse=True)
        return domain.astype(np.int16), [str(code) for code in codes], [1.0] * len(codes)

    def _languages(self, refined: Refined) -> npt.NDArray[Any]:
        return np.concatenate([one["language"] for one in self.pipeline.signals])[refined.origin]

    def _document_columns(
        self, refined: Refined, rows: npt.NDArray[np.int64], domain: npt.NDArray[np.int16]
    ) -> dict[str, Any]:
        catalogue, judged = refined.catalogue, bool(self.pipeline.signals)
        quality = np.concatenate([one["quality"] for one in self.pipeline.signals])[refined.origin] if judged else None
        return {
            "id": [bytes(one) for one in catalogue.ids[rows]],
            "source": catalogue.sources[rows],
            "file": gather(catalogue, "file")[rows],
            "position": gather(catalogue, "position")[rows],
            "bytes": catalogue.sizes[rows],
            "tokens": self._lengths[rows],
            "language": self._languages(refined)[rows] if judged else [None] * len(rows),
            "quality": [None] * len(rows) if quality is None else quality[rows],
            "domain": domain[rows],
        }

    def _curriculum(
        self, domain: npt.NDArray[np.int16], names: list[str], weights: list[float], tokenizer: Tokenizer
    ) -> dict[str, Any]:
        """Made tasks, then the stages packed from text and tasks."""
        options, made, said = self.options, None, {}
        if options.tasks.retrieval or options.tasks.long_range:
            lengths = np.diff(read_indexed(self.draft / "train").starts)
            budget = budgets(lengths, options.curriculum, options.tasks)
            said["tasks"] = generate(
                self.draft, tokenizer, options.tasks, options.curriculum.lengths, budget, options.seed, self.log
            )
            if said["tasks"]["tasks"]["documents"]:
                table = np.load(self.draft / "tasks.npy")
                made = MadeTasks((table["kind"] >= Kind.NEEDLE).astype(np.int64), table["stage"].astype(np.int64))
        said["curriculum"] = plan_stages(
            self.draft, domain, names, weights, options.mix, options.curriculum, options.tasks, options.seed, self.log,
            made,
        )  # fmt: skip
        return said

    def _write_receipts(self) -> None:
        """``ledger.json``, ``audit.parquet`` and ``quarantine.jsonl``: what became of every document."""
        pipeline = self.pipeline
        chain = [ledger.as_json() for ledger in pipeline.ledgers]
        (self.draft / "ledger.json").write_text(json.dumps(chain, indent=1) + "\n")
        rows = [*pipeline.audit, *(row for path in pipeline.audit_files for row in read_audit(path))]
        rows.sort(key=lambda row: (row.id, row.filter, row.rule, row.source))
        write_audit(self.draft / "audit.parquet", rows)
        with (self.draft / "quarantine.jsonl").open("wb") as out:
            for path in pipeline.quarantine_files:
                out.write(path.read_bytes())

    def _counts(self) -> dict[str, int]:
        """Documents that did not come in, by reason, over all steps; ``cut``: further parts of long documents."""
        counts = {"offered": self.pipeline.ledgers[0].kept, "blank": 0, "duplicate": 0, "over_cap": 0, "quarantined": 0}
        for ledger in self.pipeline.ledgers:
            for reason, number in ledger.dropped.items():
                counts[reason] = counts.get(reason, 0) + number
            counts["quarantined"] += sum(ledger.quarantined.values())
        counts["cut"] = sum(ledger["cut_parts"] for ledger in self.pipeline.entered)
        return counts


def budgets(lengths: npt.NDArray[np.int64], curriculum: Curriculum, tasks: Tasks) -> dict[int, tuple[int, int]]:
    """Tokens of (retrieval, long-range) tasks that each stage needs, by its length, so that none is read much more
    often than the text. ``lengths``: tokens of each training document.

    A stage's text is what only it holds whole, and the short text that is mixed in; longer stages draw first.
    """
    edges = np.array(curriculum.lengths, dtype=np.int64) + 1
    stage = np.minimum(np.searchsorted(edges, lengths), len(edges) - 1)
    total = np.bincount(stage, weights=lengths.astype(np.float64), minlength=len(edges))
    for number in range(len(edges) - 1, 0, -1):
        shorter = total[:number].sum()
        drawn = min(total[number] * curriculum.short_share / (1 - curriculum.short_share), MOST_DRAWN * shorter)
        total[:number] *= 1 - drawn / max(shorter, 1.0)
        total[number] += drawn
    rest = 1 - tasks.retrieval - tasks.long_range
    return {
        int(length): (int(tokens * tasks.retrieval / rest), int(tokens * tasks.long_range / rest))
        for length, tokens in zip(curriculum.lengths, total, strict=True)
    }


def _report(counts: dict[str, int], splits: dict[str, dict[str, int]], log: Log) -> None:
    gone = {reason: number for reason, number in counts.items() if number and reason not in ("offered", "cut")}
    said = ", ".join(f"{number} {reason}" for reason, number in gone.items()) or "none"
    log(f"data: of {counts['offered']} documents read, dropped: {said}; cut {counts['cut']} times")
    for split, values in splits.items():
        log(
            f"data: {split}: {values['documents']} documents, {values['tokens']} tokens, {values['bytes'] / 1e6:.2f} MB"
        )


class _Recorder:
    """An executor that remembers the folders of the stages it ran."""

    def __init__(self, executor: Executor) -> None:
        self._executor, self.used = executor, set[str]()

    def run(self, stage: Stage, work: Path, log: Log) -> Path:
        """Runs the stage."""
        folder = self._executor.run(stage, work, log)
        self.used.add(folder.name)
        return folder


def _sweep(work: Path, used: set[str]) -> None:
    """Removes what earlier builds left in ``work`` and this one did not use: a disk would fill with old thresholds."""
    for path in work.iterdir():
        if path.is_dir() and path.name not in used:
            shutil.rmtree(path, ignore_errors=True)


class _Clock:
    def __init__(self, log: Log) -> None:
        self._log, self._last = log, time.monotonic()

    def lap(self, what: str) -> None:
        now = time.monotonic()
        self._log(f"data: {what}: {now - self._last:.1f} s")
        self._last = now
