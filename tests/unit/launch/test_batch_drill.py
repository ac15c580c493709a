"""The batch script with real ranks under torchrun: time limit in mid-run, save, requeue, resume, done.

Only SLURM itself is a stand-in: ``srun`` runs the command on this machine.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.corpus import write_corpus

from .helpers import ROOT, clean_environment, copy_of_launchers, executable

pytestmark = [pytest.mark.slow, pytest.mark.gloo, pytest.mark.timeout(300)]

STEPS = 40
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") echo n1 ;;
"show node") echo "NodeName=n1 NodeAddr=127.0.0.1 NodeHostName=n1" ;;
*) echo "$*" >>"$STUB_LOG" ;;
esac
"""


def submit(tmp_path: Path, restart: int) -> subprocess.Popen[str]:
    """Start the batch script as SLURM would."""
    env = clean_environment(
        STUB_LOG=str(tmp_path / "scontrol.log"),
        REFRACTOR_VENV=str(Path(sys.executable).parents[1]),
        REFRACTOR_NPROC="2",
        REFRACTOR_SAVE_SECONDS="60",
        SLURM_SUBMIT_DIR=str(tmp_path / "repository"),
        SLURM_JOB_ID=str(40_000 + restart),  # its own port for each start
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="n1",
        SLURM_RESTART_COUNT=str(restart),
    )
    env["PATH"] = f"{tmp_path / 'tools'}:{env['PATH']}"
    arguments = ["--preset", "nano", "--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "run")]
    overrides = [f"train.steps={STEPS}", "checkpoint.every=1000", "evaluation.every=1000", "telemetry.wandb=false"]
    return subprocess.Popen(
        ["bash", str(tmp_path / "repository" / "launch" / "pretrain_64k.sh"), *arguments, *overrides],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_logged(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_time_limit_saves_queues_again_and_the_next_start_finishes(tmp_path: Path) -> None:
    executable(tmp_path / "tools" / "srun", SRUN)
    executable(tmp_path / "tools" / "scontrol", SCONTROL)
    repository = copy_of_launchers(tmp_path / "repository")
    for package in ("refractor_megatron", "data_pipeline", "hydra_conf"):
        (repository / package).symlink_to(ROOT / package)
    write_corpus(tmp_path / "corpus")
    run = tmp_path / "run"

    job = submit(tmp_path, restart=0)
    while len(steps_logged(run)) < 3 and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output[-3000:]
    assert (tmp_path / "scontrol.log").read_text() == "requeue 40000\n"
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(saved) == 1 and 3 <= int(saved[0].removeprefix("step_")) < STEPS
    assert not (run / "report.html").exists()

    job = submit(tmp_path, restart=1)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output[-3000:]
    assert f"resumed after step {int(saved[0].removeprefix('step_'))}" in output
    assert steps_logged(run) == list(range(1, STEPS + 1))
    assert (run / "report.html").exists()
