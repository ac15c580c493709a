"""Content hashes that are remembered only while they are surely those of the file."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from data_pipeline.sources import fingerprint, open_sources
from data_pipeline.sources.fingerprint import Fingerprints
from refractor_megatron.errors import DataError


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were hashed, in order; every file counts as settled."""
    seen: list[Path] = []
    whole = fingerprint.sha256_of

    def counted(path: Path) -> str:
        seen.append(path)
        return whole(path)

    monkeypatch.setattr(fingerprint, "sha256_of", counted)
    monkeypatch.setattr(fingerprint, "_SETTLE_SECONDS", -1.0)
    return seen


def test_hash_and_status_come_together_and_are_remembered(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"text")
    for _ in range(2):
        known = Fingerprints(tmp_path)
        digest, stat = known.of(path)
        assert digest == hashlib.sha256(b"text").hexdigest() and stat == path.stat()
        known.save()
    assert hashed == [path]


def test_other_content_under_the_same_size_and_time_is_seen(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"text")
    known = Fingerprints(tmp_path)
    known.of(path)
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the kernel's clock moves in ticks
        time.sleep(0.002)
        path.write_bytes(b"texu")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert known.of(path)[0] == hashlib.sha256(b"texu").hexdigest() and len(hashed) == 2


def test_a_fresh_file_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"text")
    os.utime(path, ns=(1, 1))  # its content may still change within this tick, whatever it says of its age
    known = Fingerprints(tmp_path)
    known.of(path)
    known.save()
    assert not (tmp_path / "fingerprints.json").exists()


@pytest.mark.parametrize("change", ["grown", "rewritten", "replaced"])
def test_a_file_that_changes_while_it_is_hashed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "corpus" / "a.txt"
    path.parent.mkdir()
    path.write_bytes(b"text")
    whole = fingerprint.sha256_of

    def meanwhile(read: Path) -> str:
        digest = whole(read)
        before = read.stat()
        if change == "replaced":
            (tmp_path / "new").write_bytes(b"text")
            os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
            (tmp_path / "new").replace(read)
            return digest
        while read.stat().st_ctime_ns == before.st_ctime_ns:
            time.sleep(0.002)
            read.write_bytes(b"text and more" if change == "grown" else b"texu")
        return digest

    monkeypatch.setattr(fingerprint, "sha256_of", meanwhile)
    with pytest.raises(DataError, match=r"^.*a\.txt changed while it was read; run again when nothing writes to it\.$"):
        open_sources(path.parent, tmp_path / "cache", print)
    assert not (tmp_path / "cache" / "fingerprints.json").exists()


@pytest.mark.parametrize("entry", [None, 7, [], ["x"] * 4, {"a": 1}])
def test_a_damaged_index_is_hashed_again(tmp_path: Path, hashed: list[Path], entry: object) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"text")
    (tmp_path / "fingerprints.json").write_text(json.dumps({str(path.resolve()): entry}))
    assert Fingerprints(tmp_path).of(path)[0] == hashlib.sha256(b"text").hexdigest() and hashed == [path]
