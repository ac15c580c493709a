from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.build import BuiltData
from data_pipeline.progress import Progress
from refractor_megatron.cli import main
from tests.unit.data_pipeline.corpora import write_texts


def test_build_prints_receipts_and_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_texts(tmp_path / "corpus", 8)
    arguments = ["data", "build", "--preset", "nano", "--corpus", str(corpus), "--data-root", str(tmp_path / "data")]
    assert main([*arguments, "model.vocab_size=512", "data.heldout_fraction=0.2", "data.max_bad_fraction=0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert Path(lines[-1]).is_dir() and Path(lines[-1]).name.startswith("corpus-")
    table = next(line for line in lines if line.startswith("corpus "))
    assert "not stated" in table and " 8 " in table


def test_inspect_shows_counts_roles_and_heads(mixed: BuiltData, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(mixed.folder)]) == 0
    text = capsys.readouterr().out
    train = mixed.manifest["splits"]["train"]
    assert f"train: {train['documents']} documents, {train['tokens']} tokens" in text
    assert "tokens by role: system " in text
    assert text.count("\nsample ") == 3
    assert "tokens 0.." in text and "document 0, segment 0" in text


def test_progress_in_a_pipe_has_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0])
    monkeypatch.setattr("data_pipeline.progress.time.monotonic", lambda: next(clock))
    said: list[str] = []
    with Progress("encode", 40.0, said.append) as progress:
        for _ in range(3):
            progress.advance(10.0)
    assert said == ["encode: 20.0/40.0 MB, 3.3 MB/s, 6 s left"]
