"""``refractor_manifest.json``: where an HF folder's weights came from, and the hash of everything in it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.retrieval.index import INDEX

from ...errors import CheckpointError
from ...memory.codecs import CODECS

MANIFEST = "refractor_manifest.json"
SCHEMA_VERSION = 1
#: Version of how the router turns logits into experts (``transformation.router``, ``modeling_refractor``).
ROUTER_VERSION = 1


@dataclass(frozen=True)
class HfManifest:
    """Identity and content of an exported model.

    ``source``: run, step, grid and hashes of the checkpoint. ``tensors``: sha256, dtype and shape of each tensor, also
    of the padding rows that only Megatron has. ``files``: bytes and sha256 of each file; of a safetensors file it is
    the header's, because the tensors' own hashes cover the rest. ``fingerprint``: some logits, see ``probe``.
    """

    weights: str  # raw | ema
    source: dict[str, Any]
    package_version: str
    megatron_version: str
    rules_hash: str
    tokenizer_digest: str | None
    versions: dict[str, int]
    tensors: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    fingerprint: dict[str, Any] | None
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> None:
        """Write it into ``folder``, last of all files."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")


def versions() -> dict[str, int]:
    """Versions of the formats and definitions that a served model depends on."""
    codecs = {f"codec_{codec.name}": codec.newest for codec in CODECS.values()}
    return {"router": ROUTER_VERSION, "retrieval_index": INDEX.version, **codecs}


def read(folder: Path) -> HfManifest | None:
    """The manifest of ``folder``; None where it has none.

    Raises:
        CheckpointError: it is damaged or of a schema this version does not know.
    """
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_text())
        if fields["schema_version"] != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {fields['schema_version']}, this version reads {SCHEMA_VERSION}: use the "
                "version that exported it."
            )
        return HfManifest(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error)[:80]}): export the model again.") from None
