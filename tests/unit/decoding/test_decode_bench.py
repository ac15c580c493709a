"""The measuring tool: a small run of it, and what its record claims from given figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import ROOT


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tools import each other as scripts do."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import decode_report

    return decode_report


@pytest.mark.slow
def test_a_small_run_measures_writes_and_counts_bytes(tmp_path: Path) -> None:
    """The tool asserts that a full cache has the bytes it computes, and a narrow layer those of the model's."""
    out = tmp_path / "decoding.md"
    options = [
        "--presets",
        "nano",
        "--lengths",
        "256,512",
        "--bytes-at",
        "1k",
        "--llama-prefill",
        "256",
        "--back-at",
        "3k",
    ]
    command = [sys.executable, "tools/decode_bench.py", *options, "--rounds", "2", "--steps", "2", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads(out.with_suffix(".json").read_text())["presets"][0]
    short, long = found["rows"]
    assert short["prefill_s"]["llama"] > 0 and long["prefill_s"]["llama"] is None
    assert long["prefill_s"]["refractor"] > 0 and short["prefill_s"]["refractor"] > 0
    assert long["cache_bytes"]["llama"] == 2 * short["cache_bytes"]["llama"] == found["bytes_at"]["1024"]["llama"] / 2
    assert 0.9 < found["active"]["llama"] / found["active"]["refractor"] < 1.1
    back = {row["codec"]: row for row in json.loads(out.with_suffix(".json").read_text())["going_back"]["rows"]}
    assert back["exact"]["deviation"] == 0 and back["none"]["again"] == 3072 and back["norm"]["again"] == 0
    assert back["tight"]["deviation"] > 0 and back["norm"]["cold_bytes"] < back["tight"]["cold_bytes"]
    assert "| 512 | Llama, static cache |" in out.read_text() and out.with_suffix(".png").stat().st_size > 10_000


def result_of(ours: tuple[float, float], nbytes: int, lengths: tuple[int, int] = (4096, 65536)) -> dict[str, Any]:
    """As the tool gives it: a full cache of 64 B a token whose token takes 1 and 9 ms."""
    rows = [
        {
            "length": length, "ms": {"refractor": ms, "llama": full, "in place": full / 2},
            "ms_each": {}, "cache_bytes": {"refractor": nbytes, "llama": 64 * length},
            "prefill_s": {"refractor": 1.0, "llama": None},
        }
        for length, ms, full in zip(lengths, ours, (1.0, 9.0), strict=True)
    ]  # fmt: skip
    return {"presets": [{"preset": "small", "rows": rows, "bytes_at": {}}]}


@pytest.mark.parametrize(
    "ours,nbytes,saves,grows",
    [
        ((5.0, 6.5), 64 * 65536 // 5, True, True),
        ((5.0, 6.6), 64 * 65536 // 4, False, False),
    ],
)
def test_verdicts_follow_the_figures(
    ours: tuple[float, float], nbytes: int, saves: bool, grows: bool, report: Any
) -> None:
    saving, growth = report.laws(result_of(ours, nbytes))
    assert (saving.holds, growth.holds) == (saves, grows)
    assert growth.found == f"REFRACTOR {ours[1] / ours[0]:.2f}×, Llama 9.00×, Llama, static cache 9.00×"


def test_what_was_not_measured_is_not_claimed(report: Any) -> None:
    saving, growth = report.laws(result_of((1.0, 1.0), 64, lengths=(4096, 16384)))
    assert saving.holds is None and growth.holds is None
