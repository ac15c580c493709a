"""Which paragraphs go, from which document, and what the audit says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.dedup import paragraphs
from data_pipeline.documents import Document, Part, plain
from data_pipeline.engine.tasks import Stage, pending, run_task
from data_pipeline.shards import Located, Shard, write_shard

_NOTICE = (
    b"This notice stands at the end of every page of the site, and says at length what nobody ever reads to its end."
)
_OTHER = b"A paragraph that stands in one document only; it is also longer than the least that is ever looked at here."


class Inline:
    """Does every task at once, here; counts them."""

    def __init__(self) -> None:
        self.done = 0

    def run(self, stage: Stage, work: Path, log: object) -> Path:
        folder = stage.prepare(work)
        for index in pending(folder, stage.count):
            run_task(folder, index)
            self.done += 1
        return folder


def _write(path: Path, documents: list[Document]) -> Path:
    write_shard(path, 2, "made", [Located(one, 0, place + 1) for place, one in enumerate(documents)])
    return path


def test_a_repeated_paragraph_stays_once(tmp_path: Path) -> None:
    texts = [b"Title %d\n\n" % i + _NOTICE.replace(b" ", b"  ", i) + b"\n\nEnd." for i in range(3)]
    shards = [_write(tmp_path / "a", [plain(texts[0])]), _write(tmp_path / "b", [plain(one) for one in texts[1:]])]
    folders = paragraphs.paragraph_duplicates(shards, None, Inline(), tmp_path / "work", print)
    left, audit = {}, []
    for path, folder in zip(shards, folders, strict=True):
        shard, ranges = Shard(path), paragraphs.read_cuts(folder)
        left |= {
            shard.ids[row].tobytes().hex(): paragraphs.cut_text(shard.text_of(row), ranges.get(row, []))
            for row in range(len(shard))
        }
        audit += list(paragraphs.audit_rows(shard, folder))
    owner = min(left)
    assert sum(text.count(b"notice") for text in left.values()) == left[owner].count(b"notice") == 1
    assert all(text.split(b"\n\n")[0::2][-1] == b"End." or text.endswith(b"\n\nEnd.") for text in left.values())
    assert {row.id for row in audit} == set(left) - {owner}
    for row in audit:
        assert (row.action, row.source, row.filter, row.rule) == ("change", 2, "paragraphs", "paragraph-exact/1")
        assert row.detail == f"1 paragraphs, the first also in {owner}"


def test_nothing_left_is_a_drop_and_conversations_stay(tmp_path: Path) -> None:
    chat = Document((Part(_NOTICE + b"\n\n" + _NOTICE, 1, 0),), framed=True)
    documents = [plain(_NOTICE), plain(_NOTICE + b"\n"), chat, plain(_OTHER)]
    path = _write(tmp_path / "a", documents)
    (folder,) = paragraphs.paragraph_duplicates([path], None, Inline(), tmp_path / "work", print)
    rows = list(paragraphs.audit_rows(Shard(path), folder))
    ids = [one.tobytes().hex() for one in Shard(path).ids]
    assert [(row.action, row.score) for row in rows] == [("drop", 1.0)]
    assert rows[0].id == max(ids[:2])
    assert list(paragraphs.read_cuts(folder)) == [ids.index(rows[0].id)]


def test_a_document_that_is_gone_owns_nothing(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", [plain(_NOTICE), plain(_NOTICE + b"\n\n" + _OTHER)])
    for gone in (0, 1):
        np.save(tmp_path / f"{gone}.npy", np.arange(2) != gone)
        (folder,) = paragraphs.paragraph_duplicates(
            [path], [tmp_path / f"{gone}.npy"], Inline(), tmp_path / "work", print
        )
        assert paragraphs.read_cuts(folder) == {}


def test_ranges_of_hashes_split_the_work_and_change_nothing(tmp_path: Path) -> None:
    """The same cuts with one task that compares and with seven."""
    texts = [plain(b"\n\n".join(b"%03d " % (i * k % 40) * 40 for k in range(1, 6))) for i in range(40)]
    path = _write(tmp_path / "a", texts)
    listed = tmp_path / "listed"
    listed.mkdir()
    paragraphs.list_task({"shards": [str(path)], "keep": None, "least": 100}, 0, listed)
    results = []
    for buckets in (1, 7):
        folders = []
        for index in range(buckets):
            out = tmp_path / f"{buckets}-{index}"
            out.mkdir()
            paragraphs.compare_task({"lists": [str(listed)], "buckets": buckets}, index, out)
            folders.append(str(out))
        out = tmp_path / f"{buckets}"
        out.mkdir()
        paragraphs.gather_task({"compared": folders}, 0, out)
        results.append((out / "cuts.npy").read_bytes())
        assert len(paragraphs.read_cuts(out)) > 20
    assert results[0] == results[1]


def test_done_tasks_are_not_done_again(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", [plain(_NOTICE), plain(_NOTICE + b" ")])
    executor = Inline()
    first = paragraphs.paragraph_duplicates([path], None, executor, tmp_path / "work", print)
    assert executor.done == 3
    assert paragraphs.paragraph_duplicates([path], None, executor, tmp_path / "work", print) == first
    assert executor.done == 3
