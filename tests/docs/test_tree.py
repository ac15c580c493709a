"""Habits of the tree: no file too long, no trace of one machine, no unfinished business, no vendored binaries."""

from __future__ import annotations

import re
import statistics
import subprocess
from pathlib import Path

import pytest

from tests.corpus import ROOT

TEXT = {".py", ".sh", ".md", ".yaml", ".toml", ""}


def tree() -> list[Path]:
    """Files that are, or would be, committed."""
    answer = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in answer.stdout.splitlines() if (ROOT / name).is_file()]


def sources() -> list[Path]:
    return [path for path in tree() if path.suffix in TEXT and path.name != "LICENSE" and "outbox" not in path.parts]


def test_no_source_is_longer_than_600_lines() -> None:
    long = {str(path): count for path in sources() if (count := len(path.read_text().splitlines())) > 600}
    assert not long


def test_median_module_is_short() -> None:
    lengths = [len(path.read_text().splitlines()) for path in sources() if path.suffix == ".py"]
    assert statistics.median(lengths) <= 200


def test_no_machine_paths_or_hosts() -> None:
    # Spelled in pieces, so that this file does not find itself.
    pattern = re.compile(
        "|".join(["/wo" + "rk/", "/ho" + "me/", "/ro" + "ot/", "/opt/(wheels|py" + "pi)", r"\.lib" + "rary/"])
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def test_nothing_is_unfinished() -> None:
    pattern = re.compile(
        "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error", "not imple" + "mented"])
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def test_scripts_begin_with_a_line_that_says_how_to_run_them() -> None:
    for path in tree():
        if path.suffix == ".sh" or path == ROOT / ".ci" / "run":
            first = path.read_text().splitlines()[0]
            assert first in ("#!/usr/bin/env bash", "# shellcheck shell=bash"), path


def test_nothing_large_is_committed() -> None:
    assert not [str(path) for path in tree() if path.stat().st_size > 2 * 2**20]
