"""The shared environment: made once, reused after, never changed when it is somebody else's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .helpers import bash, clean_environment, copy_of_launchers, executable, python_stub


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return copy_of_launchers(tmp_path / "with space")


def environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    stub = python_stub(tmp_path / "bin" / "python-stub")
    return clean_environment(STUB_LOG=str(tmp_path / "log"), REFRACTOR_PYTHON=str(stub), **extra)


def log(tmp_path: Path) -> list[str]:
    path = tmp_path / "log"
    return path.read_text().splitlines() if path.exists() else []


def test_first_run_installs_torch_first_then_the_project(repository: Path, tmp_path: Path) -> None:
    answer = bash(repository / "launch/pretrain_local.sh", "--preset", "nano", cwd=tmp_path, env=environment(tmp_path))
    assert answer.returncode == 0, answer.stderr
    venv, torch, project, command = log(tmp_path)
    assert venv == "venv"
    assert torch.endswith("torch==2.13.0")
    assert project.endswith(f"torch==2.13.0 -e {repository}[dev]")
    assert command.split() == ["refractor", "pretrain", "--preset", "nano"]


def test_second_run_installs_nothing(repository: Path, tmp_path: Path) -> None:
    env = environment(tmp_path)
    bash(repository / "launch/pretrain_local.sh", env=env)
    before = log(tmp_path)
    answer = bash(repository / "launch/pretrain_local.sh", env=env)
    assert log(tmp_path)[len(before) :] == ["refractor pretrain --preset pilot "]
    assert "[setup]" not in answer.stderr


@pytest.mark.parametrize("change", ["pyproject", "torch", "extras"])
def test_a_change_of_what_is_wanted_installs_again(repository: Path, tmp_path: Path, change: str) -> None:
    env = environment(tmp_path)
    bash(repository / "launch/pretrain_local.sh", env=env)
    before = len(log(tmp_path))
    if change == "pyproject":
        with open(repository / "pyproject.toml", "a") as file:
            file.write("\n# changed\n")
    else:
        env[f"REFRACTOR_{change.upper()}"] = {"torch": "torch==2.12.0", "extras": "dev,gpu"}[change]
    bash(repository / "launch/pretrain_local.sh", env=env)
    assert [line.split()[0] for line in log(tmp_path)[before:]] == ["pip", "pip", "refractor"]


def test_failed_install_leaves_no_stamp_and_is_one_sentence(repository: Path, tmp_path: Path) -> None:
    answer = bash(repository / "launch/pretrain_local.sh", env=environment(tmp_path, STUB_PIP_STATUS="1"))
    assert answer.returncode == 5
    assert [line for line in answer.stderr.splitlines() if line.startswith("error: ")] == [
        answer.stderr.splitlines()[-1]
    ]
    assert "REFRACTOR_TORCH" in answer.stderr
    assert not (repository / ".venv" / ".refractor-stamp").exists()


def test_old_python_is_refused(repository: Path, tmp_path: Path) -> None:
    old = executable(tmp_path / "old-python", "#!/usr/bin/env bash\nexit 1\n")
    answer = bash(repository / "launch/pretrain_local.sh", env=clean_environment(REFRACTOR_PYTHON=str(old)))
    assert answer.returncode == 5
    assert "Python 3.11 or newer" in answer.stderr and answer.stderr.count("\n") == 1
    assert not (repository / ".venv").exists()


def test_python_on_the_path_that_is_too_old_is_named(repository: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        executable(tools / name, "#!/bin/bash\n[[ $1 == -V ]] && echo 'Python 3.9.2' && exit 0\nexit 1\n")
    answer = bash(repository / "launch/pretrain_local.sh", env=clean_environment(PATH=f"{tools}:/usr/bin:/bin"))
    assert answer.returncode == 5
    assert "python3 is Python 3.9.2" in answer.stderr and "REFRACTOR_PYTHON" in answer.stderr


def test_foreign_environment_is_used_as_it_is(repository: Path, tmp_path: Path) -> None:
    venv = tmp_path / "theirs"
    python_stub(venv / "bin" / "python")
    env = clean_environment(STUB_LOG=str(tmp_path / "log"), REFRACTOR_VENV=str(venv))
    answer = bash(repository / "launch/pretrain_local.sh", "--", "train.steps=3", env=env)
    assert answer.returncode == 0, answer.stderr
    assert log(tmp_path) == ["refractor pretrain --preset pilot -- train.steps=3 "]
    assert not (repository / ".venv").exists()


def test_foreign_environment_without_a_package_is_refused_by_name(repository: Path, tmp_path: Path) -> None:
    pyproject = repository / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"rich>=13.9"', '"no-such-package-here>=1"'))
    venv = tmp_path / "theirs"
    python_stub(venv / "bin" / "python")
    env = clean_environment(STUB_LOG=str(tmp_path / "log"), REFRACTOR_VENV=str(venv))
    answer = bash(repository / "launch/pretrain_local.sh", env=env)
    assert answer.returncode == 5 and "lacks no-such-package-here" in answer.stderr
    assert log(tmp_path) == []


def test_missing_foreign_environment_is_one_sentence(repository: Path) -> None:
    answer = bash(repository / "launch/pretrain_local.sh", env=clean_environment(REFRACTOR_VENV="/nonexistent"))
    assert answer.returncode == 5 and "does not exist" in answer.stderr and answer.stderr.count("\n") == 1


def test_paths_are_relative_to_where_the_user_stands(repository: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = environment(tmp_path)
    bash(repository / "launch/pretrain_local.sh", "--corpus", "my text", "--out", "/abs", cwd=elsewhere, env=env)
    assert log(tmp_path)[-1] == rf"refractor pretrain --preset pilot --corpus {elsewhere}/my\ text --out /abs "


def test_run_sh_passes_arguments_to_pytest(repository: Path, tmp_path: Path) -> None:
    env = clean_environment(REFRACTOR_VENV=str(Path(sys.executable).parents[1]))
    answer = bash(repository / "tests/run.sh", "--version", cwd=tmp_path, env=env)
    assert answer.returncode == 0 and answer.stdout.startswith("pytest ")
