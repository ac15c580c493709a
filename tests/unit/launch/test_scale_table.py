"""The scale table: medians after warm-up, failed runs as rows, one sentence without runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from .helpers import ROOT


@pytest.fixture(scope="module")
def scale_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_table", ROOT / "launch" / "scale_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    import sys

    sys.modules["scale_table"] = module
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, speeds: list[float]) -> None:
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step, speed in enumerate(speeds, 1):
            record = {"step": step, "tokens_per_s": speed, "step_ms": 50.0, "mfu": 0.125, "peak_rss_mb": 100.0 + step}
            file.write(json.dumps(record) + "\n")


def test_medians_leave_the_warm_up_out(scale_table: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "tp=2.r2", [1.0, 2.0, 3.0, 100.0, 120.0, 110.0])
    row = scale_table.read_row(tmp_path / "tp=2.r2")
    assert (row.name, row.ranks, row.steps) == ("tp=2", 2, 3)
    assert row.tokens_per_s == 110.0 and row.peak_rss_mb == 106.0


def test_table_names_failures_and_figures(
    scale_table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "default.r1", [100.0] * 5)
    (tmp_path / "tp=3.r2").mkdir()
    (tmp_path / "tp=3.r2" / "scale.log").write_text("starting\nerror: 2 ranks cannot hold tp 3: give 3.\n\n")
    assert scale_table.main([str(tmp_path), "--command", "bash launch/scale_test.sh X"]) == 0
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == text
    assert "| default | 1 | 2 | 100 | 100 | 50 | 12.5% | 105 |" in text
    assert "| tp=3 | 2 | failed: error: 2 ranks cannot hold tp 3: give 3. |" in text
    assert "`bash launch/scale_test.sh X`" in text and "commit: " in text


def test_folder_without_runs_is_one_sentence(
    scale_table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale_table.main([str(tmp_path)]) == 3
    assert "holds no runs" in capsys.readouterr().err
