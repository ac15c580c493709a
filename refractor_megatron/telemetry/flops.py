"""Floating-point work of training and the peak it is measured against.

A multiply-add counts as 2 FLOP. Per token, one forward pass of a decoder does

* ``2 · N_active`` in matrix products, where N_active counts the weights that multiply this token: projections, the
  router, the ``topk`` chosen experts and the output head; not the embedding tables, which are look-ups;
* ``4 · heads · head_dim`` per visited (query, key) pair: 2 · head_dim for q·k and 2 · head_dim for the weighted sum of
  values, in each query head (sharing keys between heads, GQA, saves memory and not FLOP).

The backward pass does twice the forward's work (gradients of inputs and of weights; of both operands in attention), so

    train_flops_per_token = 6 · N_active + 12 · heads · head_dim · pairs

with ``pairs`` the visited pairs per token *summed over layers*. Pairs are those the kernels must visit under the mask,
hence MFU does not pay for keys that a window or a rule removes. Left out, at well below 1 % together: norms, softmax,
activations, rotary positions, pooling of summaries, the optimizer. This is the usual convention (PaLM, appendix B;
Megatron-LM) with L/2 replaced by the pairs visited. Recomputed forward passes are no *model* work: they count in HFU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


def forward_flops_per_token(active_params: int, pairs_per_token: float, n_heads: int, head_dim: int) -> float:
    """FLOP per token of one forward pass.

    ``active_params``: weights that multiply one token (no embedding tables; the output head counts, also when tied).
    ``pairs_per_token``: visited (query, key) pairs per token, summed over layers. ``n_heads``: query heads.
    """
    return 2.0 * active_params + 4.0 * n_heads * head_dim * pairs_per_token


def train_flops_per_token(active_params: int, pairs_per_token: float, n_heads: int, head_dim: int) -> float:
    """Forward and backward FLOP per token (the numerator of MFU); arguments as `forward_flops_per_token`."""
    return 3.0 * forward_flops_per_token(active_params, pairs_per_token, n_heads, head_dim)


def hardware_flops_per_token(train_flops: float, recomputed_forward_flops: float) -> float:
    """FLOP per token that the device really does (the numerator of HFU).

    ``recomputed_forward_flops`` is `forward_flops_per_token` of the part that runs forward twice: 0 without recompute,
    all layers but not the output head with full recompute. Recompute inside a fused attention backward is not counted.
    """
    return train_flops + recomputed_forward_flops


def window_pairs(seq_len: int, window: int) -> float:
    """Mean keys a query visits in a causal sliding window: itself and the ``window - 1`` positions before it.

    Equals mean(min(i + 1, window)) over i < seq_len; ``window >= seq_len`` gives full causal attention, (L + 1) / 2.
    """
    assert seq_len > 0 and window > 0
    w = min(window, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


def summary_pairs(seq_len: int, block: int, per_block: int) -> float:
    """Mean block summaries a query visits: ``per_block`` for each complete block that ended before the query.

    Equals per_block · mean(floor(i / block)) over i < seq_len.
    """
    assert seq_len > 0 and block > 0
    full, rest = divmod(seq_len, block)
    return per_block * (block * full * (full - 1) / 2 + rest * full) / seq_len


@dataclass(frozen=True)
class Peak:
    """FLOP/s that utilisation is measured against, and in words where the figure comes from."""

    flops: float
    name: str


#: Device-name part -> dense peak FLOP/s (vendor data sheets, no sparsity). The first match counts.
#: ``bf16`` is tensor cores; ``tf32`` is what float32 products use where TF32 is allowed; ``fp32`` is the plain units.
_GPU_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("H200", {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    ("H100 PCIe", {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12}),
    ("H100 NVL", {"bf16": 835e12, "tf32": 417e12, "fp32": 60e12}),
    ("H100", {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}),  # SXM reports "NVIDIA H100 80GB HBM3"
    ("A100", {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}),
)


def known_peak(device_name: str, precision: str) -> Peak | None:
    """Data-sheet peak of a GPU by its reported name; None for a device that is not in the table.

    ``precision``: ``bf16``, ``tf32`` (float32 with TF32 products allowed) or ``fp32``.
    """
    for part, peaks in _GPU_PEAKS:
        if part in device_name:
            return Peak(peaks[precision], f"{part} dense {precision} peak")
    return None


def measure_peak(product: Callable[[], object], flops: float, what: str, seconds: float = 1.0) -> Peak:
    """Peak of a device without a data-sheet figure: the fastest repetition of ``product`` within ``seconds``.

    ``product`` runs one large matrix product to its end (it synchronises an accelerator) and does ``flops`` FLOP: the
    caller brings it, so that this package needs no torch. ``what`` names it in the console line, for example
    ``fp32 GEMM, 2 threads``. The fastest repetition is the one that other processes disturbed least.
    """
    product()  # the first one pays for allocation and kernel selection
    deadline = time.perf_counter() + seconds
    best = float("inf")
    while best == float("inf") or time.perf_counter() < deadline:
        began = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - began)
    return Peak(flops / best, f"measured {what}")
