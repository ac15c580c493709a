"""``refractor_manifest.json``: where an HF folder's weights came from, and the hash of everything in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_pipeline.retrieval.index import INDEX

from ...errors import CheckpointError
from ...memory.codecs import CODECS

CONFIG, MANIFEST = "config.json", "refractor_manifest.json"
SCHEMA_VERSION = 1
#: Version of how the router turns logits into experts (``transformation.router``, ``modeling_refractor``).
ROUTER_VERSION = 1
_HEX = frozenset("0123456789abcdef")


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


def readable() -> dict[str, frozenset[int]]:
    """Versions of each of `versions` that this version of the package can serve; of codecs the last two."""
    found = {name: frozenset({version}) for name, version in versions().items()}
    return found | {f"codec_{codec.name}": frozenset(codec.versions) for codec in CODECS.values()}


def read(folder: Path) -> HfManifest | None:
    """The manifest of ``folder``; None where it has none.

    Raises:
        CheckpointError: it cannot be read, is of a schema this version does not know, or a field of it is missing or of
            a wrong kind, which the message names.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): export the model again.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({str(error)[:80]}): export the model again.") from None
    for field, value, wanted in _faults(content):
        found = "missing" if value is _ABSENT else f"{json.dumps(value)[:40]}"
        raise CheckpointError(f"{path} is damaged ({field} is {found}, not {wanted}): export the model again.")
    if content["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {content['schema_version']}, this version reads {SCHEMA_VERSION}: use the "
            "version that exported it."
        )
    return HfManifest(**content)


Fault = tuple[str, Any, str]  # the field, its value, what it should be
_Test = Callable[[Any], bool]
_ABSENT = object()


def _faults(content: Any) -> Iterator[Fault]:
    """What is wrong with a manifest's content, the schema first: of another one nothing else can be said."""
    if not isinstance(content, dict):
        yield "the whole", content, "an object"
        return
    schema = content.get("schema_version", _ABSENT)
    if not _is_count(schema):
        yield "schema_version", schema, "a number"
        return
    if schema != SCHEMA_VERSION:
        return
    names = {field.name for field in fields(HfManifest)}
    for name in sorted(content.keys() - names):
        yield name, content[name], "a field of a manifest"
    plain: dict[str, tuple[_Test, str]] = {
        "weights": (lambda value: value in ("raw", "ema"), "raw or ema"),
        "source": (_is_object, "an object"),
        "package_version": (_is_text, "text"),
        "megatron_version": (_is_text, "text"),
        "rules_hash": (_is_text, "text"),
        "tokenizer_digest": (_is_text_or_null, "text or null"),
        "versions": (lambda value: _is_object(value) and all(map(_is_count, value.values())), "an object of numbers"),
        "tensors": (_is_object, "an object"),
        "files": (_is_object, "an object"),
        "fingerprint": (lambda value: value is None or _is_object(value), "an object or null"),
    }
    assert plain.keys() == names - {"schema_version"}
    faults = list(_differing("", content, plain))
    yield from faults
    if faults:
        return
    yield from _source_faults(content["source"])
    for name, entry in content["tensors"].items():
        yield from _entry_faults(f"tensors[{name}]", entry, _TENSOR)
    for name, entry in content["files"].items():
        if Path(name).name != name or name in ("", ".."):
            yield f"files[{name}]", name, "the name of a file in the folder"
        header = isinstance(entry, dict) and "header_sha256" in entry
        digest = "header_sha256" if header else "sha256"
        yield from _entry_faults(f"files[{name}]", entry, {"bytes": (_is_count, "a number"), digest: _DIGEST})
    if content["fingerprint"] is not None:
        yield from _fingerprint_faults(content["fingerprint"])


def _source_faults(source: dict[str, Any]) -> Iterator[Fault]:
    yield from _differing("source.", source, {"step": (_is_count, "a number of updates")})
    kinds: dict[str, tuple[_Test, str]] = {
        "run": (_is_text, "text"),
        "config_hash": (_is_text, "text"),
        "fixed_hash": (_is_text, "text"),
        "data_digest": (_is_text, "text"),
        "retrieval_digest": (_is_text_or_null, "text or null"),
        "grid": (_is_object, "an object"),
    }
    yield from _differing("source.", source, {name: kind for name, kind in kinds.items() if name in source})


def _fingerprint_faults(found: dict[str, Any]) -> Iterator[Fault]:
    places: tuple[_Test, str] = (lambda value: _is_list_of(value, _is_count), "a list of positions")
    kinds: dict[str, tuple[_Test, str]] = {
        "positions": places,
        "tokens": places,
        "tolerance": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    }
    faults = list(_differing("fingerprint.", found, kinds))
    yield from faults
    if faults:
        return
    rows, columns = len(found["positions"]), len(found["tokens"])

    def is_table(value: Any) -> bool:
        return _is_list_of(value, lambda row: _is_list_of(row, _is_number) and len(row) == columns)

    table: tuple[_Test, str] = (
        lambda value: is_table(value) and len(value) == rows,
        f"a table of {rows} by {columns} numbers",
    )
    yield from _differing("fingerprint.", found, {"logits": table})


def _entry_faults(field: str, entry: Any, kinds: dict[str, tuple[_Test, str]]) -> Iterator[Fault]:
    if not _is_object(entry):
        yield field, entry, "an object"
        return
    yield from _differing(f"{field}.", entry, kinds)


def _differing(prefix: str, content: dict[str, Any], kinds: dict[str, tuple[_Test, str]]) -> Iterator[Fault]:
    for name, (is_right, wanted) in kinds.items():
        value = content.get(name, _ABSENT)
        if not is_right(value):
            yield f"{prefix}{name}", value, wanted


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list_of(value: Any, test: _Test) -> bool:
    return isinstance(value, list) and bool(value) and all(map(test, value))


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)


_DIGEST: tuple[_Test, str] = (_is_digest, "a sha256")
_TENSOR: dict[str, tuple[_Test, str]] = {
    "sha256": _DIGEST,
    "dtype": (_is_text, "text"),
    "shape": (lambda value: isinstance(value, list) and all(map(_is_count, value)), "a list of sizes"),
}
