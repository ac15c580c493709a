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

STEPS, EVERY = 14, 4
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def start(run: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "refractor_megatron.training.worker", str(run)],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(run: Path) -> str:
    process = start(run)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err.decode()
    return err.decode()


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
    arguments = ["pretrain", "--preset", "nano", "--corpus", str(write_corpus(root / "text"))]
    arguments += ["--data-root", str(root / "data"), "--out", str(root / "prepared"), "--prepare-only"]
    arguments += [f"train.steps={STEPS}", "train.schedule.warmup_steps=3", f"checkpoint.every={EVERY}"]
    assert main([*arguments, "evaluation.every=5", "telemetry.wandb=false", "telemetry.tensorboard=false"]) == 0
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


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_and_run_again(
    prepared: Path, uninterrupted: dict[int, float], moment: str, record_property: Callable[[str, object], None]
) -> None:
    run = prepared.with_name(moment.replace(" ", "_"))
    shutil.copytree(prepared, run)
    process = start(run)
    while not MOMENTS[moment](run) and process.poll() is None:
        time.sleep(0.0005)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for folder in manifests.complete(run / "checkpoints"):
        manifests.verify(folder)
    kept = manifests.latest_step(run / "checkpoints")
    record_property("killed after step", max(losses(run)))
    record_property("half-written folders left", len(list((run / "checkpoints").glob("*.tmp"))))
    record_property("resumed after step", kept)
    message = finish(run)
    assert (f"resumed after step {kept}" in message) == (kept > 0)
    assert losses(run) == uninterrupted
    record_property("losses equal bit for bit", f"{len(uninterrupted)}/{STEPS}")
    assert manifests.latest_step(run / "checkpoints") == STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_saves_and_exits(prepared: Path, uninterrupted: dict[int, float], number: signal.Signals) -> None:
    run = prepared.with_name(number.name)
    shutil.copytree(prepared, run)
    process = start(run)
    while not at_step(2)(run):
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    stopped = manifests.latest_step(run / "checkpoints")
    assert 2 <= stopped < STEPS and stopped == max(losses(run))
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
    process = start(run)
    _, err = process.communicate(timeout=120)
    message = err.decode()
    assert process.returncode == 4 and victim.name in message and "Traceback" not in message
    shutil.rmtree(newest)  # the way out that the message names
    finish(run)
    assert losses(run) == uninterrupted
