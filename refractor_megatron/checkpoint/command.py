"""``refractor ckpt``: list and verify the checkpoints of a run. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CheckpointError
from . import manifest as manifests


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``ckpt list`` and ``ckpt verify``."""
    parser = subparsers.add_parser("ckpt", help="list and verify checkpoints")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, action, text in (
        ("list", list_checkpoints, "complete checkpoints, oldest first"),
        ("verify", verify, "check every file's size and sha256"),
    ):
        sub = actions.add_parser(name, help=text)
        sub.add_argument("folder", type=Path, help="run folder, its checkpoints folder, or one checkpoint")
        sub.set_defaults(run=action)


def list_checkpoints(args: argparse.Namespace) -> int:
    """Print one line for each checkpoint."""
    for folder in _folders(args.folder):
        manifest = manifests.read(folder)
        size = sum(int(record["bytes"]) for record in manifest.files.values())
        grid = " ".join(f"{name}{n}" for name, n in manifest.grid.items())
        print(f"{folder}  step {manifest.step}  {size / 1e6:.1f} MB  {grid}  config {manifest.config_hash}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Verify each checkpoint; the first fault ends the command."""
    for folder in _folders(args.folder):
        manifest = manifests.verify(folder)
        print(f"{folder}  ok: {len(manifest.files)} files, step {manifest.step}")
    return 0


def _folders(path: Path) -> list[Path]:
    if (path / manifests.MANIFEST).exists():
        return [path]
    folders = manifests.complete(path) or manifests.complete(path / "checkpoints")
    if not folders:
        raise CheckpointError(f"{path} holds no complete checkpoint: give a run folder or a checkpoint folder.")
    return folders
