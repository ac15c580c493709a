"""``manifest.json``: what a dataset or index folder holds; written last, so its presence means the folder is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import provenance
from data_pipeline.sources.fingerprint import sha256_of
from refractor_megatron.errors import DataError

SPLITS = ("train", "heldout")
FILES = ("tokenizer.json", "sources.json", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx", "rec")))
#: Files of a dataset that no sample depends on. Builds of code version 1 lack them, and are read all the same.
BESIDE = (provenance.FILE,)


@dataclass(frozen=True)
class Kind:
    """A kind of folder: its name in messages, how to get one, its format, and the files its content digest covers."""

    name: str
    way_out: str
    format: str
    version: int
    files: tuple[str, ...]


DATASET = Kind("dataset", "build one with refractor data build", "refractor-data", 1, FILES)


def canonical(value: Any) -> bytes:
    """One byte string for equal JSON values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def seal(folder: Path, body: dict[str, Any], kind: Kind = DATASET, beside: tuple[str, ...] = ()) -> dict[str, Any]:
    """Adds format, file sizes and hashes and the content digest to ``body`` and writes it.

    ``beside`` names files that are listed and checked like the others, but are not part of the content digest.
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in (*kind.files, *beside)
    }
    content = hashlib.sha256(canonical({name: files[name] for name in kind.files})).hexdigest()
    manifest = {"format": kind.format, "version": kind.version, **body, "files": files, "content_sha256": content}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def load(folder: Path, kind: Kind = DATASET) -> dict[str, Any]:
    """Reads the manifest and compares all file sizes. Raises ``DataError`` for anything missing or truncated."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["version"] if manifest["format"] == kind.format else None
        sizes = {name: manifest["files"][name]["bytes"] for name in (*kind.files, *manifest["files"])}
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no {kind.name} (no manifest.json); {kind.way_out}.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error.strerror}); mend its permissions.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged; delete {folder} and build it again.") from error
    if version != kind.version:
        raise DataError(
            f"{path} has {kind.name} format version {version}, this code reads {kind.version}; build it again."
        )
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DataError(f"{folder / name} {state}; delete {folder} and build it again.")
    result: dict[str, Any] = manifest
    return result


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Compares every file's sha256 with the manifest. Raises ``DataError`` naming the first that differs."""
    for name, entry in manifest["files"].items():
        if sha256_of(folder / name) != entry["sha256"]:
            raise DataError(f"{folder / name} does not match its sha256; delete {folder} and build it again.")
