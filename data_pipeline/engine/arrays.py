"""Arrays that tasks share, on disk under a name that states their content: never rewritten, never half there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.output import draft_folder


@dataclass(frozen=True)
class Saved:
    """``folder`` holds ``<name>.npy`` of each array; ``digest``: sha256 of all names and values."""

    folder: Path
    digest: str

    def path(self, name: str) -> str:
        """Where one of them is."""
        return str(self.folder / f"{name}.npy")


def digest_of(**arrays: npt.NDArray[Any]) -> str:
    """sha256 of names, types, shapes and values."""
    state = hashlib.sha256()
    for key, array in sorted(arrays.items()):
        state.update(f"{key} {array.dtype.str} {array.shape};".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def save_arrays(work: Path, name: str, **arrays: npt.NDArray[Any]) -> Saved:
    """Stores arrays in ``<work>/<name>-<digest12>``, once."""
    digest = digest_of(**arrays)
    folder = work / f"{name}-{digest[:12]}"
    if not folder.is_dir():
        with draft_folder(folder) as draft:
            for key, array in arrays.items():
                np.save(draft / f"{key}.npy", array)
    return Saved(folder, digest)
