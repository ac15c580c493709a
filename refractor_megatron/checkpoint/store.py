"""Save and load a TrainState as a Megatron distributed checkpoint (torch_dist), atomically.

Order of a save: all ranks write into ``step_N.tmp`` and fsync; rank 0 hashes every file, writes the manifest, and
renames the folder. A kill at any moment leaves either the old checkpoints alone or the new one whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..compat.megatron import dist_checkpointing, get_default_load_sharded_strategy, get_default_save_sharded_strategy
from ..errors import CheckpointError, OutputError
from . import manifest as manifests
from .convert import checksums
from .convert.publish import is_disk_full
from .manifest import Manifest


class Store:
    """The ``checkpoints`` folder of a run, used by all ranks together."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        if dist.get_rank() == 0:
            root.mkdir(parents=True, exist_ok=True)
            manifests.sweep(root)
        dist.barrier()

    def save(self, state: dict[str, Any], identity: dict[str, Any], bytes_needed: int) -> Path:
        """Write one checkpoint.

        Args:
            state: sharded state dict (tensors of every rank, plain values from rank 0).
            identity: fields of ``Manifest`` other than ``files``.
            bytes_needed: size of the whole checkpoint, checked against the free space first.

        Raises:
            OutputError: the disk is full; the checkpoints before are untouched.
        """
        folder = manifests.folder_of(self.root, identity["step"])
        temporary = folder.with_name(folder.name + manifests.TEMPORARY)
        self._on_main(lambda: self._make_room(temporary, bytes_needed))
        try:
            dist_checkpointing.save(state, str(temporary), get_default_save_sharded_strategy("torch_dist"))
        except Exception as error:
            if is_disk_full(error):
                self._on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
                raise _disk_full(temporary, self.root) from None
            raise
        self._on_main(lambda: self._publish(temporary, folder, identity))
        return folder

    def latest(self) -> Path | None:
        """Newest complete checkpoint, verified on rank 0.

        Raises:
            CheckpointError: it is damaged.
        """
        folders = manifests.complete(self.root)
        if not folders:
            return None
        self.verify(folders[-1])
        return folders[-1]

    def verify(self, folder: Path) -> None:
        """Compare a checkpoint, of this store or another, with its manifest on rank 0.

        Raises:
            CheckpointError: on every rank, naming the file that is missing or damaged.
        """
        self._on_main(lambda: manifests.verify(folder))

    def load(self, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Fill ``state`` from a checkpoint of any grid.

        Raises:
            CheckpointError: it does not hold what ``state`` asks for.
        """
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(
                state, str(folder), get_default_load_sharded_strategy(str(folder))
            )
        except (KeyError, dist_checkpointing.core.CheckpointingException) as error:
            raise CheckpointError(f"{folder} does not hold this model's state ({str(error)[:200]}).") from error
        return loaded

    def _make_room(self, temporary: Path, bytes_needed: int) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(self.root).free
        if free < bytes_needed:
            raise OutputError(
                f"the disk of {self.root} has {free >> 20} MiB free and a checkpoint needs {bytes_needed >> 20} MiB: "
                "free space or choose another --out; the checkpoints before are untouched."
            )
        temporary.mkdir()

    def _publish(self, temporary: Path, folder: Path, identity: dict[str, Any]) -> None:
        try:
            checksums.write(temporary)
            files = {p.name: manifests.file_record(p) for p in sorted(temporary.iterdir())}
            manifests.write(temporary, Manifest(files=files, **identity))
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(temporary, folder)
            manifests.sync_folder(self.root)
            manifests.prune(self.root, self.keep)
        except OSError as error:
            if is_disk_full(error):
                raise _disk_full(temporary, self.root) from None
            raise

    @staticmethod
    def _on_main(action: Any) -> None:
        """Run on rank 0; a user's mistake found there is raised on every rank, so that none waits for the others."""
        outcome: list[Exception | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except (OutputError, CheckpointError) as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            raise outcome[0]


def _disk_full(temporary: Path, root: Path) -> OutputError:
    return OutputError(
        f"no space left while writing {temporary}: free space or choose another --out; "
        f"the checkpoints before it in {root} are untouched."
    )
