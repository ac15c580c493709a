"""The command line itself: outputs that cannot be written, overrides among flags."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from refractor_megatron.cli import main

COMMAND = [sys.executable, "-m", "refractor_megatron.cli", "masks", "check", "--preset", "nano"]


def test_a_full_disk_is_one_sentence_and_exit_code_6() -> None:
    with open("/dev/full", "w") as full:
        answer = subprocess.run(COMMAND, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert answer.returncode == 6
    assert answer.stderr == "error: the output: No space left on device; free space and run again.\n"


def test_a_reader_that_leaves_is_no_mistake() -> None:
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_overrides_may_stand_anywhere_and_only_what_is_wrong_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def build(args: argparse.Namespace) -> int:
        seen.append(args.overrides)
        return 0

    monkeypatch.setattr("refractor_megatron.training.dataset.build_dataset", build)
    words = ["data", "build", "data.max_mb=1", "--corpus", str(tmp_path), "data.seed=3", "--preset", "nano", "a.b=c"]
    assert main(words) == 0 and seen == [["data.max_mb=1", "data.seed=3", "a.b=c"]]
    with pytest.raises(SystemExit) as end:
        main([*words, "--out-root", "x"])
    assert end.value.code == 2
    assert "unrecognized arguments: --out-root x" in capsys.readouterr().err
