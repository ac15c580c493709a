"""Tables beside the tokens against naive twins."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipeline.catalogue import Catalogue
from data_pipeline.documents import plain
from data_pipeline.hashing import mix, mix_one
from data_pipeline.provenance import FOREVER, UNDATED, Provenance
from data_pipeline.shards import Located, write_shard
from data_pipeline.sources.base import Source
from data_pipeline.tables import DOCUMENTS, write_documents, write_provenance_of
from refractor_megatron.distinction.roles import RecordPolicy

NAMES = ("beta", "alpha", "gamma")
STATED = st.builds(
    Provenance,
    st.one_of(st.none(), st.sampled_from(["wire", "alpha", "émile", "\U0001f600", "zulu"])),
    st.one_of(st.none(), st.integers(-(2**52), 2**52)),
    st.floats(0, 1, width=32),
    st.sampled_from([RecordPolicy(bits) for bits in range(4)]),
    st.one_of(st.just(FOREVER), st.integers(0, 99)),
)
#: Of each shard, its source and its documents.
SHARDS = st.lists(st.tuples(st.integers(0, 2), st.lists(STATED, min_size=1, max_size=5)), min_size=1, max_size=4)


def _source(name: str) -> Source:
    return Source(name, version="", licence="", licence_file="", identity={}, units=())


def _strictest(group: list[tuple[str, Provenance]]) -> tuple[str, int, float, int, int]:
    dated = [one.timestamp for _, one in group if one.timestamp is not None]
    bits = [int(one.policy) for _, one in group]
    return (
        min(one.source or name for name, one in group),
        min(dated, default=UNDATED),
        min(one.trust for _, one in group),
        int(np.bitwise_and.reduce(bits)),
        min(one.ttl_s for _, one in group),
    )


@given(SHARDS, st.data())
def test_the_strictest_word_of_equal_documents(shards: list[tuple[int, list[Provenance]]], data: st.DataObject) -> None:
    stated = [(NAMES[source], one) for source, made in shards for one in made]
    count = len(stated)
    parent = np.array([data.draw(st.integers(0, row)) for row in range(count)])  # a row that stays, or goes for another
    gone = np.flatnonzero(parent != np.arange(count))
    order = np.array(data.draw(st.permutations(gone.tolist())), dtype=np.int64)
    kept = np.flatnonzero(parent == np.arange(count))
    cut = data.draw(st.integers(0, len(kept)))
    splits = {"one.npy": kept[:cut][::-1], "two.npy": kept[cut:]}
    groups: dict[int, list[tuple[str, Provenance]]] = {}
    for row in range(count):
        end = row
        while parent[end] != end:
            end = int(parent[end])
        groups.setdefault(end, []).append(stated[row])
    with tempfile.TemporaryDirectory() as name:
        folder, paths = Path(name), []
        for number, (source, made) in enumerate(shards):
            paths.append(folder / f"{number}.arrow")
            rows = [Located(plain(b"%d" % row, one), 0, row + 1) for row, one in enumerate(made)]
            write_shard(paths[-1], source, NAMES[source], rows)
        sources = [_source(one) for one in NAMES]
        names = write_provenance_of(folder, Catalogue.of(paths), splits, (order, parent[order]), sources)
        assert names == sorted({_strictest(groups[row])[0] for row in kept.tolist()})
        for file, rows in splits.items():
            found = [(names[row["source"]], *row.tolist()[1:]) for row in np.load(folder / file)]
            assert found == [_strictest(groups[row]) for row in rows.tolist()]


@given(st.integers(0, 6), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_a_table_of_documents_is_what_was_given(count: int, judged: bool, arrow: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        field.name: draw.integers(0, 1 << 31, count).astype(field.type.to_pandas_dtype()) for field in DOCUMENTS
        if pa.types.is_integer(field.type)
    }  # fmt: skip
    columns["domain"] += 40_000  # more domains than 16 bits count
    columns["domain"] %= 1 << 20
    columns["id"] = draw.integers(0, 256, (count + 1, 16), dtype=np.uint8)[1:]
    languages = np.array(["en", "und", "zh"])[draw.integers(0, 3, count)]
    columns["language"] = (pa.array(languages).dictionary_encode() if arrow else languages) if judged else None
    columns["quality"] = draw.random(count, dtype=np.float32) if judged else None
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "documents.parquet"
        write_documents(path, columns)
        table = parquet.read_table(path)
    assert table.schema.equals(DOCUMENTS)
    assert table["id"].to_pylist() == [one.tobytes() for one in columns["id"]]
    assert table["language"].to_pylist() == (languages.tolist() if judged else [None] * count)
    for field in ("source", "file", "position", "bytes", "tokens", "domain"):
        assert table[field].to_pylist() == columns[field].tolist()
    assert table["quality"].to_pylist() == (
        [None] * count if columns["quality"] is None else columns["quality"].tolist()
    )


def test_ids_of_another_width_are_refused(tmp_path: Path) -> None:
    columns = {field.name: np.zeros(2, dtype=np.int64) for field in DOCUMENTS}
    with pytest.raises(AssertionError):
        write_documents(tmp_path / "x.parquet", columns | {"id": np.zeros((2, 8), dtype=np.uint8)})


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_numbers_mix_alike_alone_and_in_arrays(numbers: list[int]) -> None:
    mixed = mix(np.array(numbers, dtype=np.uint64)).tolist()
    assert mixed == [mix_one(one) for one in numbers] and len(set(mixed)) == len(set(numbers))


def test_mixing_is_that_of_splitmix64() -> None:
    """The first numbers of the generator seeded with 1234567, as its authors' code gives them."""
    step, first = 0x9E3779B97F4A7C15, (6457827717110365317, 3203168211198807973, 9817491932198370423)
    assert tuple(mix_one((1234567 + n * step) % 2**64) for n in (1, 2, 3)) == first
