"""Attention statistics are the same on every grid: each (layer, sample, head, row) is counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from refractor_megatron.cli import main
from refractor_megatron.telemetry.sinks.jsonl import read_jsonl
from refractor_megatron.training.spawn import spawn
from tests.corpus import write_corpus
from tests.runs import pretrain
from tests.warm import warm_ranks

pytestmark = [pytest.mark.slow, pytest.mark.gloo, pytest.mark.timeout(600)]

#: grid -> overrides
GRIDS = {
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
    "cp2": ["parallel.cp=2"],
}


def evaluation(root: Path, name: str, *overrides: str) -> dict[str, Any]:
    """The first evaluation of a run of two steps."""
    ranks, run = 2 if overrides else 1, root / name
    settings = ["train.steps=2", "train.schedule.warmup_steps=1", "evaluation.every=2", "evaluation.samples=0"]
    settings += ["evaluation.batches=1", "train.micro_batch=2", "relation.local.window=16"]
    assert main(pretrain(root, run, "--prepare-only", "--ranks", str(ranks), *settings, *overrides)) == 0
    with warm_ranks():
        assert spawn("refractor_megatron.training.worker", [str(run)], ranks) == 0, name
    return read_jsonl(run / "eval.jsonl", ("step", "weights"))[0]


def test_every_grid_measures_what_one_rank_measures(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    one = evaluation(tmp_path, "one")
    assert one["invalid_edges"] == 0 and 0 < one["attention_mass_summary"] < 1
    keys = [key for key in one if key.startswith(("attention_", "mask_", "role_", "edges_", "masked_", "invalid_"))]
    assert len(keys) >= 18
    for name, overrides in GRIDS.items():
        other = evaluation(tmp_path, name, *overrides)
        for key in keys:
            tolerance = 0.011 if key == "attention_entropy_median" else 1e-5
            assert other[key] == pytest.approx(one[key], abs=tolerance), (name, key)
