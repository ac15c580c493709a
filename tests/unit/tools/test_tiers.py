"""``tools/tiers.py`` end to end on tiny text: every arm, the record, and nothing trained twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tests.corpus import ROOT, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ARMS = ("dense", "A", "A2", "AB", "ABC")


def tiers(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "tiers.py"), "--preset", "nano", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_every_arm_is_trained_once_and_compared_on_the_same_documents(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    arguments = ["--corpus", "text", "--seq-len", "256", "--tokens", "4096", "--window", "32", "--block", "16"]
    arguments += ["--max-mb", "2", "--heldout-fraction", "0.2", "--documents", "9", "--out", "out/tiers.md"]
    arguments += ["--arms", ",".join(reversed(ARMS)), "--sigma-min", "0.2", "--jobs", "2"]
    done = tiers(tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "tiers.json").read_text())
    assert tuple(record["arms"]) == ARMS and set(record["differences"]) == set(ARMS) - {"A"}
    positions = {name: arm["position"] for name, arm in record["arms"].items()}
    assert all(p["documents"] == 9 and p["step"] == 4 for p in positions.values())
    assert positions["AB"]["parameters"] > positions["A"]["parameters"] == positions["dense"]["parameters"]
    losses = {name: np.array(p["loss_by_document"]) for name, p in positions.items()}
    paired = (losses["AB"] - losses["A"]).mean(0)
    assert [one["mean"] for one in record["differences"]["AB"][:-1]] == pytest.approx(paired)
    # Below the window nothing but the trained weights differs: close, and not equal.
    assert 0 < abs(losses["dense"] - losses["A"])[:, 0].max() < 0.2
    text = (tmp_path / "out" / "tiers.md").read_text()
    assert "9 held-out documents" in text and all(f"| {name} |" in text for name in ARMS)
    assert matplotlib.image.imread(tmp_path / "out" / "tiers.png").shape[:2] == (672, 1680)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/tiers/*/position.json")}
    metrics = {path: path.read_text() for path in tmp_path.glob("runs/tiers/*/metrics.jsonl")}
    assert len(before) == len(metrics) == len(ARMS)
    again = tiers(tmp_path, *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path: path.read_text() for path in metrics} == metrics

    other = tiers(tmp_path, *arguments, "train.optimizer.lr=1e-3")
    assert other.returncode and "another configuration" in other.stderr


def test_unknown_arms_are_named(tmp_path: Path) -> None:
    done = tiers(tmp_path, "--arms", "A,B")
    assert done.returncode == 2 and "no such arm: B" in done.stderr
