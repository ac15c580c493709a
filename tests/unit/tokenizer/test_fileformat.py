from __future__ import annotations

import json
from pathlib import Path

import pytest

from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import Tokenizer


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    return path


def test_load_gives_the_same_tokenizer(tokenizer: Tokenizer, saved: Path, texts: list[bytes]) -> None:
    loaded = Tokenizer.load(saved)
    assert loaded.digest == tokenizer.digest
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(texts[0]) == tokenizer.encode(texts[0])


def test_saving_again_gives_the_same_bytes(saved: Path) -> None:
    before = saved.read_bytes()
    Tokenizer.load(saved).save(saved)
    assert saved.read_bytes() == before


@pytest.mark.parametrize("field", ["pattern", "ranks", "specials"])
def test_any_edit_breaks_the_seal(saved: Path, field: str) -> None:
    body = json.loads(saved.read_text())
    body[field] = body[field][:-1]
    saved.write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"tokenizer\.json is not an intact tokenizer file.*sha256"):
        Tokenizer.load(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "other"}', b"\xff"])
def test_other_content_is_refused(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    with pytest.raises(DataError, match="not an intact tokenizer file"):
        Tokenizer.load(saved)


def test_truncated_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-200])
    with pytest.raises(DataError, match="not an intact tokenizer file"):
        Tokenizer.load(saved)


def test_newer_version_is_refused(saved: Path) -> None:
    body = json.loads(saved.read_text())
    body["version"] = 2
    saved.write_text(json.dumps(body))
    with pytest.raises(DataError, match="version 2, this code reads 1"):
        Tokenizer.load(saved)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json \(No such file"):
        Tokenizer.load(tmp_path / "none.json")
