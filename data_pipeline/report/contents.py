"""What the files of a dataset folder say, read once, for the page and for ``data inspect``. No text is read."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_pipeline import manifest as manifests
from data_pipeline.packed_stream import KEY
from refractor_megatron.distinction.roles import ROLES, MaskBit
from refractor_megatron.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

#: Unknown language, as of a folder whose text was not judged.
UNKNOWN = "not judged"
_NUMBERS = ("source", "file", "position", "bytes", "tokens", "domain")
_PII = re.compile(r"([\w-]+) (\d+)")


@dataclass(frozen=True)
class Documents:
    """Of one split, [n] each, in the order of its tokens. ``language`` is "not judged" where there are no signals."""

    source: npt.NDArray[np.int64]
    file: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    language: npt.NDArray[np.str_]
    quality: npt.NDArray[np.float64]
    domain: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Dropped:
    """Audit rows of one rule: how many, and the range of their scores against the thresholds they met."""

    action: str
    filter: str
    rule: str
    count: int
    lowest: float | None
    highest: float | None
    thresholds: tuple[float | None, float | None]  # least and greatest


@dataclass(frozen=True)
class Contents:
    """A dataset folder. What an older one lacks is empty."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Contents:
        """Opens ``folder``. Raises ``DataError`` for one that is no whole dataset."""
        return cls(Path(folder), manifests.load(Path(folder)))

    @property
    def name(self) -> str:
        """What the dataset is called."""
        return str(self.manifest.get("parameters", {}).get("name", self.folder.name))

    @functools.cached_property
    def sources(self) -> list[dict[str, Any]]:
        """``sources.json``, in the order that documents and audit count in."""
        return list(self._json("sources.json", []))

    @functools.cached_property
    def ledger(self) -> list[dict[str, Any]]:
        """Steps in order: name, in, kept, dropped and quarantined by reason."""
        return list(self._json("ledger.json", []))

    @functools.cached_property
    def collected(self) -> dict[str, Any]:
        """``report.json``: what was taken down while the text was at hand."""
        return dict(self._json("report.json", {}))

    @property
    def curriculum(self) -> dict[str, Any]:
        """What the manifest says of stages; empty where the dataset is read in windows."""
        return dict(self.manifest.get(KEY) or {})

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Packed stages, shortest first."""
        return list(self.curriculum.get("stages", []))

    def documents(self, split: str) -> Documents | None:
        """The table of a split; ``None`` in a folder of an older version."""
        return _documents(self.folder / f"documents-{split}.parquet")

    def row_of(self, split: str, identity: bytes) -> int | None:
        """Row of the document with this id in a split; ``None`` if it has none."""
        import pyarrow as pa
        import pyarrow.compute as pc
        from pyarrow import parquet

        path = self.folder / f"documents-{split}.parquet"
        if not path.exists():
            return None
        ids = parquet.read_table(path, columns=["id"])["id"]
        row = pc.index(ids, pa.scalar(identity, ids.type)).as_py()
        return int(row) if row >= 0 else None

    def id_of(self, split: str, row: int) -> bytes:
        """Id of a document, by its row in a split."""
        from pyarrow import parquet

        table = parquet.read_table(self.folder / f"documents-{split}.parquet", columns=["id"])
        return bytes(table["id"][row].as_py())

    @functools.cached_property
    def audit(self) -> pa.Table | None:
        """One row for each document dropped or changed; ``None`` in a folder of an older version."""
        from data_pipeline.filters.audit import audit_table

        path = self.folder / "audit.parquet"
        return audit_table(path) if path.exists() else None

    @functools.cached_property
    def rules(self) -> list[Dropped]:
        """The audit by rule, most rows first."""
        if self.audit is None or not self.audit.num_rows:
            return []
        pairs = [("id", "count"), ("score", "min"), ("score", "max"), ("threshold", "min"), ("threshold", "max")]
        grouped = self.audit.group_by(["action", "filter", "rule"]).aggregate(pairs).to_pylist()
        found = [
            Dropped(
                row["action"], row["filter"], row["rule"], row["id_count"], row["score_min"], row["score_max"],
                (row["threshold_min"], row["threshold_max"]),
            )
            for row in grouped
        ]  # fmt: skip
        return sorted(found, key=lambda one: (-one.count, one.rule, one.filter, one.action))

    def scores(self, filter_: str) -> npt.NDArray[np.float64]:
        """Scores of the rows of a filter, in the order of the audit."""
        import pyarrow.compute as pc

        if self.audit is None:
            return np.empty(0)
        rows = self.audit.filter(pc.equal(self.audit["filter"], filter_))
        return np.asarray(rows["score"].to_numpy(), dtype=np.float64)

    @functools.cached_property
    def dropped_by_source(self) -> dict[int, Counter[str]]:
        """Documents dropped, by source and filter."""
        import pyarrow.compute as pc

        found: dict[int, Counter[str]] = {}
        if self.audit is not None:
            drops = self.audit.filter(pc.equal(self.audit["action"], "drop"))
            for row in drops.group_by(["source", "filter"]).aggregate([("id", "count")]).to_pylist():
                found.setdefault(row["source"], Counter())[row["filter"]] += row["id_count"]
        return found

    @functools.cached_property
    def pii(self) -> dict[str, int]:
        """Replacements by kind, most first."""
        import pyarrow.compute as pc

        if self.audit is None:
            return {}
        rows = self.audit.filter(pc.equal(self.audit["filter"], "pii"))
        total = Counter[str]()
        for detail in rows["detail"].to_pylist():
            total.update({kind: int(count) for kind, count in _PII.findall(detail)})
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def roles(self, store: str) -> dict[str, int]:
        """Tokens of ``store`` (train, heldout, tasks) by role; roles without tokens are left out."""
        spans = self._spans(store)
        tokens = np.bincount(spans[:, 2], weights=spans[:, 0], minlength=len(ROLES)).astype(np.int64)
        return {role: int(count) for role, count in zip(ROLES, tokens, strict=True) if count}

    def bits(self, store: str) -> dict[str, int]:
        """Tokens of ``store`` by mask bit; one token may have several."""
        spans = self._spans(store)
        counts = {str(bit.name): int(spans[(spans[:, 3] & bit.value) > 0, 0].sum(dtype=np.int64)) for bit in MaskBit}
        return {name: count for name, count in counts.items() if count}

    def _spans(self, store: str) -> npt.NDArray[np.int32]:
        from data_pipeline.pack.records import read_records

        if not (self.folder / f"{store}.rec").exists():
            return np.empty((0, 4), np.int32)
        return read_records(self.folder / store).spans

    def _json(self, name: str, missing: Any) -> Any:
        path = self.folder / name
        if not path.exists():
            return missing
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path} is damaged; delete {self.folder} and build it again.") from error


@functools.lru_cache(maxsize=4)
def _documents(path: Path) -> Documents | None:
    if not path.exists():
        return None
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=[*_NUMBERS, "language", "quality"])
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"Cannot read {path} ({reason}); delete its folder and build again.") from error
    number = {name: table[name].to_numpy().astype(np.int64) for name in _NUMBERS}
    return Documents(
        language=np.array([one or UNKNOWN for one in table["language"].to_pylist()], dtype=np.str_),
        quality=np.array([np.nan if one is None else one for one in table["quality"].to_pylist()], dtype=np.float64),
        **number,
    )


def totals(keys: npt.NDArray[Any], *weights: npt.NDArray[np.int64]) -> list[tuple[Any, int, tuple[int, ...]]]:
    """For each value of ``keys`` [n]: how often it stands there, and the sums of ``weights`` [n]; by the first weight,
    greatest first, then by value."""
    names, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    sums = [np.bincount(inverse, one.astype(np.float64), len(names)).astype(np.int64) for one in weights]
    rows = [
        (name, int(count), tuple(int(one[place]) for one in sums))
        for place, (name, count) in enumerate(zip(names.tolist(), counts, strict=True))
    ]
    return sorted(rows, key=lambda row: (*(-one for one in row[2]), str(row[0])))


def file_name(sources: Sequence[dict[str, Any]], source: int, file: int) -> str:
    """Path of a document's file where ``sources.json`` lists it, else its number."""
    files = sources[source].get("files") or []
    if not file < len(files):
        return f"file {file}"
    entry = files[file]
    return str(entry["path"] if isinstance(entry, dict) else entry)
