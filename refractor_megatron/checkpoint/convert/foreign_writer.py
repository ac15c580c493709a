"""A run or one of our folders -> a folder of another family: the dense-compatible part, checked by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.progress import Progress

from ...errors import CheckpointError, DataError
from ...tokenizer import Tokenizer
from .. import manifest as manifests
from . import source_files, verify
from .agreement import check_agreement
from .foreign import ForeignFolder, foreign_name
from .foreign_export import ADDITIVE, Export, foreign_body, is_own
from .foreign_import import GENERATION, ForeignOptions, write_texts
from .foreign_probe import check_same_model, our_logits, plain_probe, transformers_logits
from .hf_folder import HfFolder, HfWriter, Plan, plan_files, planned_bytes
from .ledger import Ledger
from .mapping import Entry, HfTensor, Table, global_shapes, table
from .megatron_folder import EMA, MegatronFolder, config_of, find_step
from .publish import staged
from .shape import Shape
from .tensors import check_numbers
from .verify import Log

_REQUESTED = "dropped by request"
_ZERO = "zero throughout, adds nothing"
_VOCABULARIES = ("model.embed_tokens.weight", "lm_head.weight")


def export_foreign(
    source: Path, out: Path, family: str, options: ForeignOptions, log: Log, *, weights: str, drop_tiers: bool
) -> Ledger:
    """Write ``out``, a folder of ``family``; it appears whole and checked, or not at all.

    Args:
        source: a run, one of its checkpoints, or one of our folders for transformers.
        weights: ``raw`` or ``ema`` of a run. drop_tiers: leave out what the family cannot express; the ledger names it.

    Raises:
        CheckpointError, ConfigError, DataError, OutputError: one sentence each; nothing is published.
    """
    job = _ForeignExport(_open(source, weights), family, options, log, drop_tiers)
    with staged(out, planned_bytes(job.plan) + (1 << 20)) as folder:
        job.run(folder)
    job.ledger.dropped = [f"dropped: {part}" for part in job.export.left_out] + job.ledger.dropped
    log(f"{out}: {len(job.ledger.targets)} tensors as {family}, {len(job.ledger.left)} left behind")
    return job.ledger


class _RunSource:
    """A checkpoint of a run."""

    def __init__(self, path: Path, weights: str) -> None:
        from ...hf.from_run import hf_config
        from .to_hf import tokenizer_of

        step = find_step(path)
        self.name, cfg = str(step), config_of(step)
        run = step.absolute().parent.parent
        self.origin = source_files.read(run, manifests.read(step).step)
        try:
            self.tokenizer: Tokenizer | None = None if self.origin else tokenizer_of(run)
        except DataError:
            self.tokenizer = None
        self.config: Any = hf_config(cfg, self.tokenizer)  # refuses a tokenizer with ids beyond the vocabulary
        self.table: Table = table(Shape.of_run(cfg))
        self.context_max = cfg.model.context_max
        self.folder = MegatronFolder(step, EMA if weights == "ema" else "")
        found = self.folder.weights()
        if not found:
            raise CheckpointError(f"{step} keeps no averaged weights (train.ema.enabled): give --weights raw.")
        wanted = {entry.name: entry.shape for entry in self.table}
        shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
        ledger, demanded = Ledger(self.name, wanted, {}), global_shapes(self.table)
        ledger.check_found(shapes, demanded)
        self.folder.leave(ledger, set(demanded))
        self.left = ledger.left
        self.folder.verify()

    def dtype(self, entry: Entry, tensor: HfTensor) -> torch.dtype:
        """Stored type."""
        return self.folder.weights()[entry.key].dtype

    def read(self, entry: Entry) -> list[Tensor]:
        """HF tensors of an entry."""
        return entry.rule.split(self.folder.read(entry.key, entry.expert))

    def finish(self) -> None:
        """Verdict on the files."""
        self.folder.finish()

    def write_texts(self, folder: Path) -> None:
        """The source's own files, or those of the run's tokenizer."""
        if self.origin is not None:
            self.origin.copy_texts(folder)
        elif self.tokenizer is not None:
            write_texts(self.tokenizer, folder, self.context_max)


class _FolderSource:
    """One of our folders for transformers."""

    def __init__(self, path: Path) -> None:
        self.name, self.folder = str(path), HfFolder(path)
        self.left: dict[str, str] = {}  # it holds one model and nothing else
        self.config: Any = verify.read_config(path)
        _, self.table = verify.table_of(path, self.config)
        verify.check_names(self.folder, self.table)
        check_agreement(path, self.config, self.folder.manifest)
        if self.folder.manifest is not None:
            verify.check_files(self.folder, self.folder.manifest, headers=False)
        manifest = self.folder.manifest
        self.origin = source_files.read(path, int(manifest.source.get("step", 0)) if manifest is not None else 0)
        if self.config.eos_token_id is None:  # an imported folder: only generation knows where a text ends
            self.config.eos_token_id = _generation(path).get("eos_token_id")

    def dtype(self, entry: Entry, tensor: HfTensor) -> torch.dtype:
        """Stored type."""
        return self.folder.tensors[tensor.name].dtype

    def read(self, entry: Entry) -> list[Tensor]:
        """HF tensors of an entry; missing padding rows are no part of what is written."""
        return [self.folder.read(t.name) if not t.padding else torch.empty(0) for t in entry.tensors]

    def finish(self) -> None:
        """Tensors were checked when they were read; the files' headers come last, so that a tensor is named first."""
        if self.folder.manifest is not None:
            verify.check_files(self.folder, self.folder.manifest, headers=True)

    def write_texts(self, folder: Path) -> None:
        """Files about text, as they are: the source's where the folder was imported."""
        if self.origin is not None:
            self.origin.copy_texts(folder)
            return
        for path in source_files.companions(self.folder.folder):
            shutil.copyfile(path, folder / path.name)


Source = _RunSource | _FolderSource


def _open(path: Path, weights: str) -> Source:
    if (path / verify.CONFIG).is_file():
        if weights == "ema":
            raise CheckpointError(f"{path} is one model: --weights chooses between those of a run, leave it out.")
        return _FolderSource(path)
    return _RunSource(path, weights)


class _ForeignExport:
    def __init__(self, source: Source, family: str, options: ForeignOptions, log: Log, drop_tiers: bool) -> None:
        self.source, self.family, self.options, self.log = source, family, options, log
        self.drop_tiers = drop_tiers
        self.origin = source.origin
        if self.origin is not None:  # rows that the import added stay behind
            self.vocab_size = source.config.vocab_size = self.origin.vocab_size
        else:
            self.vocab_size = source.config.vocab_size
        self.kept = [(e, t) for e in source.table for t in e.tensors if not t.padding and not is_own(t.name)]
        types = {t.name: options.dtype or source.dtype(e, t) for e, t in self.kept}
        dtype = str(next(iter(types.values())) if len(set(types.values())) == 1 else torch.float32)
        self.export: Export = foreign_body(source.config, family, dtype.removeprefix("torch."), drop_tiers=drop_tiers)
        self.names = {t.name: foreign_name(t.name, family) for _, t in self.kept}
        renamed = [HfTensor(self.names[t.name], self._cut(t)) for _, t in self.kept]
        self.plan: Plan = plan_files(renamed, {self.names[n]: dtype for n, dtype in types.items()}, options.shard_size)
        self.ledger = Ledger(
            source.name,
            {t.name: t.shape for _, t in self.kept},
            {one.name: one.shape for one in renamed},
            left=dict(source.left),
        )
        self._leave_own()
        self._set_ids()

    def _cut(self, tensor: HfTensor) -> tuple[int, ...]:
        """Shape of what is written: of a vocabulary, the rows that the family's model has."""
        return (self.vocab_size, *tensor.shape[1:]) if tensor.name in _VOCABULARIES else tensor.shape

    def _set_ids(self) -> None:
        """Where texts begin and end: the source's own word of an imported model; no id beyond the vocabulary."""
        body = self.export.body
        if self.origin is not None:
            for key in source_files.ID_KEYS:
                body.pop(key)
            body |= self.origin.ids
            if self.origin.rows:
                self.ledger.notes += [
                    f"{t.name}: the last {self.origin.rows} rows, which the import added, are left out"
                    for _, t in self.kept
                    if t.name in _VOCABULARIES
                ]
            return
        for key in source_files.ID_KEYS:
            ids = body[key] if isinstance(body[key], list) else [body[key]]
            if any(i is not None and not 0 <= i < self.vocab_size for i in ids):
                raise CheckpointError(
                    f"{key} of {self.source.name} is {body[key]} and the model has {self.vocab_size} tokens: give the "
                    "tokenizer that the model was trained with."
                )

    def _leave_own(self) -> None:
        """Enter what stays behind; refuse it unless it is nothing or was given up."""
        for entry in self.source.table:
            for number, tensor in enumerate(entry.tensors):
                if tensor.padding:
                    self.ledger.left[tensor.name] = "padding rows that no token has"
                elif is_own(tensor.name):
                    nothing = tensor.name.endswith(ADDITIVE) and not self.source.read(entry)[number].any()
                    if not nothing and not self.drop_tiers:
                        raise CheckpointError(
                            f"tensor {tensor.name} of {self.source.name} has no place in a {self.family} model: give "
                            "--drop-tiers to leave it out, which changes what the model computes."
                        )
                    self.ledger.left[tensor.name] = _ZERO if nothing else _REQUESTED
                    if not nothing:
                        self.ledger.dropped.append(f"{tensor.name}: {_REQUESTED}")

    def run(self, folder: Path) -> None:
        """Everything between an empty folder and one to publish."""
        self._write_tensors(folder)
        self.source.finish()
        (folder / verify.CONFIG).write_text(json.dumps(self.export.body, indent=2) + "\n")
        self.source.write_texts(folder)
        written = ForeignFolder(folder)  # names and shapes are the family's
        for own, tensor in self._tensors():
            if not torch.equal(written.read(own), tensor):
                raise CheckpointError(f"tensor {self.names[own]} was not written faithfully: nothing is kept.")
        if self.options.logits:
            batch = plain_probe(written.model.cfg)
            difference = check_same_model(our_logits(written, batch), transformers_logits(folder, batch), folder)
            self.log(f"logits of the written folder by transformers and by REFRACTOR agree within {difference:.2e}")

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Our name and the numbers of everything that is written, in order."""
        for entry in dict.fromkeys(entry for entry, _ in self.kept):
            for target, tensor in zip(entry.tensors, self.source.read(entry), strict=True):
                if target.name in self.names:
                    kept = tensor[: self._cut(target)[0]]
                    yield target.name, kept.to(self.options.dtype or kept.dtype)

    def _write_tensors(self, folder: Path) -> None:
        writer = HfWriter(folder, self.plan)
        try:
            with Progress("convert", planned_bytes(self.plan) / 1e6, self.log) as progress:
                for own, tensor in self._tensors():
                    check_numbers(tensor, own, self.source.name)
                    writer.write(self.names[own], tensor)
                    self.ledger.record([own], {self.names[own]: tuple(tensor.shape)}, tuple(tensor.shape))
                    progress.advance(tensor.nbytes / 1e6)
            self.ledger.close()
            writer.finish()
        except BaseException:
            writer.abort()
            raise


def _generation(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / GENERATION).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
