"""Local ranks: environment, exit codes, and none left behind."""

import time
from pathlib import Path

import pytest

from refractor_megatron.training.spawn import spawn

PROGRAM = """
import os, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
open(os.path.join(sys.argv[1], f"rank{rank}of{world}"), "w").write(str(os.getpid()))
if sys.argv[2] == "fail" and rank == 1:
    sys.exit(6)
if sys.argv[2] == "fail":
    time.sleep(120)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rank_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "rank_program"


def test_all_ranks_run(tmp_path: Path, module: str) -> None:
    assert spawn(module, [str(tmp_path), "ok"], 3) == 0
    assert {p.name for p in tmp_path.glob("rank?of3")} == {"rank0of3", "rank1of3", "rank2of3"}


def test_first_failure_is_returned_and_the_others_are_ended(
    tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refractor_megatron.training.spawn.GRACE_S", 0.2)
    started = time.monotonic()
    assert spawn(module, [str(tmp_path), "fail"], 2) == 6
    assert time.monotonic() - started < 60
    pid = int((tmp_path / "rank0of2").read_text())
    assert not Path(f"/proc/{pid}").exists()
