"""Checks after writing, and ``refractor convert verify``: bytes, names, shapes, numbers, logits."""

from __future__ import annotations

import filecmp
import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.progress import Progress

from ...errors import CheckpointError, DataError
from .. import manifest as manifests
from . import hf_manifest, probe, source_files
from .agreement import check_agreement, check_listed
from .buffers import New
from .foreign_config import DTYPE_NAMES
from .hf_folder import INDEX, PADDING, HfFolder, header_sha256
from .mapping import Entry, Table, table
from .probe import Probe
from .shape import Shape

PROBE = "refractor_probe.safetensors"
CONFIG = hf_manifest.CONFIG

Log = Callable[[str], object]


def read_config(folder: Path) -> Any:
    """The ``RefractorConfig`` in ``folder``.

    Raises:
        CheckpointError: missing, damaged, of another kind of model, or of values that no model could have.
    """
    from ...hf.configuration_refractor import RefractorConfig

    path = folder / CONFIG
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {folder} is no model folder, or only half of one.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({str(error)[:80]}): export the model again.") from None
    if not isinstance(content, dict) or content.get("model_type") != RefractorConfig.model_type:
        kind = content.get("model_type") if isinstance(content, dict) else None
        raise CheckpointError(
            f"{path} describes a model of type {kind!r}, and this needs {RefractorConfig.model_type}."
        )
    dtype = content.get("dtype", content.get("torch_dtype"))
    if dtype is not None and (not isinstance(dtype, str) or dtype.removeprefix("torch.") not in DTYPE_NAMES):
        raise CheckpointError(f"{path}: dtype {dtype!r} is unknown; the known ones are {', '.join(DTYPE_NAMES)}.")
    try:
        return RefractorConfig.from_dict(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} describes no REFRACTOR model ({str(error)[:120]}).") from None


def write_config(folder: Path, config: Any) -> None:
    """Write ``config.json``: every value of ours, and of transformers' own keys those that differ from its defaults."""
    from transformers import PreTrainedConfig

    ours, defaults = inspect.signature(type(config).__init__).parameters, PreTrainedConfig().to_dict()
    content = {
        key: value
        for key, value in config.to_dict().items()
        if key in ours or value != defaults.get(key, value is None)
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def table_of(folder: Path, config: Any) -> tuple[Shape, Table]:
    """Shape and table of an HF folder's configuration.

    Raises:
        CheckpointError: it lacks something or has a wrong kind of value.
    """
    try:
        shape = Shape.of_hf(config)
        return shape, table(shape)
    except (AttributeError, TypeError, KeyError, AssertionError, ZeroDivisionError) as error:
        text = str(error)[:80] or type(error).__name__
        raise CheckpointError(f"{folder / CONFIG} describes no REFRACTOR model ({text}).") from None


def check_names(hf: HfFolder, entries: Table) -> None:
    """The folder's tensors are the table's, in name and shape; padding rows may be missing.

    Raises:
        CheckpointError: names the first tensor that is missing, has another shape, or has no place.
    """
    expected = {tensor.name: tensor for entry in entries for tensor in entry.tensors}
    for name, tensor in expected.items():
        stored = hf.tensors.get(name)
        if stored is None and tensor.padding:
            continue
        if stored is None:
            raise CheckpointError(
                f"tensor {name} is missing in {hf.folder}, and config.json asks for it: they disagree or the folder is "
                "half written."
            )
        if stored.shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name} of {stored.file} has shape {list(stored.shape)} and config.json asks for "
                f"{list(tensor.shape)}: they disagree."
            )
        if tensor.padding != (stored.file.name == PADDING):
            raise CheckpointError(f"tensor {name} is in {stored.file}, which is not its place.")
    for name, stored in hf.tensors.items():
        if name not in expected:
            raise CheckpointError(f"tensor {name} of {stored.file} has no place in the model of config.json.")


def check_equal(
    pairs: Iterable[tuple[Entry, tuple[Tensor, list[Tensor]]]],
    rounded: torch.dtype | None,
    progress: Progress,
    new: New,
) -> None:
    """Both sides, read again: every entry is the same numbers, bit for bit.

    Args:
        pairs: an entry, its tensor of the Megatron side, its tensors of the other. rounded: type that the HF side was
            stored in, where that was asked for. new: gives memory.

    Raises:
        CheckpointError: names the entry that differs.
    """
    for entry, (ours, parts) in pairs:
        theirs = entry.rule.join(parts, new)
        if rounded is not None:
            ours = new(ours.shape, rounded).copy_(ours)
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape) or not _same_bits(ours, theirs):
            names = ", ".join(tensor.name for tensor in entry.tensors)
            raise CheckpointError(f"tensor {names} is not what {entry.name} holds: it was not converted faithfully.")
        progress.advance(ours.nbytes / 1e6)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compared as integers, the widest that fit: a NaN equals itself, and -0 is not 0."""
    flat = [tensor.contiguous().view(-1) for tensor in (a, b)]
    wide = all(one.nbytes % 8 == one.data_ptr() % 8 == 0 for one in flat)
    return torch.equal(*(one.view(torch.int64 if wide else torch.uint8) for one in flat))


def check_parity(megatron: Tensor, hf: Tensor) -> float:
    """Both implementations give the same logits; returns the largest difference.

    Raises:
        CheckpointError: they do not.
    """
    difference, bound = probe.compare(megatron, hf, probe.PARITY)
    if not difference <= bound:
        raise CheckpointError(
            f"logits by Megatron and by transformers differ by {difference:.2e}, more than {bound:.1e}: the conversion "
            "is wrong and was not published; please report it with the run's config.yaml."
        )
    return difference


def save_probe(folder: Path, batch: Probe) -> None:
    """Keep the batch beside the model, so that later versions compare the same logits."""
    tensors = {"tokens": batch.tokens, "records": batch.records}
    for name in ("vectors", "policies", "ids"):
        if (value := getattr(batch, name)) is not None:
            tensors[name] = value
    (folder / PROBE).write_bytes(safetensors.torch.save(tensors))


def load_probe(folder: Path) -> Probe:
    """What ``save_probe`` kept. Raises ``CheckpointError`` when it is missing or damaged."""
    try:
        return Probe(**safetensors.torch.load_file(folder / PROBE))
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{folder / PROBE} is missing or damaged ({str(error)[:80]}): export the model again."
        ) from None


def verify_folder(folder: Path, log: Log) -> None:
    """Check an exported folder against its own manifest, from the first byte to the logits.

    Raises:
        CheckpointError: names the file or tensor at fault. DataError: the tokenizer is at fault.
    """
    hf = HfFolder(folder)
    if hf.manifest is None:
        raise CheckpointError(
            f"{folder / hf_manifest.MANIFEST} is missing: only folders that refractor exported can be verified."
        )
    config = read_config(folder)
    check_names(hf, table_of(folder, config)[1])
    check_files(hf, hf.manifest, headers=False)
    check_listed(hf, config, hf.manifest)
    check_agreement(folder, config, hf.manifest)
    source_files.read(folder, int(hf.manifest.source.get("step", 0)))
    check_tokenizer(folder, config, hf.manifest)
    with Progress("verify", sum(stored.nbytes for stored in hf.tensors.values()) / 1e6, log) as progress:
        for name, stored in hf.tensors.items():
            hf.read(name)
            progress.advance(stored.nbytes / 1e6)
    check_files(hf, hf.manifest, headers=True)  # last: a tensor that was exchanged has been named before
    log(f"{folder}: {len(hf.tensors)} tensors in {len(hf.manifest.files)} files are as they were exported")
    expected = hf.manifest.fingerprint
    if expected is None:
        log("logits were not compared at export (--no-logits), so there is no fingerprint")
        return
    if not is_own_code(folder):
        log(f"{folder} carries another version's code, as its hashes say: the logits are by this version's")
    difference = probe.check_fingerprint(probe.hf_logits(folder, load_probe(folder)), expected)
    if not difference <= expected["tolerance"]:
        raise CheckpointError(
            f"{folder} gives logits that differ by {difference:.2e} from those at export ({expected['tolerance']:.1e} "
            "allowed): another version of the model's code or of torch computes another model."
        )
    log(f"logits within {difference:.2e} of the fingerprint ({expected['tolerance']:.1e} allowed)")


def is_own_code(folder: Path) -> bool:
    """Whether the modelling code in ``folder`` is this package's own, byte for byte: that is the code which is run."""
    from .to_hf import code_files

    return all((folder / path.name).is_file() and filecmp.cmp(path, folder / path.name, False) for path in code_files())


def check_files(hf: HfFolder, manifest: hf_manifest.HfManifest, *, headers: bool | None = None) -> None:
    """The manifest's files have their sizes and hashes: ``headers`` and index, all other files, or (None) both.

    Raises:
        CheckpointError: names the file.
    """
    for name, expected in manifest.files.items():
        path = hf.folder / name
        if headers is not None and headers != ("header_sha256" in expected or name == INDEX):
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: export the model again.")
        if file_record(path) != expected:
            raise CheckpointError(f"{path} does not match the manifest: it was altered, export the model again.")


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """A record of every file of a folder; ``source_files/`` has a record of its own, which is one of them."""
    return {p.name: file_record(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != ".lock"}


def file_record(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file; of a safetensors file with weights, the header's sha256."""
    if path.suffix == ".safetensors" and path.name != PROBE:
        return {"bytes": path.stat().st_size, "header_sha256": header_sha256(path)}
    return manifests.file_record(path)


def check_tokenizer(folder: Path, config: Any, manifest: hf_manifest.HfManifest | None) -> None:
    """The folder's tokenizer is intact, the manifest's, and its ids are those of the model.

    Special ids follow the ordinary ones, so a tokenizer of another size has others than the configuration.

    Raises:
        CheckpointError: sizes or digests disagree. DataError: it is missing or damaged.
    """
    from ...tokenizer.hf_files import OWN_FILE, read_hf_tokenizer

    if manifest is not None and manifest.tokenizer_digest is None:
        return
    if manifest is None and not (folder / OWN_FILE).exists():
        raise DataError(
            f"{folder / OWN_FILE} is missing, which save_pretrained does not write: copy it from the exported folder."
        )
    tokenizer = read_hf_tokenizer(folder)
    other = bool(config.role_token_ids) and config.role_token_ids != tokenizer.role_ids
    if other or tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder / OWN_FILE} has {tokenizer.vocab_size} ids and config.json, with vocab_size {config.vocab_size}, "
            "was made for another tokenizer: give the one that the model was trained with."
        )
    if manifest is not None and tokenizer.digest != manifest.tokenizer_digest:
        raise CheckpointError(
            f"{folder / OWN_FILE} is another tokenizer than the one exported: export the model again."
        )
