"""Signatures on disk: ``signatures.npy`` and, in ``signatures.json``, everything that makes two of them comparable."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup.minhash import SCHEME
from data_pipeline.dedup.shingles import HASH, NORMALISER
from refractor_megatron.errors import DataError

ARRAY, HEADER = "signatures.npy", "signatures.json"


@dataclass(frozen=True)
class Recipe:
    """How signatures were made. Only those of equal recipes may be compared."""

    ngram: int
    num_hashes: int
    seed: int
    scheme: str = SCHEME
    hash: str = HASH
    normaliser: str = NORMALISER


def write_signatures(folder: Path, signatures: npt.NDArray[np.uint32], recipe: Recipe) -> None:
    """Writes uint32 [documents, num_hashes] and its header into ``folder``."""
    assert signatures.dtype == np.uint32 and signatures.shape[1] == recipe.num_hashes
    np.save(folder / ARRAY, signatures)
    header = {**asdict(recipe), "documents": len(signatures)}
    (folder / HEADER).write_text(json.dumps(header, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_signatures(folder: Path, recipe: Recipe, documents: int) -> npt.NDArray[np.uint32]:
    """Signatures uint32 [documents, num_hashes], mapped from ``folder``.

    Raises ``DataError`` if they cannot be read, or were made in another way or of another number of documents.
    """
    try:
        header = json.loads((folder / HEADER).read_bytes())
        signatures: npt.NDArray[np.uint32] = np.load(folder / ARRAY, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"Cannot read the signatures in {folder} ({reason}); delete that folder and build again."
        ) from error
    wanted = {**asdict(recipe), "documents": documents}
    for name in [*(field.name for field in fields(Recipe)), "documents"]:
        stated = header.get(name) if isinstance(header, dict) else None
        if stated != wanted[name]:
            raise DataError(
                f"{folder / HEADER} states {name} = {stated!r} where {wanted[name]!r} is needed, and such signatures "
                "cannot be compared; delete that folder and build again."
            )
    if signatures.shape != (documents, recipe.num_hashes) or signatures.dtype != np.uint32:
        raise DataError(
            f"{folder / ARRAY} holds {signatures.dtype} {list(signatures.shape)} where its header states "
            f"uint32 {[documents, recipe.num_hashes]}; delete that folder and build again."
        )
    return signatures
