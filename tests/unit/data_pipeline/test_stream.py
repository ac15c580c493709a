from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import manifest as manifests
from data_pipeline.build import BuiltData
from data_pipeline.pack.indexed import read_indexed
from data_pipeline.stream import Sample, SampleStream
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import Tokenizer
from tests.unit.data_pipeline.corpora import Builder, write_texts

SEQ = 32


@pytest.fixture
def stream(mixed: BuiltData) -> SampleStream:
    return SampleStream(mixed.folder, SEQ, seed=7)


def same(one: Sample, two: Sample) -> bool:
    return np.array_equal(one.tokens, two.tokens) and np.array_equal(one.records, two.records)


def test_shapes_and_types(stream: SampleStream) -> None:
    sample = stream.sample(0)
    assert (sample.tokens.shape, sample.tokens.dtype) == ((SEQ + 1,), np.int64)
    assert (sample.records.shape, sample.records.dtype) == ((SEQ + 1, 4), np.int32)


def test_windows_in_order_are_the_text(stream: SampleStream, mixed: BuiltData) -> None:
    """Inputs of all windows concatenated are the tokens; each window's last target is the next one's first input."""
    tokens = np.asarray(read_indexed(mixed.folder / "train").tokens, dtype=np.int64)
    windows = [sample.tokens for sample in stream.in_order()]
    assert len(windows) == stream.samples_per_epoch == (len(tokens) - 1) // SEQ
    assert np.array_equal(np.concatenate([window[:-1] for window in windows]), tokens[: SEQ * len(windows)])
    assert all(left[-1] == right[0] for left, right in zip(windows, windows[1:], strict=False))


def test_an_epoch_visits_every_window_once_and_epochs_differ(stream: SampleStream) -> None:
    n = stream.samples_per_epoch
    windows = sorted(sample.tokens.tobytes() + sample.records.tobytes() for sample in stream.in_order())
    orders = []
    for epoch in range(2):
        visited = [stream.sample(epoch * n + i) for i in range(n)]
        orders.append([sample.tokens.tobytes() + sample.records.tobytes() for sample in visited])
        assert sorted(orders[-1]) == windows
    assert orders[0] != orders[1]
    assert orders[0] != [sample.tokens.tobytes() + sample.records.tobytes() for sample in stream.in_order()]


def test_sample_is_a_pure_function(stream: SampleStream, mixed: BuiltData) -> None:
    again = SampleStream(mixed.folder, SEQ, seed=7)
    for index in [50, 3, 0, 3, 10_000, 50]:
        assert same(stream.sample(index), again.sample(index))
    copy: SampleStream = pickle.loads(pickle.dumps(stream))
    assert same(copy.sample(11), stream.sample(11))


def test_another_process_sees_the_same_samples(stream: SampleStream, mixed: BuiltData) -> None:
    code = (
        "import sys, hashlib; from pathlib import Path; from data_pipeline.stream import SampleStream;"
        f"s = SampleStream(Path(sys.argv[1]), {SEQ}, 7);"
        "print(hashlib.sha256(b''.join(s.sample(i).tokens.tobytes() for i in (9, 2, 700))).hexdigest())"
    )
    said = subprocess.run([sys.executable, "-c", code, mixed.folder], capture_output=True, text=True, check=True).stdout
    ours = hashlib.sha256(b"".join(stream.sample(i).tokens.tobytes() for i in (9, 2, 700))).hexdigest()
    assert said.strip() == ours


def test_seed_and_split_change_the_order(mixed: BuiltData) -> None:
    one, two = SampleStream(mixed.folder, SEQ, 0), SampleStream(mixed.folder, SEQ, 1)
    assert any(not same(one.sample(i), two.sample(i)) for i in range(5))


def test_another_dataset_has_another_order(builder: Builder, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus")
    one, two = (SampleStream(builder(corpus, name=name).folder, SEQ, 0) for name in ("one", "two"))
    assert one.digest == two.digest  # same content under another name
    (corpus / "new.txt").write_text("one more document")
    assert SampleStream(builder(corpus).folder, SEQ, 0).digest != one.digest


def test_position_and_totals(stream: SampleStream, mixed: BuiltData) -> None:
    counts = mixed.manifest["splits"]["train"]
    assert stream.tokens_total == counts["tokens"]
    assert stream.position(stream.samples_per_epoch * 3) == 3.0
    assert stream.bytes_per_token == counts["bytes"] / counts["tokens"]
    tokens = read_indexed(mixed.folder / "train").tokens
    assert stream.token_bytes[tokens].sum() == counts["bytes"]


def test_records_follow_the_conversation(mixed: BuiltData) -> None:
    """Role tokens carry their own role; bits stay within their message; numbering counts from 0."""
    stream = SampleStream(mixed.folder, 200, 0)
    tokenizer = Tokenizer.load(mixed.folder / "tokenizer.json")
    opened = {token: role for role, token in enumerate(tokenizer.role_ids.values())}
    seen_bits = set()
    for sample in stream.in_order():
        document, segment, role, bits = sample.records.T
        assert document[0] == segment[0] == 0
        assert np.all(np.isin(np.diff(document), (0, 1))) and np.all(np.isin(np.diff(segment), (0, 1)))
        after_eod = np.flatnonzero(sample.tokens[:-1] == tokenizer.eod)
        assert np.array_equal(after_eod, np.flatnonzero(np.diff(document)))
        assert np.all(bits[sample.tokens == tokenizer.eod] == 0)
        for position in np.flatnonzero(np.isin(sample.tokens, list(opened))):
            expected = opened[int(sample.tokens[position])]
            assert role[position] == expected
        seen_bits |= set(bits.tolist())
    assert seen_bits == {0, 2, 4, 24}


def test_documents_are_those_of_the_dataset(mixed: BuiltData) -> None:
    """Training documents are numbered first, so that no held-out document has the number of an indexed one."""
    before = 0
    for split in ("train", "heldout"):
        stream = SampleStream(mixed.folder, SEQ, 0, split)
        starts = read_indexed(mixed.folder / split).starts
        expected = np.repeat(np.arange(len(starts) - 1), np.diff(starts)) + before
        for number, sample in enumerate(stream.in_order()):
            assert sample.documents.dtype == np.int32
            assert np.array_equal(sample.documents, expected[number * SEQ :][: SEQ + 1])
            assert np.array_equal(sample.documents - sample.documents[0], sample.records[:, 0])
        before += len(starts) - 1


def test_too_short_a_split_is_named(mixed: BuiltData) -> None:
    with pytest.raises(DataError, match=r"heldout split .* has \d+ tokens, fewer than .*seq_len \+ 1 = 1000001"):
        SampleStream(mixed.folder, 1_000_000, 0, split="heldout")


def test_window_outside_the_split(stream: SampleStream) -> None:
    for number in (-1, stream.samples_per_epoch):
        with pytest.raises(IndexError):
            stream.window(number)


def test_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no dataset"):
        SampleStream(tmp_path, SEQ, 0)


def test_files_of_two_builds_are_refused(mixed: BuiltData, builder: Builder, tmp_path: Path) -> None:
    """Even where sizes and the manifest were made to agree, token and record counts must."""
    other = builder(write_texts(tmp_path / "corpus", 6)).folder
    folder = tmp_path / "copy"
    shutil.copytree(mixed.folder, folder)
    shutil.copy(other / "train.rec", folder / "train.rec")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["train.rec"]["bytes"] = (folder / "train.rec").stat().st_size
    manifest["merkle_root"] = manifests.root(manifest)
    (folder / "manifest.json").write_bytes(manifests.serialised(manifest))
    with pytest.raises(DataError, match="are not of one build"):
        SampleStream(folder, SEQ, 0)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "refractor-data", "version": 1}'])
def test_damaged_manifest_is_named(mixed: BuiltData, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mixed.folder, folder)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        SampleStream(folder, SEQ, 0)


def test_newer_dataset_version_is_refused(mixed: BuiltData, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mixed.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(DataError, match="version 99, this code reads 1"):
        SampleStream(folder, SEQ, 0)
