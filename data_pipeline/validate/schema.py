"""JSON Schema (Draft 2020-12) of the entries of a source.

Checked by ``jsonschema-rs``: an entry of 2 kB takes it 0.3 us, ``fastjsonschema`` (Draft 7 only) 0.9 us and
``jsonschema`` 17 us, beside 5 us for parsing the line.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refractor_megatron.errors import DataError

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TAG_LIST = {"type": ["array", "null"], "items": {"type": "string"}}
_CONTENT = {
    "type": ["string", "object"],
    "required": ["value"],
    "properties": {
        "type": {"type": ["string", "null"]},
        "value": {"type": "string"},
        "encoding": {"enum": ["utf-8", "base64", None]},
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"type": "string"}, "content": _CONTENT, "protocol_tags": _TAG_LIST},
}
_PROVENANCE = {
    "source": {"type": ["string", "null"], "minLength": 1},
    "timestamp": {"type": ["string", "number", "null"]},
    "trust": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "policy": {"type": ["object", "null"]},
}
#: An entry has either a text or messages; other fields are allowed and not read.
ENTRY: dict[str, Any] = {
    "$schema": _DRAFT,
    "type": "object",
    "properties": {
        "text": {"type": ["string", "null"]},
        "messages": {"type": ["array", "null"], "items": _MESSAGE},
        **_PROVENANCE,
    },
}
_SHOWN = 160

#: What is wrong with a value in one line, or ``None``.
Check = Callable[[Any], str | None]


def compiled(schema: dict[str, Any], where: str = "the schema") -> Check:
    """The check of ``schema``, compiled once for each process. Raises ``DataError`` if it is no valid schema."""
    return _compiled(json.dumps(schema, sort_keys=True), where)


@functools.lru_cache(maxsize=256)
def _compiled(schema: str, where: str) -> Check:
    import jsonschema_rs

    try:
        validator = jsonschema_rs.Draft202012Validator(json.loads(schema))
    except ValueError as error:
        raise DataError(f"{where} is no JSON Schema of draft 2020-12 ({_short(str(error))}); correct it.") from error

    def check(value: Any) -> str | None:
        try:
            if validator.is_valid(value):
                return None
            first = next(validator.iter_errors(value))
        except ValueError as error:  # a value that JSON does not know
            return _short(str(error))
        place = "/".join(str(part) for part in first.instance_path)
        return _short(f"{place or 'entry'}: {first.message}")

    return check


def _short(message: str) -> str:
    line = message.splitlines()[0] if message else "unreadable"
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def load_schema(path: Path) -> dict[str, Any]:
    """The schema in a JSON file. Raises ``DataError`` naming the file if it cannot be read or is no schema."""
    try:
        schema = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"Cannot read the schema {path} ({error.strerror}); correct the path in the sources file."
        ) from error
    except ValueError as error:
        raise DataError(f"The schema {path} is not valid JSON ({error}); correct it.") from error
    if not isinstance(schema, dict):
        raise DataError(f"The schema {path} must be a JSON object; correct it.")
    if schema.get("$schema", _DRAFT).rstrip("#") != _DRAFT:
        raise DataError(f"The schema {path} is of {schema['$schema']!r}; write it for {_DRAFT}.")
    compiled(schema, f"The schema {path}")
    return schema
