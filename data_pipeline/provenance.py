"""Where a document comes from and what may be done with it: what a retrieval guard asks (spec section 2).

Kept beside the tokens as ``provenance.npy`` and ``provenance-heldout.npy``, one row for each document of the split. No
token of the text depends on it, so it is not part of a dataset's content digest; a retrieval index, whose answers do
depend on it, has its sha256 in its own.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.distinction.roles import RecordPolicy
from refractor_megatron.errors import DataError

FILE = "provenance.npy"
#: The same for held-out documents.
HELDOUT_FILE = "provenance-heldout.npy"
#: Fields of a JSON entry, and columns of a Parquet file, that state a document's provenance.
FIELDS = ("source", "timestamp", "trust", "policy")
#: Timestamp of a document that states none.
UNDATED = int(np.iinfo(np.int64).min)
#: Lifetime of a record that states none: no age exceeds it.
FOREVER = int(np.iinfo(np.int32).max)
ROW = np.dtype([("source", "<i4"), ("timestamp", "<i8"), ("trust", "<f4"), ("policy", "u1"), ("ttl_s", "<i4")])

Table = npt.NDArray[Any]  # structured, of ROW


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a document states about itself; the defaults are those of a document that states nothing.

    Retrieved text may be copied, but may not reach tools unless it says so (spec section 7.2).
    """

    source: str | None = None  # None: the corpus folder or package it was read from
    timestamp: int | None = None  # unix seconds
    trust: float = 1.0  # 0..1
    policy: RecordPolicy = RecordPolicy.ALLOW_COPY
    ttl_s: int = FOREVER


UNSTATED = Provenance()


def provenance_of(entry: dict[str, Any], where: str) -> Provenance:
    """What a JSON object or Parquet row states in ``source, timestamp, trust, policy``; null is unstated.

    ``where`` names file and line. Raises ``DataError`` for a value that cannot be understood: taken for unstated, it
    would pass a guard that it should not pass.
    """
    stated = {field: entry[field] for field in FIELDS if entry.get(field) is not None}
    if not stated:
        return UNSTATED
    policy, ttl_s = _policy(stated.get("policy", {}), where)
    return Provenance(
        _source(stated.get("source"), where),
        _timestamp(stated.get("timestamp"), where),
        _trust(stated.get("trust", UNSTATED.trust), where),
        policy,
        ttl_s,
    )


def _source(value: Any, where: str) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise DataError(f"{where}: source must be a name, not {value!r}; correct or remove it.")


def _timestamp(value: Any, where: str) -> int | None:
    """Unix seconds of a number, an ISO 8601 string or a date and time; UTC where no zone is given."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # refused below
            value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if value is None or (_is_number(value) and abs(value) < 2**53):
        return value if value is None else math.floor(value)
    raise DataError(f"{where}: timestamp must be unix seconds or ISO 8601, not {value!r}; correct or remove it.")


def _trust(value: Any, where: str) -> float:
    if _is_number(value) and 0 <= value <= 1:
        return float(value)
    raise DataError(f"{where}: trust must be a number from 0 to 1, not {value!r}; correct or remove it.")


def _policy(value: Any, where: str) -> tuple[RecordPolicy, int]:
    known = ("allow_copy", "allow_tools", "ttl_s")
    if not isinstance(value, dict) or not set(value) <= set(known):
        raise DataError(f"{where}: policy must be an object with {', '.join(known)}, not {value!r}; correct it.")
    stated = {key: item for key, item in value.items() if item is not None}
    copy, tools = stated.get("allow_copy", True), stated.get("allow_tools", False)
    ttl_s = stated.get("ttl_s", FOREVER)
    if not isinstance(copy, bool) or not isinstance(tools, bool):
        raise DataError(f"{where}: policy.allow_copy and policy.allow_tools must be true or false; correct them.")
    if not isinstance(ttl_s, int) or isinstance(ttl_s, bool) or not 0 <= ttl_s <= FOREVER:
        raise DataError(f"{where}: policy.ttl_s must be whole seconds from 0 to {FOREVER}, not {ttl_s!r}; correct it.")
    bits = (RecordPolicy.ALLOW_COPY if copy else RecordPolicy(0)) | (
        RecordPolicy.ALLOW_TOOLS if tools else RecordPolicy(0)
    )
    return bits, ttl_s


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_provenance(folder: Path, documents: int, file: str = FILE) -> Table:
    """The table of a dataset folder's split with ``documents`` documents. Raises ``DataError`` if it is not there."""
    path = folder / file
    try:
        table: Table = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {file}: it is of an older build; delete it and build it again.") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); delete {folder} and build it again.") from error
    if table.dtype != ROW or table.shape != (documents,):
        raise DataError(f"{path} is not of the same build as its folder; delete {folder} and build it again.")
    return table
