"""Opens an exported folder: configuration, weights and tokenizer, and whether they belong together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.convert import hf_manifest, source_files
from ..checkpoint.convert.agreement import check_agreement
from ..checkpoint.convert.verify import CONFIG, read_config
from ..distinction.roles import ROLES
from ..errors import CapabilityError, CheckpointError, DataError
from ..tokenizer import Tokenizer
from ..tokenizer.hf_files import OWN_FILE, read_hf_tokenizer
from ..training.folder import RunFolder

if TYPE_CHECKING:
    from ..hf.configuration_refractor import RefractorConfig
    from ..hf.modeling_refractor import RefractorForCausalLM

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Found:
    """An exported folder without its weights. notes: what a user should know of it, each one sentence."""

    folder: Path
    config: RefractorConfig
    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A model in evaluation mode with its tokenizer."""

    model: RefractorForCausalLM
    config: RefractorConfig
    tokenizer: Tokenizer


def read_exported(folder: Path) -> Found:
    """Configuration and tokenizer of an exported folder: what takes no time and says whether a request makes sense.

    Raises:
        CheckpointError: no exported folder, or files that do not belong together. DataError: no intact tokenizer.
    """
    _is_exported(folder)
    config: RefractorConfig = read_config(folder)
    _has_tokenizer(folder)
    tokenizer = read_hf_tokenizer(folder)
    _same_tokens(folder, config, tokenizer)
    notes = _check_manifest(folder, config, tokenizer)
    if config.retrieval is not None:
        notes += (f"{folder}: the model can read retrieved records; none are retrieved here, so it reads its context.",)
    return Found(folder, config, tokenizer, notes)


def load_weights(found: Found, device: str = "cpu", dtype: str = "float32") -> Exported:
    """The model on ``device`` in one of `DTYPES`.

    Raises:
        CheckpointError: weights that do not fill the model exactly. CapabilityError: no such device.
    """
    _place(device)
    model = _weights(found.folder, found.config, DTYPES[dtype])
    nn.Module.train(model, False)
    nn.Module.to(model, device)
    return Exported(model, found.config, found.tokenizer)


def _is_exported(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give one that refractor convert wrote.")
    if (folder / CONFIG).exists():
        return
    if RunFolder(folder).config.exists():
        raise CheckpointError(
            f"{folder} is a training run: refractor convert {folder} --to hf --out OUT, then use OUT."
        )
    raise CheckpointError(f"{folder} holds no {CONFIG}: give a folder that refractor convert wrote.")


def _has_tokenizer(folder: Path) -> None:
    if (folder / OWN_FILE).exists():
        return
    if (folder / source_files.FOLDER).is_dir():
        raise DataError(
            f"{folder} was imported and its tokenizer is not one that REFRACTOR can read: generate with transformers."
        )
    raise DataError(
        f"{folder / OWN_FILE} is missing, which save_pretrained does not write: copy it from the exported folder."
    )


def _place(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CapabilityError(f"device {device!r} cannot be used ({reason}); give --device cpu.") from None


def _same_tokens(folder: Path, config: RefractorConfig, tokenizer: Tokenizer) -> None:
    """Ids are the contract between text and weights: every one that structure places must mean the same to both."""
    found = (config.role_token_ids, config.end_token_id, config.eos_token_id)
    same = found == (tokenizer.role_ids, tokenizer.end, tokenizer.eod)
    rows = config.vocab_size - tokenizer.vocab_size  # those beyond the tokenizer's ids are never sampled
    if rows < 0 or (rows and not same):
        raise CheckpointError(
            f"{folder}: the model has {config.vocab_size} tokens and the tokenizer {tokenizer.vocab_size}, so they are "
            "not of one run; convert the checkpoint again."
        )
    if not same:
        raise CheckpointError(
            f"{folder / CONFIG}: the ids of special tokens are not the tokenizer's; convert the checkpoint again."
        )
    if config.roles[: len(ROLES)] != list(ROLES):
        raise CheckpointError(
            f"{folder / CONFIG}: the roles begin with {', '.join(config.roles[: len(ROLES)])} where this version "
            f"has {', '.join(ROLES)}; generate with the version that trained the model."
        )


def _weights(folder: Path, config: RefractorConfig, dtype: torch.dtype) -> RefractorForCausalLM:
    """The model with every weight read and none left over; safetensors only, for a pickle can run code."""
    from ..hf.modeling_refractor import RefractorForCausalLM

    # mismatched sizes are "ignored" so that they are reported: the tensor is named and refused below
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "ignore_mismatched_sizes": True}
    try:
        with _silent():
            loaded: Any = RefractorForCausalLM.from_pretrained(
                str(folder), config=config, dtype=dtype, output_loading_info=True, **options
            )
    except Exception as error:  # transformers and safetensors raise a dozen types for damaged files
        if isinstance(error, MemoryError):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(
            f"{folder}: the weights cannot be loaded ({reason}); convert the checkpoint again."
        ) from None
    model, found = loaded
    for what, names in (
        ("lack", found["missing_keys"]),
        ("have besides", found["unexpected_keys"]),
        ("have in another shape", [key[0] for key in found["mismatched_keys"]]),
    ):
        if names:
            raise CheckpointError(f"{folder}: the weights {what} {min(names)}; convert the checkpoint again.")
    assert isinstance(model, RefractorForCausalLM)
    return model


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """transformers' own bar and report would stand between our lines, and says what we say."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check_manifest(folder: Path, config: RefractorConfig, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Rules, tokenizer and definitions must be those of the export; the tensors' hashes are ``convert verify``'s."""
    manifest = hf_manifest.read(folder)
    check_agreement(folder, config, manifest)
    if manifest is None:
        return (f"{folder} has no {hf_manifest.MANIFEST}: which run it comes from cannot be told.",)
    if manifest.tokenizer_digest not in (None, tokenizer.digest):
        raise CheckpointError(
            f"{folder}: the tokenizer is not the one that the model was exported with; convert the checkpoint again."
        )
    return ()
