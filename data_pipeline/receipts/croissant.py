"""``croissant.json``: what a dataset folder holds, as Croissant 1.0 metadata (https://docs.mlcommons.org/croissant/).

Every file is named with its size and sha256, every source with its version and licence, and the tables among the files
as record sets that a Croissant reader can load. Token files have a layout that Croissant cannot express; they are
described in words. The bytes depend on the dataset alone: the one date is the newest that a source was fetched at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.receipts.ledger import Ledger

FILE = "croissant.json"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_FORMATS = {
    ".html": "text/html",
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".parquet": "application/x-parquet",
}
_WORDS = {
    ".bin": "Token ids one after another, little-endian, in Megatron's indexed layout; the .idx beside has lengths.",
    ".idx": "Index of the .bin beside: Megatron's header, then lengths, offsets and document bounds.",
    ".rec": "Records of the tokens in the .bin beside: role, segment and mask bits of each span.",
    ".npy": "Array of NumPy's format.",
}
#: Columns of ``sources.json`` that make a record set, with their types.
_SOURCE_FIELDS = {
    "name": "sc:Text",
    "version": "sc:Text",
    "licence": "sc:Text",
    "sha256": "sc:Text",
    "documents": "sc:Integer",
    "bytes": "sc:Integer",
}


def croissant(
    folder: Path, name: str, digest: str, files: Mapping[str, Mapping[str, Any]], ledgers: Sequence[Ledger] = ()
) -> bytes:
    """The metadata of the dataset in ``folder``, as the bytes of ``croissant.json``.

    ``files``: entries of the manifest to be (name to bytes and sha256), ``sources.json`` among them; ``digest``: of the
    build, hex; ``ledgers``: what became of the documents, step by step.
    """
    table: list[dict[str, Any]] = json.loads((folder / "sources.json").read_bytes())
    used = [source for source in table if source["documents"]]
    body: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": name,
        "description": _description(used),
        "version": f"1.0.0+{digest[:12]}",
        "citeAs": f"@misc{{{name}-{digest[:12]}, title={{{name}}}, note={{build {digest}}}}}",
        "license": sorted({source["licence"] for source in used if source["licence"]}),
        "isBasedOn": [_based_on(source) for source in used],
        "distribution": [_file_object(file, entry) for file, entry in sorted(files.items())],
        "recordSet": [_sources_set(table), *_tables(folder, sorted(files))],
    }
    if dates := [source["fetched"] for source in used if source.get("fetched")]:
        body["datePublished"] = max(dates)
    if ledgers:
        body["rai:dataPreprocessingProtocol"] = [_sentence(one) for one in ledgers]
    return (json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _description(used: Sequence[Mapping[str, Any]]) -> str:
    documents, size = (sum(source[key] for source in used) for key in ("documents", "bytes"))
    return f"Tokenised text for pre-training: {documents} documents, {size} bytes of text from {len(used)} sources."


def _based_on(source: Mapping[str, Any]) -> dict[str, Any]:
    """A source as a schema.org work."""
    work = {
        "@type": "sc:CreativeWork",
        "name": source["name"],
        "version": str(source["version"]),
        "license": source["licence"],
        "sha256": source["sha256"],
        "dateModified": source.get("fetched"),
    }
    return {key: value for key, value in work.items() if value}


def _file_object(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    suffix = PurePosixPath(name).suffix
    body = {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{entry['bytes']} B",
        "encodingFormat": _FORMATS.get(suffix, "application/octet-stream"),
        "sha256": entry["sha256"],
    }
    return {**body, "description": _WORDS[suffix]} if suffix in _WORDS else body


def _sources_set(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    held = [key for key in _SOURCE_FIELDS if all(key in source for source in table)]
    fields = [_field("sources", "sources.json", key, _SOURCE_FIELDS[key], {"jsonPath": f"$[*].{key}"}) for key in held]
    return {"@type": "cr:RecordSet", "@id": "sources", "name": "sources", "field": fields}


def _tables(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """A record set for each Parquet file, of its columns of text, bytes, numbers and truth values."""
    tables = []
    for name in names:
        if not name.endswith(".parquet"):
            continue
        key = name.removesuffix(".parquet")
        columns = {column: kind for column, kind in _columns(folder / name).items() if kind is not None}
        fields = [_field(key, name, column, kind, {"column": column}) for column, kind in columns.items()]
        tables.append({"@type": "cr:RecordSet", "@id": key, "name": key, "field": fields})
    return tables


def _columns(path: Path) -> dict[str, str | None]:
    """Croissant's type of each column, None where it has none. Bytes are sc:Text: readers hand text out as bytes."""
    from pyarrow import parquet, types

    kinds = (
        (types.is_integer, "sc:Integer"),
        (types.is_floating, "sc:Float"),
        (types.is_boolean, "sc:Boolean"),
        (types.is_string, "sc:Text"),
        (types.is_large_string, "sc:Text"),
        (types.is_fixed_size_binary, "sc:Text"),
        (types.is_binary, "sc:Text"),
    )
    return {
        field.name: next((kind for is_kind, kind in kinds if is_kind(field.type)), None)
        for field in parquet.read_schema(path)
    }


def _field(record_set: str, file: str, name: str, kind: str, extract: Mapping[str, str]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{record_set}/{name}",
        "name": name,
        "dataType": kind,
        "source": {"fileObject": {"@id": file}, "extract": dict(extract)},
    }


def _sentence(ledger: Ledger) -> str:
    """A step in words."""
    parts = [f"{ledger.entered} documents in", f"{ledger.kept} kept"]
    for verb, reasons in (("dropped", ledger.dropped), ("quarantined", ledger.quarantined)):
        parts += [f"{count} {verb} ({reason})" for reason, count in reasons.items()]
    return f"{ledger.name}: {', '.join(parts)}."
