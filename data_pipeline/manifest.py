"""``manifest.json``: what a dataset or index folder holds; written last, so its presence means the folder is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.receipts import merkle
from data_pipeline.sources.fingerprint import sha256_of
from refractor_megatron.errors import DataError

SPLITS = ("train", "heldout")
FILES = ("tokenizer.json", "sources.json", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx", "rec")))
#: Format version since which a folder has a Merkle root over its whole manifest. Older ones are read all the same.
ROOTED = 2


@dataclass(frozen=True)
class Kind:
    """A kind of folder: its name in messages, how to get one, its format, and the files its content digest covers.

    ``version`` is what is written, ``oldest`` what is still read; ``beside`` are those of ``files`` that no sample
    depends on, which the digest leaves out.
    """

    name: str
    way_out: str
    format: str
    version: int
    files: tuple[str, ...]
    oldest: int = 1
    beside: tuple[str, ...] = ()


DATASET = Kind("dataset", "build one with refractor data build", "refractor-data", 2, FILES, beside=("sources.json",))


def canonical(value: Any) -> bytes:
    """One byte string for equal JSON values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def serialised(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of ``manifest.json``."""
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def leaves(manifest: Mapping[str, Any]) -> list[bytes]:
    """Leaves of a folder's Merkle tree: all that its manifest says but files and root, then its files by name.

    Each is canonical JSON; a file's holds name, size and sha256, so that proving one file shows nothing of the others.
    """
    body = {key: value for key, value in manifest.items() if key not in ("files", "merkle_root")}
    files = [canonical({"name": name, **entry}) for name, entry in sorted(manifest["files"].items())]
    return [canonical(body), *files]


def root(manifest: Mapping[str, Any]) -> str:
    """The Merkle root (RFC 6962, hex) of a manifest: what stands in it as ``merkle_root``."""
    return merkle.root(leaves(manifest)).hex()


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of ``folder``, by name."""
    names = sorted(path.name for path in folder.iterdir())
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def seal(
    folder: Path,
    body: dict[str, Any],
    kind: Kind = DATASET,
    content: tuple[str, ...] = (),
    files: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Adds format, file sizes and hashes, the content digest and the Merkle root to ``body`` and writes it.

    The content digest covers the files of ``kind`` that samples depend on and those that ``content`` names; all other
    files of the folder are listed and checked like them. ``files``: ``entries`` of the folder, if they are known.
    """
    assert not (folder / "manifest.json").exists()
    files = entries(folder) if files is None else files
    covered = {name: files[name] for name in (*kind.files, *content) if name not in kind.beside}
    digest = hashlib.sha256(canonical(covered)).hexdigest()
    manifest = {"format": kind.format, "version": kind.version, **body, "files": files, "content_sha256": digest}
    manifest["merkle_root"] = root(manifest)
    written = serialised(manifest)
    (folder / "manifest.json").write_bytes(written)
    result: dict[str, Any] = json.loads(written)
    return result


def load(folder: Path, kind: Kind = DATASET) -> dict[str, Any]:
    """Reads the manifest, checks it against its Merkle root, and compares all file sizes.

    Raises ``DataError`` for anything changed in the manifest, missing or truncated.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["version"] if manifest["format"] == kind.format else None
        sizes = {name: manifest["files"][name]["bytes"] for name in (*kind.files, *manifest["files"])}
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no {kind.name} (no manifest.json); {kind.way_out}.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error.strerror}); mend its permissions.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged; delete {folder} and build it again.") from error
    if version is None or not kind.oldest <= version <= kind.version:
        raise DataError(
            f"{path} has {kind.name} format version {version}, this code reads {kind.oldest} to {kind.version}; "
            "build it again."
        )
    if version >= ROOTED and manifest.get("merkle_root") != root(manifest):
        raise DataError(f"{path} does not match its Merkle root; delete {folder} and build it again.")
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
