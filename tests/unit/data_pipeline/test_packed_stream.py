from __future__ import annotations

import hashlib
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import manifest as manifests
from data_pipeline.options import Tasks
from data_pipeline.pack.indexed import read_indexed
from data_pipeline.pack.packed import path_of
from data_pipeline.pack.records import read_records
from data_pipeline.packed_stream import PackedStream, open_stage
from data_pipeline.samples import Stretch, token_records
from data_pipeline.stream import Sample, SampleStream
from refractor_megatron.errors import DataError
from tests.runs import loaded_after
from tests.unit.data_pipeline.staged import LENGTHS, NAMES, document_lengths, sealed, write_staged, write_store

DOCUMENTS = document_lengths()
MADE = [(0, 16, 9), (0, 16, 12), (1, 64, 65), (0, 64, 30), (1, 64, 65), (0, 64, 41)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("staged") / "data"
    write_staged(path, DOCUMENTS, tasks=Tasks(retrieval=0.1, long_range=0.05), made=MADE)
    return path


@pytest.fixture(params=LENGTHS)
def stream(folder: Path, request: pytest.FixtureRequest) -> PackedStream:
    return PackedStream(folder, request.param, seed=7)


def same(one: Sample, two: Sample) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("tokens", "records", "documents"))


def sha(samples: list[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for part in (sample.tokens, sample.records, sample.documents):
            digest.update(part.tobytes())
    return digest.hexdigest()


def test_shapes_and_types(stream: PackedStream) -> None:
    sample = stream.sample(0)
    size = stream.seq_len + 1
    assert (sample.tokens.shape, sample.tokens.dtype) == ((size,), np.int64)
    assert (sample.records.shape, sample.records.dtype) == ((size, 4), np.int32)
    assert (sample.documents.shape, sample.documents.dtype) == ((size,), np.int32)


def test_samples_are_the_tokens_and_records_of_their_pieces(stream: PackedStream, folder: Path) -> None:
    """Token by token, from the files: numbering from 0, a document for every piece, roles and bits as written."""
    stores = [read_indexed(folder / name) for name in ("train", "tasks")]
    seen_roles: Counter[int] = Counter()
    for number, sample in enumerate(stream.in_order()):
        rows, numbers, tokens, segment = [], [], [], -1
        for piece, (store, low, length) in enumerate(stream.packed.of(number).tolist()):
            starts = stores[store].starts
            before = None
            for token in range(low, low + length):
                document = int(np.searchsorted(starts, token, side="right")) - 1
                size = int(starts[document + 1] - starts[document])
                second = size // 2 == 0 or token - starts[document] >= size // 2
                role, bits = (5, 0) if size == 1 else (3, 4) if second else (1, 0)
                segment += (second if size > 1 else False) is not before
                before = second if size > 1 else False
                rows.append([piece, segment, role, bits])
                numbers.append(document + (0, len(DOCUMENTS) + 2)[store])
                tokens.append(int(stores[store].tokens[token]))
                seen_roles[role] += 1
        assert sample.records.tolist() == rows
        assert sample.documents.tolist() == numbers
        assert sample.tokens.tolist() == tokens
        borders = stream.packed.cu_seqlens(number)
        assert borders.dtype == np.int32 and borders[-1] == stream.seq_len + 1
        assert np.array_equal(borders[1:-1], np.flatnonzero(np.diff(sample.records[:, 0])) + 1)
    assert set(seen_roles) >= {1, 3}


def test_two_pieces_of_one_document_do_not_read_each_other(tmp_path: Path) -> None:
    """They are two documents within the sample, and one of the dataset."""
    write_store(tmp_path / "a", [4, 12])
    records = read_records(tmp_path / "a")
    rows, documents = token_records([Stretch(records, 5, 8, 100), Stretch(records, 8, 12, 100)])
    assert rows.tolist() == [[0, 0, 1, 0]] * 3 + [[1, 1, 1, 0]] * 2 + [[1, 2, 3, 4]] * 2
    assert documents.tolist() == [101] * 7


def test_no_token_is_in_two_samples_of_any_stage(folder: Path) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for length in LENGTHS:
        packed = PackedStream(folder, length, 0).packed
        seen.update((store, token) for store, low, n in packed.pieces.tolist() for token in range(low, low + n))
    assert set(seen.values()) == {1}
    assert sum(store == 0 for store, _ in seen) > sum(DOCUMENTS) - 3 * (LENGTHS[0] + 1)


def test_task_documents_are_whole(folder: Path) -> None:
    for length in LENGTHS:
        pieces = PackedStream(folder, length, 0).packed.pieces
        placed = sorted(pieces[pieces[:, 0] == 1, 2].tolist())
        assert placed == sorted(size for _, stage, size in MADE if stage == length)


def test_epochs_of_a_domain_visit_each_sequence_once(stream: PackedStream) -> None:
    counts = stream.packed.sequences
    visits: list[list[int]] = [[] for _ in counts]
    for index in range(int(6 * stream.samples_per_epoch)):
        number = stream.sequence(index)
        visits[int(stream.packed.domains[number])].append(number)
    checked = 0
    for domain, visited in enumerate(visits):
        count = int(counts[domain])
        epochs = (
            [visited[low : low + count] for low in range(0, len(visited) - count + 1, max(1, count))] if count else []
        )
        first = int(counts[:domain].sum())
        assert all(sorted(epoch) == list(range(first, first + count)) for epoch in epochs)
        if len(epochs) > 1 and count > 5:
            assert epochs[0] != epochs[1]
            assert epochs[0] != sorted(epochs[0])
            checked += 1
    assert checked


def test_samples_have_the_shares_of_the_manifest(stream: PackedStream) -> None:
    stage = next(s for s in stream.manifest["curriculum"]["stages"] if s["length"] == stream.seq_len)
    low = 12_345
    drawn = Counter(int(stream.packed.domains[stream.sequence(i)]) for i in range(low, low + 10_000))
    names = stream.manifest["curriculum"]["domains"]
    for row in stage["domains"]:
        assert abs(drawn[names.index(row["name"])] / 10_000 - row["target"]) <= 0.001
    assert sum(drawn.values()) == 10_000 and len(drawn) == len(stage["domains"])
    consumed = stream.consumed(low + 10_000)
    assert {n: consumed[n] - stream.consumed(low)[n] for n in consumed} == {names[d]: c for d, c in drawn.items()}


def test_sample_is_a_pure_function(stream: PackedStream, folder: Path) -> None:
    again = PackedStream(folder, stream.seq_len, seed=7)
    for index in [50, 3, 0, 3, 10_000, 50]:
        assert same(stream.sample(index), again.sample(index))
    copy: PackedStream = pickle.loads(pickle.dumps(stream))
    assert same(copy.sample(11), stream.sample(11))


def test_another_process_sees_the_same_samples(stream: PackedStream, folder: Path) -> None:
    code = (
        "import sys, hashlib; from pathlib import Path; from data_pipeline.packed_stream import PackedStream;"
        f"s = PackedStream(Path(sys.argv[1]), {stream.seq_len}, 7);"
        "print(hashlib.sha256(b''.join(s.sample(i).tokens.tobytes() for i in (9, 2, 700))).hexdigest())"
    )
    said = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout
    ours = hashlib.sha256(b"".join(stream.sample(i).tokens.tobytes() for i in (9, 2, 700))).hexdigest()
    assert said.strip() == ours


def test_seed_and_stage_change_the_order(folder: Path) -> None:
    one, two = PackedStream(folder, 16, 0), PackedStream(folder, 16, 1)
    assert any(not same(one.sample(i), two.sample(i)) for i in range(5))


@pytest.mark.parametrize("killed_at", [0, 12, 36, 60])
def test_a_killed_run_goes_on_with_other_ranks_and_sees_the_same_samples(folder: Path, killed_at: int) -> None:
    """Global batches of 12 samples: one rank to the end; or one, killed, then two, four and three ranks."""
    pytest.importorskip("torch")
    from refractor_megatron.training.batches import rank_batches

    batch, micro, end = 12, 1, 96

    def seen(first: int, ranks: int) -> list[bytes]:
        """What all ranks of one global batch read, in the global order, from streams that each opened itself."""
        parts: dict[int, bytes] = {}
        for rank in range(ranks):
            stream: Any = PackedStream(folder, 64, 7)
            count = batch // (micro * ranks)
            for m, one in enumerate(rank_batches(stream, first, micro, count, rank, ranks)):
                parts[m * ranks + rank] = b"".join(
                    part.numpy().tobytes() for part in (one.tokens, one.labels, one.records)
                )
        return [parts[i] for i in sorted(parts)]

    whole = [part for first in range(0, end, batch) for part in seen(first, 1)]
    broken: list[bytes] = []
    ranks = [1, 2, 4, 3]
    for first in range(0, end, batch):
        after = 0 if first < killed_at else 1 + (first - killed_at) // batch % 3
        broken += seen(first, ranks[after])
    assert hashlib.sha256(b"".join(broken)).hexdigest() == hashlib.sha256(b"".join(whole)).hexdigest()
    assert len(set(whole)) > end // 2


def test_position_and_totals(stream: PackedStream) -> None:
    assert stream.position(stream.samples_per_epoch * 3) == 3.0
    assert stream.tokens_total == stream.samples_per_epoch * (stream.seq_len + 1)
    assert stream.bytes_per_token == 3.0
    assert len(stream.token_bytes) > 256
    with pytest.raises(IndexError):
        stream.window(stream.samples_per_epoch)


def test_open_stage_knows_stages_and_windows(folder: Path, tmp_path: Path) -> None:
    assert isinstance(open_stage(folder, 64, 0), PackedStream)
    with pytest.raises(DataError, match=r"no stage of train\.seq_len 32; .* one of its stages \(16, 64\)"):
        open_stage(folder, 32, 0)
    shutil.copytree(folder, tmp_path / "plain")
    sealed(tmp_path / "plain", {"splits": manifests.load(folder)["splits"]})
    assert isinstance(open_stage(tmp_path / "plain", 32, 0), SampleStream)


def test_the_order_depends_on_the_content(folder: Path, tmp_path: Path) -> None:
    write_staged(tmp_path / "other", [*DOCUMENTS, 9])
    one, two = PackedStream(folder, 16, 0), PackedStream(tmp_path / "other", 16, 0)
    assert one.digest != two.digest
    assert any(not np.array_equal(one.sample(i).tokens, two.sample(i).tokens) for i in range(5))


def test_files_of_two_builds_are_refused(folder: Path, tmp_path: Path) -> None:
    """Even where sizes and the manifest were made to agree, the tokens that were packed must be those there are."""
    write_staged(tmp_path / "other", DOCUMENTS[:-1])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copy(path_of(tmp_path / "other", 64), path_of(copy, 64))
    sealed(copy, {key: manifests.load(folder)[key] for key in ("splits", "curriculum")})
    with pytest.raises(DataError, match=r"stage-64\.pack and the \.bin, \.idx and \.rec files .* are not of one build"):
        PackedStream(copy, 64, 0)


def test_importing_compiles_no_kernel() -> None:
    """``pretrain`` and ``data build`` import these at their start."""
    loaded = loaded_after("import data_pipeline.packed_stream, data_pipeline.curriculum.plan")
    assert loaded.isdisjoint({"numba", "torch", "pyarrow"})


def test_names_of_domains_are_those_of_the_text_and_the_tasks(folder: Path) -> None:
    stream = PackedStream(folder, 64, 0)
    assert set(stream.consumed(20_000)) == {*NAMES, "tasks/retrieval", "tasks/long_range"}
