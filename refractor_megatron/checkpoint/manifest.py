"""The manifest: what a checkpoint holds, written last. A folder without a valid manifest is not a checkpoint.

Imports no torch, so the launcher can list and verify checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import CheckpointError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_PREFIX = "step_"
#: Mark of a save in progress; such folders are never loaded, and swept when the next run starts.
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Manifest:
    """Identity and content of one checkpoint."""

    step: int
    config_hash: str  # of every key
    fixed_hash: str  # of the keys that may not change on resume
    data_digest: str
    rules_hash: str
    package_version: str
    megatron_version: str
    grid: dict[str, int]
    files: dict[str, dict[str, int | str]]  # name -> {"bytes": n, "sha256": hex}
    schema_version: int = SCHEMA_VERSION
    totals: dict[str, float] = field(default_factory=dict)
    retrieval_digest: str | None = None  # None where the run retrieves nothing


def folder_of(root: Path, step: int) -> Path:
    """Folder of the checkpoint after update ``step``."""
    return root / f"{_PREFIX}{step:08d}"


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically: a reader sees the whole of it or none."""
    target = folder / MANIFEST
    temporary = folder / f"{MANIFEST}{TEMPORARY}"
    with open(temporary, "w") as file:
        json.dump(asdict(manifest), file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, target)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_record(path: Path) -> dict[str, int | str]:
    """Size and sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def read(folder: Path) -> Manifest:
    """Read a manifest.

    Raises:
        CheckpointError: it is missing, unreadable, or of a schema this version does not know.
    """
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_text())
        if fields["schema_version"] != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {fields['schema_version']}, this version reads {SCHEMA_VERSION}: "
                "load it with the version that wrote it."
            )
        return Manifest(**fields)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete {folder} to go on from an older one.") from None


def verify(folder: Path) -> Manifest:
    """Check every file against the manifest, size first, then sha256.

    Raises:
        CheckpointError: names the first file that is missing, truncated or altered, and the way out.
    """
    manifest = read(folder)
    way_out = f"delete {folder} to go on from the checkpoint before it"
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {way_out}.")
        if path.stat().st_size != record["bytes"]:
            raise CheckpointError(
                f"{path} is truncated ({path.stat().st_size} bytes, the manifest says {record['bytes']}): {way_out}."
            )
    for name, record in manifest.files.items():
        if file_record(folder / name)["sha256"] != record["sha256"]:
            raise CheckpointError(f"{folder / name} does not match its sha256: {way_out}.")
    return manifest


def complete(root: Path) -> list[Path]:
    """Checkpoint folders with a manifest, oldest first. Half-written ones are not among them."""
    if not root.is_dir():
        return []
    return sorted(
        p for p in root.iterdir() if p.name.startswith(_PREFIX) and p.suffix == "" and (p / MANIFEST).is_file()
    )


def latest_step(root: Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none."""
    folders = complete(root)
    return int(folders[-1].name.removeprefix(_PREFIX)) if folders else 0


def sweep(root: Path) -> None:
    """Remove what killed saves left behind (never a complete checkpoint)."""
    if root.is_dir():
        for path in root.iterdir():
            if path.suffix == TEMPORARY:
                shutil.rmtree(path)


def prune(root: Path, keep: int) -> None:
    """Keep the newest ``keep`` complete checkpoints."""
    for folder in complete(root)[:-keep]:
        doomed = folder.with_name(folder.name + TEMPORARY)
        os.rename(folder, doomed)  # stops being a checkpoint before its files go, so a kill leaves no half of one
        shutil.rmtree(doomed)
