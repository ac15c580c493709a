"""A sources file: the corpora of a build as a YAML list, each with its licence, weight, schema and fields."""

from __future__ import annotations

import glob
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.manifest import canonical
from data_pipeline.provenance import FIELDS
from data_pipeline.sources.base import Source
from data_pipeline.sources.entries import FORMATS, NO_RULES, SUFFIXES
from data_pipeline.sources.files import files_below, planned
from data_pipeline.sources.fingerprint import Fingerprints
from data_pipeline.validate.schema import compiled, load_schema
from refractor_megatron.errors import DataError

_NAME = {"type": "string", "minLength": 1}
#: What an entry of the list may say; ``specification/examples/sources.yaml`` explains it.
ENTRY_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["name", "path", "licence"],
    "properties": {
        "name": {**_NAME, "pattern": r"^[^/\s][^/]*$"},
        "path": {"oneOf": [_NAME, {"type": "array", "items": _NAME, "minItems": 1}]},
        "licence": _NAME,
        "version": {"type": "string"},
        "fetched": {"type": "string"},
        "weight": {"type": "number", "exclusiveMinimum": 0},
        "format": {"enum": sorted(FORMATS)},
        "schema": _NAME,
        "html": {"enum": ["main-text", "all"]},
        "fields": {
            "type": "object",
            "additionalProperties": _NAME,
            "propertyNames": {"enum": ["text", "messages", *FIELDS]},
        },
    },
}
_WILD = frozenset("*?[")


def listed_sources(file: Path, fingerprints: Fingerprints) -> list[Source]:
    """The sources that ``file`` lists, in its order; relative paths start at its folder.

    Raises ``DataError`` naming the file and the entry for YAML that cannot be read, an unknown or mistyped key, a name
    used twice, a path without files, or a schema that is none.
    """
    entries = _entries(file)
    names = [entry["name"] for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}: two sources are named {twice!r}; rename one.")
    return [_source(entry, file, fingerprints) for entry in entries]


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"Cannot read data.sources={file} ({error.strerror}); give the path of a sources file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not valid YAML ({' '.join(str(error).split())}); correct it.") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{file} must be a list of sources, each with name, path and licence: write it so.")
    check = compiled(ENTRY_SCHEMA)
    for number, entry in enumerate(entries, start=1):
        where = f"{file}, source {number}"
        if isinstance(entry, dict):
            _known(entry, ENTRY_SCHEMA["properties"], where)
            if isinstance(entry.get("fields"), dict):
                _known(
                    entry["fields"], ENTRY_SCHEMA["properties"]["fields"]["propertyNames"]["enum"], f"{where}, fields"
                )
        wrong = check(entry)
        if wrong is not None:
            raise DataError(f"{where}: {wrong}; correct it.")
    return entries


def _known(entry: dict[Any, Any], known: Any, where: str) -> None:
    for key in entry:
        if key not in known:
            close = get_close_matches(str(key), list(known), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
            raise DataError(f"{where}: there is no key {key!r}; {hint}")


def _source(entry: dict[str, Any], file: Path, fingerprints: Fingerprints) -> Source:
    where = f"{file}, source {entry['name']!r}"
    paths = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
    suffixes = FORMATS[entry["format"]] if "format" in entry else SUFFIXES
    found = {path for one in paths for path in _files(file.parent / one, suffixes, "format" in entry, where)}
    files = sorted(found)
    root = _common_root(files)
    schema = load_schema(file.parent / entry["schema"]) if "schema" in entry else None
    rules: dict[str, Any] = {key: entry[key] for key in ("format", "html", "fields") if key in entry}
    if schema is not None:
        rules["schema"] = schema
    table, units = planned(files, root, fingerprints, {**NO_RULES, **rules})
    identity: dict[str, Any] = {one["path"]: one["sha256"] for one in table}
    if rules:
        identity["rules"] = canonical(rules).decode()
    return Source(
        entry["name"],
        entry.get("version", ""),
        entry["licence"],
        "",
        identity,
        units,
        weight=float(entry.get("weight", 1.0)),
        schema=schema,
        fetched=entry.get("fetched"),
        files=table,
    )


def _files(path: Path, suffixes: tuple[str, ...], any_name: bool, where: str) -> list[Path]:
    """Files of a folder, of a pattern (``**`` crosses folders) or one file; ``any_name``: the format is stated, so that
    a pattern may name files of any suffix. Raises ``DataError`` if there are none.
    """
    if path.is_dir():
        files = list(files_below(path, suffixes))
    elif _WILD & set(str(path)):
        found = (Path(name) for name in glob.glob(str(path), recursive=True))
        files = [one for one in found if one.is_file() and (any_name or one.name.endswith(suffixes))]
    else:
        if not path.is_file():
            raise DataError(f"{where}: {path} does not exist; correct the path.")
        if not any_name and not path.name.endswith(suffixes):
            raise DataError(f"{where}: {path} is none of {', '.join(suffixes)}; convert it or state its format.")
        files = [path]
    if not files:
        raise DataError(f"{where}: {path} holds no {', '.join(suffixes)} file; correct the path.")
    return files


def _common_root(files: list[Path]) -> Path:
    """The deepest folder above all ``files``, so that a corpus in another place has the same relative names."""
    parents = [set(path.parents) for path in files]
    return max(set.intersection(*parents), key=lambda folder: len(folder.parts))
