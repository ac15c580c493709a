"""SIGKILL anywhere, run again: the losses are those of an uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from refractor_megatron.checkpoint import manifest as manifests
from refractor_megatron.cli import main
from tests.corpus import write_corpus
from tests.runs import pretrain

STEPS, EVERY = 14, 4
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def start(run: Path) -> subprocess.Popen[bytes]:
    """A worker that says what it says to ``run/said.txt``."""
    with open(run / "said.txt", "wb") as out:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "refractor_megatron.training.worker", str(run)],
            stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def said(run: Path) -> str:
    return (run / "said.txt").read_text()


def finish(run: Path) -> str:
    code = start(run).wait(timeout=240)
    assert code == 0, said(run)
    return said(run)


def start_and_wait(run: Path, moment: Callable[[Path], bool]) -> subprocess.Popen[bytes]:
    """A worker at that moment of its run, which goes on where the last one ended."""
    kept = manifests.latest_step(run / "checkpoints")
    process = start(run)
    # only then is the log of the last worker cut back to its newest checkpoint
    begun = (lambda: f"resumed after step {kept}" in said(run)) if kept else (lambda: True)
    while not (begun() and moment(run)) and process.poll() is None:
        time.sleep(0.002)
    assert process.poll() is None, f"it ended before its moment: {said(run)}"
    return process


def losses(run: Path) -> dict[int, float]:
    """Loss of each step; a step logged twice by a resumed run must agree with itself."""
    found: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert found.setdefault(record["step"], record["loss"]) == record["loss"]
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    write_corpus(root / "text")
    settings = [f"train.steps={STEPS}", "train.schedule.warmup_steps=3", f"checkpoint.every={EVERY}"]
    assert main(pretrain(root, root / "prepared", "--prepare-only", *settings, "evaluation.every=5")) == 0
    return root / "prepared"


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path) -> dict[int, float]:
    run = prepared.with_name("uninterrupted")
    shutil.copytree(prepared, run)
    finish(run)
    found = losses(run)
    assert sorted(found) == list(range(1, STEPS + 1)) and len(set(found.values())) == STEPS
    return found


def at_step(step: int) -> Callable[[Path], bool]:
    def reached(run: Path) -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= step

    return reached


def in_save(run: Path) -> bool:
    """A save is under way and there is a good checkpoint already."""
    return bool(manifests.complete(run / "checkpoints")) and any((run / "checkpoints").glob("*.tmp"))


MOMENTS = {"before the first save": at_step(2), "between saves": at_step(6), "in a save": in_save, "late": at_step(13)}


def test_kill_and_run_again(
    prepared: Path, uninterrupted: dict[int, float], record_property: Callable[[str, object], None]
) -> None:
    """One run that is killed at every moment, one after the other."""
    run = prepared.with_name("killed")
    shutil.copytree(prepared, run)
    for moment, reached in MOMENTS.items():
        process = start_and_wait(run, reached)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        for folder in manifests.complete(run / "checkpoints"):
            manifests.verify(folder)
        record_property(f"{moment}: killed after step", max(losses(run)))
        record_property(f"{moment}: half-written folders left", len(list((run / "checkpoints").glob("*.tmp"))))
    kept = manifests.latest_step(run / "checkpoints")
    assert kept >= 3 * EVERY and f"resumed after step {kept}" in finish(run)
    assert losses(run) == uninterrupted
    record_property("losses equal bit for bit", f"{len(uninterrupted)}/{STEPS}")
    assert manifests.latest_step(run / "checkpoints") == STEPS


def test_stop_signals_save_and_exit(prepared: Path, uninterrupted: dict[int, float]) -> None:
    run = prepared.with_name("stopped")
    shutil.copytree(prepared, run)
    for number, step in ((signal.SIGTERM, 2), (signal.SIGUSR1, 7)):
        process = start_and_wait(run, at_step(step))
        process.send_signal(number)
        assert process.wait(timeout=60) == 75, said(run)
        stopped = manifests.latest_step(run / "checkpoints")
        assert step <= stopped < STEPS and stopped == max(losses(run))
    finish(run)
    assert losses(run) == uninterrupted


def test_damaged_newest_checkpoint_is_named_and_nothing_is_lost(
    prepared: Path, uninterrupted: dict[int, float]
) -> None:
    run = prepared.with_name("damaged")
    shutil.copytree(prepared.with_name("uninterrupted"), run)
    newest = manifests.complete(run / "checkpoints")[-1]
    victim = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    with open(victim, "r+b") as file:
        file.truncate(victim.stat().st_size // 2)
    code, message = start(run).wait(timeout=120), said(run)
    assert code == 4 and victim.name in message and "Traceback" not in message
    shutil.rmtree(newest)  # the way out that the message names
    finish(run)
    assert losses(run) == uninterrupted
