"""``tools/gpu_check.py``: rehearsed on the CPU as far as that goes; the real thing where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.corpus import ROOT, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "gpu_check.py"), "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_same_path_on_the_cpu(tmp_path: Path) -> None:
    text, out = write_corpus(tmp_path / "text"), tmp_path / "out.json"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = ["--preset", "nano", "--speed-preset", "nano", "--steps", "4", "--max-mb", "2", "--out", str(out)]
    done = check("--device", device, "--corpus", str(text), *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["holds"] and result["fp32_max_loss_difference"] <= 1e-4
    assert result["bf16"]["tokens_per_s"] > 0 and result["bf16"]["mfu"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = check("--steps", "1")
    assert done.returncode == 5 and done.stderr.startswith("error: no CUDA device")
