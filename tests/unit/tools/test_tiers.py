"""``tools/tiers.py`` end to end on tiny text: arms, the record, and nothing trained twice."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from refractor_megatron.config import compose
from tests.corpus import ROOT, write_corpus
from tests.runs import python

#: Trained here; that AB and A2 are between them is seen from their configurations.
ARMS = ("dense", "A", "ABC")


def tiers(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(
        str(ROOT / "tools" / "tiers.py"), "--preset", "nano", *arguments, cwd=folder, OMP_WAIT_POLICY="PASSIVE"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_arms_are_trained_once_and_compared_on_the_same_documents(tmp_path: Path) -> None:
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
    assert positions["ABC"]["parameters"] > positions["A"]["parameters"] == positions["dense"]["parameters"]
    losses = {name: np.array(p["loss_by_document"]) for name, p in positions.items()}
    paired = (losses["ABC"] - losses["A"]).mean(0)
    assert [one["mean"] for one in record["differences"]["ABC"][:-1]] == pytest.approx(paired)
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


def a_run(folder: Path) -> Path:
    """A run folder whose last line of metrics was cut off when it was stopped."""
    lines = [{"step": n, "tokens_seen": 100 * n, "step_ms": 500.0, "tokens_per_s": 200.0} for n in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "tok'
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(text)
    for name in ("final", "baselines", "environment", "device", "samples", "position"):
        (folder / f"{name}.json").write_text("{}")
    return folder


def arms() -> dict[str, Any]:
    import tiers as tool

    return tool.arms_of(Namespace(window=128, block=64, summaries=2, sigma_min=0.35))


@pytest.mark.usefixtures("tools")
def test_an_arm_differs_from_the_one_before_it_in_one_thing() -> None:
    import tiers as tool

    found = arms()
    values = {name: compose(["experiment=nano", *arm.overrides]).values() for name, arm in found.items()}

    def differing(a: str, b: str) -> set[str]:
        return {key for key in values[a] if values[a][key] != values[b][key]}

    assert differing("A", "A2") == set() and (found["A"].seed_shift, found["A2"].seed_shift) == (0, 1)
    assert differing("A", "AB") == {"relation.global.block_size", "relation.global.summaries_per_block"}
    assert differing("AB", "ABC") == {"relation.retrieval.enabled", "relation.retrieval.sigma_min"}
    args = Namespace(preset="nano", runs="runs", data_root="data", corpus=None, overrides=[])
    plan = tool.Plan(args, (), 4, 7, {})
    assert "train.seed=7" in plan.command(found["A"]) and "train.seed=8" in plan.command(found["A2"])


@pytest.mark.usefixtures("tools")
def test_a_torn_last_line_is_no_step(tmp_path: Path) -> None:
    import record
    import tiers as tool

    folder = a_run(tmp_path / "A")
    assert tool.last_step(folder) == 3 and tool.last_step(tmp_path / "none") == 0
    plan = SimpleNamespace(folder=lambda arm: tmp_path / arm.name, command=lambda arm: ["refractor"])
    found = tool.read_arm(plan, arms()["A"])
    assert (found["tokens"], found["seconds"], found["tokens_per_s"]) == (300, 1.5, 200.0)
    assert [step["step"] for step in record.read_run(folder)["steps"]] == [1, 2, 3]


@pytest.mark.usefixtures("tools")
def test_a_failed_arm_is_reported_while_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiers as tool

    said, printed, ended = threading.Event(), [], []

    class Screen:
        def write(self, text: str) -> None:
            printed.append(text)
            if "broken" in text:
                said.set()

        def flush(self) -> None:
            pass

    def work(arm: Any) -> None:
        if arm.name == "A":
            sys.exit("training is broken")
        if arm.name == "AB":
            raise KeyError("ours")
        assert said.wait(60), "nothing was said while this arm was running"
        ended.append(arm.name)

    monkeypatch.setattr(sys, "stderr", Screen())
    with pytest.raises(SystemExit, match=r"no record: (A, AB|AB, A) failed; the same command"):
        tool.each([arms()[name] for name in ("dense", "A", "AB")], work, 3)
    assert ended == ["dense"] and "arm A failed: training is broken" in "".join(printed)
    assert "KeyError" in "".join(printed)


@pytest.mark.usefixtures("tools")
def test_every_arm_can_be_drawn_and_recorded(tmp_path: Path) -> None:
    import tiers_report

    rng = np.random.default_rng(0)
    found = {}
    for name, arm in arms().items():
        losses = 4 + rng.normal(0, 0.1, (6, 2))
        edges = [(0, 64), (64, 128)]
        buckets = [
            {"first": a, "last": b, "loss": float(mean), "low": float(mean) - 0.1, "high": float(mean) + 0.1}
            | {"tokens": 6 * (b - a)}
            for (a, b), mean in zip(edges, losses.mean(0), strict=True)
        ]
        position = {"loss_by_document": losses.tolist(), "buckets": buckets, "documents": 6, "seq_len": 128}
        position |= {"data_digest": "d" * 40, "weights": "raw", "parameters": 10, "config_hash": "c"}
        found[name] = {"title": arm.title, "label": arm.label, "color": arm.color, "position": position}
        found[name] |= {"command": "refractor", "tokens": 1000, "seconds": 2.0, "tokens_per_s": 500.0}
    result = {"commit": "abc", "command": "python tools/tiers.py", "hardware": "a machine", "threads": 1, "jobs": 2}
    result |= {"preset": "nano", "steps": 4, "seed": 1, "arms": found}
    tiers_report.write(result, tmp_path / "out" / "tiers.md")
    text = (tmp_path / "out" / "tiers.md").read_text()
    assert "- commit: `abc`\n- hardware: a machine; 1 thread(s) an arm, 2 arm(s) at a time\n" in text
    assert "- data: `dddddddddddd`; 6 held-out documents" in text
    assert len({arm["color"] for arm in found.values()}) == len({arm["label"] for arm in found.values()}) == 5
    assert matplotlib.image.imread(tmp_path / "out" / "tiers.png").shape[:2] == (672, 1680)
