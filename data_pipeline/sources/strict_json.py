"""JSON without silent choices: a field given twice is an error, not the last one that wins."""

from __future__ import annotations

import json
from typing import Any


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text; lone surrogates are kept.

    Errors: ``ValueError`` (``json.JSONDecodeError`` with a place where the syntax is wrong), also for a field that
    stands twice in one object and for values nested too deeply to be read.
    """
    try:
        return json.loads(raw, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"field {twice!a} stands twice in one object")
    return fields
