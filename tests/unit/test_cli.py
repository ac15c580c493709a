"""The command line itself: what it does when its output cannot be written."""

from __future__ import annotations

import subprocess
import sys

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
