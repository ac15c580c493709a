"""Loss by position: buckets, intervals over documents, what is written and drawn, and mistakes in a sentence."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from refractor_megatron.errors import ConfigError
from refractor_megatron.evaluation.position import (
    bucket_edges,
    bucket_means,
    buckets_of,
    confidence,
    draw,
    summary,
    table,
)

IDENTITY = {"step": 7, "weights": "raw", "seq_len": 64, "config_hash": "c", "data_digest": "d", "parameters": 1}


def losses(documents: int = 40, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    rng = np.random.default_rng(seed)
    return 4 + rng.normal(0, 0.5, (documents, 1)) - 0.01 * np.arange(64) + rng.normal(0, 0.1, (documents, 64))


@pytest.mark.parametrize(
    ("seq_len", "edges"), [(2048, [128, 256, 512, 1024, 2048]), (64, [4, 8, 16, 32, 64]), (48, [3, 6, 12, 24, 48])]
)
def test_default_buckets_double_up_to_the_window(seq_len: int, edges: list[int]) -> None:
    assert bucket_edges(None, seq_len) == edges
    assert bucket_edges(None, 75) == [75] and bucket_edges([5, 60], 64) == [5, 60]


@pytest.mark.parametrize("asked", [[], [0, 5], [8, 8], [16, 8]])
def test_buckets_that_do_not_ascend_are_refused(asked: list[int]) -> None:
    with pytest.raises(ConfigError, match="ascending"):
        bucket_edges(asked, 64)


def test_buckets_beyond_the_window_are_refused() -> None:
    with pytest.raises(ConfigError, match="train.seq_len=64"):
        bucket_edges([32, 128], 64)


def test_means_of_documents_and_buckets() -> None:
    values = np.arange(24.0).reshape(2, 12)
    assert bucket_means(values, [2, 12]).tolist() == [[0.5, 6.5], [12.5, 18.5]]
    buckets = buckets_of(bucket_means(values, [2, 12]), [2, 12])
    assert [(b.first, b.last, b.loss, b.tokens) for b in buckets] == [(0, 2, 6.5, 4), (2, 12, 12.5, 20)]


def test_interval_is_that_of_the_mean_over_documents() -> None:
    by_document = bucket_means(losses(400), [64])
    low, high = confidence(by_document)
    error = by_document.std() / 20
    assert low[0] == pytest.approx(by_document.mean() - 1.96 * error, abs=0.2 * error)
    assert high[0] == pytest.approx(by_document.mean() + 1.96 * error, abs=0.2 * error)
    assert np.array_equal(confidence(by_document)[0], low), "no chance from call to call"


def test_pairing_takes_the_differences_between_documents_out() -> None:
    first = bucket_means(losses(), [64])
    other = first - 0.02 + np.random.default_rng(1).normal(0, 0.01, first.shape)
    low, high = confidence(other - first)
    assert -0.03 < low[0] < high[0] < -0.01
    assert confidence(first)[1][0] - confidence(first)[0][0] > 10 * (high[0] - low[0])


def test_what_is_written_printed_and_drawn(tmp_path: Path) -> None:
    edges = [16, 64]
    result = summary(IDENTITY, bucket_means(losses(), edges), edges, list(range(40)))
    assert result["documents"] == 40 and len(result["loss_by_document"]) == 40
    assert np.mean(result["loss_by_document"], axis=0) == pytest.approx(
        [b["loss"] for b in result["buckets"]], abs=1e-5
    )
    lines = table(result)
    assert len(lines) == 4 and "40 held-out documents of at least 65 tokens" in lines[0] and "16–63" in lines[3]
    draw(result, tmp_path / "position.png", "a title")
    assert matplotlib.image.imread(tmp_path / "position.png").shape[:2] == (660, 1080)
