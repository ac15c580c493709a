"""Every two-rank grid against one rank: 20 fp32 steps, loss and each parameter's gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refractor_megatron.cli import main
from tests.corpus import write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.gloo, pytest.mark.timeout(900)]


def test_grids_equal_one_rank(tmp_path: Path) -> None:
    out = tmp_path / "parity.json"
    arguments = ["parity", "--corpus", str(write_corpus(tmp_path / "text")), "--data-root", str(tmp_path / "data")]
    # a third of the learning rate: Adam turns rounding of near-zero gradients into weights, in proportion to it
    arguments += ["train.optimizer.lr=1e-3", "train.schedule.cosine.min_lr=1e-4"]
    assert main([*arguments, "--grids", "dp2,tp2,pp2,ep2", "--steps", "20", "--out", str(out)]) == 0
    table = json.loads(out.read_text())["grids"]
    assert set(table) == {"dp2", "tp2", "pp2", "ep2"}
    for name, row in table.items():
        assert row["loss"] <= 1e-5 and row["gradient"] <= 1e-4 and row["norm"] <= 1e-4, (name, row)
        assert row["parameters"] == 20  # nano: every weight of two layers, embeddings and head


def test_a_wrong_gradient_is_found(tmp_path: Path) -> None:
    """The comparison itself: one parameter's gradient off by 1e-3 relative must be named."""
    import numpy as np

    from refractor_megatron.training.parity import compare

    good = {
        "loss": np.ones(3),
        "norm": np.ones(3),
        "routed": np.ones((3, 2, 4)),
        "a": np.ones((3, 4), np.float32),
        "b": np.ones((3, 2, 2), np.float32),
    }
    np.savez(tmp_path / "one.npz", **good)
    assert compare(tmp_path / "one.npz", tmp_path / "one.npz").holds
    bad = {**good, "b": good["b"].copy()}
    bad["b"][2, 0, 0] += 4e-3
    np.savez(tmp_path / "two.npz", **bad)
    difference = compare(tmp_path / "one.npz", tmp_path / "two.npz")
    assert not difference.holds and difference.parameter == "b" and difference.gradient == pytest.approx(2e-3, rel=1e-3)
