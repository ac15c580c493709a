"""A run with tier C from raw text to report: counted, resumed bit for bit, and refused with another index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from refractor_megatron.checkpoint import manifest as checkpoints
from refractor_megatron.cli import main
from refractor_megatron.training.spawn import spawn
from tests.corpus import write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RETRIEVAL = ["enabled=true", "chunk=16", "fan_in=2", "dim=128", "sigma_min=0.35"]


def arguments(root: Path, out: Path, flags: tuple[str, ...] = (), *more: str) -> list[str]:
    found = ["pretrain", "--preset", "nano", "--corpus", str(root / "text"), "--data-root", str(root / "data")]
    found += ["--out", str(out), *flags, "train.steps=4", "train.schedule.warmup_steps=2", "checkpoint.every=2"]
    found += ["evaluation.every=2", "evaluation.samples=1", "telemetry.wandb=false", "telemetry.tensorboard=false"]
    return [*found, *(f"relation.retrieval.{key}" for key in RETRIEVAL), *more]


def log(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("retrieval")
    write_corpus(root / "text")
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    assert main(arguments(root, root / "run")) == 0
    return root / "run"


def test_counts_are_logged_and_reported(run: Path) -> None:
    chunks = 8 * (128 // 16 - 1)  # global batch, chunks that ask
    for record in log(run):
        assert len(record["retrieval_rejected"]) == 5 and 0 < record["retrieval_kept"] <= 2
        assert record["retrieval_rejected"][0] > 0  # a document's own records are always the most similar
    assert sum(log(run, "eval.jsonl")[0]["retrieval_similarity"]) == 2 * chunks * 4 * 2  # 4 micro-batches of 4
    assert json.loads((run / "final.json").read_text())["retrieval"]["kept_per_chunk"] > 0
    digest = json.loads((run / "data.json").read_text())["retrieval"]["digest"]
    assert checkpoints.read(checkpoints.complete(run / "checkpoints")[-1]).retrieval_digest == digest


def test_resumed_run_is_bit_for_bit(run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(checkpoints.complete(again / "checkpoints")[-1])
    assert spawn("refractor_megatron.training.worker", [str(again)], 1) == 0
    columns = ("step", "loss", "grad_norm", "retrieval_rejected", "retrieval_kept")
    assert [[r[c] for c in columns] for r in log(again)] == [[r[c] for c in columns] for r in log(run)]


def test_another_index_is_refused_on_resume(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    again = Path(shutil.copytree(run, tmp_path / "again"))
    newest = checkpoints.complete(again / "checkpoints")[-1] / "manifest.json"
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"retrieval_digest": "another"}))
    assert spawn("refractor_megatron.training.worker", [str(again)], 1) == 4
    assert "has retrieval_digest another, this run has" in capfd.readouterr().err


@pytest.mark.gloo
@pytest.mark.parametrize("tensor", [1, 2])
def test_counts_are_of_the_global_batch_on_any_grid(run: Path, root: Path, tmp_path: Path, tensor: int) -> None:
    flags = ("--ranks", "2", "--prepare-only")
    assert main(arguments(root, tmp_path / "two", flags, f"parallel.tp={tensor}")) == 0
    assert spawn("refractor_megatron.training.worker", [str(tmp_path / "two")], 2) == 0
    for column in ("retrieval_rejected", "retrieval_kept"):
        assert [r[column] for r in log(tmp_path / "two")] == [r[column] for r in log(run)]
