"""``tokenizer.json``: our own file, versioned and sealed by a digest.

    {"format": "refractor-tokenizer", "version": 1, "pattern": str, "ranks": [base64, ...],
     "specials": [str, ...], "sha256": hex}

The position in ``ranks`` is the id and the merge priority; special tokens take the ids after the last rank.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refractor_megatron.errors import DataError

FORMAT, VERSION = "refractor-tokenizer", 1


def _body(pattern: str, ranks: Sequence[bytes], specials: Sequence[str]) -> dict[str, Any]:
    encoded = [base64.b64encode(token).decode() for token in ranks]
    return {"format": FORMAT, "version": VERSION, "pattern": pattern, "ranks": encoded, "specials": list(specials)}


def _digest_of_body(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest(pattern: str, ranks: Sequence[bytes], specials: Sequence[str]) -> str:
    """sha256 of the tokenizer's content, independent of the file's layout."""
    return _digest_of_body(_body(pattern, ranks, specials))


def write(path: Path, pattern: str, ranks: Sequence[bytes], specials: Sequence[str]) -> None:
    """Writes the file; the same tokenizer always gives the same bytes."""
    body = _body(pattern, ranks, specials)
    body["sha256"] = _digest_of_body(body)
    path.write_text(json.dumps(body, indent=0, ensure_ascii=True) + "\n", encoding="ascii")


def read(path: Path) -> tuple[str, list[bytes], list[str]]:
    """``(pattern, ranks, specials)``. Raises ``DataError`` if the file is missing, damaged or of another version."""
    try:
        body = json.loads(path.read_bytes())
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {body['format']!r}")
        if body["version"] != VERSION:
            raise DataError(f"{path} has tokenizer format version {body['version']}, this code reads {VERSION}.")
        seal = body.pop("sha256")
        if seal != _digest_of_body(body):
            raise ValueError("its content does not match its sha256")
        ranks = [base64.b64decode(token, validate=True) for token in body["ranks"]]
        return str(body["pattern"]), ranks, [str(name) for name in body["specials"]]
    except OSError as error:
        reason = error.strerror or "input/output error"
        raise DataError(
            f"Cannot read the tokenizer {path} ({reason}); build the dataset or export the model again."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not an intact tokenizer file ({error}); build the dataset or export the model again."
        ) from error
