"""Hugging Face folder -> run folder with a Megatron checkpoint, tensor by tensor."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.progress import Progress

from ... import __version__
from ...compat.megatron import MEGATRON_VERSION
from ...config.schema import RunConfig
from ...distinction.closure import compile_checked
from ...errors import CheckpointError
from ...tokenizer import Tokenizer
from ...tokenizer.hf_files import OWN_FILE, read_hf_tokenizer
from .. import manifest as manifests
from . import probe, source_files, verify
from .agreement import check_agreement
from .buffers import Buffers
from .foreign import tokenizer_of
from .hf_folder import HfFolder
from .ledger import Ledger
from .mapping import Entry, HfTensor, Table, global_shapes
from .megatron_folder import EMA, MegatronFolder
from .megatron_writer import Records, write_checkpoint
from .publish import staged
from .shape import Shape
from .streaming import ahead, own_threads
from .tensors import check_numbers, dtype_name
from .to_hf import RUN_CONFIG
from .verify import Log


@dataclass(frozen=True)
class ImportOptions:
    """``shard_size``: bytes of a data file. ``logits``: compare logits by both implementations."""

    shard_size: int = 4_000_000_000
    logits: bool = True


def import_folder(source: Path, out: Path, options: ImportOptions, log: Log) -> Ledger:
    """Write the run folder ``out`` from an exported model; it appears whole and checked, or not at all.

    The folder has config.yaml, tokenizer.json and one checkpoint without optimizer state, on the step of its source.

    Raises:
        CheckpointError, ConfigError, DataError, OutputError: one sentence each; nothing is published.
    """
    job = Importer(source, options, log)
    with staged(out, job.bytes_needed) as folder:
        job.run(folder)
    log(f"{out}: {len(job.ledger.targets)} tensors, {job.bytes_needed / 1e6:.0f} MB from {source}")
    return job.ledger


class Importer:
    """One conversion. ``open`` and ``compare_logits`` know what kind of folder the source is."""

    hf: HfFolder
    config: Any  # RefractorConfig
    cfg: RunConfig
    shape: Shape
    entries: Table
    tokenizer: Tokenizer | None

    def __init__(self, source: Path, options: ImportOptions, log: Log) -> None:
        self.options, self.log = options, log
        self.open(source)
        self.buffers = self.hf.buffers = Buffers(options.shard_size)
        self.ema = self.cfg.train.ema.enabled
        self.dtypes = self._dtypes()
        self.ledger = self._ledger()
        written = sum(torch.Size(e.shape).numel() * self.dtypes[e.key].itemsize for e in self.entries)
        self.bytes_needed = written * (2 if self.ema else 1) + (4 << 20)

    def open(self, source: Path) -> None:
        """Read and check everything about the source but its numbers; sets the attributes above."""
        self.hf = HfFolder(source)
        self.config = verify.read_config(source)
        shape, self.entries = verify.table_of(source, self.config)
        verify.check_names(self.hf, self.entries)
        verify.check_tokenizer(source, self.config, self.hf.manifest)
        if self.hf.manifest is not None:
            verify.check_files(self.hf, self.hf.manifest, headers=False)
        check_agreement(source, self.config, self.hf.manifest)
        self.cfg = run_config_of(source, self.config)
        assert Shape.of_run(self.cfg) == shape, "the two configurations describe different weights"
        self.shape = shape
        ours = (source / OWN_FILE).exists()  # a folder that was imported has the tokenizer of its family
        self.tokenizer = read_hf_tokenizer(source) if ours else tokenizer_of(source, self.log)

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Type of every Megatron tensor: that of its HF tensors, which must agree."""
        found: dict[str, torch.dtype] = {}
        for entry in self.entries:
            for tensor in entry.tensors:
                if tensor.name not in self.hf.tensors:
                    continue
                dtype = self.hf.tensors[tensor.name].dtype
                dtype_name(dtype, tensor.name)
                if found.setdefault(entry.key, dtype) != dtype:
                    raise CheckpointError(
                        f"tensor {tensor.name} of {self.hf.folder} has dtype {dtype} and its neighbours in {entry.key} "
                        f"have {found[entry.key]}: save the model in one dtype."
                    )
        return found

    def _ledger(self) -> Ledger:
        tensors = [tensor for entry in self.entries for tensor in entry.tensors]
        prefixes = ("", EMA) if self.ema else ("",)
        ledger = Ledger(
            str(self.hf.folder),
            {tensor.name: tensor.shape for tensor in tensors},
            {prefix + entry.name: entry.shape for entry in self.entries for prefix in prefixes},
            frozenset(tensor.name for tensor in tensors if tensor.padding),
        )
        for tensor in tensors:
            if tensor.name not in self.hf.tensors:
                ledger.notes.append(f"{tensor.name}: no such rows in {self.hf.folder}, written as zeros")
        if self.hf.manifest is None:
            ledger.notes.append("no refractor_manifest.json: nobody can tell whether tensors were exchanged")
        return ledger

    def run(self, folder: Path) -> None:
        """Everything between an empty folder and one to publish."""
        self.cfg.save(folder / "config.yaml")
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer.json")
        source = self.hf.manifest.source if self.hf.manifest is not None else {}
        number = int(source.get("step", 0))
        source_files.carry(self.hf.folder, folder, number)
        step = manifests.folder_of(folder / "checkpoints", number)
        step.mkdir(parents=True)
        with own_threads(), self._progress("convert") as progress, contextlib.closing(self._joined()) as joined:
            records = write_checkpoint(
                step,
                self.shape,
                self.entries,
                self.dtypes,
                lambda entry: self._next(entry, joined, progress),
                ema=self.ema,
                progress={"step": number, "skipped_steps": 0},
                shard_size=self.options.shard_size,
            )
        self.ledger.close()
        self._write_manifest(step, number, source, records)
        with own_threads():
            self._check(step)
        if self.options.logits:
            self.compare_logits(step)

    def _joined(self) -> Generator[tuple[Entry, Tensor], None, None]:
        """Megatron's tensor of every entry, read and joined ahead of the writer."""
        return ahead(self.entries, self._join, self._bytes, self.options.shard_size)

    def _join(self, entry: Entry) -> Tensor:
        parts = [self._part(tensor) for tensor in entry.tensors]
        for target, part in zip(entry.tensors, parts, strict=True):
            check_numbers(part, target.name, str(self.hf.folder))
        return entry.rule.join(parts, self.buffers.empty)

    def _bytes(self, entry: Entry) -> int:
        """Bytes of an entry's two sides, which exist together for a moment."""
        return 2 * math.prod(entry.shape) * self.dtypes[entry.key].itemsize

    def _next(self, entry: Entry, joined: Iterator[tuple[Entry, Tensor]], progress: Progress) -> Tensor:
        """The tensor that the writer asks for, entered into the ledger."""
        expected, tensor = next(joined)
        assert expected is entry, "the writer asks in the order of the table"
        found = [t.name for t in entry.tensors if t.name in self.hf.tensors]
        prefixes = ("", EMA) if self.ema else ("",)
        self.ledger.record(found, {p + entry.name: tuple(tensor.shape) for p in prefixes}, entry.shape)
        progress.advance(tensor.nbytes / 1e6)
        return tensor

    def _part(self, tensor: HfTensor, *, check: bool = True) -> Tensor:
        if tensor.name in self.hf.tensors:
            return self.hf.read(tensor.name, check=check)
        owner = next(entry for entry in self.entries if tensor in entry.tensors)
        return torch.zeros(tensor.shape, dtype=self.dtypes[owner.key])

    def _write_manifest(self, step: Path, number: int, source: dict[str, Any], records: Records) -> None:
        """The source's identity where the HF folder has kept it, so that the run it came from takes it back.

        ``records``: of files that were hashed while they were written.
        """
        files = {path.name: records.get(path.name) or manifests.file_record(path) for path in sorted(step.iterdir())}
        manifests.write(
            step,
            manifests.Manifest(
                step=number,
                config_hash=self.cfg.hash,
                fixed_hash=self.cfg.fixed_hash,
                data_digest=str(source.get("data_digest", "")),
                retrieval_digest=source.get("retrieval_digest"),
                rules_hash=compile_checked(self.cfg.safety.masks)[0].digest,
                package_version=__version__,
                megatron_version=MEGATRON_VERSION,
                grid={"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1},
                files=files,
            ),
        )

    def _check(self, step: Path) -> None:
        """Read the new checkpoint as a stranger would, and compare it with the source, both sets of weights."""
        shapes = global_shapes(self.entries)
        folders = [MegatronFolder(step, prefix) for prefix in (("", EMA) if self.ema else ("",))]
        for written in folders:
            written.buffers = self.buffers
            ledger = Ledger(str(step), {}, {})
            ledger.check_found({key: t.shape for key, t in written.weights().items()}, shapes)
            written.leave(ledger, set(shapes))
            written.verify()
            with self._progress("compare") as progress, ThreadPoolExecutor(1) as other:
                pairs = ahead(self.entries, partial(self._pair, written, other), self._bytes, self.options.shard_size)
                verify.check_equal(pairs, None, progress, self.buffers.empty)
        for written in folders:
            written.finish()

    def _pair(self, written: MegatronFolder, other: ThreadPoolExecutor, entry: Entry) -> tuple[Tensor, list[Tensor]]:
        ours = other.submit(written.read, entry.key, entry.expert)
        parts = [self._part(tensor, check=False) for tensor in entry.tensors]
        return ours.result(), parts

    def compare_logits(self, step: Path) -> None:
        """The same logits from the source by transformers and from the new checkpoint by Megatron."""
        from .megatron_logits import megatron_logits

        batch = probe.Probe.of(self.config)
        self.log(f"comparing logits of {batch.tokens.shape[1]} tokens by Megatron and by transformers")
        theirs = probe.hf_logits(self.hf.folder, batch)
        ours = megatron_logits(self.cfg, step, "", None, batch)
        self.log(f"logits agree within {verify.check_parity(ours, theirs):.2e}")

    def _progress(self, label: str) -> Progress:
        size = sum(stored.nbytes for stored in self.hf.tensors.values())
        return Progress(label, size / 1e6, self.log)


def run_config_of(folder: Path, config: Any) -> RunConfig:
    """The run's configuration: the one exported with the model, or one made from ``config.json``.

    Raises:
        CheckpointError: the exported one describes another model than config.json. ConfigError: it is damaged.
    """
    from ...hf import from_run

    path = folder / RUN_CONFIG
    if not path.exists():
        return from_run.run_config(config)
    cfg = RunConfig.load(path)
    tokenizer = read_hf_tokenizer(folder) if (folder / OWN_FILE).exists() else None
    expected, found = from_run.hf_config(cfg, tokenizer).to_dict(), config.to_dict()
    for key in sorted(expected.keys() | found.keys()):
        if key not in ("dtype", "transformers_version", "_name_or_path") and expected.get(key) != found.get(key):
            raise CheckpointError(
                f"{folder} disagrees with itself on {key}: config.json is not what {RUN_CONFIG} makes."
            )
    return cfg
