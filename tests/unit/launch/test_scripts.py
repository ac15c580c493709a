"""Every launch script: syntax, shellcheck, help, and one sentence for a wrong argument."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import ROOT, bash, clean_environment

SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
COMMANDS = [path for path in SCRIPTS if path.name in ("pretrain_local.sh", "pretrain_64k.sh", "scale_test.sh")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    answer = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.skipif(shutil.which("shellcheck", path=str(Path(sys.executable).parent)) is None, reason="no shellcheck")
def test_shellcheck() -> None:
    program = Path(sys.executable).parent / "shellcheck"
    answer = subprocess.run([program, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help_names_every_flag_that_the_script_takes(script: Path) -> None:
    answer = bash(script, "--help")
    assert answer.returncode == 0
    text = script.read_text()
    start = text.index("while (($#))")
    accepted = set(re.findall(r"(?<!\S)(--[a-z]+)(?=\)| \|)", text[start : text.index("\ndone", start)]))
    assert accepted >= {"--help", "--preset", "--corpus", "--out"}
    assert not [flag for flag in accepted if flag not in answer.stdout]
    assert "set -" not in answer.stdout  # the header only


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("pretrain_local.sh", ["--bogus"], "unknown flag '--bogus'"),
        ("pretrain_local.sh", ["--steps"], "--steps needs a value"),
        ("pretrain_local.sh", ["--steps", "--ranks", "2"], "--steps needs a value"),
        ("pretrain_local.sh", ["--steps", "0"], "whole number of at least 1, not '0'"),
        ("pretrain_local.sh", ["--ranks", "two"], "not 'two'"),
        ("pretrain_local.sh", ["train.steps=3"], "come after --"),
        ("pretrain_local.sh", ["file.txt"], "unknown flag 'file.txt'"),
        ("pretrain_64k.sh", ["--bogus"], "unknown flag '--bogus'"),
        ("pretrain_64k.sh", ["steps"], "neither a flag nor a Hydra override"),
        ("pretrain_64k.sh", [], "sbatch launch/pretrain_64k.sh"),
        ("scale_test.sh", ["--bogus"], "unknown flag '--bogus'"),
        ("scale_test.sh", ["--ranks", "1 x"], "not 'x'"),
        ("scale_test.sh", ["--steps", "-"], "not '-'"),
        ("scale_test.sh", ["nano"], "neither a flag nor a list"),
    ],
)
def test_wrong_argument_is_one_sentence_and_exit_2(script: str, arguments: list[str], words: str) -> None:
    answer = bash(ROOT / "launch" / script, *arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
    assert words in answer.stderr


def test_64k_refuses_a_folder_that_is_not_the_repository(tmp_path: Path) -> None:
    env = clean_environment(REFRACTOR_ROOT=str(tmp_path), REFRACTOR_DRY_RUN="1")
    answer = bash(ROOT / "launch" / "pretrain_64k.sh", env=env)
    assert answer.returncode == 2 and "is not the repository" in answer.stderr


def test_64k_dry_run_prints_the_three_commands(tmp_path: Path) -> None:
    env = clean_environment(REFRACTOR_DRY_RUN="1", SLURM_JOB_NUM_NODES="4", SLURM_GPUS_ON_NODE="8")
    answer = bash(
        ROOT / "launch" / "pretrain_64k.sh",
        *("--out", "/shared/run one", "--corpus", "/shared/text", "parallel.tp=4", "train.steps=20000"),
        cwd=tmp_path,
        env=env,
    )
    assert answer.returncode == 0, answer.stderr
    prepare, train, finish = answer.stdout.splitlines()
    assert "pretrain --prepare-only --preset pretrain_64k --ranks 32" in prepare
    assert prepare.endswith(r"--out /shared/run\ one --corpus /shared/text -- parallel.tp=4 train.steps=20000")
    assert "srun --nodes=4 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=600" in train
    assert "--nproc-per-node=8 --max-restarts=0" in train
    assert "SIGUSR1" in train and "--shutdown-timeout 600" in train
    assert train.endswith(r"-m refractor_megatron.training.worker /shared/run\ one")
    assert "--prepare-only" not in finish and not (tmp_path / "runs").exists()


def test_64k_asks_slurm_for_what_the_script_relies_on() -> None:
    lines = (ROOT / "launch" / "pretrain_64k.sh").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1", "--output=%x-%j.out"} <= set(asked)
    grace = next(int(line.rpartition("@")[2]) for line in asked if line.startswith("--signal=B:USR1@"))
    assert grace > 600  # more than the default of REFRACTOR_SAVE_SECONDS


def test_64k_preset_fits_the_nodes_that_the_script_asks_for() -> None:
    from refractor_megatron.config import check, compose

    text = (ROOT / "launch" / "pretrain_64k.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --(nodes|gpus-per-node)=(\d+)", text, flags=re.MULTILINE))
    warnings = check(compose(["experiment=pretrain_64k"]), int(asked["nodes"]) * int(asked["gpus-per-node"]))
    assert not warnings


def test_torchrun_knows_the_flags_that_the_batch_script_gives_it() -> None:
    from torch.distributed.run import get_args_parser

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert {"--signals-to-handle", "--shutdown-timeout", "--max-restarts", "--rdzv-id", "-m"} <= {
        option.replace("_", "-") for option in known
    }


def test_scale_test_prints_sbatch_lines() -> None:
    answer = bash(
        ROOT / "launch" / "scale_test.sh",
        "--sbatch",
        "--ranks",
        "1 2",
        "--out",
        "/s",
        "parallel.tp=2 train.seq_len=512",
    )
    assert answer.returncode == 0, answer.stderr
    first, second = answer.stdout.splitlines()
    assert first.startswith("sbatch --nodes=1 ") and second.startswith("sbatch --nodes=2 ")
    assert first.endswith(r"--out /s/tp=2\,seq_len=512.r1 train.steps=20 parallel.tp=2 train.seq_len=512")
