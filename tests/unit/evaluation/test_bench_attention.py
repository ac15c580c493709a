"""``refractor bench attention``: flags, one measurement, the arithmetic of the table and its verdicts, end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import psutil
import pytest
import torch

from refractor_megatron import cli
from refractor_megatron.errors import CapabilityError, ConfigError
from refractor_megatron.evaluation import bench_attention, bench_measure, bench_report, evidence
from refractor_megatron.evaluation.bench_measure import Request, measure, peak_bytes, timed
from refractor_megatron.evaluation.bench_report import (
    Row,
    aligned,
    beside_dense,
    body,
    growth,
    keys_per_query,
    laws,
    parse_lengths,
    plot,
    rows_of,
    scaling,
)

REQUEST = Request(
    subject="tri-tier", length=200, backward=True, heads=4, kv_heads=2, head_dim=16, window=64, block=32, summaries=2,
    levels=1, fanout=2, retrieved=4, repeats=2, threads=1, backend="auto", device="cpu",
)  # fmt: skip


def row(length: int, **other: Any) -> Row:
    """A row where the tri-tier attention takes 10 ns a pair and is 20 times faster than dense; memory is linear."""
    seconds = 4 * length * 1000 * 10e-9
    values: dict[str, Any] = {
        "forward": seconds / 4, "both": seconds, "dense_forward": seconds * 2, "dense_both": seconds * 20,
        "pooling_forward": seconds / 4, "pooling_both": seconds, "cold": frozenset(), "visited": length * 1000,
        "causal": length * (length + 1) // 2, "heads": 4, "build": 0.05, "memory_forward": length * 20_000,
        "memory_both": length * 40_000, "dense_memory_forward": length * 20_000, "dense_memory_both": length * 30_000,
    }  # fmt: skip
    return Row(length=length, **values | other)


def states(rows: list[Row]) -> list[bool | None]:
    return [law.holds for law in laws(rows)]


def test_lengths_are_numbers_of_tokens() -> None:
    assert parse_lengths("16k,512, 4K,512") == [512, 4096, 16384]
    for text in ("", "4x", "4k,,8k", "-1", "1.5k", "9" * 5000):
        with pytest.raises(ConfigError, match="--lengths: .* write for example 4k,16k or 512"):
            parse_lengths(text)
    with pytest.raises(ConfigError, match="'1m' is not a number of tokens; k is the only unit: 1024k"):
        parse_lengths("1m")
    for text in ("0", "16", "4k,2"):
        with pytest.raises(ConfigError, match="too few to measure; write more than 16"):
            parse_lengths(text)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--lengths", "4q"], 2, "'4q' is not a number of tokens"),
        (["--window", "0"], 2, "--window is 0; it must be at least 1"),
        (["--summaries", "-1"], 2, "--summaries is -1; it must be at least 0"),
        (["--kv-heads", "3"], 2, "--heads 4 is not a multiple of --kv-heads 3"),
        (["--head-dim", "7"], 2, "--head-dim is 7"),
        (["--levels", "3"], 2, "--levels is 3; it is 1 or 2"),
        (["--levels", "2", "--summaries", "0"], 2, "2 needs --summaries of at least 1"),
        (["--fanout", "1"], 2, "--fanout is 1; it must be at least 2"),
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
    monkeypatch.setattr(bench_attention, "_ask", lambda *_: pytest.fail("measured"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["bench", "attention", *(a.format(tmp=tmp_path) for a in arguments)]) == code
    text = capsys.readouterr().err
    assert message in text and len(text.splitlines()) == 1


def test_a_measurement_says_what_ran() -> None:
    found = measure(REQUEST)
    assert found["backend"] == "blocksparse_cpu" and found["dtype"] == "torch.float32" and found["gpu"] is None
    assert len(found["laps"]) == len(found["pooling"]) == 2 and all(wall > 0 for _, wall in found["laps"])
    assert len(found["plan"]["laps"]) == 5 and found["plan"]["causal"] == 200 * 201 // 2
    assert found["plan"]["legal"] <= found["plan"]["visited"]
    assert found["cold"] is False


def test_memory_counts_from_a_settled_process_and_holds_the_pooling() -> None:
    """A second copy of the keys is what pooling makes: it stands above attention's own peak."""
    sizes = {"length": 32768, "backward": False, "heads": 4, "kv_heads": 4, "head_dim": 64, "repeats": 1}
    found = {}
    for change in ({"summaries": 2, "block": 128}, {"summaries": 0}):
        request = Request(**{**vars(REQUEST), **sizes, **change})
        found[request.summaries] = bench_attention._ask(vars(request), request)["memory"]
    tensors = 4 * 32768 * 4 * 64 * 4  # q, k, v and the result in float32
    assert 0.9 * tensors < found[0] < 1.7 * tensors and found[2] > found[0] + tensors / 4


def test_the_time_of_the_plan_holds_all_that_a_kernel_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of visits and tiles are made on demand: they must be made while the clock runs."""
    from refractor_megatron.fabric.backends import flex, flex_mask
    from refractor_megatron.fabric.backends.registry import named

    made: list[Any] = []

    def clock(work: Any, device: str) -> tuple[float, float]:
        made.append(work()[0])
        return 1.0, 1.0

    monkeypatch.setattr(bench_measure, "timed", clock)
    cpu = torch.device("cpu")
    for name in ("blocksparse_cpu", "flex"):
        found: dict[str, Any] = {}
        plan = bench_measure._plan(REQUEST, named(name, cpu), found)
        assert len(found["plan"]["laps"]) == len(made) == bench_measure.BUILDS and plan not in made
        for each in made:
            tiles = flex_mask._of_plan.get(each, {})
            assert "layout" in vars(each) if name == "blocksparse_cpu" else (cpu, flex.BLOCK) in tiles
        made.clear()


def test_tiers_can_be_off_and_dense_runs_on_grouped_heads() -> None:
    bare = {**vars(REQUEST), "summaries": 0, "retrieved": 0, "backward": False}
    found = measure(Request(**bare))
    assert "pooling" not in found and found["plan"]["legal"] == sum(min(64, q + 1) for q in range(200))
    assert measure(Request(**bare | {"subject": "dense"}))["backend"] == "torch flash attention"


@pytest.mark.parametrize(("levels", "fanout"), [(1, 16), (2, 4), (2, 8)])
def test_the_law_of_the_keys_per_query_is_that_of_the_plan(levels: int, fanout: int) -> None:
    values = {"length": 16384, "levels": levels, "fanout": fanout, "backward": False, "repeats": 1, "heads": 2}
    request = Request(**{**vars(REQUEST), **values})
    plan = measure(request)["plan"]
    assert plan["legal"] / request.length == pytest.approx(keys_per_query(request), rel=0.05)


def test_scaling_says_where_the_quadratic_term_takes_over() -> None:
    default = {**vars(REQUEST), "window": 512, "block": 128, "summaries": 2, "retrieved": 20, "fanout": 16}
    text = scaling(Request(**default))
    assert "512 of the window + 20 retrieved + L/128 summaries (S·L/2B) keys" in text
    assert "64 times below dense" in text and "beyond 66k tokens" in text and "tends to 1/64;" in text
    text = scaling(Request(**default | {"levels": 2}))
    assert "48 summaries of near blocks" in text and "L/2048 summaries" in text and "tends to 1/1024." in text
    assert "beyond 1160k tokens" in text
    assert "linear in the length" in scaling(Request(**default | {"summaries": 0}))


def test_a_long_run_is_its_own_only_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_measure, "timed", lambda work, device: (1.0, bench_measure.LONG + 1))
    found = measure(REQUEST)
    assert found["laps"] == [(1.0, bench_measure.LONG + 1)] and found["cold"]


def test_the_clock_counts_work_and_the_peak_memory() -> None:
    cpu, wall = timed(lambda: sum(range(100_000)), "cpu")
    assert cpu > 0 and wall > 0
    assert 0.9 * psutil.Process().memory_info().rss <= peak_bytes("cpu") < psutil.virtual_memory().total


def test_a_refusal_comes_before_the_first_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """flex has no backward on a CPU, dense a limit of 2048 tokens: found out before forward of 256 is measured."""
    for arguments, message in (
        (["--backend", "flex"], "flex has no backward pass on cpu"),
        (["--backend", "dense", "--lengths", "256,4k"], "limited to 2048 tokens"),
    ):
        out = tmp_path / "record.md"
        code = cli.main(["bench", "attention", "--lengths", "256", *arguments, "--out", str(out)])
        printed = capsys.readouterr()
        assert code == CapabilityError.exit_code and message in printed.err and printed.out == "" and not out.exists()


def test_what_is_missing_is_the_users_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in (({"device": "cuda"}, "no CUDA device"), ({"backend": "nonsense"}, "does not exist")):
        text = json.dumps({**vars(REQUEST), **change})
        assert bench_measure.main(text) == CapabilityError.exit_code
        assert message in json.loads(capsys.readouterr().out)["error"]


def test_an_error_of_the_measuring_process_becomes_ours() -> None:
    with pytest.raises(CapabilityError, match="relation.backend 'nonsense' does not exist"):
        request = Request(**{**vars(REQUEST), "backend": "nonsense"})
        bench_attention._ask(vars(request), request)


def test_rows_take_medians_of_each_mode() -> None:
    found = []
    for subject, cost in (("tri-tier", 1.0), ("dense", 30.0)):
        for backward, memory in ((False, 60), (True, 90)):
            answer: dict[str, Any] = {"request": {**vars(REQUEST), "subject": subject, "length": 4096}}
            answer["request"]["backward"] = backward
            answer["laps"] = [[cost * s * (1 + backward), 9.0] for s in (1, 7, 2)]
            answer |= {"memory": memory, "cold": subject == "dense" and backward}
            if subject == "tri-tier":
                plan = {"laps": [[0.3, 9.0], [0.1, 7.0], [0.2, 8.0]], "visited": 10**6, "legal": 9, "causal": 10**7}
                answer |= {"plan": plan, "pooling": [[1.0 + backward, 9.0]]}
            found.append(answer)
    (only,) = rows_of(found, wall=False)
    assert (only.forward, only.both, only.dense_both, only.build) == (2.0, 4.0, 120.0, 0.2)
    assert (only.pooling_forward, only.pooling_both, only.cold) == (1.0, 2.0, {"dense_both"})
    assert (only.memory_forward, only.memory_both, only.dense_memory_both) == (60, 90, 90)
    assert only.faster == 30.0 and only.faster_pooled == 20.0 and only.faster_forward_pooled == 20.0
    assert only.per_pair(only.both) == pytest.approx(4.0 / 4e6 * 1e9)
    assert (rows_of(found, wall=True)[0].forward, rows_of(found, wall=True)[0].build) == (9.0, 8.0)


def test_laws_hold_fail_or_are_not_measured() -> None:
    good = [row(4096), row(65536), row(131072, both=None, dense_both=None, memory_both=None)]
    assert states(good) == [True] * 6
    assert states([row(512), row(1024)]) == [None] * 6
    seconds = 4 * 65536 * 1000 * 10e-9
    slow = row(65536, both=seconds * 1.4, build=0.2, memory_forward=65536 * 90_000, memory_both=65536 * 90_000)
    assert states([row(4096), slow]) == [False, False, False, False, False, None]
    assert [str(law).split(":")[0] for law in laws([row(4096), slow])][-2:] == ["FAILS", "not measured"]


def test_the_law_of_memory_is_judged_well_above_the_noise() -> None:
    mib = 2**20
    assert growth([(1024, 0), (2048, 12 * mib)]) is None
    assert growth([(1024, 200 * mib), (2048, 63 * mib), (4096, None)]) is None
    assert growth([(1000, 100 * mib), (1500, 140 * mib)]) is None
    assert growth([(512, 60 * mib), (4096, 100 * mib), (16384, 400 * mib)]) == pytest.approx(1.0)
    assert "(needs two lengths, one twice the other, of at least 64 MiB)" in str(laws([row(512), row(1024)])[2])


def test_the_specification_names_the_thresholds() -> None:
    """The record cites section 4 for them."""
    text = (evidence._ROOT / "specification" / "REFRACTOR_SPEC.md").read_text()
    section = text[text.index("\n## 4.") : text.index("\n## 5.")]
    numbers = (bench_report.PAIR_SPREAD * 100, bench_report.SPEED_UP, bench_report.SPEED_UP_AIM)
    spread, speed, aim = (f"{x:.0f}" for x in numbers)
    for part in (f"±{spread} %", f"{speed} times faster", f"aim {aim}", f"at most {bench_report.GROWTH}"):
        assert part in section
    assert f"at most {bench_report.BUILD * 1e3:.0f} ms" in section


def test_the_record_says_what_a_sceptic_asks() -> None:
    rows = [row(4096, dense_memory_forward=2**30), row(65536, cold=frozenset({"dense_forward"}))]
    rows.append(row(131072, both=None, dense_both=None, pooling_both=None, memory_both=None, dense_memory_both=None))
    text = body(rows, REQUEST, "settings.", "clock.", "x.png")
    assert "clock. `*` is one run without a warm-up" in text and re.search(
        r"\| dense forward \| [\d.]+ s \| [\d.]+ s\* \|", text
    )
    assert "`-`: forward + backward is not measured at 128k" in text and scaling(REQUEST) in text
    assert re.search(r"\| pooling forward \|.* s \| [\d.]+ s \|\n\| pooling forward \+ backward \|.* s \| - \|", text)
    more = beside_dense(rows)
    assert "at 4k forward + backward (156 against 117 MiB), 64k forward + backward (2500 against 1875 MiB):" in more
    assert more in text and "nowhere takes more" in beside_dense([row(4096, memory_both=1)])
    assert "*" not in body(rows[:1], REQUEST, "settings.", "clock.", "x.png").split("![")[0]


def test_table_and_picture(tmp_path: Path) -> None:
    rows = [row(512), row(4096), row(131072, both=None, dense_both=None, memory_both=None)]
    lines = aligned(rows).splitlines()
    assert re.fullmatch(r"length +512 +4k +128k", lines[0]) and len({len(line) for line in lines}) == 1
    assert re.search(r"\nfaster, forward \+ backward +20\.0× +20\.0× +-", aligned(rows))
    plot(rows, "title", tmp_path / "plot.png")
    image = matplotlib.image.imread(tmp_path / "plot.png")
    assert image.shape[:2] == (912, 1440) and float(image[..., :3].std()) > 0.05


def test_records_say_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = evidence.record("Title", "abc", "a processor", ["refractor x"], ["data/x.json"], "body\n\n")
    assert "- commit: `abc`" in text and "[x.json](data/x.json)" in text and text.endswith("\nbody\n")
    noted = evidence.record("Title", "abc", "a processor", ["x"], ["x.json"], "body", ["note: a line", "y: z"])
    assert "[x.json](x.json)\n- note: a line\n- y: z\n\nbody\n" in noted
    assert "GiB, no GPU" in evidence.processor() and evidence.processor("H200").endswith("GiB, H200")
    monkeypatch.setattr(evidence, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert evidence.commit() == "unknown (not a git checkout)"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "record.md"
    arguments = ["--lengths", "256", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--window", "64"]
    arguments += ["--block", "64", "--summaries", "1", "--levels", "2", "--fanout", "2"]
    arguments += ["--repeats", "1", "--note", "two tests at once"]
    assert cli.main(["bench", "attention", *arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\[\d/4\] .* left$", printed, re.M)) == 4 and "not measured: " in printed
    assert "] 256 tri-tier forward + backward: " in printed and "] 256 dense forward: " in printed
    text = out.read_text()
    command = re.search(r"- command: `(refractor bench attention .*)`", text)
    assert command and "--lengths 256 --heads 2 --kv-heads 1" in command[1]
    assert "--note 'two tests at once'" in command[1] and "\n- note: two tests at once\n" in text
    assert "2 heads of 16 over 1 key head, " in text and ", 1 thread." in text and "one run after a warm-up" in text
    assert "1 summary per block of 64 and per group of 2 blocks" in text and "L/256 summaries" in text
    assert "[record.json](record.json), [record.png](record.png)" in text and "![" in text
    kept = json.loads((tmp_path / "new" / "record.json").read_text())
    assert len(kept["measurements"]) == 4 and all(m["memory"] >= 0 for m in kept["measurements"])
    assert (tmp_path / "new" / "record.png").stat().st_size > 10_000
