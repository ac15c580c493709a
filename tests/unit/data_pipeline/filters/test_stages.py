"""The signals stage: rows in the order of the shard, equal to the functions' own results, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.documents import Document, Part, plain
from data_pipeline.engine.tasks import Stage, run_task, task_folder
from data_pipeline.filters import language, pii, quality
from data_pipeline.filters.decide import decide
from data_pipeline.filters.quality import RULES
from data_pipeline.filters.signals import SIGNALS
from data_pipeline.filters.stages import FILE, VERSION, made_by, read_signals, signals_task
from data_pipeline.options import Filters
from data_pipeline.shards import Located, Shard, write_shards
from refractor_megatron.distinction.roles import ROLE_ID
from refractor_megatron.errors import DataError

TEXTS = [
    "The command prints the names of all files in the folder. Write to jane.roe@mail.de for help with it.",
    "Der Befehl gibt die Namen aller Dateien im Ordner aus, einen in jeder Zeile, sofern nichts anderes verlangt wird.",
    "",
    "このコマンドは、フォルダーにあるすべてのファイルの名前を表示します。",
]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two shards: plain texts, and one conversation."""
    chat = Document(
        (Part(b"Hello!", ROLE_ID["user"]), Part(b"Hello, what is it?", ROLE_ID["assistant"], 1)), framed=True
    )
    for name, documents in (("plain", [plain(text.encode()) for text in TEXTS]), ("chat", [chat])):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, 3, name, [Located(one, 0, at + 1) for at, one in enumerate(documents)])
    return [str(tmp_path / name / "00000.arrow") for name in ("plain", "chat")]


def test_rows_are_those_of_the_functions(shards: list[str], tmp_path: Path) -> None:
    stage = Stage("signals", "data_pipeline.filters.stages:signals_task", 2, {"shards": shards}, VERSION)
    folder = stage.prepare(tmp_path / "work")
    for index, path in enumerate(shards):
        run_task(folder, index)
        columns, shard = read_signals(task_folder(folder, index) / FILE), Shard(Path(path))
        flat, offsets = shard.text
        labels, scores = language.identify(flat, offsets)
        computed = quality.compute(flat, offsets, labels)
        assert columns["id"].tobytes() == shard.ids.tobytes() and columns["id"].shape == (len(shard), 16)
        assert columns["language"].tolist() == labels and columns["language_score"].tolist() == scores.tolist()
        assert (columns["source"] == 3).all() and columns["framed"].tolist() == shard.framed.tolist()
        assert all(columns[name].tolist() == computed[name].tolist() for name in SIGNALS)
        counted = pii.count(flat, offsets)
        assert counted and all(columns[f"pii_{kind}"].tolist() == found.tolist() for kind, found in counted.items())
        assert ((columns["quality"] >= 0) & (columns["quality"] <= 1)).all()  # type: ignore[operator]
    assert columns["framed"].tolist() == [True]


def test_what_it_finds(shards: list[str], tmp_path: Path) -> None:
    signals_task({"shards": shards}, 0, tmp_path)
    columns = read_signals(tmp_path / FILE)
    assert columns["language"].tolist() == ["en", "de", "und", "ja"]
    assert columns["pii_email"].tolist() == [1, 0, 0, 0]
    decision = decide(columns, None, None, Filters(enabled=True))
    assert decision.keep.tolist() == [True, True, False, True]
    assert [row.rule for row in decision.rows] == ["santacoder-alphanumeric/1"]


def test_same_bytes_each_time_and_no_counts_of_personal_data_unless_asked(shards: list[str], tmp_path: Path) -> None:
    for name, params in (("a", {}), ("b", {}), ("c", {"pii": False})):
        (tmp_path / name).mkdir()
        signals_task({"shards": shards, **params}, 0, tmp_path / name)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert not [name for name in read_signals(tmp_path / "c" / FILE) if name.startswith("pii_")]


def test_hosts_must_agree_on_the_model(shards: list[str], tmp_path: Path) -> None:
    signals_task({"shards": shards, "made_by": made_by()}, 1, tmp_path)
    assert (tmp_path / FILE).exists() and set(made_by()) == {"py3langid", "unicode"}
    with pytest.raises(DataError, match="same versions"):
        signals_task({"shards": shards, "made_by": {**made_by(), "py3langid": "0.1"}}, 1, tmp_path)


def test_damaged_or_foreign_signals_are_named(shards: list[str], tmp_path: Path) -> None:
    signals_task({"shards": shards}, 0, tmp_path)
    table = pq.read_table(tmp_path / FILE)
    pq.write_table(table.drop_columns(["top_2gram"]), tmp_path / "less.parquet")
    with pytest.raises(DataError, match="lacks 'top_2gram'"):
        read_signals(tmp_path / "less.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / FILE).read_bytes()[:-9])
    with pytest.raises(DataError, match="cut.parquet"):
        read_signals(tmp_path / "cut.parquet")


def test_empty_table_reads(tmp_path: Path) -> None:
    fields = [("id", pa.binary(16)), ("source", pa.int32()), ("framed", pa.bool_()), ("language", pa.string())]
    fields += [(name, pa.float32()) for name in ("language_score", "quality", *SIGNALS)]
    pq.write_table(pa.schema(fields).empty_table(), tmp_path / FILE)
    columns = read_signals(tmp_path / FILE)
    assert columns["id"].shape == (0, 16)
    decision = decide(columns, None, None, Filters(enabled=True), RULES)
    assert decision.keep.dtype == np.bool_ and len(decision.keep) == 0 and decision.rows == ()
