"""Megatron checkpoint -> Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.progress import Progress

from ... import __version__
from ...config.schema import RunConfig
from ...errors import CheckpointError, DataError
from ...tokenizer import Tokenizer
from . import hf_manifest, probe, source_files, verify
from .buffers import Buffers
from .hf_folder import HfFolder, HfWriter, Plan, plan_files, planned_bytes
from .hf_manifest import HfManifest
from .ledger import Ledger
from .mapping import Entry, Table, global_shapes, table
from .megatron_folder import EMA, MegatronFolder, config_of, find_step
from .publish import staged
from .shape import Shape
from .streaming import ahead, own_threads
from .tensors import check_numbers, dtype_name
from .verify import Log

#: The run's own configuration beside the model, so that the way back gives the same run.
RUN_CONFIG = "refractor_run.yaml"


@dataclass(frozen=True)
class ExportOptions:
    """``weights``: raw or ema. ``shard_size``: bytes of a file. ``dtype``: None keeps the stored one.

    ``logits``: compare logits by both implementations, for which the model must fit into memory.
    """

    weights: str = "raw"
    shard_size: int = 4_000_000_000
    dtype: torch.dtype | None = None
    logits: bool = True


def export(source: Path, out: Path, options: ExportOptions, log: Log) -> Ledger:
    """Write ``out`` from a run or one of its checkpoints; it appears whole and checked, or not at all.

    Raises:
        CheckpointError, ConfigError, DataError, OutputError: one sentence each; nothing is published.
    """
    step = find_step(source)
    cfg = config_of(step)
    tokenizer = tokenizer_of(step.absolute().parent.parent)
    job = _Export(step, cfg, tokenizer, options, log)
    with staged(out, job.bytes_needed) as folder:
        try:
            job.run(folder)
        finally:
            job.source.abandon()
    log(f"{out}: {len(job.ledger.targets)} tensors, {planned_bytes(job.plan) / 1e6:.1f} MB from {step}")
    return job.ledger


def tokenizer_of(run: Path) -> Tokenizer:
    """The tokenizer of a run: its own, or its dataset's.

    Raises:
        DataError: there is none, the run has another one than its dataset was built with, or data.json is damaged.
    """
    own, data = run / "tokenizer.json", run / "data.json"
    try:
        built = Path(json.loads(data.read_bytes())["folder"]) / "tokenizer.json" if data.exists() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{data} is damaged ({str(error)[:80]}): run refractor pretrain again, it is made anew."
        ) from None
    if built is not None and not own.exists():
        return Tokenizer.load(built)
    if not own.exists():
        raise DataError(f"{run} has neither tokenizer.json nor data.json: a model is no use without its tokenizer.")
    tokenizer = Tokenizer.load(own)
    if built is not None and built.exists() and (other := Tokenizer.load(built)).digest != tokenizer.digest:
        raise DataError(
            f"{own} has {tokenizer.vocab_size} ids and is not the tokenizer of the run's dataset, {built} with "
            f"{other.vocab_size}: restore the one that the model was trained with."
        )
    return tokenizer


class _Export:
    """One conversion."""

    def __init__(self, step: Path, cfg: RunConfig, tokenizer: Tokenizer, options: ExportOptions, log: Log) -> None:
        from ...hf.from_run import hf_config

        self.step, self.cfg, self.tokenizer, self.options, self.log = step, cfg, tokenizer, options, log
        self.config = hf_config(cfg, tokenizer)
        shape = Shape.of_run(cfg)
        assert shape == Shape.of_hf(self.config), "the two configurations describe different weights"
        self.entries: Table = table(shape)
        self.prefix = EMA if options.weights == "ema" else ""
        self.buffers = Buffers(options.shard_size)
        self.source = MegatronFolder(step, self.prefix)
        self.source.buffers = self.buffers
        self.ledger = self._ledger()
        self.dtypes = self._dtypes()
        self.plan: Plan = plan_files(
            (tensor for entry in self.entries for tensor in entry.tensors), self.dtypes, options.shard_size
        )
        self.bytes_needed = planned_bytes(self.plan) + (1 << 20)
        if rows := cfg.model.vocab_size - tokenizer.vocab_size:
            self.ledger.notes.append(f"the tokenizer has {tokenizer.vocab_size} ids: {rows} rows belong to no token")

    def _ledger(self) -> Ledger:
        targets = {tensor.name: tensor.shape for entry in self.entries for tensor in entry.tensors}
        ledger = Ledger(str(self.step), {entry.name: entry.shape for entry in self.entries}, targets)
        found = self.source.weights()
        if self.prefix and not found:
            raise CheckpointError(f"{self.step} keeps no averaged weights (train.ema.enabled): give --weights raw.")
        shapes = global_shapes(self.entries)
        ledger.check_found({key: tensor.shape for key, tensor in found.items()}, shapes)
        self.source.leave(ledger, set(shapes))
        self.source.verify()
        return ledger

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Type of every HF tensor: the asked one, or that of its source."""
        stored = self.source.weights()
        found = {}
        for entry in self.entries:
            dtype_name(stored[entry.key].dtype, entry.key)
            for tensor in entry.tensors:
                found[tensor.name] = self.options.dtype or stored[entry.key].dtype
        return found

    def run(self, folder: Path) -> None:
        """Everything between an empty folder and one to publish."""
        with own_threads():
            digests = self._write_tensors(folder)
            self.source.finish()
            self._write_companions(folder)
            self._check(HfFolder(folder))
        fingerprint = self._compare_logits(folder) if self.options.logits else None
        self._write_manifest(folder, digests, fingerprint)

    def _check(self, written: HfFolder) -> None:
        """Both sides from the disk again, tensor by tensor."""
        written.buffers = self.buffers
        verify.check_names(written, self.entries)
        with self._progress("compare") as progress, ThreadPoolExecutor(1) as other:
            pairs = ahead(self.entries, partial(self._pair, written, other), self._bytes, self.options.shard_size)
            verify.check_equal(pairs, self.options.dtype, progress, self.buffers.empty)

    def _pair(self, written: HfFolder, other: ThreadPoolExecutor, entry: Entry) -> tuple[Tensor, list[Tensor]]:
        ours = other.submit(self._read, entry, check=False)
        parts = [written.read(tensor.name) for tensor in entry.tensors]
        return ours.result(), parts

    def _write_tensors(self, folder: Path) -> dict[str, str]:
        writer = HfWriter(folder, self.plan)
        try:
            with self._progress("convert") as progress:
                for entry, parts in self._split():
                    names = [tensor.name for tensor in entry.tensors]
                    if len(parts) != len(names):
                        raise CheckpointError(
                            f"{entry.name} gave {len(parts)} tensors for {', '.join(names)}: not kept."
                        )
                    named = dict(zip(names, parts, strict=True))
                    self.ledger.record([entry.name], {n: tuple(p.shape) for n, p in named.items()}, entry.shape)
                    for name, part in named.items():
                        writer.write(name, part)
                    progress.advance(sum(part.nbytes for part in parts) / 1e6)
                self.ledger.close()
                writer.finish()
        except BaseException:
            writer.abort()
            raise
        return writer.digests

    def _split(self) -> Iterator[tuple[Entry, list[Tensor]]]:
        """HF tensors of every entry, read and split ahead of the writer."""
        return ahead(self.entries, self._split_one, self._bytes, self.options.shard_size)

    def _split_one(self, entry: Entry) -> list[Tensor]:
        tensor = self._read(entry)
        check_numbers(tensor, entry.name, str(self.step))
        new, dtype = self.buffers.empty, self.options.dtype
        parts = entry.rule.split(tensor, new)
        return [new(part.shape, dtype).copy_(part) if dtype else part for part in parts]

    def _bytes(self, entry: Entry) -> int:
        """Bytes of an entry's two sides, which exist together for a moment."""
        return 2 * math.prod(entry.shape) * self.dtypes[entry.tensors[0].name].itemsize

    def _read(self, entry: Entry, *, check: bool = True) -> Tensor:
        return self.source.read(entry.key, entry.expert, check=check)

    def _progress(self, label: str) -> Progress:
        return Progress(label, planned_bytes(self.plan) / 1e6, self.log)

    def _write_companions(self, folder: Path) -> None:
        """Configuration, code, tokenizer, and the run's own configuration."""
        from transformers import GenerationConfig

        from ...tokenizer.hf_files import write_hf_tokenizer

        types = set(self.dtypes.values())
        self.config.dtype = types.pop() if len(types) == 1 else torch.float32
        verify.write_config(folder, self.config)
        generation = GenerationConfig(
            eos_token_id=[self.tokenizer.eod, self.tokenizer.end],
            pad_token_id=self.tokenizer.pad,
            suppress_tokens=sorted([self.tokenizer.pad, *self.tokenizer.role_ids.values()]),  # roles are structure
        )
        generation.to_json_file(folder / "generation_config.json")
        write_hf_tokenizer(self.tokenizer, folder, self.cfg.model.context_max)
        self.cfg.save(folder / RUN_CONFIG)
        source_files.carry(self.step.absolute().parent.parent, folder, self.source.manifest.step)
        for path in code_files():
            shutil.copyfile(path, folder / path.name)

    def _compare_logits(self, folder: Path) -> dict[str, Any]:
        from .megatron_logits import megatron_logits

        batch = probe.Probe.of(self.config)
        self.log(f"comparing logits of {batch.tokens.shape[1]} tokens by Megatron and by transformers")
        ours = megatron_logits(self.cfg, self.step, self.prefix, self.options.dtype, batch)
        theirs = probe.hf_logits(folder, batch)
        difference = verify.check_parity(ours, theirs)
        self.log(f"logits agree within {difference:.2e}")
        verify.save_probe(folder, batch)
        return probe.fingerprint(theirs, difference)

    def _write_manifest(self, folder: Path, digests: dict[str, str], fingerprint: dict[str, Any] | None) -> None:
        manifest = self.source.manifest
        source = {
            name: getattr(manifest, name)
            for name in ("step", "config_hash", "fixed_hash", "data_digest", "retrieval_digest", "grid")
        }
        tensors = {
            name: {
                "sha256": digests[name],
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
            }
            for shard in self.plan.values()
            for name, (shape, dtype) in shard.items()
        }
        HfManifest(
            weights=self.options.weights,
            source={"run": self.step.absolute().parent.parent.name, **source},
            package_version=__version__,
            megatron_version=manifest.megatron_version,
            rules_hash=manifest.rules_hash,
            tokenizer_digest=self.tokenizer.digest,
            versions=hf_manifest.versions(),
            tensors=tensors,
            files=verify.records(folder),
            fingerprint=fingerprint,
        ).write(folder)


def code_files() -> list[Path]:
    """The modelling code that travels with the weights."""
    root = Path(str(files("refractor_megatron.hf")))
    return sorted(root.glob("*_refractor.py"))
