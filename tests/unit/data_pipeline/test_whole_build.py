"""A build with everything switched on: what comes out adds up, and does not depend on who did it or in which order."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from data_pipeline.build import BuiltData, build
from data_pipeline.filters.audit import read_audit
from data_pipeline.options import Curriculum, Decontaminate, Dedup, Engine, Filters, Mix, Options, Tasks
from data_pipeline.packed_stream import open_stage
from data_pipeline.receipts.ledger import check_chain
from data_pipeline.receipts.verify import verify_folder
from refractor_megatron.errors import ConfigError
from tests.corpus import write_corpus

pytestmark = pytest.mark.slow

EVERYTHING = Options(
    name="whole",
    vocab_size=512,
    max_mb=5.0,
    heldout_fraction=0.05,
    max_bad_fraction=0.05,
    tokenizer_mb=0.3,
    dedup=Dedup(enabled=True, paragraphs=True),
    filters=Filters(enabled=True, perplexity_high=99.0, pii="scrub"),
    decontaminate=Decontaminate(enabled=True),
    mix=Mix("source", 2.0),
    tasks=Tasks(0.05, 0.05, window=64),
    curriculum=Curriculum((256, 1024)),
    engine=Engine(workers=1),
)


def texts(root: Path) -> list[str]:
    """Made text with exact and near duplicates, addresses, junk."""
    made = [path.read_text() for path in sorted(write_corpus(root / "made").iterdir())]
    draw = random.Random(7)
    near = []
    for text in made[:30]:
        words = text.split(" ")
        words[draw.randrange(len(words))] = "planted"
        near.append(" ".join(words))
    mail = [f"Write to jane.doe{i}@mailbox-provider.net about it. {text}" for i, text in enumerate(made[40:45])]
    return [*made, *near, *made[100:110], *mail, "x y z", "!!! ??? *** " * 40]


def write_lines(folder: Path, documents: list[str], files: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(files):
        lines = [json.dumps({"text": text}) for text in documents[number::files]]
        if number == 0:
            lines.insert(3, '{"text": "cut')
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def built(root: Path, corpus: Path, name: str = "out", **changes: Any) -> BuiltData:
    options = replace(EVERYTHING, **changes)
    return build(corpus, root / name, options, cache=root / f"{name}-cache", log=lambda line: None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    return write_lines(root / "a" / "corpus", texts(root), 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> BuiltData:
    return built(tmp_path_factory.mktemp("whole"), corpus)


def test_every_document_is_accounted_for(whole: BuiltData) -> None:
    chain = check_chain(json.loads((whole.folder / "ledger.json").read_bytes()))
    splits = whole.manifest["splits"]
    assert chain[-1].kept == splits["train"]["documents"] + splits["heldout"]["documents"]
    dropped = sum(sum(one.dropped.values()) for one in chain)
    audit = read_audit(whole.folder / "audit.parquet")
    silent = sum(one.dropped.get(reason, 0) for one in chain for reason in ("blank", "over_cap"))
    assert sum(row.action == "drop" for row in audit) == dropped - silent
    assert len({(row.id, row.filter) for row in audit}) <= len(audit)
    counts = whole.manifest["counts"]
    assert counts["quarantined"] == 1 and counts["duplicate"] == 10
    assert counts["near-duplicate"] >= 30  # the planted ones, and those with an address before them
    assert {row.filter for row in audit} >= {"near-duplicate", "exact-duplicate", "quality", "pii"}
    (line,) = (whole.folder / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["position"] == 4


def test_the_folder_is_sealed_and_its_tables_agree_with_its_tokens(whole: BuiltData) -> None:
    assert verify_folder(whole.folder) == []
    for split in ("train", "heldout"):
        table = parquet.read_table(whole.folder / f"documents-{split}.parquet")
        assert table.num_rows == whole.manifest["splits"][split]["documents"]
        assert sum(table["tokens"].to_pylist()) == whole.manifest["splits"][split]["tokens"]
        assert len(set(table["id"].to_pylist())) == table.num_rows


def test_heldout_text_is_in_no_training_sample(whole: BuiltData) -> None:
    held = set(parquet.read_table(whole.folder / "documents-heldout.parquet")["id"].to_pylist())
    assert held and not held & set(parquet.read_table(whole.folder / "documents-train.parquet")["id"].to_pylist())


def test_no_address_reaches_the_tokens(whole: BuiltData) -> None:
    from refractor_megatron.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(whole.folder / "tokenizer.json")
    everything = b""
    for length in (256, 1024):
        stream = open_stage(whole.folder, length, 0)
        everything += b" ".join(tokenizer.decode(s.tokens.tolist()) for s in stream.in_order())
    assert b"<EMAIL>" in everything and b"@mailbox-provider" not in everything


def test_another_worker_count_or_layout_of_the_files_gives_the_same_tokens(
    tmp_path: Path, corpus: Path, whole: BuiltData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.engine.local._SMALL", 0.0)  # so little text would need no pool
    other = built(tmp_path, corpus, engine=Engine(workers=2))
    assert {path.name: path.read_bytes() for path in other.folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.folder.iterdir()
    }
    shuffled = texts(tmp_path)
    random.Random(3).shuffle(shuffled)
    moved = built(tmp_path, write_lines(tmp_path / "b" / "corpus", shuffled, 5), "moved")
    assert moved.manifest["content_sha256"] == whole.manifest["content_sha256"]


def test_a_threshold_changes_without_reading_the_text_again(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(tmp_path, corpus)
    monkeypatch.setattr(
        "data_pipeline.filters.stages.signals_task", lambda *_: pytest.fail("signals are computed once")
    )
    monkeypatch.setattr("data_pipeline.sources.ingest.ingest_task", lambda *_: pytest.fail("text is read once"))
    monkeypatch.setattr("data_pipeline.dedup.stages.sign_task", lambda *_: pytest.fail("signatures are kept"))
    tighter = replace(EVERYTHING.filters, thresholds=("loose-word-count=300..",))
    second = built(tmp_path, corpus, filters=tighter)
    assert second.folder != first.folder
    assert second.manifest["splits"]["train"]["documents"] < first.manifest["splits"]["train"]["documents"]


def test_an_unknown_rule_or_threshold_is_named(tmp_path: Path, corpus: Path) -> None:
    for text, reason in (("no-such-rule=1..", "No quality rule is called 'no-such-rule'"), ("loose", "rule=low..high")):
        with pytest.raises(ConfigError, match=reason):
            built(tmp_path, corpus, filters=replace(EVERYTHING.filters, thresholds=(text,)))


def test_stages_are_mixed_as_stated(whole: BuiltData) -> None:
    curriculum = whole.manifest["curriculum"]
    assert [stage["length"] for stage in curriculum["stages"]] == [256, 1024]
    for stage in curriculum["stages"]:
        assert sum(domain["share"] for domain in stage["domains"]) == pytest.approx(1)
        for domain in stage["domains"]:
            assert abs(domain["share"] - domain["target"]) <= 0.001
    stream = open_stage(whole.folder, 1024, 0)
    assert np.array_equal(stream.sample(5).tokens, open_stage(whole.folder, 1024, 0).sample(5).tokens)
