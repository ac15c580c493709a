"""The signals stage: one task for each shard of documents writes what the filters know of them, row by row."""

from __future__ import annotations

import importlib.metadata
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters import language, quality
from data_pipeline.filters.signals import SIGNALS
from data_pipeline.output import mendable_errors
from data_pipeline.shards import Shard
from refractor_megatron.errors import DataError

#: Part of the stage's digest: raise it when the same shard would give other signals.
VERSION = 1
FILE = "signals.parquet"


def made_by() -> dict[str, str]:
    """What the signals depend on besides text and code: for the stage's parameters, so that its digest covers it."""
    return {"py3langid": importlib.metadata.version("py3langid"), "unicode": unicodedata.unidata_version}


def signals_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Writes ``out/signals.parquet`` for the shard ``params["shards"][index]``, row i for document i.

    Columns: id, source, framed, language, language_score, every signal of ``SIGNALS``, quality, and pii_<kind> counts
    unless ``params["pii"]`` is false. Conversations are judged by the text of all their turns. Raises ``DataError``
    where ``params["made_by"]`` names other versions than run here, as on a host that was set up otherwise.
    """
    if params.get("made_by", made_by()) != made_by():
        raise DataError(f"This host has {made_by()} and the build {params['made_by']}; install the same versions.")
    shard = Shard(Path(params["shards"][index]))
    flat, offsets = shard.text
    labels, certainty = language.identify(flat, offsets)
    columns: dict[str, npt.NDArray[np.generic]] = {"language": np.array(labels, np.str_), "framed": shard.framed}
    columns |= quality.compute(flat, offsets, labels)
    ids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(shard), [None, pa.py_buffer(shard.ids.tobytes())])
    arrays = [
        ("id", ids),
        ("source", pa.array(shard.numbers("source"), pa.int32())),
        ("framed", pa.array(shard.framed)),
        ("language", pa.array(labels, pa.string())),
        ("language_score", pa.array(certainty, pa.float32())),
        *((name, pa.array(columns[name], pa.float32())) for name in SIGNALS),
        ("quality", pa.array(quality.quality(columns), pa.float32())),
    ]
    if params.get("pii", True):
        from data_pipeline.filters import pii

        arrays += [(f"pii_{kind}", pa.array(found, pa.int32())) for kind, found in pii.count(flat, offsets).items()]
    table = pa.table(dict(arrays))
    with mendable_errors(out):
        pq.write_table(table, out / FILE, compression="zstd", row_group_size=max(1, len(shard)))


def read_signals(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Columns of a ``signals.parquet``: id uint8 [n, 16], language str [n], framed bool [n], numbers [n].

    Raises ``DataError`` for a file that is missing, cut short or lacks a signal of this version.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read().combine_chunks()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"Cannot read {path} ({reason}); delete its folder and build again.") from error
    missing = {"id", "source", "framed", "language", "language_score", "quality", *SIGNALS} - set(table.column_names)
    if missing:
        raise DataError(f"{path} lacks {sorted(missing)[0]!r} of this version; delete its folder and build again.")
    columns: dict[str, npt.NDArray[np.generic]] = {
        name: table[name].to_numpy() for name in table.column_names if name not in ("id", "language", "framed")
    }
    columns["framed"] = table["framed"].to_numpy().astype(np.bool_)
    columns["language"] = np.array(table["language"].to_pylist(), np.str_)
    columns["id"] = np.frombuffer(b"".join(table["id"].to_pylist()), np.uint8).reshape(-1, 16)
    return columns
