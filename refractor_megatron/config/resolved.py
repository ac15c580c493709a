"""The resolved configuration of a run as a file: written once by the launcher, read by every rank."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import ConfigError, OutputError
from .convert import convert, leaf_of
from .schema import RunConfig, schema
from .yaml_file import Entry, dump_yaml, read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADER_KEYS = ("package", "preset", "hash", "fixed_hash", "explicit")


def write(cfg: RunConfig, path: Path) -> None:
    """Write ``cfg`` with its header; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(render(cfg), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose a writable output folder.") from None


def render(cfg: RunConfig) -> str:
    """The text of the file."""
    header = {
        "package": __version__,
        "preset": cfg.preset,
        "hash": cfg.hash,
        "fixed_hash": cfg.fixed_hash,
        # keys set by file or command line, each with the value that the preset has
        "explicit": {key: _plain(value) for key, value in sorted(cfg.baseline.items())},
    }
    note = (
        "# Resolved by refractor_megatron. Do not edit: the hash covers every key. To change a run, compose it again.\n"
    )
    return note + dump_yaml({"resolved": header}) + dump_yaml(cfg.to_dict())


def read(path: Path) -> RunConfig:
    """The configuration in ``path``; raises ``ConfigError`` unless it is what ``write`` wrote."""
    entries, header = read_yaml(path)
    if set(header) != set(_HEADER_KEYS) or not isinstance(header.get("explicit"), dict):
        raise ConfigError(
            f"{path}: this is no resolved configuration; pass it to `refractor pretrain --config`, which resolves it."
        )
    _check_complete(path, entries, header)
    values = {key: convert(schema()[key], entries[key].value, entries[key].where) for key in schema()}
    cfg = RunConfig.from_values(values, preset=str(header["preset"]), baseline=_baseline(header, path))
    if (cfg.hash, cfg.fixed_hash) != (header["hash"], header["fixed_hash"]):
        raise ConfigError(
            f"{path}: edited by hand, its keys hash to {cfg.hash} and its header says {header['hash']}; restore the "
            f"file or compose the run again in another output folder."
        )
    return cfg


def _check_complete(path: Path, entries: Mapping[str, Entry], header: Mapping[str, Any]) -> None:
    missing = [key for key in schema() if key not in entries]
    if missing:
        raise ConfigError(
            f"{path}: {', '.join(missing[:5])} missing; the file was written by version {header['package']} and "
            f"this is version {__version__}, or it was edited by hand: compose the run again."
        )


def _baseline(header: Mapping[str, Any], path: Path) -> dict[str, Any]:
    where = f"{path}, resolved.explicit"
    return {key: convert(leaf_of(str(key), where), value, where) for key, value in header["explicit"].items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
