from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from data_pipeline.build import BuiltData
from data_pipeline.filters.audit import read_audit
from data_pipeline.pack.indexed import read_indexed
from data_pipeline.packed_stream import PackedStream
from data_pipeline.progress import Progress
from refractor_megatron.cli import main
from refractor_megatron.tokenizer import Tokenizer
from tests.unit.data_pipeline.corpora import write_texts
from tests.unit.data_pipeline.report.everything import build_everything


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> BuiltData:
    """A dataset built with everything switched on."""
    return build_everything(tmp_path_factory)


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


def lines_of(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> list[str]:
    assert main(["data", "inspect", str(folder), *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_inspect_a_document_by_number_and_by_id(mixed: BuiltData, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = read_indexed(mixed.folder / "train")
    tokenizer = Tokenizer.load(mixed.folder / "tokenizer.json")
    rows = parquet.read_table(mixed.folder / "documents-train.parquet").to_pylist()
    chat = next(
        number
        for number in range(len(rows))
        if tokenizer.decode(tokens.tokens[tokens.starts[number] :][:30].tolist()).startswith(b"You are")
    )
    for number in (0, chat):
        low, high = tokens.starts[number : number + 2].tolist()
        lines = lines_of(capsys, mixed.folder, "--document", str(number), "--full")
        assert lines[0] == f"document {number}: training document {number}, id {rows[number]['id'].hex()}"
        assert any(f"position {rows[number]['position']}" in line for line in lines)
        text = tokenizer.decode(tokens.tokens[low:high].tolist(), show_specials=True).decode(errors="replace")
        assert "\n".join(lines).endswith(text.rstrip("\n"))
        assert lines_of(capsys, mixed.folder, "--document", rows[number]["id"].hex(), "--full") == lines
    runs = [line for line in lines if line.startswith("  tokens ")]
    assert any(", data, bits" in run and "RET_SCOPE" in run for run in runs)
    assert runs[0].startswith("  tokens 0..") and runs[-1].split(":")[0].endswith(f"..{high - low - 1}")


def test_a_long_document_is_cut_unless_all_is_asked_for(
    everything: BuiltData, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = read_indexed(everything.folder / "train").starts
    longest = int(np.diff(starts).argmax())
    left = int(np.diff(starts)[longest]) - 400
    assert (
        lines_of(capsys, everything.folder, "--document", str(longest))[-1]
        == f"... {left} more tokens: --full shows them"
    )
    assert not lines_of(capsys, everything.folder, "--document", str(longest), "--full")[-1].startswith("...")


def test_inspect_says_what_became_of_a_dropped_document(
    everything: BuiltData, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in read_audit(everything.folder / "audit.parquet") if row.filter == "near-duplicate")
    lines = lines_of(capsys, everything.folder, "--document", row.id)
    assert lines[0] == f"document {row.id} is not in the dataset"
    assert any("drop by minhash-direct/1" in line and row.detail in line for line in lines[1:])


def test_inspect_a_made_task(everything: BuiltData, capsys: pytest.CaptureFixture[str]) -> None:
    splits = everything.manifest["splits"]
    first = splits["train"]["documents"] + splits["heldout"]["documents"]
    assert lines_of(capsys, everything.folder, "--document", str(first))[0] == f"document {first}: made task 0"


def test_inspect_shows_the_pieces_of_a_sample(everything: BuiltData, capsys: pytest.CaptureFixture[str]) -> None:
    stream = PackedStream(everything.folder, 512, seed=3)
    lines = lines_of(capsys, everything.folder, "--sample", "4", "--stage", "512", "--seed", "3", "--full")
    sample = stream.sample(4)
    packed = stream.packed.of(stream.sequence(4))
    pieces = [line for line in lines if re.match(r"tokens \d+\.\.\d+: document ", line)]
    ends = np.cumsum(packed[:, 2])
    packed_ends = list(zip(ends.tolist(), packed[:, 2].tolist(), strict=True))
    assert [line.split(":")[0] for line in pieces] == [f"tokens {end - size}..{end - 1}" for end, size in packed_ends]
    numbers = [int(line.split("document ")[1].split(",")[0]) for line in pieces]
    assert numbers == sample.documents[ends - 1].tolist()
    tokenizer = Tokenizer.load(everything.folder / "tokenizer.json")
    for end, size in packed_ends:
        head = tokenizer.decode(sample.tokens[end - size : min(end, end - size + 24)].tolist(), show_specials=True)
        assert f"  {head.decode(errors='replace')!r}" in lines
    assert lines[0].startswith(f"sample 4 of {len(stream.packed)} in a pass, 512 tokens")


def test_inspect_a_window_where_there_are_no_stages(mixed: BuiltData, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, mixed.folder, "--sample", "0", "--stage", "64")
    assert "64 tokens and one to predict, seed 0" in lines[0]


def test_inspect_the_audit(everything: BuiltData, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_audit(everything.folder / "audit.parquet")
    table = lines_of(capsys, everything.folder, "--audit")[1:]
    assert sum(int(line.split()[0]) for line in table) == len(rows)
    near = [row for row in rows if row.filter == "near-duplicate"]
    assert len(lines_of(capsys, everything.folder, "--audit", "minhash-direct")) == len(near)
    assert lines_of(capsys, everything.folder, "--audit", "near-duplicate")[0].startswith(near[0].id)
    many = [row for row in rows if row.filter == "pii" or row.filter == "paragraphs"]
    assert many


def test_inspect_on_one_screen(everything: BuiltData, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, everything.folder)
    stage = everything.manifest["curriculum"]["stages"][1]
    assert any(
        line.startswith(f"stage 512: {stage['sequences']} sequences, {stage['tokens']} tokens") for line in lines
    )
    assert any(line.startswith("PII replaced: email ") for line in lines)
    assert any(line.startswith("dropped by: ") for line in lines) and len(lines) < 60


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--document", "100000"], "has documents 0 to"),
        (["--document", "xyz"], "neither a number nor an id"),
        (["--document", "f" * 32], "has no document"),
        (["--sample", "0", "--stage", "77"], "--stage one of 128, 512"),
        (["--sample", "-1"], "--sample from 0"),
        (["--stage", "128"], "give --sample N as well"),
        (["--full"], "give one of them as well"),
        (["--audit", "no-such-rule"], "it has those of: "),
    ],
)
def test_mistakes_are_one_sentence(
    everything: BuiltData, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "inspect", str(everything.folder), *arguments]) == 3
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_a_sample_of_windows_needs_a_length(mixed: BuiltData, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(mixed.folder), "--sample", "0"]) == 3
    assert "say how long the sample shall be with --stage" in capsys.readouterr().err


def test_report_prints_where_the_page_is(mixed: BuiltData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["data", "report", str(mixed.folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.read_text().startswith("<!doctype html>")
    assert main(["data", "report", str(mixed.folder), "--out", str(mixed.folder / "page.html")]) == 6
    assert main(["data", "verify", str(mixed.folder)]) == 0


def test_progress_in_a_pipe_has_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0])
    monkeypatch.setattr("data_pipeline.progress.time.monotonic", lambda: next(clock))
    said: list[str] = []
    with Progress("encode", 40.0, said.append) as progress:
        for _ in range(3):
            progress.advance(10.0)
    assert said == ["encode: 20.0/40.0 MB, 3.3 MB/s, 6 s left"]
