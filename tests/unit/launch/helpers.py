"""Stand-ins for programs that the launch scripts call, and a way to run the scripts beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.corpus import ROOT

#: A python that records what it is asked to run. Anything it does not know goes to the real interpreter.
PYTHON_STUB = """#!/usr/bin/env bash
log="${{STUB_LOG:?}}"
case "$1 $2" in
"-m venv") mkdir -p "${{*: -1}}/bin"; cp "$0" "${{*: -1}}/bin/python"; echo "venv" >>"$log" ;;
"-m pip") echo "pip ${{*:4}}" >>"$log"; exit "${{STUB_PIP_STATUS:-0}}" ;;
"-m refractor_megatron.cli")
    echo "refractor $(printf '%q ' "${{@:3}}")" >>"$log"
    if [[ " $* " == *" --prepare-only "* ]]; then printf 'train:\\n  steps: 10\\n' >"${{STUB_RUN:?}}/config.yaml"; fi
    exit "${{STUB_CLI_STATUS:-0}}" ;;
*) exec {python} "$@" ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    """Write an executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def python_stub(path: Path) -> Path:
    """Write the recording python."""
    return executable(path, PYTHON_STUB.format(python=sys.executable))


def copy_of_launchers(folder: Path) -> Path:
    """A bare copy of what the launchers need, so that a test may make environments in it."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "run.sh", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without the project's and SLURM's variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("REFRACTOR_", "SLURM_", "STUB_", "PIP_"))}
    return {**kept, **extra}


def bash(
    script: Path, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=clean_environment() if env is None else env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
