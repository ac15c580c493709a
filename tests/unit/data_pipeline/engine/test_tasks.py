"""What a stage's folder does with the drafts it finds, and the command that does one task."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.engine import tasks
from data_pipeline.engine.command import add_task_parser
from data_pipeline.engine.tasks import run_task, task_folder
from refractor_megatron.errors import DataError
from tests.unit.data_pipeline.engine import jobs

HOST = socket.gethostname()


def draft(folder: Path, host: str, pid: int, age_s: float = 0.0) -> Path:
    """A draft as a task of that process leaves it."""
    path = folder / f".00001.{host}-{pid}"
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "half.bin").write_bytes(b"half")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_drafts_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path, dead_pid: int) -> None:
    sample = jobs.stage("hashes", 3)
    folder = sample.prepare(tmp_path)
    living = draft(folder, HOST, os.getppid())
    elsewhere = draft(folder, "node-7.cluster", dead_pid)
    for gone in (draft(folder, HOST, dead_pid), draft(folder, "node-8.cluster", 1, age_s=30 * 86400)):
        assert gone.is_dir()
    (folder / ".swept.00001.x-1").mkdir()  # of a sweep that was itself killed
    sample.prepare(tmp_path)
    assert jobs.drafts(folder) == sorted([living.name, elsewhere.name])


def swept_under_way(params: dict[str, Any], index: int, out: Path) -> None:
    """A task whose draft another process takes for an abandoned one."""
    (out / "first").write_text("1")
    out.rename(out.with_name(".swept" + out.name))
    (out / "second").write_text("2")


def test_task_that_was_swept_publishes_nothing(tmp_path: Path) -> None:
    sample = tasks.Stage("sample", f"{__name__}:swept_under_way", 1, {})
    folder = sample.prepare(tmp_path)
    with pytest.raises(FileNotFoundError):
        run_task(folder, 0)
    assert not task_folder(folder, 0).exists()


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_task_parser(parser.add_subparsers())
    args = parser.parse_args(["task", *arguments])
    code: int = args.run(args)
    return code


def test_command_does_one_task_once(tmp_path: Path) -> None:
    folder = jobs.stage("start_times", 3).prepare(tmp_path)
    assert command(str(folder), "2") == 0
    before = jobs.tree(folder)
    assert list(before) == ["00002/started.txt", "stage.json"]
    assert command(str(folder), "2") == 0
    assert jobs.tree(folder) == before


@pytest.mark.parametrize("index", ["-1", "3"])
def test_command_refuses_a_task_that_is_not_there(tmp_path: Path, index: str) -> None:
    folder = jobs.stage("hashes", 3).prepare(tmp_path)
    with pytest.raises(DataError, match=f"has tasks 0 to 2, no task {index}"):
        command(str(folder), "--", index)


def test_command_refuses_what_is_no_stage(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder of a stage"):
        command(str(tmp_path), "0")
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        command(str(tmp_path), "0")
