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

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline import manifest as manifests
from data_pipeline.curriculum.budget import budgets
from data_pipeline.curriculum.plan import MadeTasks, plan_stages
from data_pipeline.engine.arrays import save_arrays
from data_pipeline.engine.choose import executor_of
from data_pipeline.engine.tasks import Executor, Stage, pending, task_folder
from data_pipeline.identity import check_options, check_weights, evaluation_files, parameters
from data_pipeline.identity import digest as digest_of
from data_pipeline.options import Options
from data_pipeline.output import draft_folder, exclusive, mendable_errors
from data_pipeline.pack.indexed import read_indexed
from data_pipeline.pipeline import Pipeline, Refined
from data_pipeline.progress import Log
from data_pipeline.provenance import FILE as PROVENANCE
from data_pipeline.provenance import HELDOUT_FILE as HELDOUT_PROVENANCE
from data_pipeline.receipts.croissant import croissant
from data_pipeline.receipts.ledger import check_chain
from data_pipeline.receipts.write import write_audit_of, write_ledgers, write_quarantine
from data_pipeline.report import collect
from data_pipeline.sources import open_sources
from data_pipeline.sources.base import Source
from data_pipeline.sources.fingerprint import sha256_of
from data_pipeline.tables import gather, sources_table, write_documents, write_provenance_of, write_sources
from data_pipeline.tasks.compose import Kind
from data_pipeline.tasks.write import generate
from data_pipeline.tokenise.merge import merge
from data_pipeline.versions import versions
from refractor_megatron.errors import OutputError
from refractor_megatron.tokenizer import Tokenizer


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
    check_options(options, tokenizer)
    evaluation = evaluation_files(options.decontaminate)
    body = parameters(options, evaluation, tokenizer)
    with mendable_errors(out_root, cache):
        sources = open_sources(corpus, cache, log, name=options.name, sources_file=sources_file)
        check_weights(options, sources)
        digest = digest_of(body, sources)
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
                made = _Build(draft, sources, options, tokenizer, evaluation, {**body}, digest, work, recorder, log)
                manifest = made.run()
            _sweep(work, recorder.used | made.pipeline.kept)
    return BuiltData(folder, manifest, built=True)


def _up_to_date(folder: Path, log: Log) -> BuiltData:
    manifest = manifests.load(folder)
    log(f"data: {folder} is up to date")
    return BuiltData(folder, manifest, built=False)


@dataclass
class _Build:
    """One build into ``draft``."""

    draft: Path
    sources: list[Source]
    options: Options
    tokenizer: Tokenizer | None
    evaluation: list[tuple[str, str]]
    parameters: dict[str, Any]
    digest: str
    work: Path
    executor: _Recorder
    log: Log

    def run(self) -> dict[str, Any]:
        """Everything from reading to the sealed manifest, which it returns."""
        clock = _Clock(self.log)
        self.pipeline = Pipeline(self.sources, self.options, self.work, self.executor, self.log, self.evaluation)
        refined = self.pipeline.run()
        clock.lap("read, judge, deduplicate and select")
        self._write_sources(refined)
        names = write_provenance_of(
            self.draft,
            self.pipeline.catalogue,
            {PROVENANCE: refined.origin[refined.train], HELDOUT_PROVENANCE: refined.origin[refined.heldout]},
            self.pipeline.equal,
            self.sources,
        )
        tokenizer = self.tokenizer or self._learn(refined)
        tokenizer.save(self.draft / "tokenizer.json")
        clock.lap(f"tokenizer of {tokenizer.vocab_size} ids")
        splits = self._encode(refined, tokenizer)
        clock.lap("encode and merge")
        extra = self._stages(refined, splits, tokenizer)
        clock.lap("document tables, made tasks and stages")
        self._write_receipts(refined)
        counts = self._counts()
        _report(counts, splits, self.log)
        self._warn(counts)
        body = {
            "digest": self.digest,
            "made_by": versions(),
            "parameters": self.parameters,
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.digest},
            "splits": splits,
            "provenance_sources": names,
            "counts": counts,
            **extra,
        }
        manifest = self._seal(body)
        clock.lap("receipts")
        return manifest

    def _warn(self, counts: dict[str, int]) -> None:
        """What a user may not expect."""
        if counts["over_cap"]:
            taken = self.pipeline.read_mb
            self.log(f"data: data.max_mb={self.options.max_mb:g} keeps a part of {taken:.1f} MB; raise it for more")
        if counts["quarantined"]:
            first = next(line for path in self.pipeline.quarantine_files for line in path.read_bytes().splitlines())
            row = json.loads(first)
            file = self.sources[row["source"]].files[row["file"]]["path"]
            self.log(
                f"data: {counts['quarantined']} entries could not be understood, the first {file}:{row['position']} "
                f"({row['reason']}); quarantine.jsonl has all"
            )
        if self.executor.reused:
            self.log(f"data: kept from an earlier build: {', '.join(self.executor.reused)}")

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
        places = save_arrays(self.work, "sample", places=refined.catalogue.places(sample))
        self.pipeline.kept.add(places.folder.name)
        stage = Stage(
            "tokenizer",
            "data_pipeline.tokenise.learn:learn_task",
            1,
            {
                "text": self.pipeline.digest,
                "sample_digest": places.digest,
                "vocab_size": self.options.vocab_size,
                "max_bytes": limit,
            },
            volatile={
                "shards": [str(path) for path in refined.catalogue.shards],
                "sample": places.path("places"),
            },
        )
        folder = self.executor.run(stage, self.work, self.log)
        return Tokenizer.load(task_folder(folder, 0) / "tokenizer.json")

    def _kept_tokenizer(self, tokenizer: Tokenizer) -> Path:
        """A file of it in the work folder, which tasks on other hosts see; the draft may be swept under them."""
        folder = self.work / f"tokenizer-file-{tokenizer.digest[:12]}"
        self.pipeline.kept.add(folder.name)
        if not folder.is_dir():
            with draft_folder(folder) as draft:
                tokenizer.save(draft / "tokenizer.json")
        return folder / "tokenizer.json"

    def _encode(self, refined: Refined, tokenizer: Tokenizer) -> dict[str, dict[str, int]]:
        catalogue = refined.catalogue
        stage = Stage(
            "encode",
            "data_pipeline.tokenise.stages:encode_task",
            len(catalogue.shards),
            {"text": self.pipeline.digest, "tokenizer_digest": tokenizer.digest},
            volatile={
                "shards": [str(path) for path in catalogue.shards],
                "tokenizer": str(self._kept_tokenizer(tokenizer)),
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
        groups = {
            split: np.unique(refined.catalogue.groups[rows], axis=0, return_inverse=True)[1].reshape(-1)
            for split, rows in (("train", refined.train), ("heldout", refined.heldout))
        }
        return {"domains": names, **self._curriculum(domain[refined.train], names, weights, tokenizer, groups)}

    def _domains(self, refined: Refined) -> tuple[npt.NDArray[np.int32], list[str], list[float]]:
        """Domain of every document, int32 [n], and names and weights of the domains."""
        if self.options.mix.by == "source":
            names = [source.name for source in self.sources]
            return refined.catalogue.sources.astype(np.int32), names, [source.weight for source in self.sources]
        codes, domain = np.unique(self._languages(refined), return_inverse=True)
        return domain.astype(np.int32), [str(code) for code in codes], [1.0] * len(codes)

    def _languages(self, refined: Refined) -> npt.NDArray[Any]:
        return np.concatenate([one["language"] for one in self.pipeline.signals])[refined.origin]

    def _document_columns(
        self, refined: Refined, rows: npt.NDArray[np.int64], domain: npt.NDArray[np.int32]
    ) -> dict[str, Any]:
        catalogue, judged = refined.catalogue, bool(self.pipeline.signals)
        quality = np.concatenate([one["quality"] for one in self.pipeline.signals])[refined.origin] if judged else None
        return {
            "id": catalogue.ids[rows],
            "source": catalogue.sources[rows],
            "file": gather(catalogue, "file")[rows],
            "position": gather(catalogue, "position")[rows],
            "bytes": catalogue.sizes[rows],
            "tokens": self._lengths[rows],
            "language": self._languages(refined)[rows] if judged else None,
            "quality": None if quality is None else quality[rows],
            "domain": domain[rows],
        }

    def _curriculum(
        self,
        domain: npt.NDArray[np.int32],
        names: list[str],
        weights: list[float],
        tokenizer: Tokenizer,
        groups: dict[str, npt.NDArray[np.int64]],
    ) -> dict[str, Any]:
        """Made tasks, then the stages packed from text and tasks."""
        options, made, said = self.options, None, {}
        if options.tasks.retrieval or options.tasks.long_range:
            lengths = np.diff(read_indexed(self.draft / "train").starts)
            budget = budgets(lengths, options.curriculum, options.tasks)
            said["tasks"] = generate(
                self.draft, tokenizer, options.tasks, options.curriculum.lengths, budget, options.seed, self.log, groups
            )
            if said["tasks"]["tasks"]["documents"]:
                table = np.load(self.draft / "tasks.npy")
                made = MadeTasks((table["kind"] >= Kind.NEEDLE).astype(np.int64), table["stage"].astype(np.int64))
        said["curriculum"] = plan_stages(
            self.draft, domain, names, weights, options.mix, options.curriculum, options.tasks, options.seed, self.log,
            made,
        )  # fmt: skip
        return said

    def _write_receipts(self, refined: Refined) -> None:
        """``ledger.json``, ``audit.parquet`` and ``quarantine.jsonl``: what became of every document."""
        pipeline = self.pipeline
        check_chain([ledger.as_json() for ledger in pipeline.ledgers])
        write_ledgers(self.draft, pipeline.ledgers)
        write_audit_of(self.draft, pipeline.audit, pipeline.audit_files)
        write_quarantine(self.draft, pipeline.quarantine_files, scrub=self.options.filters.pii == "scrub")
        collect.write(self.draft, collect.collect(pipeline, refined))

    def _counts(self) -> dict[str, int]:
        """Documents that did not come in, by reason, over all steps; ``cut``: further parts of long documents."""
        counts = {
            "offered": self.pipeline.ledgers[0].entered,
            "blank": 0,
            "duplicate": 0,
            "over_cap": 0,
            "quarantined": 0,
        }
        for ledger in self.pipeline.ledgers:
            for reason, number in ledger.dropped.items():
                counts[reason] = counts.get(reason, 0) + number
            counts["quarantined"] += sum(ledger.quarantined.values())
        counts["cut"] = sum(ledger["cut_parts"] for ledger in self.pipeline.entered)
        return counts


def _report(counts: dict[str, int], splits: dict[str, dict[str, int]], log: Log) -> None:
    gone = {reason: number for reason, number in counts.items() if number and reason not in ("offered", "cut")}
    said = ", ".join(f"{number} {reason}" for reason, number in gone.items()) or "none"
    cut = f"; long ones were cut {counts['cut']} times" if counts["cut"] else ""
    log(f"data: of {counts['offered']} documents, dropped: {said}{cut}")
    for split, values in splits.items():
        log(
            f"data: {split}: {values['documents']} documents, {values['tokens']} tokens, {values['bytes'] / 1e6:.2f} MB"
        )


class _Recorder:
    """An executor that remembers the folders of the stages it ran."""

    def __init__(self, executor: Executor) -> None:
        self._executor, self.used = executor, set[str]()
        self.reused: list[str] = []

    def run(self, stage: Stage, work: Path, log: Log) -> Path:
        """Runs the stage."""
        if stage.count and not pending(stage.folder(work), stage.count):
            self.reused.append(stage.name)
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
