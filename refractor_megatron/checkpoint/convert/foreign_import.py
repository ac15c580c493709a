"""A folder of another family -> one of ours, for transformers or for Megatron; tiers off, the same function."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.progress import Progress

from ... import __version__
from ...compat.megatron import MEGATRON_VERSION
from ...distinction.closure import compile_checked
from ...errors import CheckpointError
from ...tokenizer import Tokenizer
from ...tokenizer.hf_files import write_hf_tokenizer
from . import hf_manifest, probe, source_files, verify
from .foreign import ForeignFolder, tokenizer_of
from .foreign_probe import check_same_model, our_logits, plain_probe, transformers_logits
from .hf_folder import HfFolder, HfWriter, Plan, plan_files, planned_bytes
from .hf_manifest import HfManifest
from .ledger import Ledger
from .mapping import HfTensor
from .publish import staged
from .source_files import companions
from .tensors import check_numbers
from .to_hf import RUN_CONFIG, code_files
from .to_megatron import Importer, ImportOptions
from .verify import Log

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class ForeignOptions:
    """``shard_size``: bytes of a file. ``dtype``: None keeps the stored one. ``logits``: compare with transformers."""

    shard_size: int = 4_000_000_000
    dtype: torch.dtype | None = None
    logits: bool = True


def import_hf(source: Path, out: Path, options: ForeignOptions, log: Log) -> Ledger:
    """Write ``out``, a REFRACTOR folder for transformers; it appears whole and checked, or not at all.

    Where the tokenizer can be ours, id for id, the folder has it as every folder of ours has: roles and ends of
    documents are tokens, and ``refractor generate`` reads it. Otherwise the source's files are copied and no token
    means anything to the model. ``source_files/`` has them as they were in both cases.

    Raises:
        CheckpointError, OutputError: one sentence each; nothing is published.
    """
    job = _HfImport(source, options, log)
    with staged(out, planned_bytes(job.plan) + (1 << 20)) as folder:
        job.run(folder)
    log(f"{out}: {len(job.ledger.targets)} tensors from {source} ({job.foreign.model.family})")
    return job.ledger


def import_megatron(source: Path, out: Path, options: ForeignOptions, log: Log) -> Ledger:
    """Write the run folder ``out`` with one checkpoint for any grid, from which a run may start.

    Raises:
        CheckpointError, ConfigError, OutputError: one sentence each; nothing is published.
    """
    job = _MegatronImport(source, ImportOptions(options.shard_size, options.logits), log)
    with staged(out, job.bytes_needed) as folder:
        job.run(folder)
    log(f"{out}: {len(job.ledger.targets)} tensors from {source}; refractor pretrain --weights {out} goes on from it")
    return job.ledger


class _HfImport:
    def __init__(self, source: Path, options: ForeignOptions, log: Log) -> None:
        from ...hf.from_run import hf_config

        self.options, self.log = options, log
        self.foreign, self.tokenizer = _open(source, log)
        self.config = hf_config(self.foreign.model.cfg, self.tokenizer)
        self.tensors = [t for entry in self.foreign.table for t in entry.tensors if not t.padding]
        dtypes = {t.name: options.dtype or self.foreign.tensors[t.name].dtype for t in self.tensors}
        self.plan: Plan = plan_files(self.tensors, dtypes, options.shard_size)
        self.config.dtype = dtypes[self.tensors[0].name] if len(set(dtypes.values())) == 1 else torch.float32
        origin = self.foreign.origin
        self.ledger = Ledger(
            str(source),
            {origin[t.name]: t.shape for t in self.tensors},
            {t.name: t.shape for t in self.tensors},
            left=dict(self.foreign.left),
            notes=self.foreign.growth,
        )

    def run(self, folder: Path) -> None:
        """Everything between an empty folder and one to publish."""
        digests = self._write_tensors(folder)
        self.config.to_json_file(folder / verify.CONFIG, use_diff=False)
        self.foreign.model.cfg.save(folder / RUN_CONFIG)
        texts = companions(self.foreign.folder) if self.tokenizer is None else []
        for path in [*code_files(), *texts]:
            shutil.copyfile(path, folder / path.name)
        if self.tokenizer is not None:
            write_texts(self.tokenizer, folder, self.foreign.model.cfg.model.context_max)
        source_files.keep(self.foreign.folder, self.foreign.model, folder)
        self._check_written(folder)
        fingerprint = self._compare_logits(folder) if self.options.logits else None
        self._write_manifest(folder, digests, fingerprint)

    def _write_tensors(self, folder: Path) -> dict[str, str]:
        writer = HfWriter(folder, self.plan)
        try:
            with Progress("convert", planned_bytes(self.plan) / 1e6, self.log) as progress:
                for one in self.tensors:
                    tensor = self.foreign.read(one.name)
                    check_numbers(tensor, self.foreign.origin[one.name], str(self.foreign.folder))
                    tensor = tensor.to(self.options.dtype or tensor.dtype)
                    writer.write(one.name, tensor)
                    self.ledger.record([self.foreign.origin[one.name]], {one.name: tuple(tensor.shape)}, one.shape)
                    progress.advance(tensor.nbytes / 1e6)
            self.ledger.close()
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        return writer.digests

    def _check_written(self, folder: Path) -> None:
        """Read both folders again: the same numbers under both names."""
        written = HfFolder(folder)
        verify.check_names(written, self.foreign.table)
        for one in self.tensors:
            tensor = self.foreign.read(one.name)
            if not torch.equal(written.read(one.name), tensor.to(self.options.dtype or tensor.dtype)):
                raise CheckpointError(
                    f"tensor {one.name} is not what {self.foreign.origin[one.name]} of {self.foreign.folder} holds: it "
                    "was not written faithfully."
                )

    def _compare_logits(self, folder: Path) -> dict[str, Any]:
        batch = plain_probe(self.foreign.model.cfg, self.foreign.source_vocab)
        theirs = transformers_logits(self.foreign.folder, batch)
        difference = check_same_model(our_logits(self.foreign, batch), theirs, self.foreign.folder)
        self.log(f"logits equal those of transformers' {self.foreign.model.family} within {difference:.2e}")
        verify.save_probe(folder, batch)
        return probe.fingerprint(probe.hf_logits(folder, batch), difference)

    def _write_manifest(self, folder: Path, digests: dict[str, str], fingerprint: dict[str, Any] | None) -> None:
        cfg = self.foreign.model.cfg
        tensors = {
            name: {"sha256": digests[name], "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for shard in self.plan.values()
            for name, (shape, dtype) in shard.items()
        }
        HfManifest(
            weights="raw",
            source={
                "run": self.foreign.folder.resolve().name,
                "family": self.foreign.model.family,
                "step": 0,
                "config_hash": cfg.hash,
                "fixed_hash": cfg.fixed_hash,
                "data_digest": "",
                "retrieval_digest": None,
                "grid": {},
            },
            package_version=__version__,
            megatron_version=MEGATRON_VERSION,
            rules_hash=compile_checked(cfg.safety.masks)[0].digest,
            tokenizer_digest=None if self.tokenizer is None else self.tokenizer.digest,
            versions=hf_manifest.versions(),
            tensors=tensors,
            files=verify.records(folder),
            fingerprint=fingerprint,
        ).write(folder)


class _MegatronImport(Importer):
    """The importer of our own folders, on a foreign one under our names."""

    def open(self, source: Path) -> None:
        """See ``Importer.open``; the tokenizer becomes ours where it can, and else the user is told."""
        from ...hf.from_run import hf_config

        self.hf: ForeignFolder
        self.hf, self.tokenizer = _open(source, self.log)
        self.cfg = self.hf.model.cfg
        self.config = hf_config(self.cfg, None)
        self.shape, self.entries = self.hf.shape, self.hf.table

    def run(self, folder: Path) -> None:
        """See ``Importer.run``; the source's files about text come along."""
        source_files.keep(self.hf.folder, self.hf.model, folder)
        super().run(folder)

    def _ledger(self) -> Ledger:
        ledger = super()._ledger()
        ledger.left |= self.hf.left
        renamed = [f"{own}: {name} in {self.hf.folder}" for own, name in self.hf.origin.items() if own != name]
        ledger.notes += renamed + self.hf.growth
        return ledger

    def _part(self, tensor: HfTensor, *, check: bool = True) -> Tensor:
        part = super()._part(tensor, check=check)
        if check and tensor.name in self.hf.origin:  # before the base class does, under the name that the folder has
            check_numbers(part, self.hf.origin[tensor.name], str(self.hf.folder))
        return part

    def compare_logits(self, step: Path) -> None:
        """Megatron's own path against transformers' own class."""
        from .megatron_logits import megatron_logits

        batch = plain_probe(self.cfg, self.hf.source_vocab)
        theirs = transformers_logits(self.hf.folder, batch)
        ours = megatron_logits(self.cfg, step, "", None, batch)
        difference = check_same_model(ours, theirs, self.hf.folder)
        self.log(f"Megatron's logits equal those of transformers' {self.hf.model.family} within {difference:.2e}")


def write_texts(tokenizer: Tokenizer, folder: Path, context_max: int) -> None:
    """Our tokenizer's files, and where generation ends."""
    write_hf_tokenizer(tokenizer, folder, context_max)
    ends = {"eos_token_id": [tokenizer.eod, tokenizer.end], "pad_token_id": tokenizer.pad}
    hidden = sorted([tokenizer.pad, *tokenizer.role_ids.values()])  # roles are structure
    (folder / GENERATION).write_text(json.dumps(ends | {"suppress_tokens": hidden}, indent=2) + "\n")


def _open(source: Path, log: Log) -> tuple[ForeignFolder, Tokenizer | None]:
    """The source and its tokenizer as ours, with a row for each of its tokens."""
    foreign = ForeignFolder(source)
    for note in foreign.model.notes:
        log(f"note: {note}")
    tokenizer = tokenizer_of(source, log, foreign.source_vocab)
    if tokenizer is not None and tokenizer.vocab_size > foreign.source_vocab:
        foreign = ForeignFolder(source, tokenizer.vocab_size)
        log(
            f"note: the vocabulary grows from {foreign.source_vocab} to {tokenizer.vocab_size} for special tokens that "
            "the model lacks; each new row is the mean of the others, and --to "
            f"{foreign.model.family} takes them out again"
        )
    return foreign, tokenizer
