"""``tools/gpu_check.py``: rehearsed on the CPU as far as that goes; the real thing where there is a GPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.corpus import ROOT, write_corpus
from tests.runs import python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(660)]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("tools/gpu_check.py", *arguments)


def test_training_the_same_path_on_the_cpu(tmp_path: Path) -> None:
    text, out = write_corpus(tmp_path / "text"), tmp_path / "out.json"
    arguments = ["--preset", "nano", "--speed-preset", "nano", "--steps", "4", "--max-mb", "2", "--out", str(out)]
    done = check("train", "--device", DEVICE, "--corpus", str(text), *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["holds"] and result["fp32_max_loss_difference"] <= 1e-4
    assert result["bf16"]["tokens_per_s"] > 0 and result["bf16"]["mfu"] > 0


@pytest.mark.parametrize("name", ["train", "attention"])
@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(name: str) -> None:
    done = check(name)
    assert done.returncode == 5 and done.stderr.startswith("error: no CUDA device")


def test_lengths_that_are_no_numbers_are_the_users_to_mend() -> None:
    done = check("attention", "--lengths", "4k,many", "--device", DEVICE)
    assert done.returncode == 2 and done.stderr == (
        "error: --lengths: 'many' is not a number of tokens; write for example 4k,16k or 512.\n"
    )


@pytest.mark.parametrize(
    ("slow", "lengths", "expected"),
    [
        ([131072], [4096, 65536, 131072], 65536),
        ([4096, 16384], [4096, 16384, 65536], 16384),
        ([131072], [131072], 131072),
        ([512], [256, 512], 512),
    ],
)
def test_a_length_to_diagnose_is_always_found(
    slow: list[int], lengths: list[int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from gpu_attention import diagnosed

    assert diagnosed(slow, lengths) == expected


def rehearse(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The attention check at sizes for a CPU; a GPU takes them too."""
    sizes = {"lengths": "256,512", "heads": 4, "kv-heads": 2, "head-dim": 16, "window": 64, "block": 32}
    sizes |= {"d-model": 64, "layer-length": 256, "repeats": 3}
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    done = check("attention", "--device", DEVICE, *flags, "--out", str(out), *arguments)
    return done, json.loads((out / "gpu_attention.json").read_text())


def test_attention_from_parity_to_diagnosis(tmp_path: Path) -> None:
    done, result = rehearse(tmp_path, "--diagnose", "--commit", "abc123")
    assert done.returncode == 0, done.stderr[-3000:]
    assert result["failed"] == [] and result["about"]["commit"] == "abc123"
    rows = result["parity"]["rows"]
    assert result["parity"]["holds"] and {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert any(row["rows_without_keys"] for row in rows) and any(row["tiles"]["full"] for row in rows)
    assert {row["tables"].split()[0] for row in rows} == {"intervals", "bits"}
    lengths = [(row["length"], row["retrieved"]) for row in result["benchmark"]]
    assert lengths == [(256, False), (512, False), (512, True)]
    for row in result["benchmark"]:
        against = row["forward_against_dense"]
        assert row["recompiled"] == 0 and 0 < row["legal_share"] < row["visited_share"]
        assert against["share_of_ideal"] == pytest.approx(against["speed_up"] * row["visited_share"])
        assert against["speed_up"] == pytest.approx(against["dense_ms"] / row["flex"]["forward_ms"])
        assert (row["flex"]["both_ms"] is not None) == ON_GPU
    assert result["layer"]["both_speed_up"] > 0
    diagnosis = result["diagnosis"]
    assert diagnosis["length"] == 512 and diagnosis["skipped"] == [] and len(diagnosis["rows"]) >= 12
    assert not any("refused" in row for row in diagnosis["rows"])
    text = (tmp_path / "gpu_attention.md").read_text()
    assert text in done.stdout and "commit: `abc123`" in text and "Failed" not in text
    for title in ("# Attention on a GPU", "## Attention", "## A whole layer", "## Parity", "## Diagnosis"):
        assert f"{title}\n" in text
    assert (tmp_path / "gpu_attention.png").stat().st_size > 10_000


def test_a_section_that_fails_leaves_the_others_and_fails_the_check(tmp_path: Path) -> None:
    done, result = rehearse(tmp_path, "--lengths=256", "--layer-length=0")
    assert done.returncode == 1 and result["failed"] == ["layer"], done.stderr[-3000:]
    assert result["parity"]["holds"] and len(result["benchmark"]) == 2
    assert "**Failed**: layer (ConfigError: " in (tmp_path / "gpu_attention.md").read_text()


def test_what_finds_no_time_left_is_named(tmp_path: Path) -> None:
    done, result = rehearse(tmp_path, "--budget=0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert result["failed"] == ["parity", "benchmark 256", "benchmark 512", "benchmark 512 retrieved", "layer"]
    assert result["layer"]["error"].endswith("s left, 1 s needed") and "**Failed**: parity (" in done.stdout
