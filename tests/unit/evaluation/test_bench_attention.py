"""``refractor bench attention``: flags, one measurement, the arithmetic of the table and its verdicts, end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import psutil
import pytest

from refractor_megatron import cli
from refractor_megatron.errors import CapabilityError, ConfigError
from refractor_megatron.evaluation import bench_attention, bench_measure, evidence
from refractor_megatron.evaluation.bench_attention import parse_lengths
from refractor_megatron.evaluation.bench_measure import Request, measure, peak_bytes, timed
from refractor_megatron.evaluation.bench_report import Row, aligned, growth, laws, plot, rows_of

REQUEST = Request(
    subject="fabric", length=200, backward=True, heads=4, kv_heads=2, head_dim=16, window=64, block=32, summaries=2,
    retrieved=4, repeats=2, threads=1, backend="auto", device="cpu",
)  # fmt: skip


def row(length: int, **other: Any) -> Row:
    """A row where the tri-tier attention takes 10 ns a pair and is 20 times faster than dense; memory is linear."""
    seconds = 4 * length * 1000 * 10e-9
    values: dict[str, Any] = {
        "forward": seconds / 4, "both": seconds, "dense_forward": seconds * 2, "dense_both": seconds * 20,
        "pooling": seconds, "visited": length * 1000, "causal": length * (length + 1) // 2, "heads": 4, "build": 0.05,
        "peak_forward": length * 5000, "peak_both": length * 10_000, "dense_peak_forward": None,
        "dense_peak_both": None,
    }  # fmt: skip
    return Row(length=length, **values | other)


def states(rows: list[Row]) -> list[bool | None]:
    return [law.holds for law in laws(rows)]


def test_lengths_are_numbers_of_tokens() -> None:
    assert parse_lengths("16k,512, 4k,512") == [512, 4096, 16384]
    for text in ("", "4x", "0", "4k,,8k", "-1", "1.5k"):
        with pytest.raises(ConfigError, match="--lengths: .* write for example 4k,16k or 512"):
            parse_lengths(text)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--lengths", "4q"], 2, "'4q' is not a number of tokens"),
        (["--window", "0"], 2, "--window is 0; it must be at least 1"),
        (["--summaries", "-1"], 2, "--summaries is -1; it must be at least 0"),
        (["--kv-heads", "3"], 2, "--heads 4 is not a multiple of --kv-heads 3"),
        (["--head-dim", "7"], 2, "--head-dim is 7"),
        (["--out", "{tmp}/record.txt"], 2, "does not end in .md"),
        (["--out", "{tmp}/file/record.md"], 6, "cannot be written"),
        (["--out", "/proc/record.md"], 6, "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_measured(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_attention, "_measure", lambda request: pytest.fail("measured"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["bench", "attention", *(a.format(tmp=tmp_path) for a in arguments)]) == code
    text = capsys.readouterr().err
    assert message in text and len(text.splitlines()) == 1


def test_a_measurement_says_what_ran() -> None:
    found = measure(REQUEST)
    assert found["backend"] == "blocksparse_cpu" and found["dtype"] == "torch.float32" and found["gpu"] is None
    assert len(found["laps"]) == len(found["pooling"]) == 2 and all(wall > 0 for _, wall in found["laps"])
    assert len(found["plan"]["seconds"]) == 5 and found["plan"]["causal"] == 200 * 201 // 2
    assert found["plan"]["legal"] <= found["plan"]["visited"]
    assert found["peak"] > 50 * 2**20


def test_tiers_can_be_off_and_dense_runs_on_grouped_heads() -> None:
    bare = {**vars(REQUEST), "summaries": 0, "retrieved": 0, "backward": False}
    found = measure(Request(**bare))
    assert "pooling" not in found and found["plan"]["legal"] == sum(min(64, q + 1) for q in range(200))
    assert measure(Request(**bare | {"subject": "sdpa"}))["backend"] == "torch flash attention"


def test_a_long_run_is_its_own_only_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_measure, "timed", lambda work, device: (1.0, bench_measure.LONG + 1))
    assert measure(REQUEST)["laps"] == [(1.0, bench_measure.LONG + 1)]


def test_the_clock_counts_work_and_the_peak_memory() -> None:
    cpu, wall = timed(lambda: sum(range(100_000)), "cpu")
    assert cpu > 0 and wall > 0
    assert 0.9 * psutil.Process().memory_info().rss <= peak_bytes("cpu") < psutil.virtual_memory().total


def test_what_is_missing_is_the_users_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in (({"device": "cuda"}, "no CUDA device"), ({"backend": "nonsense"}, "does not exist")):
        text = json.dumps({**vars(REQUEST), **change})
        assert bench_measure.main(text) == CapabilityError.exit_code
        assert message in json.loads(capsys.readouterr().out)["error"]


def test_an_error_of_the_measuring_process_becomes_ours() -> None:
    with pytest.raises(CapabilityError, match="relation.backend 'nonsense' does not exist"):
        bench_attention._measure(Request(**{**vars(REQUEST), "backend": "nonsense"}))


def test_rows_take_medians_and_subtract_the_baseline() -> None:
    found = []
    for subject, cost in (("fabric", 1.0), ("sdpa", 30.0)):
        for length, backward, peak in ((16, False, 100), (16, True, 200), (4096, False, 160), (4096, True, 290)):
            answer: dict[str, Any] = {"request": {**vars(REQUEST), "subject": subject, "length": length}}
            answer["request"]["backward"] = backward
            answer["laps"] = [[cost * s * (1 + backward), 9.0] for s in (1, 7, 2)]
            answer |= {"peak": peak, "baseline": length == 16}
            if subject == "fabric":
                plan = {"seconds": [0.3, 0.1, 0.2], "visited": 10**6, "legal": 9, "causal": 10**7}
                answer |= {"plan": plan, "pooling": [[1.0, 9.0]]}
            found.append(answer)
    (only,) = rows_of(found, wall=False)
    assert (only.forward, only.both, only.dense_both, only.pooling, only.build) == (2.0, 4.0, 120.0, 1.0, 0.2)
    assert (only.peak_forward, only.peak_both, only.dense_peak_both) == (60, 90, 90)
    assert only.faster == 30.0 and only.faster_with_pooling == 24.0
    assert only.per_pair(only.both) == pytest.approx(4.0 / 4e6 * 1e9)
    assert rows_of(found, wall=True)[0].forward == 9.0


def test_laws_hold_fail_or_are_not_measured() -> None:
    good = [row(4096), row(65536), row(131072, both=None, dense_both=None, peak_both=None)]
    assert states(good) == [True] * 5
    assert states([row(512), row(1024)]) == [None, None, True, None, None]
    seconds = 4 * 65536 * 1000 * 10e-9
    slow = row(65536, both=seconds * 1.4, build=0.2, peak_both=65536 * 30_000)
    assert states([row(4096), slow]) == [False, False, False, False, None]
    assert growth([row(4096)]) is None and growth(good) == pytest.approx(1.0)
    assert [str(law).split(":")[0] for law in laws([row(4096), slow])][-2:] == ["FAILS", "not measured"]


def test_table_and_picture(tmp_path: Path) -> None:
    rows = [row(512), row(4096), row(131072, both=None, dense_both=None, pooling=None, peak_both=None)]
    lines = aligned(rows).splitlines()
    assert re.fullmatch(r"length +512 +4k +128k", lines[0]) and len({len(line) for line in lines}) == 1
    assert re.search(r"faster, forward \+ backward +20\.0× +20\.0× +-", aligned(rows))
    plot(rows, "title", tmp_path / "plot.png")
    image = matplotlib.image.imread(tmp_path / "plot.png")
    assert image.shape[:2] == (912, 1440) and float(image[..., :3].std()) > 0.05


def test_records_say_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = evidence.record("Title", "abc", "a processor", ["refractor x"], ["data/x.json"], "body\n\n")
    assert "- commit: `abc`" in text and "[x.json](data/x.json)" in text and text.endswith("\nbody\n")
    assert "GiB, no GPU" in evidence.processor() and evidence.processor("H200").endswith("GiB, H200")
    monkeypatch.setattr(evidence, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert evidence.commit() == "unknown (not a git checkout)"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "record.md"
    arguments = ["--lengths", "256,512", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--window", "64"]
    assert cli.main(["bench", "attention", *arguments, "--repeats", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\[ ?\d+/12\] .* left$", printed, re.M)) == 12 and "not measured: " in printed
    text = out.read_text()
    command = re.search(r"- command: `(refractor bench attention .*)`", text)
    assert command and "--lengths 256,512 --heads 2 --kv-heads 1" in command[1]
    assert "[record.json](record.json), [record.png](record.png)" in text and "![" in text
    kept = json.loads((tmp_path / "new" / "record.json").read_text())
    assert len(kept["measurements"]) == 12 and sum(m["baseline"] for m in kept["measurements"]) == 4
    assert (tmp_path / "new" / "record.png").stat().st_size > 10_000
