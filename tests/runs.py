"""Arguments of a short run, and processes of this interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.corpus import ROOT


def pretrain(root: Path, out: Path, *more: str) -> list[str]:
    """``refractor pretrain`` of the nano preset on ``root/text`` that logs to files only; flags before overrides."""
    places = ["--corpus", str(root / "text"), "--data-root", str(root / "data"), "--out", str(out)]
    return ["pretrain", "--preset", "nano", *places, *more, "telemetry=jsonl"]


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """This interpreter with these arguments, run to its end whatever the exit code."""
    command = [sys.executable, "-W", "ignore", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)


def printed(*arguments: str, **environment: str) -> str:
    """Standard output of this interpreter with these arguments, which must succeed."""
    done = python(*arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def loaded_after(code: str) -> set[str]:
    """Names of the top-level packages that a fresh interpreter has imported after ``code``."""
    text = printed("-c", f"import sys\n{code}\nprint()\nprint(*{{name.partition('.')[0] for name in sys.modules}})")
    return set(text.splitlines()[-1].split())
