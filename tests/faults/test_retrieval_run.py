"""A run with tier C from raw text to report: counted, resumed bit for bit, and refused with another index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from refractor_megatron.checkpoint import manifest as checkpoints
from refractor_megatron.cli import main
from refractor_megatron.telemetry.sinks.jsonl import read_jsonl
from refractor_megatron.training.spawn import spawn
from tests.corpus import write_corpus
from tests.runs import pretrain
from tests.warm import warm_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LOG = "metrics.jsonl"
RETRIEVAL = ["enabled=true", "chunk=16", "fan_in=2", "dim=128", "sigma_min=0.35"]


def arguments(root: Path, out: Path, flags: tuple[str, ...] = (), *more: str) -> list[str]:
    settings = ["train.steps=4", "train.schedule.warmup_steps=2", "checkpoint.every=2", "evaluation.every=2"]
    settings += ["evaluation.samples=1", *(f"relation.retrieval.{key}" for key in RETRIEVAL)]
    return pretrain(root, out, *flags, *settings, *more)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("retrieval")
    write_corpus(root / "text")
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    with warm_ranks():
        assert main(arguments(root, root / "run")) == 0
    return root / "run"


def test_counts_are_logged_and_reported(run: Path) -> None:
    chunks = 8 * (128 // 16 - 1)  # global batch, chunks that ask
    assert len(read_jsonl(run / LOG)) == 4
    for record in read_jsonl(run / LOG):
        assert len(record["retrieval_rejected"]) == 5 and 0 < record["retrieval_kept"] <= 2
        assert record["retrieval_rejected"][0] > 0  # a document's own records are always the most similar
    first = read_jsonl(run / "eval.jsonl", ("step", "weights"))[0]
    assert sum(first["retrieval_similarity"]) == 2 * chunks * 4 * 2  # 4 micro-batches of 4
    assert json.loads((run / "final.json").read_text())["retrieval"]["kept_per_chunk"] > 0
    digest = json.loads((run / "data.json").read_text())["retrieval"]["digest"]
    assert checkpoints.read(checkpoints.complete(run / "checkpoints")[-1]).retrieval_digest == digest


def test_resumed_run_is_bit_for_bit(run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(checkpoints.complete(again / "checkpoints")[-1])
    with warm_ranks():
        assert spawn("refractor_megatron.training.worker", [str(again)], 1) == 0
    columns = ("step", "loss", "grad_norm", "retrieval_rejected", "retrieval_kept")
    assert [[r[c] for c in columns] for r in read_jsonl(again / LOG)] == [
        [r[c] for c in columns] for r in read_jsonl(run / LOG)
    ]


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
    with warm_ranks():
        assert spawn("refractor_megatron.training.worker", [str(tmp_path / "two")], 2) == 0
    for column in ("retrieval_rejected", "retrieval_kept"):
        assert [r[column] for r in read_jsonl(tmp_path / "two" / LOG)] == [r[column] for r in read_jsonl(run / LOG)]
