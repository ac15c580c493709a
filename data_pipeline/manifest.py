"""``manifest.json``: what a dataset folder holds; written last, so its presence means the folder is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from data_pipeline.sources.fingerprint import sha256_of
from refractor_megatron.errors import DataError

FORMAT, VERSION = "refractor-data", 1
SPLITS = ("train", "heldout")
FILES = ("tokenizer.json", "sources.json", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx", "rec")))


def canonical(value: Any) -> bytes:
    """One byte string for equal JSON values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def seal(folder: Path, body: dict[str, Any]) -> dict[str, Any]:
    """Adds format, file sizes and hashes and the content digest to ``body`` and writes it."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in FILES}
    content = hashlib.sha256(canonical(files)).hexdigest()
    manifest = {"format": FORMAT, "version": VERSION, **body, "files": files, "content_sha256": content}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def load(folder: Path) -> dict[str, Any]:
    """Reads the manifest and compares all file sizes. Raises ``DataError`` for anything missing or truncated."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["version"] if manifest["format"] == FORMAT else None
        sizes = {name: manifest["files"][name]["bytes"] for name in FILES}
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no dataset (no manifest.json); build one with refractor data build.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error.strerror}); mend its permissions.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged; delete {folder} and build it again.") from error
    if version != VERSION:
        raise DataError(f"{path} has dataset format version {version}, this code reads {VERSION}; build it again.")
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DataError(f"{folder / name} {state}; delete {folder} and build it again.")
    result: dict[str, Any] = manifest
    return result


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Compares every file's sha256 with the manifest. Raises ``DataError`` naming the first that differs."""
    for name in FILES:
        if sha256_of(folder / name) != manifest["files"][name]["sha256"]:
            raise DataError(f"{folder / name} does not match its sha256; delete {folder} and build it again.")
