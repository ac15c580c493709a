"""Formulas against a count of every multiply and add of a small decoder."""

from __future__ import annotations

import itertools

import pytest

from refractor_megatron.telemetry.flops import (
    forward_flops_per_token,
    hardware_flops_per_token,
    known_peak,
    measure_peak,
    summary_pairs,
    train_flops_per_token,
    window_pairs,
)  # fmt: skip

L, D, HEADS, KV, HEAD_DIM, FFN, VOCAB, LAYERS, WINDOW = 11, 6, 2, 1, 4, 10, 13, 3, 4


def _product(rows: int, inner: int, cols: int) -> int:
    """FLOP of one matrix product, counted one multiply-add at a time."""
    return sum(2 for _ in itertools.product(range(rows), range(inner), range(cols)))


def _forward() -> int:
    q, kv = HEADS * HEAD_DIM, KV * HEAD_DIM
    count = _product(L, D, VOCAB)
    for _ in range(LAYERS):
        count += _product(L, D, q + 2 * kv) + _product(L, q, D) + 2 * _product(L, D, FFN) + _product(L, FFN, D)
        for _head, query, key in itertools.product(range(HEADS), range(L), range(L)):
            if 0 <= query - key < WINDOW:
                count += _product(1, HEAD_DIM, 1) + _product(1, 1, HEAD_DIM)
    return count


def _backward() -> int:
    """For C = A·B two products of the same size: dA = dC·Bᵀ and dB = Aᵀ·dC."""
    return 2 * _forward()


def test_training_flops_equal_a_brute_force_count() -> None:
    q, kv = HEADS * HEAD_DIM, KV * HEAD_DIM
    active = LAYERS * (D * (q + 2 * kv) + q * D + 3 * D * FFN) + D * VOCAB
    pairs = LAYERS * window_pairs(L, WINDOW)
    assert forward_flops_per_token(active, pairs, HEADS, HEAD_DIM) * L == pytest.approx(_forward(), rel=1e-12)
    train = train_flops_per_token(active, pairs, HEADS, HEAD_DIM)
    assert train * L == pytest.approx(_forward() + _backward(), rel=1e-12)
    assert train == pytest.approx(6 * active + 12 * HEADS * HEAD_DIM * pairs)


def test_recompute_counts_for_the_hardware_only() -> None:
    train = train_flops_per_token(100, 5.0, 2, 4)
    layers = forward_flops_per_token(80, 5.0, 2, 4)
    assert hardware_flops_per_token(train, 0.0) == train
    assert hardware_flops_per_token(train, layers) == train + 2 * 80 + 4 * 2 * 4 * 5.0


@pytest.mark.parametrize(("seq_len", "window"), [(1, 1), (7, 3), (8, 8), (8, 100), (16, 1)])
def test_window_pairs(seq_len: int, window: int) -> None:
    counted = sum(1 for i in range(seq_len) for j in range(i + 1) if i - j < window)
    assert window_pairs(seq_len, window) == pytest.approx(counted / seq_len)


@pytest.mark.parametrize(("seq_len", "block", "per_block"), [(1, 4, 2), (8, 4, 1), (19, 4, 2), (16, 16, 3), (5, 1, 1)])
def test_summary_pairs(seq_len: int, block: int, per_block: int) -> None:
    complete = [b for b in range(seq_len) if (b + 1) * block <= seq_len]
    counted = sum(per_block for i in range(seq_len) for b in complete if (b + 1) * block - 1 < i)
    assert summary_pairs(seq_len, block, per_block) == pytest.approx(counted / seq_len)


@pytest.mark.parametrize(
    ("device", "precision", "flops"),
    [("NVIDIA H100 80GB HBM3", "bf16", 989e12), ("NVIDIA H100 PCIe", "bf16", 756e12), ("NVIDIA H200", "bf16", 989e12),
     ("NVIDIA A100-SXM4-80GB", "bf16", 312e12), ("NVIDIA A100-PCIE-40GB", "fp32", 19.5e12)],
)  # fmt: skip
def test_known_gpus(device: str, precision: str, flops: float) -> None:
    peak = known_peak(device, precision)
    assert peak is not None and peak.flops == flops and precision in peak.name


def test_unknown_gpu_has_no_data_sheet_figure() -> None:
    assert known_peak("Some Accelerator 9000", "bf16") is None


def test_measured_peak_is_the_fastest_repetition_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([5.0, 0.5, 0.25, 2.0, 9.0])
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def product() -> None:
        clock[0] += next(durations)

    peak = measure_peak(product, 1e9, "fp32 GEMM, 2 threads", seconds=2.5)
    assert peak.flops == 1e9 / 0.25 and peak.name == "measured fp32 GEMM, 2 threads"
