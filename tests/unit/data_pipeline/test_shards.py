from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import shards
from data_pipeline.catalogue import Catalogue
from data_pipeline.dedup.paragraphs import paragraph_duplicates
from data_pipeline.documents import Document, Part
from data_pipeline.engine.local import LocalExecutor
from data_pipeline.filters.stages import FILE, signals_task
from data_pipeline.provenance import Provenance
from data_pipeline.refine import refine_task
from data_pipeline.shards import Located, Shard, document_id, write_shard, write_shards
from refractor_megatron.distinction.roles import RecordPolicy
from refractor_megatron.errors import DataError

PARTS = st.builds(Part, st.binary(max_size=40), st.integers(0, 5), st.integers(0, 9), st.integers(0, 31))
PROVENANCE = st.builds(
    Provenance,
    st.none() | st.just("wiki"),
    st.none() | st.integers(-(2**40), 2**40),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([RecordPolicy(0), RecordPolicy.ALLOW_COPY]),
    st.integers(0, 1000),
)
DOCUMENTS = st.one_of(
    st.builds(lambda data, seen: Document((Part(data),), provenance=seen), st.binary(max_size=60), PROVENANCE),
    st.builds(lambda parts, seen: Document(tuple(parts), True, seen), st.lists(PARTS, max_size=4), PROVENANCE),
)


@settings(max_examples=50)
@given(st.lists(DOCUMENTS, max_size=8))
def test_documents_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, documents: list[Document]) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.arrow"
    write_shard(path, 3, "wiki", [Located(one, 1, row + 1) for row, one in enumerate(documents)])
    shard = Shard(path)
    assert list(shard) == documents and len(shard) == len(documents)
    assert [bytes(one) for one in shard.keys] == [one.key for one in documents]
    assert (shard.groups == shard.keys).all(), "none of them was cut"
    assert [bytes(one) for one in shard.ids] == [document_id(one.key, "wiki") for one in documents]
    assert shard.framed.tolist() == [one.framed for one in documents]
    assert shard.sizes.tolist() == [one.size for one in documents]
    flat, offsets = shard.text
    texts = [flat[low:high].tobytes() for low, high in zip(offsets[:-1], offsets[1:], strict=True)]
    assert texts == [b"".join(part.data for part in one.parts) for one in documents]


def test_shards_are_bounded_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    rows = [Located(Document((Part(b"%04d " % i * 7),)), 0, i + 1) for i in range(20)]
    assert write_shards(tmp_path, 0, "a", rows) == 7
    opened = [Shard(path) for path in sorted(tmp_path.iterdir())]
    assert [one for shard in opened for one in shard] == [row.document for row in rows]
    assert max(int(shard.sizes.sum()) for shard in opened) <= 135
    catalogue = Catalogue.of(sorted(tmp_path.iterdir()))
    assert len(catalogue) == 20
    places = catalogue.places(np.arange(20))
    assert [opened[shard].document(row) for shard, row in places.tolist()] == [row.document for row in rows]


def test_groups_are_kept_by_shards_catalogue_and_refining(tmp_path: Path) -> None:
    documents = [Document((Part(b"part %d" % i),)) for i in range(5)]
    groups = [None, documents[0].key, documents[0].key, None, documents[3].key]
    rows = [Located(one, 0, 1, group) for one, group in zip(documents, groups, strict=True)]
    write_shards(tmp_path, 0, "a", rows)
    expected = [documents[0].key] * 3 + [documents[3].key] * 2
    shard = Shard(tmp_path / "00000.arrow")
    assert shard.groups.shape == (5, 16) and [bytes(one) for one in shard.groups] == expected
    catalogue = Catalogue.of([tmp_path / "00000.arrow"] * 2)
    assert [bytes(one) for one in catalogue.groups] == expected * 2
    np.save(tmp_path / "keep.npy", np.array([False, True, False, True, True]))
    (tmp_path / "out").mkdir()
    params = {"shards": [str(tmp_path / "00000.arrow")], "keep": [str(tmp_path / "keep.npy")], "cuts": None}
    refine_task(params | {"pii": None}, 0, tmp_path / "out")
    refined_groups = Shard(tmp_path / "out" / "00000.arrow").groups
    assert [bytes(one) for one in refined_groups] == [expected[1], expected[3], expected[4]]


def test_a_catalogue_of_nothing_has_its_columns() -> None:
    assert Catalogue.of([]).groups.shape == (0, 16)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "missing"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.arrow"
    write_shard(path, 0, "a", [Located(Document((Part(b"text"),)), 0, 1)])
    if damage == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "other": b"x" * 500}[damage])
    with pytest.raises(DataError, match=r"a\.arrow"):
        Shard(path)


def refined(tmp_path: Path, documents: list[Document], keep: list[bool], cut: bool, scrub: bool) -> Path:
    write_shard(tmp_path / "a.arrow", 0, "a", [Located(one, 0, row + 1) for row, one in enumerate(documents)])
    np.save(tmp_path / "keep.npy", np.array(keep))
    shards, cuts = [tmp_path / "a.arrow"], None
    if cut:
        with LocalExecutor(1) as executor:
            cuts = paragraph_duplicates(shards, [tmp_path / "keep.npy"], executor, tmp_path, print, least=20)
    out = tmp_path / "out"
    out.mkdir()
    params = {
        "shards": [str(path) for path in shards],
        "keep": [str(tmp_path / "keep.npy")],
        "cuts": cuts and [str(path) for path in cuts],
        "pii": [str(tmp_path / FILE)] if scrub else None,
    }
    signals_task(params, 0, tmp_path)
    refine_task(params, 0, out)
    return out


def test_refining_keeps_the_chosen_and_cuts_paragraphs(tmp_path: Path) -> None:
    shared, own = b"a paragraph of more than twenty bytes", b"one that no other document has in it"
    texts = [Document((Part(data),)) for data in (own, shared, b"gone", shared + b"\n\n" + own[:-1], b"short")]
    out = refined(tmp_path, texts, [True, True, False, True, True], cut=True, scrub=False)
    shard = Shard(out / "00000.arrow")
    kept = [one.parts[0].data for one in shard]
    rows = np.load(out / "rows.npy").tolist()
    assert b"".join(kept).count(shared) == 1 and set(rows) in ({0, 1, 3, 4}, {0, 3, 4})
    assert [bytes(one) for one in shard.keys] == [texts[row].key for row in rows]


def test_scrubbing_changes_every_part_and_says_so(tmp_path: Path) -> None:
    from data_pipeline.filters.audit import read_audit

    mail = b"write to jane.doe@mailbox-provider.net now"
    talk = Document((Part(b"hello", 1, 0, 0), Part(mail, 2, 1, 4)), framed=True)
    out = refined(tmp_path, [Document((Part(b"plain text"),)), talk], [True, True], cut=False, scrub=True)
    shard = Shard(out / "00000.arrow")
    changed = shard.document(1)
    assert shard.document(0).parts[0].data == b"plain text"
    assert b"jane" not in changed.parts[1].data and changed.parts[0] == talk.parts[0]
    assert (changed.parts[1].role, changed.parts[1].segment, changed.parts[1].bits) == (2, 1, 4)
    rows = read_audit(out / "audit.parquet")
    assert [(row.filter, row.detail, row.action) for row in rows] == [("pii", "email 1", "change")]
