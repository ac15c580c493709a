"""The SLURM batch script against stand-ins for SLURM: done, requeue, failure, no progress, early signal."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from .helpers import ROOT, bash, clean_environment, executable, python_stub

SCRIPT = ROOT / "launch" / "pretrain_64k.sh"

#: srun that trains according to STUB_TRAIN: writes the checkpoint of a step, fails, or saves when it gets a signal.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$STUB_LOG"
checkpoint() { mkdir -p "$STUB_RUN/checkpoints/step_$1"; echo '{}' >"$STUB_RUN/checkpoints/step_$1/manifest.json"; }
case "$STUB_TRAIN" in
finish) checkpoint 00000010 ;;
fail) exit 9 ;;
wait)
    trap 'sleep 0.3; checkpoint 00000004; echo "saved" >>"$STUB_LOG"; exit 1' USR1 TERM
    touch "$STUB_RUN/started"
    for _ in $(seq 100); do sleep 0.1; done ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") printf 'n1\\nn2\\n' ;;
"show node") echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
*) echo "scontrol $*" >>"$STUB_LOG" ;;
esac
"""


@dataclass(frozen=True)
class Job:
    run: Path
    log: Path
    env: dict[str, str]

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def checkpoint(self, step: int) -> None:
        folder = self.run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    def submit(self) -> subprocess.CompletedProcess[str]:
        return bash(SCRIPT, "--out", str(self.run), env=self.env)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    def make(train: str, **extra: str) -> Job:
        tools, run, log = tmp_path / "tools", tmp_path / "run", tmp_path / "log"
        run.mkdir()
        executable(tools / "srun", SRUN)
        executable(tools / "scontrol", SCONTROL)
        python_stub(tmp_path / "venv" / "bin" / "python")
        environment = clean_environment(
            STUB_LOG=str(log),
            STUB_RUN=str(run),
            STUB_TRAIN=train,
            REFRACTOR_ROOT=str(ROOT),
            REFRACTOR_VENV=str(tmp_path / "venv"),
            SLURM_JOB_ID="77",
            SLURM_JOB_NUM_NODES="2",
            SLURM_JOB_NODELIST="n[1-2]",
            SLURM_GPUS_ON_NODE="4",
        )
        environment["PATH"] = f"{tools}:{environment['PATH']}"
        return Job(run, log, {**environment, **extra})

    return make


def test_job_that_trains_to_the_end_evaluates_and_leaves(job: Callable[..., Job]) -> None:
    it = job("finish")
    answer = it.submit()
    assert answer.returncode == 0, answer.stderr
    prepare, train, finish = it.lines()
    assert "--prepare-only" in prepare and "--ranks 8" in prepare
    assert "--rdzv-endpoint=10.0.0.1:20077 --rdzv-id=77.0" in train
    assert finish.startswith("refractor pretrain --preset pretrain_64k")


def test_finished_job_does_not_train_again(job: Callable[..., Job]) -> None:
    it = job("fail")
    it.checkpoint(10)
    assert it.submit().returncode == 0
    assert not [line for line in it.lines() if line.startswith("srun")]


def test_half_written_checkpoint_is_no_progress(job: Callable[..., Job]) -> None:
    it = job("fail")
    (it.run / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert it.submit().returncode == 9


def test_failure_is_not_queued_again(job: Callable[..., Job]) -> None:
    it = job("fail")
    answer = it.submit()
    assert answer.returncode == 9
    assert "stopped at step 0 of 10" in answer.stderr
    assert not [line for line in it.lines() if line.startswith("scontrol requeue")]


def test_wrong_configuration_ends_the_job_before_any_rank_starts(job: Callable[..., Job]) -> None:
    it = job("finish", STUB_CLI_STATUS="2")
    assert it.submit().returncode == 2
    assert not [line for line in it.lines() if line.startswith("srun")]


@pytest.mark.parametrize(("number", "code", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)])
def test_signal_saves_and_only_the_time_limit_queues_again(
    job: Callable[..., Job], number: signal.Signals, code: int, requeued: bool
) -> None:
    it = job("wait")
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "--out", str(it.run)], env=it.env, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not (it.run / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert "saved" in it.lines()  # the script waited for the save
    assert ("scontrol requeue 77" in it.lines()) is requeued


def test_job_without_progress_stops_for_good(job: Callable[..., Job]) -> None:
    it = job("fail", SLURM_RESTART_COUNT="3")
    (it.run / "slurm_progress").write_text("0 2\n")
    answer = it.submit()
    assert answer.returncode == 1 and "came back 3 times" in answer.stderr
    assert not [line for line in it.lines() if line.startswith("srun")]


def test_progress_clears_the_count_of_stalls(job: Callable[..., Job]) -> None:
    it = job("finish", SLURM_RESTART_COUNT="3")
    it.checkpoint(4)
    (it.run / "slurm_progress").write_text("0 2\n")
    assert it.submit().returncode == 0
    assert (it.run / "slurm_progress").read_text() == "4 0\n"


def test_job_without_time_for_one_save_does_not_start(job: Callable[..., Job]) -> None:
    it = job("finish", SLURM_JOB_END_TIME=str(int(time.time()) + 300))
    answer = it.submit()
    assert answer.returncode == 1 and "longer --time" in answer.stderr
    assert not it.log.exists()
