"""Whether a sealed folder is, bit for bit, what its build wrote; if not, which file is at fault."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline import manifest as manifests
from data_pipeline.progress import Log, Progress
from data_pipeline.receipts.merkle import proof, verify_proof
from data_pipeline.sources.fingerprint import sha256_of
from refractor_megatron.errors import DataError

_MANIFEST = "manifest.json"
_KEYS = {"bytes", "sha256"}


def verify_folder(folder: Path, root: str | None = None, log: Log | None = None) -> list[str]:
    """What is wrong with a dataset or index folder, one line for each file at fault; nothing wrong, no line.

    Reads every byte. ``root`` (hex) is the Merkle root that the folder must have, as its user noted it down: without
    it, a folder whose files and manifest were changed together passes. Folders of format version 1 have none: of their
    manifests only the entries of files are verified. Indexes inside a dataset are verified with it. Names that begin
    with a dot are locks and drafts, and not looked at. Raises ``DataError`` if ``folder`` was never sealed.
    """
    manifest, lines = _read(folder)
    if manifest is None:
        return lines
    stated = manifest.get("merkle_root")
    entries: dict[str, dict[str, Any]] = manifest["files"]
    found = _found(folder, entries, log)
    damaged = bool(lines)
    if stated is not None and manifests.root(manifest) != stated:
        damaged = True
        lines.append(f"{folder / _MANIFEST} does not match its Merkle root.")
        if manifests.root({**manifest, "files": found}) == stated:
            entries = found  # the files are those that the root is of: an entry was changed, not its file
    if stated is None and manifest["version"] >= manifests.ROOTED:
        damaged = True
        lines.append(f"{folder / _MANIFEST} has no Merkle root.")
    if root is not None and stated != root and not damaged:
        lines.append(f"{folder / _MANIFEST} has Merkle root {stated}, not {root}: it is another dataset or build.")
    lines += [line for name in sorted(entries) if (line := _difference(folder / name, entries[name], found.get(name)))]
    return lines + _others(folder, set(manifest["files"]), log)


def prove_file(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """JSON that proves, to one who knows the root alone, that file ``name`` of that size and hash is in the folder."""
    leaves = manifests.leaves(manifest)
    index = 1 + sorted(manifest["files"]).index(name)
    path = [one.hex() for one in proof(leaves, index)]
    return {"leaf": json.loads(leaves[index]), "index": index, "leaves": len(leaves), "path": path}


def check_proof(claim: Mapping[str, Any], root: str) -> bool:
    """Whether a ``claim`` of ``prove_file`` holds for the Merkle root ``root`` (hex)."""
    path = [bytes.fromhex(one) for one in claim["path"]]
    leaf = manifests.canonical(claim["leaf"])
    return verify_proof(leaf, claim["index"], claim["leaves"], path, bytes.fromhex(root))


def _read(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest, or None, and what is wrong with its bytes."""
    path = folder / _MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {_MANIFEST}: it is no dataset, or no whole one; name another.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error.strerror}); mend its permissions.") from error
    try:
        manifest = json.loads(data)
        well_formed = (
            isinstance(manifest["format"], str)
            and isinstance(manifest["version"], int)
            and all(_is_entry(name, entry) for name, entry in manifest["files"].items())
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        well_formed = False
    if not well_formed:
        return None, [f"{path} is damaged: it is no manifest."]
    # one bit may change the bytes and not the meaning: 1e-05 and 1E-05
    same = manifests.serialised(manifest) == data
    return manifest, [] if same else [f"{path} is not written as its build writes it."]


def _is_entry(name: str, entry: Any) -> bool:
    """A file's name within the folder, with its size and hash."""
    parts = PurePosixPath(name).parts
    inside = bool(parts) and ".." not in parts and not PurePosixPath(name).is_absolute() and "\x00" not in name
    return inside and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) and set(entry) == _KEYS


def _found(folder: Path, entries: Mapping[str, Any], log: Log | None) -> dict[str, dict[str, Any]]:
    """What the listed files really hold; a missing one is left out."""
    there = {name: folder / name for name in sorted(entries) if (folder / name).is_file()}
    total = sum(path.stat().st_size for path in there.values()) / 1e6
    found = {}
    with Progress(f"verify {folder.name}", total, log or _silent) as progress:
        for name, path in there.items():
            size = path.stat().st_size
            try:
                found[name] = {"bytes": size, "sha256": sha256_of(path)}
            except OSError as error:
                raise DataError(f"Cannot read {path} ({error.strerror}); mend its permissions.") from error
            progress.advance(size / 1e6)
    return found


def _difference(path: Path, entry: Mapping[str, Any], found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return f"{path} is missing."
    if found["bytes"] != entry["bytes"]:
        return f"{path} has {found['bytes']} bytes instead of {entry['bytes']}."
    return None if found["sha256"] == entry["sha256"] else f"{path} does not match its sha256."


def _others(folder: Path, listed: set[str], log: Log | None) -> list[str]:
    """What is wrong with what the manifest does not list: sealed folders within this one, and anything else."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == _MANIFEST or path.name in listed:
            continue
        if path.is_dir() and (path / _MANIFEST).is_file():
            lines += verify_folder(path, log=log)
        elif path.is_dir():
            inner = [one for one in sorted(path.rglob("*")) if not one.is_dir()]
            lines += [_extra(one) for one in inner if one.relative_to(folder).as_posix() not in listed]
        else:
            lines.append(_extra(path))
    return lines


def _extra(path: Path) -> str:
    return f"{path} is not listed in the manifest."


def _silent(line: str) -> None:
    """No log."""
