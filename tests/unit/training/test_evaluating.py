"""An evaluation logs what masks and attention did, takes its probe off again, and raises alerts in a sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.stream import Sample
from refractor_megatron.engines.base import StepResult
from refractor_megatron.telemetry.hub import Telemetry
from refractor_megatron.training.callbacks.evaluating import Evaluating, alerts
from refractor_megatron.training.loop import Step
from tests.engine import engine_of, tiny

LENGTH = 64


@dataclass
class TwoDocuments:
    """Stands for a held-out stream: every window holds the end of one document and the start of another."""

    seq_len: int = LENGTH
    bytes_per_token: float = 4.0

    def sample(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        records = np.zeros((LENGTH + 1, 4), dtype=np.int32)
        records[20 + index :, :2] = 1
        records[:, 2] = 5
        tokens = rng.integers(0, 1024, LENGTH + 1)
        return Sample(tokens.astype(np.int64), records, records[:, 0].copy())


def run(tmp_path: Path, rows: int) -> tuple[list[dict[str, Any]], list[str], Any]:
    engine = engine_of(tiny(f"train.seq_len={LENGTH}", "relation.local.window=8", "train.micro_batch=2"))
    telemetry = Telemetry(tmp_path, tensorboard=False, wandb=False, config={})
    stream: Any = TwoDocuments()
    evaluating = Evaluating(engine, None, stream, telemetry, every=2, batches=2, micro_batch=2, attention_rows=rows)
    said: list[str] = []
    result = StepResult(1.0, 1.0, True, None)
    for number in (1, 2):
        evaluating.after_step(
            Step(
                number=number, last=False, stopping=False, result=result, lr=1e-3, seconds=1.0, tokens=1, samples=1,
                skipped=0, epoch=0.0, retrieval=None, say=said.append,
            )
        )  # fmt: skip
    telemetry.close()
    records = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    return records, said, engine


def test_an_evaluation_logs_masks_and_attention(tmp_path: Path) -> None:
    (record,), said, engine = run(tmp_path, rows=16)
    assert record["step"] == 2 and said == [f"held-out {record['loss']:.4f} nats/token"]
    assert record["mask_entropy"] == 1 and record["invalid_edges"] == 0 and record["masked_rows"] == 0
    assert record["role_share"] == [0, 0, 0, 0, 0, 1]
    assert 0 < record["edges_used_share"] < 1 and record["edges_used_share"] <= record["visited_share"]
    assert len(record["attention_entropy_layer"]) == 2 and 0.9 < record["attention_entropy"] <= 1, "a fresh model"
    shares = record["attention_mass_summary"] + record["attention_mass_local"]
    assert shares == pytest.approx(1) and 0 < record["attention_mass_summary"] < 0.5
    assert "attention_mass_retrieved" not in record
    assert all(getattr(module, "probe", None) is None for module in engine.model.modules())


def test_without_rows_masks_are_logged_all_the_same(tmp_path: Path) -> None:
    (record,), _, _ = run(tmp_path, rows=0)
    assert record["invalid_edges"] == 0 and record["mask_entropy_median"] == 1
    assert not any(name.startswith("attention_") for name in record)


def test_alerts_name_the_way_out() -> None:
    healthy = {"invalid_edges": 0.0, "mask_entropy_median": 0.9, "attention_entropy_median": 0.5}
    assert alerts(dict(healthy)) == [] == alerts({})
    for name, value, way in (
        ("invalid_edges", 3.0, "3 illegal edges"),
        ("mask_entropy_median", 0.05, "safety.masks"),
        ("attention_entropy_median", 0.09, "reduce sparsity"),
    ):
        (sentence,) = alerts({**healthy, name: value})
        assert sentence.startswith("ALERT: ") and way in sentence
